"""The search: outer tuples best-first by their lower bounds, until no open bound is below the best plan found.

Inside a tuple the exact program of `layered.py` runs where it is small enough, else the heuristic of `large.py`. What
the plan is worth is said by `bound.py` alone, which shares no pruning with either: see `certificate.py`.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Literal

from ...cost_model.steady_state import steady_state_time_ns
from ...runtime.errors import MeshwrightError
from .bound import Bound
from .evaluate import Evaluation, evaluate, evaluate_stage
from .fronts import MOST_WORK, Fronts, TooLarge
from .knapsack import INFINITE, LINEAR
from .layered import Layered
from .layouts import best_of_layouts
from .problem import Outer, Plan, Problem
from .tables import Tables

MOST_CUTS = 20_000
MOST_EXACT_LAYERS = 64
COARSE, FINE = 1e-3, 1e-4  # widths of a bound: to take tuples in order, and to say what a plan is worth

Status = Literal["solved", "searched", "bounded", "infeasible"]


@dataclass(frozen=True)
class Outcome:
    """What became of an outer tuple. `solved`: the exact search found its best plan, or that none of it beats `below`;
    `searched`: by the heuristic; `bounded`: no plan of it beats `lower_bound_ns`, and the best plan found does;
    `infeasible`: nothing fits. `lower_bound_ns` comes from the bound alone."""

    index: int
    status: Status
    lower_bound_ns: int
    step_ns: int | None = None


@dataclass(frozen=True)
class Found:
    """The best plan, its price, and an entry for every outer tuple. `exact` says that the search left nothing out."""

    plan: Plan
    evaluation: Evaluation
    tuples: tuple[Outcome, ...]
    exact: bool

    @property
    def lower_bound_ns(self) -> int:
        """No plan takes less time."""
        return min(self.evaluation.step_ns, *(t.lower_bound_ns for t in self.tuples))

    @property
    def gap(self) -> float:
        """The share of J by which the best plan might still be better, as far as the bound tells."""
        return 1 - self.lower_bound_ns / self.evaluation.step_ns if self.evaluation.step_ns else 0.0


@dataclass(frozen=True)
class NothingFits:
    """No plan was found; `proven` says that every tuple was searched exactly or excluded by its bound."""

    tuples: tuple[Outcome, ...]
    proven: bool


def search(problem: Problem, *, within: float = 0.0, most_work: int = MOST_WORK) -> Found | NothingFits:
    """The fastest plan. With `within` 0.01 it stops once the best plan is at most 1 % above every open bound.
    `most_work` limits the comparisons of the exact search per outer tuple; beyond, the heuristic's plan stands."""
    plan, tuples, exact = search_below(problem, INFINITE, within=within, most_work=most_work)
    if plan is None:
        return NothingFits(tuples, exact)
    evaluation = evaluate(problem, plan)
    plan = simplest(problem, plan, evaluation.step_ns)
    return Found(plan, evaluate(problem, plan), tuples, exact)


def search_below(problem: Problem, known_ns: int, *, within: float,
                 most_work: int) -> tuple[Plan | None, tuple[Outcome, ...], bool]:
    """(the fastest plan if it is faster than `known_ns`, what became of the tuples, whether nothing was left out)."""
    run = _Run(problem, within, most_work, known_ns)
    run.go()
    tuples = tuple(run.done[i] for i in range(len(problem.outers)))
    if run.best is None:
        return None, tuples, not run.inexact
    step_ns, plan = run.best
    evaluation = evaluate(problem, plan)
    if evaluation.step_ns > step_ns or not evaluation.fits:
        raise MeshwrightError(f"the search priced its plan at {step_ns} ns and as fitting, evaluate at "
                              f"{evaluation.step_ns} ns and {'' if evaluation.fits else 'not '}fitting",
                              do="This is a bug: please report it with the problem's JSON.")
    return plan, tuples, not run.inexact


