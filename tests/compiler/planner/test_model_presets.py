"""Published models have their published sizes, in total, per token and piece by piece."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from meshwright.compiler.planner import model_presets
from meshwright.compiler.planner.meta_model import build
from meshwright.compiler.planner.model_presets import MODEL_PRESETS

pytest.importorskip("transformers")

# 10^9 parameters as published, and half a unit of the last digit given; sources in model_presets.py
TOTAL = {
    "llama3-8b": (8.030261248, 1e-10), "llama3-70b": (70.553706496, 1e-10), "llama3-405b": (405.8533888, 1e-10),
    "gpt3-175b": (175, 0.5), "mixtral-8x7b": (46.7, 0.05), "mixtral-8x22b": (141, 0.5), "qwen3-235b-a22b": (235, 0.5),
    "deepseek-v3": (671, 0.5), "bert-large": (0.34, 0.005), "t5-11b": (11, 0.5), "switch-c": (1571, 0.5),
    "vit-22b": (21.743, 0.01),  # the published total leaves out biases, norms, patches and positions: 0.0082
}
ACTIVE = {  # what one token uses
    "mixtral-8x7b": (12.9, 0.05), "mixtral-8x22b": (39, 0.5), "qwen3-235b-a22b": (22, 0.5),
    "deepseek-v3": (37, 0.6),  # 37.55 here; the weights' README says 36.7, the paper 37
}
# What presets leave to transformers' defaults and what follows from several numbers, as the sources have it.
CONFIGURATION: dict[str, dict[str, Any]] = {
    "llama3-8b": {"hidden_act": "silu", "head_dim": 128, "tie_word_embeddings": False, "attention_bias": False},
    "gpt3-175b": {"activation_function": "gelu_new", "n_inner": None, "tie_word_embeddings": True, "resid_pdrop": 0.1},
    "mixtral-8x7b": {"hidden_act": "silu", "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False},
    "mixtral-8x22b": {"hidden_act": "silu", "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False},
    "qwen3-235b-a22b": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                        "attention_bias": False, "sliding_window": None},
    "deepseek-v3": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
                    "qk_head_dim": 192, "tie_word_embeddings": False},
    "bert-large": {"hidden_act": "gelu", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
                   "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "t5-11b": {"dense_act_fn": "relu", "is_gated_act": False, "num_decoder_layers": 24, "dropout_rate": 0.1,
               "tie_word_embeddings": True, "relative_attention_num_buckets": 32},
    "vit-22b": {"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "switch-c": {"dense_act_fn": "relu", "encoder_sparse_step": 1, "decoder_sparse_step": 1, "router_bias": False},
}


built = cache(lambda name: build(name, seq=128, micro_batch=1))


def parameters(name: str) -> dict[str, int]:
    """Elements of each parameter of a preset, tied ones once."""
    return {key: p.numel() for key, p in built(name).model.named_parameters()}


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    published, half_a_unit = TOTAL[name]
    assert abs(sum(parameters(name).values()) / 1e9 - published) <= half_a_unit
    assert MODEL_PRESETS[name].parameters == published
    assert all(p.is_meta for p in built(name).model.parameters())
    assert f"[{MODEL_PRESETS[name].source}]" in str(model_presets.__doc__)


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_a_token_uses_as_many_as_published(name: str) -> None:
    preset = MODEL_PRESETS[name]
    assert preset.active == ACTIVE.get(name, (0.0, 0.0))[0]
    if preset.active:
        experts = sum(n for key, n in parameters(name).items() if ".experts." in key)
        of = preset.changes.get("n_routed_experts") or preset.changes.get("num_experts") or 8
        idle = experts * (1 - preset.changes["num_experts_per_tok"] / of)
        assert abs((sum(parameters(name).values()) - idle) / 1e9 - preset.active) <= ACTIVE[name][1]


def test_the_matrices_of_the_blocks_of_vit_22b_are_the_published_total() -> None:
    matrices = [n for key, n in parameters("vit-22b").items() if ".layers." in key and n >= 6144 * 6144]
    assert len(matrices) == 48 * 6
    assert round(sum(matrices) / 1e6) == 21743


@pytest.mark.parametrize(("name", "multiplier", "multiple_of"), [
    ("llama3-8b", 1.3, 1024), ("llama3-70b", 1.3, 4096), ("llama3-405b", 1.2, 4096)])
def test_llama_feed_forward_widths_follow_the_rule_of_its_code(name: str, multiplier: float, multiple_of: int) -> None:
    """The numbers are torchtitan's, torchtitan/models/llama3/__init__.py."""
    changes = MODEL_PRESETS[name].changes
    width = int(multiplier * (8 * changes["hidden_size"] // 3))
    assert changes["intermediate_size"] == -(-width // multiple_of) * multiple_of


@pytest.mark.parametrize("name", CONFIGURATION)
def test_defaults_are_those_of_the_sources(name: str) -> None:
    config = built(name).model.config
    assert {key: getattr(config, key) for key in CONFIGURATION[name]} == CONFIGURATION[name]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-8x22b", "qwen3-235b-a22b"])
def test_rope_base(name: str) -> None:
    assert built(name).model.config.rope_parameters["rope_theta"] == 1e6


def test_switch_c_has_the_heads_of_its_released_weights() -> None:
    sizes = parameters("switch-c")
    queries = [n for key, n in sizes.items() if re.search(r"(SelfAttention|EncDecAttention)\.q\.weight", key)]
    assert queries == [2080 * 30 * 64] * 45
    experts = [n for key, n in sizes.items() if key.endswith(("wi.weight", "wo.weight"))]
    assert experts == [2048 * 2080 * 6144] * 60
    assert "30 heads" in built("switch-c").notes[0]
