"""Properties of whole plans, on a model small enough for the exact search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import meshwright as mw
from meshwright.compiler.planner.captured import ModelAtAnyBatch
from meshwright.compiler.planner.group_search import GroupSearch
from meshwright.compiler.planner.plan_model import Planner, Request
from meshwright.compiler.planner.search import Found
from meshwright.cost_model.layer_price import FIXED_CONTEXT_BYTES

CLUSTER, SEQ, BATCH = "2x2 h100-sxm", 512, 4
MIB = 2**20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelAtAnyBatch:
    """Two layers whose weights and activations are some MiB."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2000, "max_position_embeddings": 4096}))
    return ModelAtAnyBatch(str(Path(folder)), SEQ)


def best(model: ModelAtAnyBatch, capacity_bytes: float, speed: tuple[float, float], delay: float) -> float:
    """Step time of the best plan, infinite where none fits. `speed` and `delay` scale the links."""
    planner = Planner(Request(model.spec, CLUSTER, SEQ, BATCH), model)
    usual = mw.Cluster.parse(CLUSTER)
    planner.cluster = replace(
        usual, device=replace(usual.device, memory_bytes=FIXED_CONTEXT_BYTES + capacity_bytes),
        levels=tuple(replace(v, bandwidth_bytes_per_s=v.bandwidth_bytes_per_s * s, latency_s=v.latency_s * delay)
                     for v, s in zip(usual.levels, speed, strict=True)))
    searched = GroupSearch(planner.pricer, within=0.0, most_work=1 << 40).run()
    return searched.result.evaluation.step_ns if isinstance(searched.result, Found) else float("inf")


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(capacity=st.integers(12, 40), more=st.integers(1, 20), inner=st.floats(0.02, 1), outer=st.floats(0.02, 1),
       faster=st.floats(1, 20), which=st.integers(0, 1), delay=st.floats(0.1, 1))
def test_more_memory_or_a_faster_link_is_never_slower(
        small: ModelAtAnyBatch, capacity: int, more: int, inner: float, outer: float, faster: float, which: int,
        delay: float) -> None:
    speed = (inner, min(outer, inner))  # outer levels are never faster than inner ones
    base = best(small, capacity * MIB, speed, 1.0)
    assert best(small, (capacity + more) * MIB, speed, 1.0) <= base
    raised = (inner * faster, speed[1]) if which == 0 else (inner, min(inner, speed[1] * faster))
    assert best(small, capacity * MIB, raised, 1.0) <= base
    assert best(small, capacity * MIB, speed, delay) <= base


def test_the_range_holds_what_fits_and_what_does_not(small: ModelAtAnyBatch) -> None:
    times = [best(small, capacity * MIB, (1.0, 1.0), 1.0) for capacity in (5, 14, 18, 1000)]
    assert times[0] == float("inf") and times == sorted(times, reverse=True) and times[1] > times[2] > times[3]
