"""Random schedules and costs for the pipeline tests."""

from __future__ import annotations

from hypothesis import strategies as st

from meshwright.cost_model.pipeline import StageCosts
from meshwright.cost_model.schedules import Schedule, ScheduleName

NAMES: tuple[ScheduleName, ...] = ("gpipe", "1f1b", "interleaved", "zb-h1")


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name, p = draw(st.sampled_from(NAMES)), draw(st.integers(1, 6))
    if name == "interleaved":
        return Schedule(name, p, p * draw(st.integers(1, 7)), draw(st.integers(2, 4)))
    return Schedule(name, p, draw(st.integers(1, 40)))


@st.composite
def instances(draw: st.DrawFn) -> tuple[Schedule, list[StageCosts]]:
    """A schedule and uneven costs; small ones make ties, zeros included."""
    schedule = draw(schedules())
    number = st.integers(0, draw(st.sampled_from([1, 3, 10, 10**9])))
    chunk = st.tuples(*[number] * schedule.chunks)
    stage = st.builds(StageCosts, chunk, chunk, chunk, number, number, number, number)
    return schedule, draw(st.lists(stage, min_size=schedule.stages, max_size=schedule.stages))


def even(schedule: Schedule, forward_ns: int, input_ns: int, weight_ns: int) -> list[StageCosts]:
    """Equal stages, free transfers; the numbers are those of a whole stage and must divide by its chunks."""
    v = schedule.chunks
    return [StageCosts((forward_ns // v,) * v, (input_ns // v,) * v, (weight_ns // v,) * v)] * schedule.stages
