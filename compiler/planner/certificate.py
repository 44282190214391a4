"""What a plan is worth: a lower bound for every outer tuple, and a check of both that needs nothing of the search.

Each tuple's bound is one of three kinds: `path`, from `bound.py`; `enumerated`, where all stages' choices were gone
through and none gave less (small tuples only: J rises with every cost, so undecided stages stand in with their least
costs); `infeasible`, where the bound leaves no room for any plan. `verify` computes all of it anew.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, product
from typing import Annotated, Literal

from pydantic import Field

from ...cost_model.in_flight import peak_activation_bytes
from ...cost_model.pipeline import StageCosts
from ...cost_model.steady_state import steady_state_time_ns
from ...runtime.errors import InvalidInputError
from .bound import Bound
from .evaluate import evaluate
from .knapsack import INFINITE, Weights
from .problem import Data, Plan, Problem, part_sizes, read_json

MOST_NODES = 20_000
MOST_COMBINATIONS = 50_000
MOST_CUTS = 5_000

How = Literal["path", "enumerated", "infeasible"]


class TupleBound(Data):
    """No plan of outer tuple `index` takes less than `lower_bound_ns`, for the reason `how`."""

    index: int
    how: How
    lower_bound_ns: Annotated[int, Field(ge=0)]


class Certificate(Data):
    """A plan of the problem with that digest, its step time, and bounds for all outer tuples."""

    version: Literal[1] = 1
    problem_sha256: str
    plan: Plan
    step_ns: int
    tuples: tuple[TupleBound, ...]

    @property
    def lower_bound_ns(self) -> int:
        """No plan takes less time."""
        return min(self.step_ns, *(t.lower_bound_ns for t in self.tuples))

    @property
    def gap(self) -> float:
        """By which share of its step time the plan may at most be improved; 0 proves it optimal."""
        return 1 - self.lower_bound_ns / self.step_ns if self.step_ns else 0.0

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """Raises `InvalidInputError` for what is no certificate."""
        return read_json(cls, text, "certificate", "`certify` makes")


def certify(problem: Problem, plan: Plan, nodes: int = MOST_NODES) -> Certificate:
    """Bounds for every outer tuple, at least as large as the plan's step time where that can be shown. `nodes` limits
    the enumeration per tuple. Raises `InvalidInputError` for a plan that does not fit."""
    evaluation = evaluate(problem, plan)
    if not evaluation.fits:
        raise InvalidInputError("certificate: the plan does not fit", expected="one that fits the capacity")
    target = evaluation.step_ns
    tuples = tuple(_tuple_bound(problem, index, target, nodes) for index in range(len(problem.outers)))
    return Certificate(problem_sha256=digest(problem), plan=plan, step_ns=target, tuples=tuples)


def verify(problem: Problem, certificate: Certificate, nodes: int = MOST_NODES) -> list[str]:
    """Everything that is wrong with the certificate; nothing is believed but the problem."""
    if certificate.problem_sha256 != digest(problem):
        return ["it is for another problem"]
    fault = problem.plan_fault(certificate.plan)
    if fault:
        return [f"plan: {fault}"]
    evaluation, faults = evaluate(problem, certificate.plan), []
    if not evaluation.fits:
        faults.append("the plan does not fit")
    if evaluation.step_ns != certificate.step_ns:
        faults.append(f"the plan takes {evaluation.step_ns} ns, not {certificate.step_ns}")
    if [t.index for t in certificate.tuples] != list(range(len(problem.outers))):
        return [*faults, f"expected bounds of {len(problem.outers)} outer tuples in order, got "
                         f"{len(certificate.tuples)}"]
    for claim in certificate.tuples:
        if not _holds(problem, claim, nodes):
            title = problem.outers[claim.index].title
            faults.append(f"{title}: {claim.lower_bound_ns} ns ({claim.how}) could not be shown again")
    return faults


def digest(problem: Problem) -> str:
    """SHA-256 of the problem's JSON."""
    return hashlib.sha256(problem.to_json().encode()).hexdigest()


