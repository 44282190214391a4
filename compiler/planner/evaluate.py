"""J(x): the step time of a plan and what each stage holds. Everything else calls this, or is tested equal to it.

    chunk time      Σ over its layers, plus re-sharding between neighbours whose layouts differ
    stage tail      Σ sync + Σ optimizer over all layers of the stage
    transfer        by the layouts on both sides of a cut; a stage with several chunks sends each as its slowest one
    memory          Σ static + peak of saved activations over the schedule + the largest transient ≤ capacity
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...cost_model.in_flight import peak_activation_bytes
from ...cost_model.pipeline import StageCosts
from ...cost_model.steady_state import steady_state_time_ns
from ...runtime.errors import InvalidInputError
from .problem import Option, Outer, Plan, Problem


@dataclass(frozen=True)
class StageMemory:
    """Bytes per GPU of a stage, by category."""

    static_bytes: int
    activation_bytes: int
    transient_bytes: int
    capacity_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.static_bytes + self.activation_bytes + self.transient_bytes

    @property
    def missing_bytes(self) -> int:
        """What the stage needs above the capacity, 0 when it fits."""
        return max(0, self.total_bytes - self.capacity_bytes)


@dataclass(frozen=True)
class Evaluation:
    """The price of a plan: J in nanoseconds, and per stage its times and memory."""

    step_ns: int
    costs: tuple[StageCosts, ...]
    memory: tuple[StageMemory, ...]

    @property
    def fits(self) -> bool:
        return not any(stage.missing_bytes for stage in self.memory)


def evaluate(problem: Problem, plan: Plan) -> Evaluation:
    """Raises `InvalidInputError` for what is no plan of the problem; one that does not fit is priced all the same."""
    fault = problem.plan_fault(plan)
    if fault:
        raise InvalidInputError(f"plan: {fault}", expected="a plan of this problem")
    outer = problem.outers[plan.outer]
    chosen = [outer.options[kind][o] for kind, o in zip(problem.layers, plan.options, strict=True)]
    parts = [chosen[a:b] for a, b in pairwise((0, *plan.ends))]
    costs = tuple(_stage_costs(outer, parts, stage) for stage in range(outer.p))
    memory = tuple(_stage_memory(outer, parts[stage::outer.p], stage, problem.capacity_bytes)
                   for stage in range(outer.p))
    return Evaluation(steady_state_time_ns(outer.order, costs), costs, memory)


def evaluate_stage(problem: Problem, outer: Outer, ends: Sequence[int], options: Sequence[int],
                   stage: int) -> tuple[StageMemory, StageCosts]:
    """What one stage of a plan with these cuts and options holds and takes."""
    chosen = [outer.options[kind][o] for kind, o in zip(problem.layers, options, strict=True)]
    parts = [chosen[a:b] for a, b in pairwise((0, *ends))]
    return (_stage_memory(outer, parts[stage::outer.p], stage, problem.capacity_bytes),
            _stage_costs(outer, parts, stage))


def _stage_costs(outer: Outer, parts: Sequence[Sequence[Option]], stage: int) -> StageCosts:
    own = parts[stage::outer.p]
    moves = [[outer.reshard[a.layout_out][b.layout_in] for a, b in pairwise(chunk)] for chunk in own]
    cuts = [outer.transfer[a[-1].layout_out][b[0].layout_in] for a, b in pairwise(parts)]
    return StageCosts(
        tuple(sum(o.forward_ns for o in chunk) + sum(r.forward_ns for r in moved)
              for chunk, moved in zip(own, moves, strict=True)),
        tuple(sum(o.input_gradient_ns for o in chunk) + sum(r.backward_ns for r in moved)
              for chunk, moved in zip(own, moves, strict=True)),
        tuple(sum(o.weight_gradient_ns for o in chunk) for chunk in own),
        max((cut.forward_ns for part, cut in enumerate(cuts) if part % outer.p == stage), default=0),
        max((cut.backward_ns for part, cut in enumerate(cuts, 1) if part % outer.p == stage), default=0),
        sum(o.sync_ns for chunk in own for o in chunk), sum(o.optimizer_ns for chunk in own for o in chunk))


def _stage_memory(outer: Outer, own: Sequence[Sequence[Option]], stage: int, capacity: int) -> StageMemory:
    until_b = [sum(o.saved_bytes for o in chunk)
               + sum(outer.reshard[a.layout_out][b.layout_in].saved_bytes for a, b in pairwise(chunk))
               for chunk in own]
    until_w = [sum(o.saved_until_w_bytes for o in chunk) for chunk in own]
    return StageMemory(sum(o.static_bytes for chunk in own for o in chunk),
                       peak_activation_bytes(outer.order, stage, until_b, until_w),
                       max(o.transient_bytes for chunk in own for o in chunk), capacity)
