"""MODEL arguments of the planner: a model without weights, in training mode, and inputs for it, all on the meta device.

The names are those of `compiler/models.py` plus the published models of `model_presets.py`. No hub access is made, and
no code that a configuration names is run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...runtime import torch_compat
from ...runtime.errors import InvalidInputError, UnknownNameError
from ...runtime.plan_data import too_deep
from ..models import PRESETS, config_name
from .experts import one_expert_each, price_experts
from .model_presets import MODEL_PRESETS

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForPreTraining", "AutoModelForMaskedLM",
                "AutoModelForImageClassification", "AutoModel")
SIZES = ("_size", "_layers", "_heads", "_dim", "_experts", "_rank")
MOST_MODULES = 20_000  # layers or experts
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class MetaModel:
    """`model(*args, **kwargs)` is a training step's forward pass; nothing has data. `notes`: what was assumed."""

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: tuple[str, ...] = ()


def build(spec: str, *, seq: int, micro_batch: int, dtype: str = "bfloat16", imbalance: float = 1.0) -> MetaModel:
    """The model that `spec` names, for `micro_batch` sequences of `seq` tokens, with weights of `dtype` (a model from
    `module:callable` keeps its own). `imbalance`: rows of the busiest expert over the mean, 1 or more.

    Raises `UnknownNameError` for an unknown preset, `InvalidInputError` for anything that can't be built.
    """
    if seq < 1 or micro_batch < 1 or not 1 <= imbalance < float("inf"):
        raise InvalidInputError(f"seq {seq}, micro-batch {micro_batch}, imbalance {imbalance}", expected="1 or more")
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    path = Path(spec)
    if spec in MODEL_PRESETS or spec in PRESETS:
        built = _preset(spec, seq, micro_batch, DTYPES[dtype])
    elif os.path.isdir(spec) or path.suffix == ".json":
        file = path / "config.json" if os.path.isdir(spec) else path
        built = _from_config(config_name(file), _config_file(file), seq, micro_batch, DTYPES[dtype])
    elif ":" in spec:
        built = _from_callable(spec, seq, micro_batch)
    else:
        raise UnknownNameError("model", spec, [*MODEL_PRESETS, *PRESETS, "path/to/config.json", "module:callable"])
    experts = price_experts(built.model, imbalance)
    notes = tuple(f"{name}: priced as tokens × top-k × {imbalance:g} rows through grouped products, whatever the "
                  "router chooses; no token dropped" for name in experts)
    built.model.train()
    return MetaModel(built.name, built.model, built.args, built.kwargs, (*built.notes, *notes))


def _preset(name: str, seq: int, micro_batch: int, dtype: torch.dtype) -> MetaModel:
    preset = MODEL_PRESETS.get(name)
    kind, changes = PRESETS[name] if preset is None else (preset.model_type, preset.changes)
    notes = (preset.note,) if preset is not None and preset.note else ()
    return _from_config(name, _config({"model_type": kind, **changes}, name), seq, micro_batch, dtype, notes)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InvalidInputError("Hugging Face models need transformers", do="pip install meshwright[hf]") from None


def _config_file(path: Path) -> Any:
    try:
        data = json.loads(path.read_text())
        if too_deep(data):  # whatever the recursion limit is
            raise RecursionError
    except OSError as error:
        raise InvalidInputError(f"{path}: {error.strerror or error}",
                                expected="a Hugging Face config.json or its directory") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidInputError(f"{path} is no JSON that can be read ({reason})") from None
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise InvalidInputError(f"{path} names no model_type", expected="a Hugging Face config.json")
    negative = [k for k, v in data.items() if isinstance(v, (int, float)) and v < 0
                and (k.endswith(SIZES) or k.startswith(("n_", "d_", "num_")))]
    if negative:
        raise InvalidInputError(f"{path}: {negative[0]} is {data[negative[0]]}", expected="a positive size")
    counts = {k: v for k, v in data.items() if isinstance(v, int) and ("layers" in k or "experts" in k)}
    large = [k for k, v in counts.items() if v > MOST_MODULES]
    if large:  # building as many modules as a slip of the pen asks for would never end
        raise InvalidInputError(f"{path}: {large[0]} is {str(data[large[0]])[:40]}", expected=f"at most {MOST_MODULES}")
    return _config({k: v for k, v in data.items() if k != "auto_map"}, str(path))


def _config(data: Mapping[str, Any], name: str) -> Any:
    transformers = _transformers()
    kinds = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if data["model_type"] not in kinds:
        raise UnknownNameError("model_type of transformers", data["model_type"], kinds)
    try:
        return transformers.AutoConfig.for_model(**data)
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise InvalidInputError(f"{name} is no configuration that transformers accepts ({reason})") from None


