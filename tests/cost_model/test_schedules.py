"""Orders: written out for small cases, valid for all, and every kind of fault in an order is named."""

from __future__ import annotations

import pytest
from hypothesis import given

from meshwright.cost_model.schedules import Op, Schedule, first_violation, orders, stage_order

from .pipelines import schedules


def text(schedule: Schedule, stage: int) -> str:
    """F0 B0 …; with chunks 0.F0, the chunk in front."""
    chunk = (lambda op: f"{op.chunk}.") if schedule.chunks > 1 else (lambda op: "")
    return " ".join(f"{chunk(op)}{op.kind}{op.micro_batch}" for op in stage_order(schedule, stage))


@pytest.mark.parametrize(("schedule", "stage", "expected"), [
    (Schedule("gpipe", 2, 3), 0, "F0 F1 F2 B0 B1 B2"),
    (Schedule("1f1b", 3, 4), 0, "F0 F1 F2 B0 F3 B1 B2 B3"),
    (Schedule("1f1b", 3, 4), 2, "F0 B0 F1 B1 F2 B2 F3 B3"),
    (Schedule("1f1b", 4, 2), 0, "F0 F1 B0 B1"),
    (Schedule("zb-h1", 3, 4), 0, "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"),
    (Schedule("zb-h1", 3, 4), 1, "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3"),
    (Schedule("zb-h1", 3, 4), 2, "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"),
    (Schedule("interleaved", 2, 4, 2), 0,
     "0.F0 0.F1 1.F0 1.F1 0.F2 1.B0 0.F3 1.B1 1.F2 0.B0 1.F3 0.B1 1.B2 1.B3 0.B2 0.B3"),
    (Schedule("interleaved", 2, 4, 2), 1,
     "0.F0 0.F1 1.F0 1.B0 1.F1 1.B1 0.F2 0.B0 0.F3 0.B1 1.F2 1.B2 1.F3 1.B3 0.B2 0.B3"),
], ids=lambda x: x.name if isinstance(x, Schedule) else None)
def test_written_out(schedule: Schedule, stage: int, expected: str) -> None:
    assert text(schedule, stage) == expected


@given(schedules())
def test_every_order_is_valid(schedule: Schedule) -> None:
    assert first_violation(schedule, orders(schedule)) is None


SMALL = Schedule("zb-h1", 2, 2)


def changed(stage: int, order: list[Op]) -> list[list[Op]]:
    return [order if s == stage else list(o) for s, o in enumerate(orders(SMALL))]


def test_first_violation_names_the_fault() -> None:
    first = list(orders(SMALL)[0])  # F0 F1 B0 W0 B1 W1
    assert first_violation(SMALL, [first]) == "expected an order for each of 2 stages, got 1"
    assert first_violation(SMALL, changed(0, first[:-1])) == "stage 0: W of micro-batch 1, chunk 0 is missing"
    assert first_violation(SMALL, changed(0, [*first, first[0]])) == "stage 0: F of micro-batch 0, chunk 0 runs twice"
    assert first_violation(SMALL, changed(0, [*first, Op("F", 1, 0)])) == (
        "stage 0: F of micro-batch 0, chunk 1 is no operation of this schedule")
    assert first_violation(SMALL, changed(0, [first[0], first[2], first[3], first[4], first[1], first[5]])) == (
        "stage 0: B of micro-batch 1, chunk 0 runs before F of micro-batch 1, chunk 0")
    assert first_violation(SMALL, changed(0, [*first[:2], first[3], first[2], *first[4:]])) == (
        "stage 0: W of micro-batch 0, chunk 0 runs before B of micro-batch 0, chunk 0")


def test_orders_that_wait_for_one_another_are_found() -> None:
    """Stage 0 wants B0 before it runs F1; stage 1 runs F1 before B0. Each order alone is fine."""
    schedule = Schedule("1f1b", 2, 2)
    stuck = [[Op("F", 0, 0), Op("B", 0, 0), Op("F", 0, 1), Op("B", 0, 1)],
             [Op("F", 0, 0), Op("F", 0, 1), Op("B", 0, 0), Op("B", 0, 1)]]
    assert first_violation(schedule, stuck) == (
        "stage 0: B of micro-batch 0, chunk 0 waits for B of micro-batch 0, chunk 0 on stage 1, which never runs")


@pytest.mark.parametrize(("arguments", "message"), [
    (("2f2b", 2, 2), "unknown schedule '2f2b', expected one of gpipe, 1f1b, interleaved, zb-h1"),
    (("1f1b", 0, 2), "at least 1 stage"), (("gpipe", 2, 0), "at least 1 stage"),
    (("1f1b", 2, 2, 2), r"2 chunk\(s\) per stage; expected 1"),
    (("interleaved", 2, 2, 1), r"1 chunk\(s\) per stage; expected at least 2"),
    (("interleaved", 4, 6, 2), "6 micro-batches are no multiple of 4 stages"),
])
def test_bad_sizes_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="stage 2, expected 0 to 1"):
        stage_order(SMALL, 2)
