"""The same problem for CP-SAT: an independent exact solver that either proves a plan, refutes it, or runs out of time.

Variables: z[l, k, o] layer l is in part k with option o; the end of every operation of the schedule; what each stage
sends, holds at most in transients. Constraints, per outer tuple:

    one part and option per layer      Σ z[l] = 1, part(l+1) - part(l) ∈ {0, 1}, the first is 0, the last p·v - 1
    families, even parts               as in problem.py
    re-sharding, transfers             1 where the layouts on both sides are chosen; J rises with them, so ≥ suffices
    order                              end(op) ≥ end(before it on its stage) + time, ≥ end(awaited) + transfer + time
    memory                             static + held · saved + transient ≤ capacity at every moment of the schedule

and J ≥ end of every stage + its tail is minimised. Only the tables, the orders and the held counts are shared.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from ...cost_model.in_flight import held_at_peaks
from ...cost_model.schedules import Op, awaited, orders
from .evaluate import evaluate
from .problem import Outer, Plan, Problem, part_sizes

MOST_VARIABLES = 200_000
INFINITE = 1 << 62

Verdict = Literal["proven", "refuted", "bound", "timed out"]


@dataclass(frozen=True)
class Proof:
    """`proven`: no plan takes less time; `refuted`: `plan` does, or fits where none was claimed to; `bound`: none takes
    less than `lower_bound_ns`, which is below the plan's; `timed out`: not even that for every outer tuple."""

    verdict: Verdict
    lower_bound_ns: int
    step_ns: int | None
    plan: Plan | None

    def sentence(self) -> str:
        """One line for people."""
        if self.verdict == "refuted" and self.step_ns:
            return f"a faster plan, of {self.step_ns / 1e6:,.2f} ms"
        if self.verdict == "bound" and self.step_ns:
            return f"bound {100 * (1 - self.lower_bound_ns / self.step_ns):.2f} %"
        return self.verdict


def prove(problem: Problem, plan: Plan | None, limit_s: float = 60.0, workers: int = 1,
          relaxed: Collection[int] = ()) -> Proof:
    """Whether any plan is faster than `plan` (None: whether any fits), within `limit_s` seconds of wall time. Outer
    tuples in `relaxed` have options that are no strategies, only below some: theirs count as bounds, never as plans."""
    deadline = time.monotonic() + limit_s
    claimed = evaluate(problem, plan).step_ns if plan is not None else INFINITE
    best, found, lower, complete = claimed, plan, claimed, True
    for index, outer in enumerate(problem.outers):
        if len(problem.layers) < outer.parts or not all(outer.options[kind] for kind in problem.layers):
            continue
        answer = _solve(problem, index, best, deadline - time.monotonic(), workers)
        if answer is None:
            complete, lower = False, 0
            continue
        bound, better = answer
        lower = min(lower, bound)
        if better is not None and index not in relaxed:
            found, best = better, evaluate(problem, better).step_ns
    lower = min(lower, best)
    step_ns = best if best < INFINITE else None
    if best < claimed:
        return Proof("refuted", lower, step_ns, found)
    return Proof("proven" if lower >= claimed else "bound" if complete else "timed out", lower, step_ns, found)


