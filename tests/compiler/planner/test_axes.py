"""Every axis wins where it should and loses where it should, for the reason given."""

from __future__ import annotations

import json
from pathlib import Path

from .planning import NODE, answer, bubble_share, exposed_share, plan

LLAMA = "llama3-8b"


def test_tensor_parallel_wins_when_samples_run_out_and_the_sequence_may_not_be_cut() -> None:
    """Two samples on eight GPUs: data parallelism alone can't use six of them."""
    found = plan(LLAMA, NODE, 32768, 2, pp=1, cp=1)
    assert found.layers[1].options.tp == 4 and found.layers[1].options.dp == 2
    assert answer(LLAMA, NODE, 32768, 2, pp=1, cp=2, tp=2).plan is not None


def test_tensor_parallel_loses_when_there_are_samples_for_all() -> None:
    """Its communication is exposed in every layer of every micro-batch."""
    free, pinned = plan(LLAMA, NODE, 8192, 64, pp=1), plan(LLAMA, NODE, 8192, 64, pp=1, tp=8)
    assert free.layers[1].options.tp == 1
    assert pinned.predicted.step_time_ns > 1.3 * free.predicted.step_time_ns
    assert exposed_share(pinned) > 5 * exposed_share(free)


def test_context_parallel_wins_on_long_sequences_with_few_samples() -> None:
    """Keys and values hide behind attention, whose share grows with the sequence; tp's traffic hides behind nothing."""
    free, without = plan(LLAMA, NODE, 32768, 2, pp=1), plan(LLAMA, NODE, 32768, 2, pp=1, cp=1)
    assert free.layers[1].options.cp > 1
    assert without.predicted.step_time_ns > 1.05 * free.predicted.step_time_ns
    assert exposed_share(without) > exposed_share(free)


def test_context_parallel_loses_when_there_are_samples_for_all() -> None:
    """The same work with more communication: it is not even searched, and the refusal says so."""
    found = answer(LLAMA, NODE, 8192, 64, pp=1)
    pinned = plan(LLAMA, NODE, 8192, 64, pp=1, cp=2)
    assert found.plan is not None and found.plan.layers[1].options.cp == 1
    assert pinned.predicted.step_time_ns >= found.plan.predicted.step_time_ns
    assert any(left.axis == "cp" and "samples enough" in left.reason for left in found.planner.space.left)


def test_zero_wins_where_states_do_not_fit() -> None:
    """18 bytes for each of 8e9 parameters are more than a GPU has."""
    assert answer(LLAMA, NODE, 8192, 64, pp=1, tp=1, zero=0).plan is None
    found = plan(LLAMA, NODE, 8192, 64, pp=1, tp=1)
    assert max(r.options.zero for r in found.layers) >= 1
    assert found.predicted.stages[0].memory_bytes["optimizer"] < 2 * 8.03e9


def test_sharding_parameters_loses_where_they_fit() -> None:
    """ZeRO-3 gathers them twice in every micro-batch, and its buffers make smaller micro-batches or recomputation."""
    free, third = plan(LLAMA, NODE, 8192, 64, pp=1, tp=1), plan(LLAMA, NODE, 8192, 64, pp=1, tp=1, zero=3)
    assert all(r.options.zero < 3 for r in free.layers)
    assert third.predicted.step_time_ns > 1.01 * free.predicted.step_time_ns


def test_pipeline_wins_between_gpus_with_slow_links() -> None:
    """Consumer GPUs on a network: stages exchange activations only, replicas all gradients or parameters."""
    free, without = plan(LLAMA, "8x1 rtx-4090", 2048, 64), plan(LLAMA, "8x1 rtx-4090", 2048, 64, pp=1)
    assert free.mesh.pp == 8
    assert without.predicted.step_time_ns > 1.5 * free.predicted.step_time_ns


