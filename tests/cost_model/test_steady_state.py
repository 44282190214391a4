"""The step time without simulation: equal to it everywhere, its cost independent of m, wrong steps noticed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from meshwright.cost_model import steady_state as module
from meshwright.cost_model.pipeline import StageCosts, simulate
from meshwright.cost_model.schedules import Schedule
from meshwright.cost_model.steady_state import stage_ends_ns, steady_state_time_ns

from .pipelines import even, instances


@settings(max_examples=400)
@given(instances())
def test_equals_simulation(instance: tuple[Schedule, list[StageCosts]]) -> None:
    line = simulate(*instance)
    assert stage_ends_ns(*instance) == line.stage_end_ns
    assert steady_state_time_ns(*instance) == line.makespan_ns


def steps_walked(schedule: Schedule, costs: list[StageCosts], monkeypatch: pytest.MonkeyPatch) -> int:
    walked: list[int] = []
    step = module._Walk.step
    with monkeypatch.context() as patch:
        patch.setattr(module._Walk, "step", lambda self, t: (walked.append(t), step(self, t))[1])
        steady_state_time_ns(schedule, costs)
    return len(walked)


@pytest.mark.parametrize(("name", "v"), [("1f1b", 1), ("zb-h1", 1), ("interleaved", 4)])
def test_steps_do_not_grow_with_micro_batches(name: Any, v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (Schedule(name, 8, m, v) for m in (512, 1 << 20))
    costs = even(few, 400, 500, 300)
    costs[3] = StageCosts((120,) * v, (130,) * v, (90,) * v, 17, 19)
    assert steps_walked(few, costs, monkeypatch) == steps_walked(many, costs, monkeypatch) <= 12 * 8 * v


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_near_ties_are_exact(name: Any) -> None:
    """Stages that differ by 1 ns in a millisecond: what one gains on the other adds up over many micro-batches."""
    schedule = Schedule(name, 3, 300)
    costs = [StageCosts((10**6 + s,), (10**6,), (10**6 - s // 2,), 5000, 7000) for s in range(3)]
    assert steady_state_time_ns(schedule, costs) == simulate(schedule, costs).makespan_ns


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "interleaved"])
@pytest.mark.parametrize("starts", ["forward_start", "backward_start"])
def test_a_wrong_step_is_caught(name: Any, starts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seeded fault: the last stage runs one operation a step late."""
    schedule = Schedule(name, 3, 6, 2 if name == "interleaved" else 1)
    costs = [StageCosts((3 + s,) * schedule.chunks, (2 + s,) * schedule.chunks, (2,) * schedule.chunks, 1, 2)
             for s in range(3)]
    build = module._Walk.__init__

    def late(self: module._Walk, *args: Any) -> None:
        build(self, *args)
        getattr(self, starts)[-1] += 1

    assert stage_ends_ns(schedule, costs) == simulate(schedule, costs).stage_end_ns
    monkeypatch.setattr(module._Walk, "__init__", late)
    assert stage_ends_ns(schedule, costs) != simulate(schedule, costs).stage_end_ns


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_costs_must_fit(name: Any) -> None:
    with pytest.raises(ValueError, match="expected costs of 2 stages, got 0"):
        steady_state_time_ns(Schedule(name, 2, 2), [])