def _tuple_bound(problem: Problem, index: int, target: int, nodes: int) -> TupleBound:
    bound = Bound(problem, problem.outers[index])
    if not bound.fits():
        return TupleBound(index=index, how="infeasible", lower_bound_ns=INFINITE)
    lower = bound.lower_bound(target)
    if lower < target and nothing_below(problem, index, target, nodes):
        return TupleBound(index=index, how="enumerated", lower_bound_ns=target)
    return TupleBound(index=index, how="path", lower_bound_ns=lower)


def _holds(problem: Problem, claim: TupleBound, nodes: int) -> bool:
    bound = Bound(problem, problem.outers[claim.index])
    if claim.how == "infeasible":
        return not bound.fits()
    if claim.how == "enumerated":
        return nothing_below(problem, claim.index, claim.lower_bound_ns, nodes)
    return bound.quick() >= claim.lower_bound_ns or not bound.reaches(claim.lower_bound_ns - 1)


_Times = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # F, B and W of each chunk


class _Stage:
    """A choice of all layers of a stage: its costs without transfers, and the layouts at both ends of its chunks."""

    __slots__ = ("ends", "tail", "times")

    def __init__(self, times: _Times, tail: int, ends: tuple[tuple[int, int], ...]) -> None:
        self.times, self.tail, self.ends = times, tail, ends

    def costs(self, send_forward_ns: int = 0, send_backward_ns: int = 0) -> StageCosts:
        forward, backward, weight = self.times
        return StageCosts(forward, backward, weight, send_forward_ns, send_backward_ns, self.tail)


def nothing_below(problem: Problem, index: int, target: int, nodes: int = MOST_NODES) -> bool:
    """Whether enumeration shows that no fitting plan of the tuple takes less than `target` ns; False also when that
    would take more than `nodes` evaluations of J or too many combinations."""
    outer = problem.outers[index]
    if len(problem.layers) < outer.parts:
        return True
    free = len(problem.layers) % outer.parts if outer.v > 1 else outer.parts - 1
    if math.comb(outer.parts if outer.v > 1 else len(problem.layers) - 1, free) > MOST_CUTS:
        return False
    proof = _Enumeration(problem, index, target, nodes)
    try:
        return not any(proof.finds_below(ends) for ends in _cuts(problem, index))
    except _TooMany:
        return False


class _TooMany(Exception):
    pass


