"""Experts are priced by tokens × top-k × imbalance, and say so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from meshwright.compiler.planner import experts
from meshwright.compiler.planner.capture_model import describe
from meshwright.compiler.planner.meta_model import MetaModel, _config, _from_config
from meshwright.cost_model.model import LayerKind, ModelDescription
from meshwright.runtime.errors import UnsupportedError

transformers = pytest.importorskip("transformers")
SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 128}
MIXTRAL = {"model_type": "mixtral", **SMALL, "num_local_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK = {"model_type": "deepseek_v3", **SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 32,
            "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
            "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
SWITCH = {"model_type": "switch_transformers", "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
          "num_sparse_decoder_layers": 1, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 4,
          "vocab_size": 128}
TOKENS = 2 * 32


def described(data: dict[str, Any], imbalance: float = 1.0, seq: int = 32, dtype: torch.dtype = torch.bfloat16,
              **options: Any) -> ModelDescription:
    built = _from_config("model", _config(data, "model"), seq, 2, dtype)
    notes = experts.price_experts(built.model, imbalance)
    built = MetaModel("model", built.model.train(), (), built.kwargs, tuple(notes))
    return describe(built, seq=seq, micro_batch=2, imbalance=imbalance, **options)


def with_experts(model: ModelDescription) -> list[LayerKind]:
    return [k for k in model.kinds if k.experts is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_of_mixtral(dtype: torch.dtype) -> None:
    [layer] = with_experts(described(MIXTRAL, dtype=dtype))
    assert (layer.experts, layer.top_k, layer.expert_ffn, layer.ffn) == (8, 2, 96, None)
    assert layer.expert_parameters == 8 * 3 * 64 * 96
    assert layer.expert_flops_forward == TOKENS * 2 * 3 * 2 * 64 * 96  # tokens × top-k × three products
    assert layer.expert_flops_backward == 2 * layer.expert_flops_forward


def test_imbalance_multiplies_the_experts_and_nothing_else() -> None:
    [even], [uneven] = with_experts(described(MIXTRAL)), with_experts(described(MIXTRAL, 1.5))
    assert uneven.expert_flops_forward == 1.5 * even.expert_flops_forward
    assert uneven.expert_flops_backward == 1.5 * even.expert_flops_backward
    assert uneven.flops_forward - uneven.expert_flops_forward == even.flops_forward - even.expert_flops_forward
    assert uneven.saved["none"].bytes > even.saved["none"].bytes
    assert (uneven.top_k, uneven.expert_parameters) == (even.top_k, even.expert_parameters)


def test_weights_of_all_experts_are_read() -> None:
    [layer] = with_experts(described(MIXTRAL))
    grouped = [r for r in layer.forward if r.op == "grouped_mm"]
    weights = sum(r.bytes_read for r in grouped)
    assert len(grouped) == 2 and weights > layer.expert_parameters * 2  # two bytes each, and the rows


def test_dense_and_expert_layers_of_one_model() -> None:
    model = described(DEEPSEEK, verify_folding=True)
    assert model.order == (0, 1, 2, 2, 3)
    dense, sparse = model.kinds[1], model.kinds[2]
    assert (dense.experts, dense.ffn, dense.heads) == (None, 96, 4)
    assert (sparse.experts, sparse.top_k, sparse.expert_ffn, sparse.ffn) == (8, 4, 32, 32)  # the shared expert is dense


def test_a_container_of_experts() -> None:
    layers = with_experts(described(SWITCH))
    assert len(layers) == 2
    for layer in layers:
        assert (layer.experts, layer.top_k, layer.expert_ffn) == (4, 1, 48)
        assert layer.expert_flops_forward == TOKENS * 2 * 2 * 32 * 48
        assert layer.expert_parameters == 4 * 2 * 32 * 48


def test_one_expert_and_its_number_describe_what_all_experts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    short = described(SWITCH)
    monkeypatch.setattr(experts, "CONTAINERS", {})
    whole = described(SWITCH)
    for a, b in zip(short.kinds, whole.kinds, strict=True):
        assert dataclasses.replace(a, capture_s=0.0) == dataclasses.replace(b, capture_s=0.0)
    real = transformers.SwitchTransformersForConditionalGeneration(_config(SWITCH, "model"))
    assert whole.parameter_count == sum(p.numel() for p in real.parameters())


def test_the_transformers_class_is_as_it_was() -> None:
    described(SWITCH)
    real = transformers.SwitchTransformersForConditionalGeneration(_config(SWITCH, "model"))
    assert len(real.encoder.block[1].layer[-1].mlp.experts) == 4


def test_experts_of_another_build_are_refused_by_name() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    class Bag(nn.ModuleList):
        def forward(self, tokens: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return tokens

    model = nn.Sequential(nn.Linear(4, 4), Bag([Scaled(), Scaled()]))
    with pytest.raises(UnsupportedError, match=r"the experts 1 \(Bag\) can't be captured without data"):
        experts.price_experts(model, 1.0)
