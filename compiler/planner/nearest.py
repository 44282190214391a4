"""Why nothing fits, and the least capacity at which something does.

Times don't matter for that question, so the search runs on tables whose times are all 0: then only memory is left to
compare, and a bisection over the capacity asks it again. On small tuples the answer is exact; on large ones it is
within a thousandth of what the heuristic finds, and `proven_bytes` is the largest capacity at which the bound still
rules every plan out.
"""

from __future__ import annotations

from dataclasses import dataclass

from .bound import Bound
from .evaluate import StageMemory, evaluate
from .problem import Option, Outer, Plan, Problem, Reshard, Transfer
from .search import Found, search

GIB = 1 << 30
FREE = ("forward_ns", "input_gradient_ns", "weight_gradient_ns", "sync_ns", "optimizer_ns")


@dataclass(frozen=True)
class Nearest:
    """`plan` fits into `capacity_bytes` and binds on `stage`, which holds `memory`; with `exact` nothing fits into
    less, else nothing fits into `proven_bytes`."""

    plan: Plan
    stage: int
    memory: StageMemory
    capacity_bytes: int
    proven_bytes: int
    exact: bool
    title: str

    def missing_bytes(self, problem: Problem) -> int:
        """What the asked capacity lacks."""
        return self.capacity_bytes - problem.capacity_bytes

    def sentence(self, problem: Problem) -> str:
        """The binding constraint, what is missing, and the change that fits."""
        parts = {"static": self.memory.static_bytes, "saved activations": self.memory.activation_bytes,
                 "transient": self.memory.transient_bytes}
        largest = max(parts, key=lambda name: parts[name])
        return (f"no plan fits: the one of least memory ({self.title}) needs {self.memory.total_bytes / GIB:.2f} GiB "
                f"on stage {self.stage}, most of it {largest} ({parts[largest] / GIB:.2f} GiB); "
                f"{self.missing_bytes(problem) / GIB:.2f} GiB are missing per GPU")


def nearest(problem: Problem) -> Nearest | None:
    """The least capacity at which a plan fits; None when no capacity helps (no tuple has options for all layers)."""
    free = _without_times(problem)
    best: tuple[int, Plan, bool] | None = None
    proven = None
    for index, outer in enumerate(free.outers):
        alone = free.model_copy(update={"outers": (outer,)})
        found = _least(alone, best[0] if best else None)
        if found is None:
            continue
        capacity, plan, exact, low = found
        proven = low if proven is None else min(proven, low)
        if plan is not None and (best is None or capacity < best[0]):
            best = capacity, plan.model_copy(update={"outer": index}), exact
    if best is None or proven is None:
        return None
    memory = evaluate(problem, best[1]).memory
    stage = max(range(len(memory)), key=lambda s: memory[s].total_bytes)
    exact = proven >= best[0] - 1
    return Nearest(best[1], stage, memory[stage], best[0], min(proven, best[0] - 1), exact,
                   problem.outers[best[1].outer].title)


def _least(alone: Problem, below: int | None) -> tuple[int, Plan | None, bool, int] | None:
    """(least capacity found, its plan, whether exact, largest capacity proven too small) of one tuple, looking only
    below `below`; plan None when nothing fits there, the whole None when the tuple has no plan at all."""
    plenty = below - 1 if below is not None else 1 << 61
    found, exact = _fits(alone, plenty)
    if found is None:
        return (plenty, None, exact, plenty if exact else _proven(alone, plenty)) if below is not None else None
    high, low, all_exact = _needs(alone, found), -1, True
    while high - low > (1 if all_exact else high // 1000):
        middle = (low + high) // 2
        plan, exact = _fits(alone, middle)
        if plan is None:
            low, all_exact = middle, all_exact and exact
        else:
            found, high = plan, _needs(alone, plan)
    return high, found, all_exact, low if all_exact else _proven(alone, low)


def _proven(alone: Problem, high: int) -> int:
    """The largest capacity at which the bound rules out every plan."""
    low = -1
    while high - low > 0:
        middle = (low + high + 1) // 2
        if Bound(_with(alone, middle), alone.outers[0]).fits():
            high = middle - 1
        else:
            low = middle
    return low


def _fits(alone: Problem, capacity: int) -> tuple[Plan | None, bool]:
    if capacity < 0:
        return None, True
    result = search(_with(alone, capacity))
    return (result.plan, True) if isinstance(result, Found) else (None, result.proven)


def _needs(alone: Problem, plan: Plan) -> int:
    return max(stage.total_bytes for stage in evaluate(alone, plan).memory)


def _with(problem: Problem, capacity: int) -> Problem:
    return problem.model_copy(update={"capacity_bytes": capacity})


def _without_times(problem: Problem) -> Problem:
    return problem.model_copy(update={"outers": tuple(map(_free, problem.outers))})


def _free(outer: Outer) -> Outer:
    def option(own: Option) -> Option:
        return own.model_copy(update=dict.fromkeys(FREE, 0))

    return outer.model_copy(update={
        "options": tuple(tuple(map(option, own)) for own in outer.options),
        "reshard": tuple(tuple(Reshard(saved_bytes=r.saved_bytes) for r in row) for row in outer.reshard),
        "transfer": tuple(tuple(Transfer() for _ in row) for row in outer.transfer)})
