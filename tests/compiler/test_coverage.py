"""On the benchmark models, at least 90 % of the bytes outside GEMM, convolution and attention move in emitted kernels.

The models are the benchmarks' own with fewer layers: layers are equal, so the share hardly depends on their number.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from meshwright.compiler.backend import compile_graph
from meshwright.compiler.report import Report
from meshwright.compiler.settings import resolve

IDS = torch.randint(0, 5000, (2, 128), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
MODELS = {
    "bert": lambda: (BertModel(BertConfig(num_hidden_layers=1)), IDS),
    "gpt2": lambda: (GPT2LMHeadModel(GPT2Config(n_layer=1, use_cache=False)), IDS),
    "llama": lambda: (LlamaForCausalLM(LlamaConfig(
        hidden_size=512, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1376,
        vocab_size=8000, use_cache=False)), IDS),
    "vit": lambda: (ViTModel(ViTConfig(num_hidden_layers=1)), IMAGES),
    "resnet": lambda: (ResNetModel(ResNetConfig()), IMAGES),
}


def first(output) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def report_of(model: nn.Module, x: torch.Tensor, train: bool) -> Report:
    torch.compiler.reset()
    report = Report()
    settings = resolve({"measure": False})  # coverage is about what is emitted, not about this machine's timings
    fast = torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, settings, report))
    if train:
        out = first(fast(x))
        (out * torch.randn_like(out)).sum().backward()
    else:
        with torch.no_grad():
            fast(x)
    return report


EVERY_RUN = (("bert", True), ("llama", True), ("resnet", False))  # the other seven run in `make sweep`
CASES = [pytest.param(name, train, id=f"{name}-{'training' if train else 'inference'}",
                      marks=() if (name, train) in EVERY_RUN else pytest.mark.sweep)
         for name in MODELS for train in (False, True)]


@pytest.mark.parametrize(("name", "train"), CASES)
def test_ninety_percent(name: str, train: bool) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    report = report_of(model.eval(), x, train)
    moved = {g.kind: (g.kernel_bytes, g.aten_bytes, g.uncovered) for g in report.graphs}
    for kind, (kernels, aten, uncovered) in moved.items():
        share = kernels / (kernels + aten)
        worst = sorted(uncovered.items(), key=lambda item: -item[1])[:4]
        assert share >= 0.9, f"{kind}: {share:.1%}; not in kernels: {worst}"
    assert set(moved) == ({"forward", "backward"} if train else {"inference"})
