"""Plans for tests: captures are shared by all tests of a process, and kept in the cache directory beyond it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from meshwright.compiler.planner.captured import ModelAtAnyBatch
from meshwright.compiler.planner.plan_model import Answer, Planner, Request, pins_from
from meshwright.runtime.plan import Plan

NODE = "1x8 h100-sxm"


@lru_cache(maxsize=16)
def model(name: str, seq: int) -> ModelAtAnyBatch:
    """The model's captures."""
    return ModelAtAnyBatch(name, seq)


def planner(name: str, cluster: str, seq: int, batch: int, **pins: Any) -> Planner:
    """A planner with pinned axes."""
    return Planner(Request(name, cluster, seq, batch, pins_from(pins)), model(name, seq))


def answer(name: str, cluster: str, seq: int, batch: int, **pins: Any) -> Answer:
    """Its answer, without an explanation where nothing fits."""
    return planner(name, cluster, seq, batch, **pins).solve(explain=False)


def plan(name: str, cluster: str, seq: int, batch: int, **pins: Any) -> Plan:
    """The plan."""
    found = answer(name, cluster, seq, batch, **pins).plan
    assert found is not None
    return found


def exposed_share(found: Plan) -> float:
    """Of the busiest stage's step: communication that nothing hides."""
    stage = min(found.predicted.stages, key=lambda s: s.bubble_ns)
    return sum(stage.exposed_ns.values()) / found.predicted.step_time_ns


def bubble_share(found: Plan) -> float:
    """Of the busiest stage's step: waiting."""
    return min(s.bubble_ns for s in found.predicted.stages) / found.predicted.step_time_ns