class _Run:
    def __init__(self, problem: Problem, within: float, most_work: int, known_ns: int) -> None:
        self.problem, self.within, self.most_work, self.known_ns = problem, within, most_work, known_ns
        self.best: tuple[int, Plan] | None = None
        self.done: dict[int, Outcome] = {}
        self.inexact = False

    @property
    def below(self) -> int:
        return self.best[0] if self.best else self.known_ns

    @property
    def enough(self) -> int:
        """A bound at or above this ends the search."""
        return self._enough(self.below)

    def _enough(self, step_ns: int) -> int:
        return math.ceil(step_ns * (1 - self.within)) if step_ns < INFINITE else INFINITE

    def go(self) -> None:
        """A tuple enters with its quick bound, comes back with its full one, and is then searched. The first that may
        fit gives a plan at once: against one, a full bound is mostly a single question."""
        bounds = {i: Bound(self.problem, outer) for i, outer in enumerate(self.problem.outers)}
        queue = [(bound.quick(), i, False) for i, bound in bounds.items()]
        heapq.heapify(queue)
        while queue:
            lower, i, full = heapq.heappop(queue)
            if lower >= self.enough and lower < INFINITE:
                self._excluded(i, lower)
            elif full:
                bound = bounds.pop(i)
                if INFINITE > self.enough and not bound.reaches(self.enough - 1):
                    self._excluded(i, self.enough)
                    continue
                self._solve(i, bound, bound.lower_bound(self.below, FINE, lower))
            else:
                lower = max(lower, bounds[i].lower_bound(self.enough, COARSE, last=LINEAR))
                if lower >= INFINITE or (self.below >= INFINITE and not bounds[i].fits()):
                    self.done[i] = Outcome(i, "infeasible", INFINITE)
                else:
                    if self.below >= INFINITE:
                        self.best = self._searched(i, bounds[i], lower)
                    heapq.heappush(queue, (lower, i, True))

    def _excluded(self, i: int, lower: int) -> None:
        self.done[i] = Outcome(i, "bounded", lower)
        self.inexact |= lower < self.below

    def _searched(self, i: int, bound: Bound, lower: int) -> tuple[int, Plan] | None:
        return best_of_layouts(Tables(self.problem, self.problem.outers[i]), bound, i, lower, self.below)

    def _solve(self, i: int, bound: Bound, lower: int) -> None:
        outer = self.problem.outers[i]
        tables = Tables(self.problem, outer)
        found, exact = None, lower >= self.below
        if not exact:
            found = self._searched(i, bound, lower)
            below = found[0] if found else self.below
            exact = lower >= below
            if not exact and _small(self.problem, outer) and lower < self._enough(below):
                try:
                    found = Layered(Fronts(tables, below, self.most_work), i).solve(below) or found
                    exact = True
                except TooLarge:
                    pass
        if found is not None:
            self.best = _better(self.best, found)
        self.inexact |= not exact
        status: Status = "solved" if exact else "searched"
        self.done[i] = Outcome(i, status, lower, found and found[0])


def _small(problem: Problem, outer: Outer) -> bool:
    cuts = math.comb(len(problem.layers) - 1, outer.parts - 1) if outer.v == 1 else \
        math.comb(outer.parts, len(problem.layers) % outer.parts)
    return len(problem.layers) <= MOST_EXACT_LAYERS and cuts <= MOST_CUTS


def _better(a: tuple[int, Plan] | None, b: tuple[int, Plan] | None) -> tuple[int, Plan] | None:
    return b if a is None or (b is not None and b[0] < a[0]) else a


def simplest(problem: Problem, plan: Plan, step_ns: int) -> Plan:
    """Ties: equal layers of a stage that share an option move to the first option with which J stays and all fits."""
    outer, parts = problem.outers[plan.outer], plan.part_of_layer()
    layers_of: dict[tuple[int, int, int], list[int]] = {}
    for layer, part in enumerate(parts):
        layers_of.setdefault((part % outer.p, problem.layers[layer], plan.options[layer]), []).append(layer)
    costs = list(evaluate(problem, plan).costs)
    for (stage, kind, taken), layers in layers_of.items():
        for option in range(taken):
            if not problem.mixing and outer.options[kind][option].family != outer.options[kind][taken].family:
                continue
            options = list(plan.options)
            for layer in layers:
                options[layer] = option
            memory, own = evaluate_stage(problem, outer, plan.ends, options, stage)
            if memory.missing_bytes:
                continue
            # layouts may change at the borders of the neighbours' parts, too: then all of the plan is priced anew
            same = outer.options[kind][option].layout_in == outer.options[kind][taken].layout_in and (
                outer.options[kind][option].layout_out == outer.options[kind][taken].layout_out)
            other = plan.model_copy(update={"options": tuple(options)})
            now = [*costs[:stage], own, *costs[stage + 1:]] if same else list(evaluate(problem, other).costs)
            if steady_state_time_ns(outer.order, now) <= step_ns:
                plan, costs = other, now
                break
    return plan
