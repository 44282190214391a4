"""The search over a model's strategy space: groups of outer tuples best-first, priced in full only where that matters.

Every group starts with relaxed tables, which no option is below (`pricing.py`). Groups are taken by the bound of these.
One whose bound is no better than the best plan stays relaxed: it is `bounded`, or `infeasible`. The others get half
relaxed tables, and those that these leave open are priced in full and searched by `search.py`. What comes out is one
problem with the tables of all outer tuples, so a certificate covers the whole space, the relaxed part included.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .bound import Bound
from .evaluate import Evaluation, evaluate
from .knapsack import INFINITE, LINEAR
from .pricing import Choice, GroupTables, Pricer, Relaxed
from .problem import Outer, Plan, Problem
from .search import Found, NothingFits, Outcome, search_below, simplest
from .space import Group

WITHIN = 0.0075  # a plan this close to every open bound ends the search
MOST_WORK = 20_000_000  # comparisons of the exact search per outer tuple: a tenth of a second


@dataclass(frozen=True)
class Tuple:
    """An outer tuple of the final problem: the group's tables it came from."""

    tables: GroupTables
    outer: Outer


@dataclass(frozen=True)
class Searched:
    """The whole problem, where its tuples came from, and the answer."""

    problem: Problem
    tuples: tuple[Tuple, ...]
    result: Found | NothingFits

    def choice(self, plan: Plan, layer: int) -> Choice:
        """What a plan's layer does."""
        kind = self.problem.layers[layer]
        return self.tuples[plan.outer].tables.choices[kind][plan.options[layer]]