class _Enumeration:
    def __init__(self, problem: Problem, index: int, target: int, nodes: int) -> None:
        self.problem, self.outer, self.target, self.nodes = problem, problem.outers[index], target, nodes
        self.bound = Bound(problem, self.outer)
        self.stages: dict[tuple[int, tuple[tuple[int, int], ...]], list[_Stage]] = {}

    def finds_below(self, ends: tuple[int, ...]) -> bool:
        """Whether a plan with these cuts beats the target."""
        spans, p, m = list(pairwise((0, *ends))), self.outer.p, self.outer.m
        for stage in range(p):
            content = self.bound.content(spans[stage::p])
            if self.bound.least(stage, content, Weights(m, m, m, 1)) >= self.target:
                return False
        stages = [self._choices(stage, tuple(spans[stage::p])) for stage in range(p)]
        if not all(stages):
            return False
        for stage, choices in enumerate(stages):  # a choice that is too slow even beside the least of all others
            least = [self._least(own) for own in stages]
            stages[stage] = [c for c in choices if self._below([*least[:stage], c.costs(), *least[stage + 1:]])]
            if not stages[stage]:
                return False
        return self._descend(stages, [self._least(choices) for choices in stages], [])

    def _choices(self, stage: int, spans: tuple[tuple[int, int], ...]) -> list[_Stage]:
        if (stage, spans) not in self.stages:
            self.stages[stage, spans] = list(self._enumerate(stage, spans))
        return self.stages[stage, spans]

    def _enumerate(self, stage: int, spans: tuple[tuple[int, int], ...]) -> Iterator[_Stage]:
        """Every distinct choice that fits and whose busy time is below the target."""
        outer, layers, seen = self.outer, [la for a, b in spans for la in range(a, b)], set()
        options = [outer.options[self.problem.layers[la]] for la in layers]
        if math.prod(map(len, options)) > MOST_COMBINATIONS:
            raise _TooMany
        for chosen in product(*options):
            families = {(self.problem.layers[la], o.family) for la, o in zip(layers, chosen, strict=True)}
            if not self.problem.mixing and len(families) > len({kind for kind, _ in families}):
                continue
            at, chunks = 0, []
            for a, b in spans:
                chunks.append(chosen[at:at + b - a])
                at += b - a
            moves = [[outer.reshard[x.layout_out][y.layout_in] for x, y in pairwise(chunk)] for chunk in chunks]
            times = (tuple(sum(o.forward_ns for o in c) + sum(r.forward_ns for r in r_) for c, r_ in
                           zip(chunks, moves, strict=True)),
                     tuple(sum(o.input_gradient_ns for o in c) + sum(r.backward_ns for r in r_) for c, r_ in
                           zip(chunks, moves, strict=True)),
                     tuple(sum(o.weight_gradient_ns for o in c) for c in chunks))
            tail = sum(o.sync_ns + o.optimizer_ns for o in chosen)
            if outer.m * sum(map(sum, times)) + tail >= self.target:
                continue
            ends = tuple((c[0].layout_in, c[-1].layout_out) for c in chunks)
            held = sum(o.static_bytes for o in chosen) + max(o.transient_bytes for o in chosen) + peak_activation_bytes(
                outer.order, stage, [sum(o.saved_bytes for o in c) + sum(r.saved_bytes for r in r_) for c, r_ in
                                     zip(chunks, moves, strict=True)],
                [sum(o.saved_until_w_bytes for o in c) for c in chunks])
            if held <= self.problem.capacity_bytes and (times, tail, ends) not in seen:
                seen.add((times, tail, ends))
                yield _Stage(times, tail, ends)

    def _least(self, choices: Sequence[_Stage]) -> StageCosts:
        """At most what any of these choices costs, entry by entry, transfers free."""
        forward, backward, weight = (tuple(map(min, zip(*(c.times[i] for c in choices), strict=True)))
                                     for i in range(3))
        return StageCosts(forward, backward, weight, sync_ns=min(c.tail for c in choices))

    def _descend(self, stages: Sequence[Sequence[_Stage]], least: Sequence[StageCosts], taken: list[_Stage]) -> bool:
        stage = len(taken)
        for choice in stages[stage]:
            chosen = [*taken, choice]
            costs = self._priced(chosen) if stage + 1 == self.outer.p else [
                *(c.costs() for c in chosen), *least[stage + 1:]]
            if self._below(costs) and (stage + 1 == self.outer.p or self._descend(stages, least, chosen)):
                return True
        return False

    def _below(self, costs: Sequence[StageCosts]) -> bool:
        self.nodes -= 1
        if self.nodes < 0:
            raise _TooMany
        return steady_state_time_ns(self.outer.order, costs) < self.target

    def _priced(self, chosen: Sequence[_Stage]) -> list[StageCosts]:
        p = self.outer.p
        forward, backward = [0] * p, [0] * p
        ends = [chosen[part % p].ends[part // p] for part in range(self.outer.parts)]
        for part, (before, after) in enumerate(pairwise(ends)):
            cut = self.outer.transfer[before[1]][after[0]]
            forward[part % p] = max(forward[part % p], cut.forward_ns)
            backward[(part + 1) % p] = max(backward[(part + 1) % p], cut.backward_ns)
        return [c.costs(f, b) for c, f, b in zip(chosen, forward, backward, strict=True)]


def _cuts(problem: Problem, index: int) -> Iterator[tuple[int, ...]]:
    outer, count = problem.outers[index], len(problem.layers)
    low, high = part_sizes(count, outer)
    if outer.v == 1:
        for inner in combinations(range(1, count), outer.parts - 1):
            yield (*inner, count)
        return
    for longer in combinations(range(outer.parts), count - low * outer.parts):
        end, ends = 0, []
        for part in range(outer.parts):
            end += high if part in longer else low
            ends.append(end)
        yield tuple(ends)