def _cp_model() -> Any:
    """The solver's module, imported where it is needed: that takes a second.

    Compiled programs make torch's symbols global, and the solver has some of the same names: bound to torch's, it
    crashes, so it is bound to its own first."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        from ortools.sat.python import cp_model
    finally:
        sys.setdlopenflags(flags)
    return cp_model


def _solve(problem: Problem, index: int, below: int, limit_s: float, workers: int) -> tuple[int, Plan | None] | None:
    """(bound on every plan below `below`, a plan below it if there is one) of a tuple; None without an answer."""
    cp_model = _cp_model()
    outer = problem.outers[index]
    size = outer.parts * sum(len(outer.options[kind]) for kind in problem.layers) + 3 * outer.parts * outer.m
    if limit_s <= 0 or size > MOST_VARIABLES:
        return None
    model = _Model(problem, outer, below)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds, solver.parameters.num_workers = limit_s, workers
    status = solver.solve(model.model)
    if status == cp_model.INFEASIBLE:
        return below, None
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return int(solver.best_objective_bound), model.plan(solver, index)
    return None if status != cp_model.UNKNOWN or solver.best_objective_bound <= 0 else (
        int(solver.best_objective_bound), None)


class _Model:
    def __init__(self, problem: Problem, outer: Outer, below: int) -> None:
        cp_model = _cp_model()
        self.problem, self.outer, self.model = problem, outer, cp_model.CpModel()
        self.count, self.parts = len(problem.layers), outer.parts
        self.most_ns = min(below - 1, 1 << 50)
        self.options = [outer.options[kind] for kind in problem.layers]
        self.z = [[[self.model.new_bool_var(f"z{la}_{k}_{o}") for o in range(len(own))] for k in range(self.parts)]
                  for la, own in enumerate(self.options)]
        self._cuts()
        self._families()
        self.resharded = self._reshards()
        self._memory()
        self.model.minimize(self._step())

    def _sum(self, stage_or_part: list[int], name: str) -> Any:
        """Σ of an option's field over the layers of these parts."""
        return sum(getattr(option, name) * self.z[la][k][o] for la, own in enumerate(self.options)
                   for k in stage_or_part for o, option in enumerate(own))

    def _own(self, stage: int) -> list[int]:
        return list(range(stage, self.parts, self.outer.p))

    def _cuts(self) -> None:
        part = [sum(k * x for k, own in enumerate(layer) for x in own) for layer in self.z]
        for la, layer in enumerate(self.z):
            self.model.add_exactly_one(x for own in layer for x in own)
            if la:
                self.model.add(part[la] >= part[la - 1])
                self.model.add(part[la] <= part[la - 1] + 1)
        self.model.add(part[0] == 0)
        self.model.add(part[-1] == self.parts - 1)
        if self.outer.v > 1:
            low, high = part_sizes(self.count, self.outer)
            for k in range(self.parts):
                self.model.add_linear_constraint(sum(x for layer in self.z for x in layer[k]), low, high)

    def _families(self) -> None:
        if self.problem.mixing:
            return
        for stage in range(self.outer.p):
            for kind in set(self.problem.layers):
                taken = {name: self.model.new_bool_var("")
                         for name in dict.fromkeys(o.family for o in self.outer.options[kind])}
                self.model.add_at_most_one(taken.values())
                for la, own in enumerate(self.options):
                    if self.problem.layers[la] == kind:
                        for k in self._own(stage):
                            for o, option in enumerate(own):
                                self.model.add_implication(self.z[la][k][o], taken[option.family])

    def _end(self, la: int, k: int, layout: int, side: str) -> Any:
        """1 when the layer is in the part with that layout."""
        return sum(self.z[la][k][o] for o, option in enumerate(self.options[la]) if getattr(option, side) == layout)

    def _both(self, la: int, k: int, following: int, a: int, b: int, both: Any) -> None:
        """`both` is 1 when layer la ends part k in layout a and the next layer of `following` begins in layout b."""
        self.model.add(both >= self._end(la, k, a, "layout_out") + self._end(la + 1, following, b, "layout_in") - 1)

    def _reshards(self) -> list[list[tuple[Any, Any]]]:
        """Per part, (price, 0/1) of every change of layout inside it."""
        found: list[list[tuple[Any, Any]]] = [[] for _ in range(self.parts)]
        for k in range(self.parts):
            for la in range(self.count - 1):
                for a in {o.layout_out for o in self.options[la]}:
                    for b in {o.layout_in for o in self.options[la + 1]}:
                        price = self.outer.reshard[a][b]
                        if price.forward_ns or price.backward_ns or price.saved_bytes:
                            both = self.model.new_bool_var("")
                            self._both(la, k, k, a, b, both)
                            found[k].append((price, both))
        return found

    def _reshard(self, k: int, name: str) -> Any:
        return sum(getattr(price, name) * both for price, both in self.resharded[k])

    def _memory(self) -> None:
        for stage in range(self.outer.p):
            own = self._own(stage)
            transient = self.model.new_int_var(0, self.problem.capacity_bytes, "")
            for la, options in enumerate(self.options):
                for k in own:
                    self.model.add(transient >= sum(option.transient_bytes * self.z[la][k][o]
                                                    for o, option in enumerate(options)))
            static = self._sum(own, "static_bytes")
            for held in held_at_peaks(self.outer.order, stage):
                active = sum(held.until_b[c] * (self._sum([k], "saved_bytes") + self._reshard(k, "saved_bytes"))
                             + held.until_w[c] * self._sum([k], "saved_until_w_bytes") for c, k in enumerate(own))
                self.model.add(static + active + transient <= self.problem.capacity_bytes)

    def _sends(self) -> tuple[list[Any], list[Any]]:
        p = self.outer.p
        forward = [self.model.new_int_var(0, self.most_ns, "") for _ in range(p)]
        backward = [self.model.new_int_var(0, self.most_ns, "") for _ in range(p)]
        for k in range(self.parts - 1):
            for a in {o.layout_out for own in self.options for o in own}:
                for b in {o.layout_in for own in self.options for o in own}:
                    price, both = self.outer.transfer[a][b], self.model.new_bool_var("")
                    for la in range(self.count - 1):
                        self._both(la, k, k + 1, a, b, both)
                    self.model.add(forward[k % p] >= price.forward_ns * both)
                    self.model.add(backward[(k + 1) % p] >= price.backward_ns * both)
        return forward, backward

    def _step(self) -> Any:
        """J, with the end of every operation of the schedule as a variable."""
        order, split = self.outer.order, self.outer.order.splits_backward
        forward, backward = self._sends()
        duration: dict[tuple[str, int], Any] = {}
        for k in range(self.parts):
            weight = self._sum([k], "weight_gradient_ns")
            sums = {"F": self._sum([k], "forward_ns") + self._reshard(k, "forward_ns"),
                    "B": self._sum([k], "input_gradient_ns") + self._reshard(k, "backward_ns")
                    + (0 if split else weight), "W": weight}
            for kind in order.kinds:
                duration[kind, k] = self.model.new_int_var(0, self.most_ns, "")
                self.model.add(duration[kind, k] == sums[kind])
        ends: dict[tuple[int, Op], Any] = {(s, op): self.model.new_int_var(0, self.most_ns, "")
                                           for s, ops in enumerate(orders(order)) for op in ops}
        step = self.model.new_int_var(0, self.most_ns, "J")
        for s, ops in enumerate(orders(order)):
            before: Any = 0
            for op in ops:
                time_ns = duration[op.kind, op.chunk * self.outer.p + s]
                self.model.add(ends[s, op] >= before + time_ns)
                needed = awaited(order, s, op)
                if needed is not None:
                    send = (forward if op.kind == "F" else backward)[needed[0]]
                    self.model.add(ends[s, op] >= ends[needed] + send + time_ns)
                before = ends[s, op]
            own = self._own(s)
            self.model.add(step >= before + self._sum(own, "sync_ns") + self._sum(own, "optimizer_ns"))
        return step

    def plan(self, solver: Any, index: int) -> Plan:
        """The plan of the solver's solution."""
        chosen = [next((k, o) for k, own in enumerate(layer) for o, x in enumerate(own) if solver.value(x))
                  for layer in self.z]
        ends = tuple(sum(k <= part for k, _ in chosen) for part in range(self.parts))
        return Plan(outer=index, ends=ends, options=tuple(o for _, o in chosen))
