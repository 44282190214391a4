"""The time line of a plan: all of it where it is small, the shape of it where it is large, and a trace."""

from __future__ import annotations

import json

import pytest

from meshwright.compiler.plan_charts import timeline_charts
from meshwright.compiler.plan_timeline import chrome_trace, step_fault, timeline
from meshwright.runtime.errors import InvalidInputError
from meshwright.runtime.plan_predictions import StageCosts

from ..runtime.plans import plan, uniform


def test_all_of_a_small_step() -> None:
    made = plan()
    drawn = timeline(made, 1000)
    assert drawn is not None and drawn.whole and drawn.line.makespan_ns == made.predicted.step_time_ns
    assert sum(map(len, drawn.line.events)) == 2 * 8 * 2


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "interleaved"])
def test_fewer_micro_batches_of_a_large_step(schedule: str) -> None:
    made = uniform(pp=4, schedule=schedule, chunks=2 if schedule == "interleaved" else 1, micro_batches=400)
    drawn, least = timeline(made, 500), timeline(made, 1)
    assert drawn is not None and least is not None
    events = sum(map(len, drawn.line.events))
    assert not drawn.whole and drawn.micro_batches == 400 and 8 <= drawn.drawn < 400 and events <= 500
    assert least.drawn == 8  # fills the pipeline all the same


def test_more_stages_than_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.compiler.plan_timeline.MOST_TRACE_EVENTS", 60)
    made = uniform(pp=4, micro_batches=32)
    assert timeline(made, 1000) is None and timeline_charts(made) == []
    with pytest.raises(InvalidInputError, match="4 stages"):
        chrome_trace(made)


def test_the_step_is_the_longest_path_through_the_costs() -> None:
    made = plan()
    assert step_fault(made) is None
    first = made.predicted.stages[0]
    slower = first.model_copy(update={"costs": StageCosts(forward_ns=(10**9,), input_gradient_ns=(1,),
                                                          weight_gradient_ns=(1,))})
    changed = made.predicted.model_copy(update={"stages": (slower, made.predicted.stages[1])})
    assert "not the 0.132 s predicted" in (step_fault(made.model_copy(update={"predicted": changed})) or "")


def test_trace() -> None:
    data = json.loads(chrome_trace(plan()))
    spans = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == 32 + 4 and max(e["ts"] + e["dur"] for e in spans) == pytest.approx(132_000)
    assert {e["args"]["name"] for e in data["traceEvents"] if e["ph"] == "M"} >= {"stage 0", "stage 1"}
    assert "not measured" in data["otherData"]["note"]


def test_a_huge_trace_says_that_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.compiler.plan_timeline.MOST_TRACE_EVENTS", 100)
    assert "of 400 micro-batches are drawn" in json.loads(chrome_trace(uniform(micro_batches=400)))["otherData"]["note"]