class GroupSearch:
    """One search. `within`: a plan this close to every open bound ends it; `most_work`: see `search_below`; after
    `time_limit_s` seconds the best plan so far is taken, if there is one, and what was not looked at keeps the bound
    that costs nothing."""

    def __init__(self, pricer: Pricer, *, mixing: bool = False, within: float = WITHIN,
                 most_work: int = MOST_WORK, time_limit_s: float = math.inf) -> None:
        self.pricer, self.space = pricer, pricer.space
        self.mixing, self.within, self.most_work = mixing, within, most_work
        self.best: tuple[int, Group, int, Plan] | None = None  # ns, group, position of its outer tuple, plan in it
        self.tables: dict[Group, GroupTables] = {}
        self.outcomes: dict[Group, list[Outcome]] = {}
        self.exact = True
        self.time_limit_s = time_limit_s

    def run(self) -> Searched:
        """Search everything: the most promising groups first, as far as a bound of their simplest schedule tells."""
        deadline = time.monotonic() + self.time_limit_s
        groups = list(self.space.groups())
        hopes = {group: self._relaxed(group) for group in groups}
        for group in sorted(groups, key=lambda g: (hopes[g], groups.index(g))):
            if self.best and time.monotonic() >= deadline:
                self._leave(group)
            else:
                self._visit(group)
        return self._assembled(groups)

    def _leave(self, group: Group) -> None:
        """Close a group unseen."""
        outers = self.tables[group].outers(self.space)
        self.outcomes[group] = [self._closed(i, Bound(self.problem([outer]), outer).quick())
                                for i, outer in enumerate(outers)]

    @property
    def _below(self) -> int:
        return self.best[0] if self.best else INFINITE

    @property
    def _enough(self) -> int:
        return math.ceil(self.best[0] * (1 - self.within)) if self.best else INFINITE

    def _relaxed(self, group: Group) -> float:
        """About what the group could reach by its relaxed tables: even stages, the bubble of 1F1B, synchronisation with
        ZeRO 1. It decides on the order of groups only. The tables are kept until better ones are needed."""
        tables = self.tables[group] = self.pricer.relaxed(group)
        outers = tables.outers(self.space)
        if not outers:
            return INFINITE
        tail = sum(min(tails.values()) for kind in self.space.order if (tails := tables.tails[kind]))
        busiest = self._busiest(tables)
        return busiest * (group.m + group.p - 1) + tail * 1e9 / group.p if busiest < INFINITE else INFINITE

    def _busiest(self, tables: GroupTables) -> float:
        """ns per micro-batch of the busiest stage, if layers are shared out as evenly as whole layers can be."""
        p, counts = tables.group.p, Counter(self.space.order)
        least = {kind: min((c.option.forward_ns + c.option.input_gradient_ns + c.option.weight_gradient_ns
                            for c in tables.choices[kind]), default=INFINITE) for kind in counts}
        total = sum(n * least[kind] for kind, n in counts.items())
        major = max(counts, key=lambda kind: counts[kind])
        slots = -(-total // (p * least[major])) if least[major] else 1
        return max(total / p, *least.values(), (slots if p > 1 else 0) * least[major] * 0.99)

    def _visit(self, group: Group) -> None:
        outers = self.tables[group].outers(self.space)
        bounds = [self._bound(outer) for outer in outers]
        open_ = [i for i, lower in enumerate(bounds) if lower < self._enough]
        if open_ and self.best:  # against a plan, closer bounds may spare the full prices
            tables = self.tables[group] = self.pricer.half_relaxed(group)
            outers = tables.outers(self.space)
            for i in open_:
                bounds[i] = max(bounds[i], self._bound(outers[i]))
            open_ = [i for i in open_ if bounds[i] < self._enough]
        outcomes = {i: self._closed(i, lower) for i, lower in enumerate(bounds) if i not in open_}
        if open_:
            tables = self.tables[group] = self.pricer.full(group)
            priced = tables.outers(self.space)
            problem = self.problem([priced[i] for i in open_])
            plan, searched, exact = search_below(problem, self._below, within=self.within, most_work=self.most_work)
            self.exact &= exact
            outcomes |= {open_[o.index]: replace(o, index=open_[o.index]) for o in searched}
            if plan is not None:
                self.best = evaluate(problem, plan).step_ns, group, open_[plan.outer], plan
        self.outcomes[group] = [outcomes[i] for i in range(len(outers))]

    def _bound(self, outer: Outer) -> int:
        """`_enough` or more where relaxed tables close the tuple, else some bound below it. With an option or two of
        each family, whole layers and their transients hardly matter."""
        bound = Bound(self.problem([outer]), outer)
        quick, enough = bound.quick(), self._enough
        return quick if quick >= enough or bound.reaches(enough - 1, LINEAR) else enough

    def _closed(self, index: int, lower: int) -> Outcome:
        if lower >= INFINITE:
            return Outcome(index, "infeasible", INFINITE)
        self.exact &= lower >= self._below
        return Outcome(index, "bounded", lower)

    def problem(self, outers: Sequence[Outer]) -> Problem:
        """The problem of these outer tuples."""
        space = self.space
        return Problem.model_construct(
            kinds=tuple(kind.name for kind in space.kinds), layers=space.order, gpus=space.cluster.gpus,
            global_batch=space.global_batch, capacity_bytes=self.pricer.capacity_bytes, outers=tuple(outers),
            mixing=self.mixing)

    def _assembled(self, groups: Sequence[Group]) -> Searched:
        tuples: list[Tuple] = []
        outcomes: list[Outcome] = []
        plan: Plan | None = None
        for group in groups:
            outers = self.tables[group].outers(self.space)
            if self.best and group == self.best[1]:
                plan = self.best[3].model_copy(update={"outer": len(tuples) + self.best[2]})
            outcomes += [replace(o, index=len(tuples) + i) for i, o in enumerate(self.outcomes[group])]
            tuples += [Tuple(self.tables[group], outer) for outer in outers]
        problem = self.problem([t.outer for t in tuples])
        if plan is None:
            return Searched(problem, tuple(tuples), NothingFits(tuple(outcomes), self.exact))
        plan = simplest(problem, plan, evaluate(problem, plan).step_ns)
        evaluation: Evaluation = evaluate(problem, plan)
        return Searched(problem, tuple(tuples), Found(plan, evaluation, tuple(outcomes), self.exact))


def priced_in_full(pricer: Pricer, searched: Searched, deadline: float) -> Searched:
    """The same answer with the full tables of every group whose relaxed ones leave room below the plan, as far as
    `deadline` (of `time.monotonic`) allows."""
    assert isinstance(searched.result, Found)
    below, tuples = searched.result.evaluation.step_ns, list(searched.tuples)
    open_ = dict.fromkeys(tuples[o.index].tables.group for o in searched.result.tuples
                          if tuples[o.index].tables.relaxed and o.lower_bound_ns < below)
    for group in open_:
        if time.monotonic() >= deadline:
            break
        tables, own = pricer.full(group), [i for i, t in enumerate(tuples) if t.tables.group == group]
        for i, outer in zip(own, tables.outers(pricer.space), strict=True):
            tuples[i] = Tuple(tables, outer)
    problem = searched.problem.model_copy(update={"outers": tuple(t.outer for t in tuples)})
    return Searched(problem, tuple(tuples), searched.result)


def rebuilt(pricer: Pricer, relaxed: Callable[[Group], Relaxed], *,
            mixing: bool = False) -> tuple[Problem, tuple[Tuple, ...]]:
    """The problem that a search ended with, given how far it priced each group."""
    search, tuples = GroupSearch(pricer, mixing=mixing), list[Tuple]()
    for group in pricer.space.groups():
        price = {"": pricer.full, "relaxed": pricer.relaxed, "half relaxed": pricer.half_relaxed}[relaxed(group)]
        tables = price(group)
        tuples += [Tuple(tables, outer) for outer in tables.outers(pricer.space)]
    return search.problem([t.outer for t in tuples]), tuple(tuples)
