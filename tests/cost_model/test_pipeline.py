"""The time line: by hand, tight, monotone, with the bubbles of the papers; a dropped dependency is noticed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost_model import pipeline as module
from meshwright.cost_model.pipeline import StageCosts, Timeline, simulate
from meshwright.cost_model.schedules import Op, Schedule, awaited, orders
from meshwright.cost_model.steady_state import steady_state_time_ns

from .pipelines import NAMES, even, instances

Instance = tuple[Schedule, list[StageCosts]]
UNEVEN = [StageCosts((2,), (3,), (1,), send_forward_ns=5, sync_ns=10, optimizer_ns=4),
          StageCosts((1,), (2,), (2,), send_backward_ns=7, optimizer_ns=1)]


def test_by_hand() -> None:
    """Stage 0: F0 0-2, F1 2-4; stage 1: F0 7-8, B0 8-12, F1 12-13, B1 13-17; back after 7: B0 19-23, B1 24-28."""
    line = simulate(Schedule("1f1b", 2, 2), UNEVEN)
    assert [(e.start_ns, e.end_ns) for e in line.events[0]] == [(0, 2), (2, 4), (19, 23), (24, 28)]
    assert [(e.start_ns, e.end_ns) for e in line.events[1]] == [(7, 8), (8, 12), (12, 13), (13, 17)]
    assert line.stage_end_ns == (42, 18) and line.makespan_ns == 42
    assert line.bubble_ns == (42 - 2 * 6 - 14, 42 - 2 * 5 - 1)


def earliest_starts(line: Timeline) -> list[list[int]]:
    """What the definition gives for every operation, from the other ends on the time line."""
    ends = {(stage, e.op): e.end_ns for stage, events in enumerate(line.events) for e in events}
    result = []
    for stage, events in enumerate(line.events):
        own = [0, *(e.end_ns for e in events[:-1])]
        result.append([])
        for before, event in zip(own, events, strict=True):
            needed = awaited(line.schedule, stage, event.op)
            sender = line.costs[needed[0]] if needed else None
            send = 0 if sender is None else sender.send_forward_ns if event.op.kind == "F" else sender.send_backward_ns
            result[-1].append(max(before, ends[needed] + send if needed else 0))
    return result


@given(instances())
def test_every_start_is_as_early_as_its_inputs(instance: Instance) -> None:
    line = simulate(*instance)
    assert [[e.start_ns for e in events] for events in line.events] == earliest_starts(line)
    assert tuple(tuple(e.op for e in events) for events in line.events) == orders(line.schedule)
    assert min(line.bubble_ns) >= 0


@given(instances(), st.data())
def test_raising_a_cost_never_shortens_the_step(instance: Instance, data: st.DataObject) -> None:
    schedule, costs = instance
    stage = data.draw(st.integers(0, schedule.stages - 1))
    name = data.draw(st.sampled_from(list(StageCosts.__dataclass_fields__)))
    value, more = getattr(costs[stage], name), data.draw(st.integers(1, 20))
    raised: Any
    if isinstance(value, tuple):
        chunk = data.draw(st.integers(0, schedule.chunks - 1))
        raised = tuple(x + more * (i == chunk) for i, x in enumerate(value))
    else:
        raised = value + more
    slower = [replace(c, **{name: raised}) if s == stage else c for s, c in enumerate(costs)]
    before, after = simulate(schedule, costs), simulate(schedule, slower)
    assert after.makespan_ns >= before.makespan_ns
    assert all(a >= b for a, b in zip(after.stage_end_ns, before.stage_end_ns, strict=True))


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_bubbles_of_even_stages(p: int, rounds: int) -> None:
    """(p-1)/(m+p-1) of the step for 1F1B and GPipe; divided by v if interleaved; a third of it for zero-bubble H1."""
    m, f, b, w, v = p * rounds, 12, 12, 12, 4
    for name in ("gpipe", "1f1b"):
        line = simulate(Schedule(name, p, m), even(Schedule(name, p, m), f, b, w))
        assert line.bubble_ns == ((p - 1) * (f + b + w),) * p
        assert line.bubble_ns[0] * (m + p - 1) == (p - 1) * line.makespan_ns
    schedule = Schedule("interleaved", p, m, v)
    assert simulate(schedule, even(schedule, f, b, w)).bubble_ns == ((p - 1) * (f + b + w) // v,) * p
    schedule = Schedule("zb-h1", p, m)
    assert simulate(schedule, even(schedule, f, b, w)).bubble_ns == ((p - 1) * (f + b + w) // 3,) * p


def test_the_slowest_stage_sets_the_pace() -> None:
    schedule = Schedule("1f1b", 4, 64)
    costs = even(schedule, 10, 10, 10)
    costs[2] = StageCosts((20,), (10,), (10,))
    at_64 = simulate(schedule, costs).makespan_ns
    assert simulate(replace(schedule, micro_batches=65), costs).makespan_ns - at_64 == 40


def test_uneven_stages_of_1f1b_lie_between_closed_forms() -> None:
    """The slowest stage works for every micro-batch; the sum over stages once more, (m - 1) · max + Σ, is what a step
    takes where it is the last one, and nearly the most: zigzags between F and B of neighbours add up to 2 %."""
    draw = random.Random(1)
    for _ in range(500):
        schedule = Schedule("1f1b", draw.randint(2, 8), draw.randint(1, 20))
        costs = [StageCosts(*((draw.randint(1, 100),) for _ in range(3))) for _ in range(schedule.stages)]
        total = [sum(c.forward_ns + c.input_gradient_ns + c.weight_gradient_ns) for c in costs]
        m, slowest = schedule.micro_batches, max(total)
        step_ns = simulate(schedule, costs).makespan_ns
        assert m * slowest <= step_ns <= 1.02 * ((m - 1) * slowest + sum(total))
        if total[-1] == slowest and schedule.stages == 2:
            assert step_ns == (m - 1) * slowest + sum(total)


def test_chrome_trace() -> None:
    line = simulate(Schedule("1f1b", 2, 2), UNEVEN)
    trace = json.loads(json.dumps(line.chrome_trace()))
    spans = [r for r in trace if r["ph"] == "X" and r["tid"] == 0]
    assert [(r["name"], r["ts"], r["dur"]) for r in spans] == [
        ("F0", 0.0, 0.002), ("F1", 0.002, 0.002), ("B0", 0.019, 0.004), ("B1", 0.024, 0.004),
        ("sync", 0.028, 0.01), ("optimizer", 0.038, 0.004)]
    assert [r["args"]["name"] for r in trace if r["ph"] == "M"] == ["stage 0", "stage 1"]


def test_bad_input_is_refused() -> None:
    schedule = Schedule("1f1b", 2, 2)
    with pytest.raises(ValueError, match="expected costs of 2 stages, got 1"):
        simulate(schedule, UNEVEN[:1])
    with pytest.raises(ValueError, match=r"expected costs of 1 chunk\(s\) on stage 1, got 2"):
        simulate(schedule, [UNEVEN[0], StageCosts((1, 1), (1, 1), (1, 1))])
    with pytest.raises(ValueError, match="stage 0: B of micro-batch 1, chunk 0 is missing"):
        simulate(schedule, UNEVEN, [orders(schedule)[0][:-1], orders(schedule)[1]])
    for bad in ({"forward_ns": (-1,)}, {"forward_ns": (1.5,)}, {"sync_ns": float("nan")}, {"optimizer_ns": True}):
        with pytest.raises(ValueError, match="expected integer nanoseconds of at least 0"):
            replace(UNEVEN[0], **bad)
    with pytest.raises(ValueError, match="one number per chunk"):
        StageCosts((1,), (1, 2), (1,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["F", "B"])
def test_a_dropped_dependency_is_caught(name: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seeded fault: one stage no longer waits for its neighbour. Simulation and steady state then disagree."""
    schedule = Schedule(name, 3, 6, 2 if name == "interleaved" else 1)
    costs = even(schedule, 20, 20, 20)
    costs = [replace(c, send_forward_ns=9, send_backward_ns=9) for c in costs]
    assert simulate(schedule, costs).makespan_ns == steady_state_time_ns(schedule, costs)

    def forgetful(schedule: Schedule, stage: int, op: Op) -> tuple[int, Op] | None:
        return None if (stage, op.kind) == (1, kind) else awaited(schedule, stage, op)

    monkeypatch.setattr(module, "awaited", forgetful)
    assert simulate(schedule, costs).makespan_ns < steady_state_time_ns(schedule, costs)
