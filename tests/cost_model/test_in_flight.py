"""Counts of held activations: closed forms equal to counting, peaks equal to the time line's, faults caught."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost_model import in_flight as module
from meshwright.cost_model.in_flight import closed_in_flight, in_flight, peak_activation_bytes
from meshwright.cost_model.pipeline import StageCosts, simulate
from meshwright.cost_model.schedules import Schedule

from .pipelines import instances, schedules


def counting_agrees(schedule: Schedule) -> bool:
    return all(closed_in_flight(schedule, stage, chunk, until) == in_flight(schedule, stage, chunk, until)
               for stage in range(schedule.stages) for chunk in (None, *range(schedule.chunks)) for until in ("B", "W"))


@given(schedules())
def test_closed_forms_equal_counting(schedule: Schedule) -> None:
    assert counting_agrees(schedule)


@pytest.mark.parametrize("p", [1, 2, 4, 7])
@pytest.mark.parametrize("m", [1, 3, 4, 20])
def test_formulas_of_the_papers(p: int, m: int) -> None:
    for s in range(p):
        assert in_flight(Schedule("gpipe", p, m), s) == m
        assert in_flight(Schedule("1f1b", p, m), s) == min(m, p - s)
        assert in_flight(Schedule("zb-h1", p, m), s, until="B") == min(m, p - s)
        assert in_flight(Schedule("zb-h1", p, m), s, until="W") == min(m, p)
        assert in_flight(Schedule("interleaved", p, m * p, 3), s) == min(m * p * 3, (p - s - 1) * 2 + (3 - 1) * p + 1)


@given(instances(), st.data())
def test_peak_is_that_of_the_time_line(instance: tuple[Schedule, list[StageCosts]], data: st.DataObject) -> None:
    schedule, costs = instance
    sizes = st.lists(st.integers(0, 5), min_size=schedule.chunks, max_size=schedule.chunks)
    until_b, until_w = data.draw(sizes), data.draw(sizes)
    line = simulate(schedule, costs)
    for stage in range(schedule.stages):
        curve = line.activation_curve(stage, until_b, until_w)
        assert curve[-1][1] == 0 and [t for t, _ in curve] == sorted(t for t, _ in curve)
        assert peak_activation_bytes(schedule, stage, until_b, until_w) == max(held for _, held in curve)


def test_zero_bubble_holds_no_more_than_stage_0_of_1f1b() -> None:
    """Table 2 of the paper: p times M_B = until_b + until_w."""
    for stage in range(4):
        assert peak_activation_bytes(Schedule("zb-h1", 4, 16), stage, [3], [7]) == (4 - stage) * 3 + 4 * 7
    assert peak_activation_bytes(Schedule("1f1b", 4, 16), 0, [3], [7]) == 4 * 10


def test_sizes_must_name_every_chunk() -> None:
    with pytest.raises(ValueError, match=r"expected activation bytes for 2 chunk\(s\), got 1 and 2"):
        peak_activation_bytes(Schedule("interleaved", 2, 4, 2), 0, [1], [1, 1])


@pytest.mark.parametrize("schedule", [Schedule("1f1b", 4, 16), Schedule("interleaved", 4, 16, 2),
                                      Schedule("zb-h1", 4, 16)], ids=lambda s: s.name)
@pytest.mark.parametrize("wrong_by", [-1, 1])
def test_a_wrong_warm_up_is_caught(schedule: Schedule, wrong_by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seeded fault in the closed form's count: the comparison with counting fails."""
    right = module.warm_up
    assert counting_agrees(schedule)
    monkeypatch.setattr(module, "warm_up", lambda *a: right(*a) + wrong_by)
    assert not counting_agrees(schedule)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "interleaved"])
def test_an_activation_released_too_early_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seeded fault in the peak's bookkeeping: it no longer agrees with the time line."""
    schedule = Schedule(name, 4, 8, 2 if name == "interleaved" else 1)  # type: ignore[arg-type]
    sizes = [1] * schedule.chunks
    line = simulate(schedule, [StageCosts(tuple(sizes), tuple(sizes), tuple(sizes))] * 4)
    held = max(h for _, h in line.activation_curve(1, sizes, sizes))
    assert peak_activation_bytes(schedule, 1, sizes, sizes) == held
    right = module.warm_up
    monkeypatch.setattr(module, "warm_up", lambda *a: right(*a) - 1)
    forget_peaks()
    try:
        assert peak_activation_bytes(schedule, 1, sizes, sizes) < held
    finally:
        forget_peaks()


def forget_peaks() -> None:
    module.held_at_peaks.cache_clear()
