"""The pipeline of a plan on the time line: for the report's drawing, and as a trace for Chrome and Perfetto.

Built from the stage costs in the plan by `cost_model/pipeline.py`. A step of very many micro-batches is drawn with
fewer: warm-up, the alternation in between and cool-down look the same, and the drawing says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..cost_model.pipeline import StageCosts, Timeline, simulate
from ..cost_model.schedules import Schedule
from ..cost_model.steady_state import steady_state_time_ns
from ..runtime.errors import InvalidInputError
from ..runtime.plan import Plan

MOST_TRACE_EVENTS = 400_000
MOST_STEPS = 3_000_000


@dataclass(frozen=True)
class PlanTimeline:
    """`line` has `drawn` of the step's micro-batches; all of them unless there were too many."""

    line: Timeline
    drawn: int
    micro_batches: int

    @property
    def whole(self) -> bool:
        return self.drawn == self.micro_batches


def stage_costs(plan: Plan) -> tuple[StageCosts, ...]:
    """The plan's costs as the pipeline model takes them."""
    return tuple(StageCosts(**s.costs.model_dump()) for s in plan.predicted.stages)


def timeline(plan: Plan, most_events: int) -> PlanTimeline | None:
    """The step's events, with fewer micro-batches where there would be more than `most_events` of them; but never
    fewer than twice the stages, so that the pipeline fills. None where even that is too much to go through."""
    s = plan.schedule
    per_micro_batch = s.stages * s.chunks * (3 if s.name == "zb-h1" else 2)
    drawn = min(s.micro_batches, max(2 * s.stages, most_events // per_micro_batch))
    if s.name == "interleaved":
        drawn -= drawn % s.stages
    if drawn * per_micro_batch > MOST_TRACE_EVENTS:
        return None
    return PlanTimeline(simulate(Schedule(s.name, s.stages, drawn, s.chunks), stage_costs(plan)), drawn,
                        s.micro_batches)


def step_fault(plan: Plan) -> str | None:
    """What is wrong when the step time is not the longest path through the stages' own costs; None when it is, and
    where walking the path would take long."""
    s = plan.schedule
    if s.stages * s.chunks * s.micro_batches > MOST_STEPS:
        return None
    found = steady_state_time_ns(Schedule(s.name, s.stages, s.micro_batches, s.chunks), stage_costs(plan))
    if found == plan.predicted.step_time_ns:
        return None
    return (f"the stages' costs make a step of {found / 1e9:.6g} s, not the {plan.predicted.step_time_s:.6g} s "
            f"predicted")


def chrome_trace(plan: Plan) -> str:
    """A trace as JSON: a thread per stage, predictions only. Raises `InvalidInputError` for a pipeline beyond that."""
    drawn = timeline(plan, MOST_TRACE_EVENTS)
    if drawn is None:
        raise InvalidInputError(f"a trace of {plan.schedule.stages} stages", expected="fewer")
    note = "predicted by Meshwright, not measured"
    if not drawn.whole:
        note += f"; {drawn.drawn} of {drawn.micro_batches} micro-batches are drawn"
    process: dict[str, Any] = {"ph": "M", "name": "process_name", "pid": 0,
                               "args": {"name": f"{plan.model.name}: {note}"}}
    return json.dumps({"traceEvents": [process, *drawn.line.chrome_trace()], "displayTimeUnit": "ms",
                       "otherData": {"note": note, "plan": plan.title}})