def test_pipeline_loses_where_its_bubble_is_large_and_links_are_fast() -> None:
    """Eight samples: at most eight micro-batches for the stages, but replicas for each of them."""
    free, pinned = plan(LLAMA, NODE, 8192, 8), plan(LLAMA, NODE, 8192, 8, pp=4, schedule="1f1b")
    assert free.mesh.pp == 1
    assert pinned.predicted.step_time_ns > 1.2 * free.predicted.step_time_ns
    assert bubble_share(pinned) > 0.1


def test_interleaving_wins_with_few_micro_batches() -> None:
    """Its bubble is that of 1F1B divided by the chunks."""
    plain = plan(LLAMA, NODE, 8192, 8, pp=4, schedule="1f1b")
    chunked = plan(LLAMA, NODE, 8192, 8, pp=4, schedule="interleaved")
    assert plain.predicted.step_time_ns > 1.1 * chunked.predicted.step_time_ns
    assert bubble_share(chunked) < bubble_share(plain)


def test_interleaving_loses_where_memory_is_short_and_micro_batches_are_many() -> None:
    """Its stages hold more activations: the sequence has to be cut or recomputed for a bubble that is small anyway."""
    plain = plan(LLAMA, "1x8 a100-40", 8192, 256, pp=4, schedule="1f1b")
    chunked = plan(LLAMA, "1x8 a100-40", 8192, 256, pp=4, schedule="interleaved")
    assert chunked.predicted.step_time_ns > plain.predicted.step_time_ns
    assert bubble_share(plain) < 0.05


def test_expert_parallel_wins_where_experts_are_many_bytes() -> None:
    """Without it, all experts' weights are gathered and their gradients reduced in every micro-batch."""
    free = plan("mixtral-8x7b", "2x8 h100-sxm", 4096, 64, pp=1, tp=1, cp=1)
    without = plan("mixtral-8x7b", "2x8 h100-sxm", 4096, 64, pp=1, tp=1, cp=1, ep=1)
    assert max(r.options.ep for r in free.layers) > 1
    assert without.predicted.step_time_ns > 1.05 * free.predicted.step_time_ns
    assert max(r.options.zero for r in without.layers) == 3


def test_expert_parallel_loses_over_a_network_where_experts_are_small(tmp_path: Path) -> None:
    """One GPU per node: rows would cross the network in every layer and micro-batch, weights do once a step."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "mixtral", "num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 2048,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 8192}))
    small = str(tmp_path)
    free = plan(small, "8x1 a100-80", 4096, 64, pp=1, tp=1, cp=1)
    spread = plan(small, "8x1 a100-80", 4096, 64, pp=1, tp=1, cp=1, ep=8)
    assert max(r.options.ep for r in free.layers) == 1
    assert spread.predicted.step_time_ns > 1.1 * free.predicted.step_time_ns
    assert exposed_share(spread) > exposed_share(free)


def test_recomputation_wins_where_memory_is_short() -> None:
    """40 GB: without it, the sequence has to be cut instead."""
    free = plan(LLAMA, "1x8 a100-40", 8192, 64, pp=1, tp=1)
    without = plan(LLAMA, "1x8 a100-40", 8192, 64, pp=1, tp=1, recompute="none")
    assert any(r.options.recompute != "none" for r in free.layers)
    assert without.predicted.step_time_ns > 1.02 * free.predicted.step_time_ns


def test_recomputation_loses_where_memory_is_enough() -> None:
    """It runs the forward pass again: about a quarter more work. 141 GB hold all of a sample's activations."""
    free = plan(LLAMA, "1x8 h200", 8192, 64, pp=1, tp=1, micro_batch=1)
    full = plan(LLAMA, "1x8 h200", 8192, 64, pp=1, tp=1, micro_batch=1, recompute="full")
    assert all(r.options.recompute == "none" for r in free.layers if r.kind == "LlamaDecoderLayer")
    assert 1.1 < full.predicted.step_time_ns / free.predicted.step_time_ns < 1.5
