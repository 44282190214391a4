"""Galvatron's cost formulas agree with its own code, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.cost_model import galvatron as cost
from meshwright.cost_model.galvatron import Plan, Setting, Strategy
from meshwright.cost_model.galvatron_profile import Profile, read_profile

DATA = Path(__file__).parent / "data" / "galvatron"
GOLDEN = json.loads((DATA / "golden_costs.json").read_text())
PROFILE = read_profile(DATA, 8)
TOLERANCE = 1e-6


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=TOLERANCE, abs=1e-12)


def rows(kind: str) -> Any:
    return pytest.mark.parametrize("row", GOLDEN[kind], ids=[row["id"] for row in GOLDEN[kind]])


def strategy(row: dict[str, Any]) -> Strategy:
    return Strategy(row["tp"], row["sp"], row["dp"], row["dp_type"], row.get("checkpoint", False), row["cp"])


def setting(row: dict[str, Any], pp: int, layers: int) -> Setting:
    mode = row["mode"]
    return Setting(pp, layers, row["global_batch"], row["chunks"], mode["time_mode"], mode["async_grad_reduce"],
                   mode["pipeline_type"])


def golden_plan(row: dict[str, Any]) -> Plan:
    layers = [strategy(group) for group in row["layer_groups"] for _ in range(group["count"])]
    mode = row["mode"]
    degree = None if mode["search_tp_sp_mode"] == "sp_only" else mode["global_buffer_tp_size"]
    return Plan(setting(row, row["pp"], row["layers"]), tuple(row["pp_division"]), tuple(layers),
                strategy(row["embedding"]), degree)


def test_there_are_as_many_rows_as_promised() -> None:
    assert [len(GOLDEN[k]) for k in ("plans", "single_layers", "single_embeddings")] == [42, 15, 10]


@rows("plans")
def test_plan(row: dict[str, Any]) -> None:
    plan, expected = golden_plan(row["plan"]), row["expected"]
    found = cost.price(PROFILE, plan)
    assert found.time_s == close(expected["time_s"])
    assert found.samples_per_s == close(row["plan"]["global_batch"] / expected["time_s"])
    assert [ms / 1000 for ms in found.synced_ms] == close(expected["stage_layer_sync_sum_s"])
    assert list(found.memory_mb) == close(expected["memory_total_MB_per_stage"])
    assert list(found.states_mb) == close(expected["layer_states_MB_per_stage"])
    assert list(found.activation_mb) == close(expected["layer_activation_MB_per_stage"])
    assert list(found.used_mb) == expected["search_used_MB_per_stage"]
    assert cost.buffer_mb(PROFILE, plan.setting, plan.buffer_degree) == expected["tp_buffer_MB"]
    fits = {gb: max(found.used_mb) <= cost.usable_mb(float(gb)) for gb in expected["feasible_at_budget_GB"]}
    assert fits == expected["feasible_at_budget_GB"]


@rows("plans")
def test_embedding_of_a_plan(row: dict[str, Any]) -> None:
    plan, expected = golden_plan(row["plan"]), row["expected"]
    for synced, key in ((False, "embedding_time_nosync_s"), (True, "embedding_time_sync_s")):
        found = cost.embedding_time_ms(PROFILE, plan.setting, plan.embedding, synced=synced)
        assert [ms / 1000 for ms in found] == close(expected[key])
    states, activation = zip(*cost.embedding_memory_mb(PROFILE, plan.setting, plan.embedding), strict=True)
    assert list(states) == close(expected["embedding_states_MB_per_stage"])
    assert list(activation) == close(expected["embedding_activation_MB_per_stage"])


@rows("single_layers")
def test_layer(row: dict[str, Any]) -> None:
    one, expected = strategy(row["layer"]), row["expected"]
    own = setting(row, row["layer"]["pp"], row["layers_in_model"])
    found = cost.layer_time(PROFILE, own, one)
    assert own.local_batch(one) == expected["local_batch"]
    assert one.shards == expected["sdp_degree"]
    assert found.forward_ms == close(expected["forward_ms"])
    assert found.backward_ms == close(expected["backward_ms"])
    assert found.reduce_ms == close(expected["dp_comm_ms_unoverlapped"])
    assert found.gather_ms == close(expected["zero3_allgather_ms"])
    assert found.parallel_ms == close(expected["tp_or_ulysses_comm_ms"])
    assert found.p2p_ms == close(expected["p2p_ms_total_before_dividing_by_layers"])
    assert found.synced_ms / 1000 == close(expected["time_with_grad_sync_s"])
    assert found.plain_ms / 1000 == close(expected["time_without_grad_sync_s"])
    states, activation = cost.layer_memory_mb(PROFILE, own, one)
    assert states == close(expected["model_states_MB"])
    assert [activation * own.in_flight(i) for i in range(own.pp)] == close(expected["activation_MB_by_stage"])


@rows("single_embeddings")
def test_embedding(row: dict[str, Any]) -> None:
    one, expected = strategy(row["embedding"]), row["expected"]
    own = setting(row, row["embedding"]["pp"], 32)
    for synced, key in ((False, "time_without_grad_sync_s"), (True, "time_with_grad_sync_s")):
        assert [ms / 1000 for ms in cost.embedding_time_ms(PROFILE, own, one, synced=synced)] == close(expected[key])
    states, activation = zip(*cost.embedding_memory_mb(PROFILE, own, one), strict=True)
    assert list(states) == close(expected["model_states_MB"])
    assert list(activation) == close(expected["activation_MB"])


def test_a_fifth_is_set_aside_above_20_gb() -> None:
    assert cost.usable_mb(20) == 20480 > cost.usable_mb(21) == 21504 - 4300


@pytest.mark.parametrize("part", ["layer", "other"])
def test_a_heavier_layer_never_makes_a_step_faster(part: str) -> None:
    def time_ms(stage: int, ms: float) -> float:
        plain, synced = [30.0, 20.0, 20.0, 25.0], [33.0, 20.0, 20.0, 25.0]
        plain[stage] += ms
        synced[stage] += ms if part == "layer" else 0.0
        return cost.pipeline_time_ms(plain, synced, 8)

    assert all(time_ms(stage, 1.0) >= time_ms(stage, 0.0) for stage in range(4))


def test_profile_is_reused_for_other_hidden_sizes() -> None:
    other: Profile = read_profile(DATA, 8, hidden=8192)
    assert (PROFILE.hidden, PROFILE.hidden_mb_per_sample, other.hidden_mb_per_sample) == (4096, 16.0, 32.0)
