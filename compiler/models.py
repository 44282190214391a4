"""MODEL arguments of the command line: a preset, a Hugging Face config, or `module:callable`.

Presets and configs give models with random weights: no hub access is needed or made.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.errors import InvalidInputError, UnknownNameError

_LLAMA_TINY = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8,
               "num_key_value_heads": 8, "vocab_size": 32000}
_MINILM = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}

# name -> (model type of transformers, what differs from its default configuration)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("bert", {}),
    "bert-tiny": ("bert", {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512,
                           "num_attention_heads": 2}),
    "gpt2": ("gpt2", {}),
    "llama-tiny": ("llama", _LLAMA_TINY),
    "minilm": ("bert", _MINILM),
    "resnet-50": ("resnet", {}),
    "vit-base": ("vit", {}),
}


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and example inputs for it."""

    name: str
    model: nn.Module
    example: dict[str, Any] | tuple[Any, ...]


def load_model(spec: str, *, batch: int = 1, seq: int = 128) -> Loaded:
    """Build the model that `spec` names, with example inputs of `batch` sequences of `seq` tokens (or images).

    Raises `UnknownNameError` for an unknown preset, `InvalidInputError` for anything that can't be built.
    """
    torch.manual_seed(0)
    if spec in PRESETS:
        kind, changes = PRESETS[spec]
        return _from_config(spec, _config_class(kind)(**changes), batch, seq)
    path = Path(spec)
    folder = os.path.isdir(spec)  # False, unlike is_dir, where the name itself is impossible
    if folder or path.suffix == ".json":
        return _from_file(path / "config.json" if folder else path, batch, seq)
    if ":" in spec:
        return _from_callable(spec)
    raise UnknownNameError("model", spec, [*PRESETS, "path/to/config.json", "module:callable"])


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InvalidInputError("Hugging Face models need transformers", do="pip install transformers") from None


def _config_class(kind: str) -> Callable[..., Any]:
    return lambda **changes: _transformers().AutoConfig.for_model(kind, **changes)


def _from_file(path: Path, batch: int, seq: int) -> Loaded:
    if not path.is_file():
        raise InvalidInputError(f"{path} does not exist", expected="a Hugging Face config.json or its directory")
    try:
        config = _transformers().AutoConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInputError(f"{path} is no configuration that transformers knows ({first})") from None
    return _from_config(config_name(path), config, batch, seq)


def config_name(path: Path) -> str:
    """What a model of a configuration file is called: the file, or its directory where the file has the usual name."""
    return path.resolve().parent.name or path.stem if path.name == "config.json" else path.stem


def _from_config(name: str, config: Any, batch: int, seq: int) -> Loaded:
    transformers = _transformers()
    wanted = ("AutoModelForCausalLM", "AutoModel") if _decoder(config) else ("AutoModel",)
    kinds = [k for k in wanted if type(config) in getattr(transformers, k)._model_mapping.keys()]
    if not kinds:
        raise InvalidInputError(f"transformers has no model for {type(config).__name__}")
    if hasattr(config, "use_cache"):
        config.use_cache = False
    model = getattr(transformers, kinds[0]).from_config(config).eval()
    return Loaded(name, model, _example(config, model, batch, seq))


def _decoder(config: Any) -> bool:
    return any("CausalLM" in a or "LMHead" in a for a in getattr(config, "architectures", None) or []) or (
        config.model_type in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "mixtral", "opt"))


def _example(config: Any, model: nn.Module, batch: int, seq: int) -> dict[str, Any]:
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", 224)
        side = size if isinstance(size, int) else size[0]
        return {"pixel_values": torch.randn(batch, getattr(config, "num_channels", 3), side, side)}
    longest = getattr(config, "max_position_embeddings", seq) or seq
    ids = torch.randint(0, config.vocab_size, (batch, min(seq, longest)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _from_callable(spec: str) -> Loaded:
    """`module:callable` gives an `nn.Module`, or a pair of one and its example inputs."""
    module_name, _, attribute = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module_name), attribute)()
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(f"{spec!r}: {error}", expected="module:callable that can be imported") from None
    finally:
        sys.path.pop(0)
    model, example = made if isinstance(made, tuple) else (made, getattr(made, "example_inputs", None))
    if not isinstance(model, nn.Module) or example is None:
        raise InvalidInputError(f"{spec} gave a {type(made).__name__}",
                                expected="a pair (nn.Module, example_inputs)")
    if isinstance(example, torch.Tensor):
        example = (example,)
    return Loaded(spec, model.eval(), example)