def _from_config(name: str, config: Any, seq: int, micro_batch: int, dtype: torch.dtype,
                 notes: tuple[str, ...] = ()) -> MetaModel:
    auto = _auto_class(config)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # any token will do
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and seq > longest:
        if getattr(config, "rope_parameters", None) is None:
            raise InvalidInputError(f"seq {seq} for {name}", expected=f"at most {longest}, its max_position_embeddings")
        notes = (*notes, f"seq {seq} is longer than the configuration's max_position_embeddings {longest}")
    try:
        with torch.device("meta"), one_expert_each(config.model_type):
            model = auto.from_config(config, dtype=dtype)
    except Exception as error:
        raise InvalidInputError(f"{name}: transformers can't build this configuration ({_first_line(error)})") from None
    kwargs = _inputs(config, model, seq, micro_batch, dtype)
    if "pixel_values" in kwargs:
        notes = (*notes, "an image model: the number of tokens follows from the image, not from seq")
    return MetaModel(name, model, (), kwargs, notes)


def _auto_class(config: Any) -> Any:
    """The auto class whose model the configuration names in `architectures`, else the first that has one."""
    transformers, named = _transformers(), getattr(config, "architectures", None) or []
    classes = AUTO_CLASSES[1:] if _encoder(transformers, config) else AUTO_CLASSES
    fitting = [auto for auto in (getattr(transformers, name) for name in classes)
               if type(config) in auto._model_mapping.keys()]
    if not fitting:
        raise InvalidInputError(f"transformers has no model for {type(config).__name__}")
    for auto in fitting:
        found = auto._model_mapping[type(config)]
        if any(c.__name__ in named for c in (found if isinstance(found, tuple) else (found,))):
            return auto
    return fitting[0]


def _encoder(transformers: Any, config: Any) -> bool:
    """BERT and its like have a causal class too, for use inside an encoder-decoder."""
    masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping.keys()
    return masked and not getattr(config, "is_decoder", False) and hasattr(config, "is_decoder")


def _inputs(config: Any, model: nn.Module, seq: int, micro_batch: int, dtype: torch.dtype) -> dict[str, Any]:
    accepted = inspect.signature(model.forward).parameters
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        kwargs = {"pixel_values": torch.empty(micro_batch, channels, *sides, device="meta", dtype=dtype)}
        labels = torch.empty(micro_batch, device="meta", dtype=torch.long)
    else:
        ids = torch.empty(micro_batch, seq, device="meta", dtype=torch.long)
        kwargs, labels = {"input_ids": ids}, torch.empty_like(ids)
    if "labels" in accepted:
        kwargs["labels"] = labels
    if "next_sentence_label" in accepted:
        kwargs["next_sentence_label"] = torch.empty(micro_batch, device="meta", dtype=torch.long)
    return kwargs


def _from_callable(spec: str, seq: int, micro_batch: int) -> MetaModel:
    """`module:callable` gives an `nn.Module` with its example inputs, as for `explain`; where the callable takes `seq`
    and `micro_batch`, it is called with them. It runs under the meta device."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise InvalidInputError(f"the model {spec!r}", expected="module:callable")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), attribute)
        with torch.device("meta"):
            made = function(**_wanted(function, {"seq": seq, "micro_batch": micro_batch}))
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(f"{spec!r}: {error}", expected="module:callable that can be imported") from None
    except Exception as error:
        raise InvalidInputError(f"{spec!r} fails on the meta device ({_first_line(error)})",
                                expected="a callable that needs no data to build its model") from None
    finally:
        sys.path.pop(0)
    model, example = made if isinstance(made, tuple) else (made, getattr(made, "example_inputs", None))
    if not isinstance(model, nn.Module) or example is None:
        raise InvalidInputError(f"{spec} gave a {type(made).__name__}", expected="a pair (nn.Module, example_inputs)")
    if isinstance(example, Mapping):
        return on_meta(spec, model, (), example)
    return on_meta(spec, model, (example,) if isinstance(example, torch.Tensor) else tuple(example), {})


def on_meta(name: str, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> MetaModel:
    """`model` and its inputs without their data. `Module.to` would untie its weights. Changes `model`."""
    made: dict[int, torch.Tensor] = {}

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        bare = tensor.detach().to("meta")
        kept = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
        return made.setdefault(id(tensor), kept)

    for sub in model.modules():
        for table in (sub._parameters, sub._buffers):
            table.update({n: empty(t) for n, t in table.items() if t is not None and not t.is_meta})  # type: ignore[misc]
    inputs = torch_compat.tree_map(
        lambda v: v.detach().to("meta").requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v,
        (tuple(args), dict(kwargs)))
    return MetaModel(name, model, *inputs)


def _wanted(function: Callable[..., Any], offered: Mapping[str, int]) -> dict[str, int]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {k: v for k, v in offered.items() if k in parameters}


def _first_line(error: BaseException) -> str:
    lines = [ln.strip() for ln in str(error).splitlines() if ln.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
