"""Geometry of the report: what is drawn is what the plan says, within the drawing, thinned where it is too much."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.compiler import plan_charts as charts
from meshwright.compiler.plan_charts import LEFT, RIGHT, WIDTH, Chart
from meshwright.runtime.plan import Plan
from meshwright.runtime.plan_predictions import Certificate, TupleResult

from ..runtime.plans import GIB, certificate, plan, uniform

MADE = plan()
ROOM = WIDTH - LEFT - RIGHT


def with_tuples(*tuples: TupleResult) -> Plan:
    made = certificate(MADE.predicted.step_time_ns)
    return plan(certificate=Certificate(**{**{n: getattr(made, n) for n in Certificate.model_fields},
                                           "tuples": tuples}))


def step(made: Plan) -> Chart:
    return charts.timeline_charts(made)[0][1]


def inside(chart: Chart) -> bool:
    return all(LEFT - 0.1 <= b.x and b.x + b.width <= WIDTH - RIGHT + 0.1 and b.y + b.height <= chart.height
               for b in chart.boxes) and all(0 <= p.x <= WIDTH and 0 <= p.y <= chart.height for p in chart.points)


def test_timeline() -> None:
    chart = step(MADE)
    assert len(chart.boxes) == 36 and inside(chart) and not chart.note
    assert [text for _, text in chart.legend] == ["forward", "backward", "gradient synchronisation", "optimizer"]
    assert chart.boxes[0].title == "stage 0: forward of micro-batch 0, 4 ms" and chart.boxes[0].label == "0"
    last = max(b.x + b.width for b in chart.boxes)
    assert last == pytest.approx(WIDTH - RIGHT, abs=2)


def test_timeline_of_many_micro_batches_is_thinned_and_small() -> None:
    chart = step(uniform(pp=32, blocks=64, micro_batches=512))
    assert "of 512 micro-batches" in chart.note and not chart.boxes
    assert set(chart.paths) == {"opF", "opB", "sync", "opt"} and sum(map(len, chart.paths.values())) < 300_000
    weights = step(uniform(schedule="zb-h1"))
    assert ("opW", "weight gradient") in weights.legend
    chunks = step(uniform(schedule="interleaved", chunks=2))
    assert any(b.css == "opF odd" for b in chunks.boxes) and "odd chunks" in chunks.note


def test_the_start_is_enlarged_where_operations_are_narrow() -> None:
    [(title, whole), (start, chart)] = charts.timeline_charts(uniform(pp=2, micro_batches=120))
    assert title == "" and start.startswith("The first ") and inside(chart)
    assert len(chart.boxes) < len(whole.boxes) and max(b.width for b in chart.boxes) > max(b.width for b in whole.boxes)
    assert len(charts.timeline_charts(MADE)) == 1


def test_memory_bars_add_up_and_stand_before_the_limit() -> None:
    chart = charts.memory_chart(MADE)
    total = sum(b.width for b in chart.boxes)  # both stages are equal: one bar
    [limit] = chart.lines
    assert total / (limit.x - LEFT) == pytest.approx(48 / 72) and inside(chart)
    assert [r.text for r in chart.rows] == ["stages 0–1"] and limit.text == "limit 72 GiB"


def test_a_plan_that_does_not_fit_reaches_over_the_limit() -> None:
    stages = tuple(s.model_copy(update={"limit_bytes": 40 * GIB}) for s in MADE.predicted.stages)
    chart = charts.memory_chart(plan(predicted=MADE.predicted.model_copy(update={"stages": stages})))
    assert max(b.x + b.width for b in chart.boxes) > chart.lines[0].x and inside(chart)


def test_time_bars_fill_the_step() -> None:
    chart = charts.time_chart(MADE)
    by_row: dict[float, float] = {}
    for b in chart.boxes:
        by_row[b.y] = by_row.get(b.y, 0) + b.width
    assert len(by_row) == 2 and len({round(v, 6) for v in by_row.values()}) == 1
    assert ("bubble", "bubble") in chart.legend and inside(chart)


def test_many_different_stages_are_thinned() -> None:
    assert charts.shown_stages(8, 3) == list(range(8))
    shown = charts.shown_stages(500, 250)
    assert len(shown) == charts.MOST_ROWS and {0, 250, 499} <= set(shown)
    assert charts.equal_runs([1, 1, 2, 1]) == [(0, 1), (2, 2), (3, 3)]


def test_search() -> None:
    chart = charts.search_chart(MADE)
    assert chart is not None and inside(chart)
    assert [text for _, text in chart.legend] == ["searched to the end (1)", "searched by the heuristic (1)",
                                                  "excluded by its bound (1)"]
    assert chart.note == "Not drawn: 1 in which no plan fits." and len(chart.points) == 3
    [found] = [p for p in chart.points if p.css == "solved"]
    [line, across] = chart.lines
    assert found.x < line.x and found.y == pytest.approx(across.y, abs=1)


def test_search_draws_tuples_at_one_place_once() -> None:
    step_ns = MADE.predicted.step_time_ns
    same = [TupleResult(title=f"p={i}", state="bounded", bound_ns=2 * step_ns) for i in range(500)]
    chart = charts.search_chart(with_tuples(*same))
    assert chart is not None and len(chart.points) == 1 and chart.points[0].text.endswith("and 494 more")
    far = charts.search_chart(with_tuples(TupleResult(title="far", state="bounded", bound_ns=step_ns * 10**6)))
    assert far is not None and inside(far) and "drawn at the edge" in far.note


@pytest.mark.parametrize("made", [plan(certificate=None), with_tuples(),
                                  with_tuples(TupleResult(title="x", state="infeasible"))])
def test_no_search_to_draw(made: Any) -> None:
    assert charts.search_chart(made) is None


@pytest.mark.parametrize(("most", "first"), [(132.0, [0, 20, 40]), (0.005, [0, 0.001, 0.002]), (7.0, [0, 1, 2])])
def test_round_ticks(most: float, first: list[float]) -> None:
    ticks = charts.nice(most)
    assert ticks[:3] == pytest.approx(first) and ticks[-1] <= most * 1.001 and 4 <= len(ticks) <= 12
