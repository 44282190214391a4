"""Good plans of an outer tuple where the exact search is too large: cuts first, then each stage alone, then moves.

Cuts come from the windows that the bound leaves open. With the cuts fixed a stage is a knapsack over the fronts of its
parts: the least busy time that fits, by boundary layouts. Then single layers move from the busiest stage to another one
as long as J falls. Nothing is proven here: how good the plan is, the bound says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .bound import Bound
from .evaluate import evaluate
from .fronts import Families, Fronts, Place, busy_ns, together
from .problem import Plan, part_sizes
from .tables import STATIC, TRANSIENT, UNTIL_B, UNTIL_W, Ints, staircase

SLACKS = (0.0005, 0.002, 0.01, 0.05)  # how far above the bound cuts are looked for
WORTH_IMPROVING = 0.05  # moves of single layers gain less
MOST_MOVES = 40  # plans priced for that
NEAR = 0.0005  # a plan so close to the bound of its tuple is not improved
SHARES = (0.5, 0.0, 1.0, 0.25, 0.75)  # where in their windows
MOST_ROWS = 128  # per chunk of a stage, and of sums over several chunks
Ends = tuple[int, ...]


class Choice(NamedTuple):
    """What one stage does: its busy time, the layouts at both ends of each chunk, and the options of each chunk."""

    busy_ns: int
    layouts: tuple[tuple[int, int], ...]
    options: tuple[tuple[int, ...], ...]


class _Rows(NamedTuple):
    """Sums over some chunks of a stage: static, transient, busy; activations at each moment; a node per chunk."""

    static: Ints
    transient: Ints
    busy: Ints
    moments: Ints
    nodes: Ints


class Large:
    """The heuristic for one outer tuple. `best(below)` is a plan faster than `below` ns, or None."""

    def __init__(self, fronts: Fronts, bound: Bound, index: int) -> None:
        self.fronts, self.bound, self.index = fronts, bound, index
        self.tables, self.outer = fronts.tables, fronts.tables.outer
        self.problem, self.layers = fronts.tables.problem, fronts.tables.problem.layers
        self._choices: dict[tuple[int, tuple[tuple[int, ...], ...], int], tuple[Choice, ...]] = {}

    def best(self, lower: int, below: int) -> tuple[int, Plan] | None:
        """The best of all starts, improved by moves."""
        starts = {}
        for ends in dict.fromkeys(self._starts(lower)):
            found = self.plan(ends)
            if found is not None:
                starts[ends] = found
        if not starts:
            return None
        ends = min(starts, key=lambda one: starts[one][0])
        if starts[ends][0] > below * (1 + WORTH_IMPROVING):
            return None
        step_ns, plan = self._improved(ends, starts[ends], lower)
        return (step_ns, plan) if step_ns < below else None

    def improved(self, best: tuple[int, Plan], lower: int, below: int) -> tuple[int, Plan] | None:
        """A plan faster than `below` ns from the cuts of another one, or None."""
        found = self.plan(best[1].ends)
        if found is None:
            return None
        step_ns, plan = self._improved(best[1].ends, found, lower)
        return (step_ns, plan) if step_ns < below else None

    def plan(self, ends: Ends, first: int | None = None) -> tuple[int, Plan] | None:
        """J and plan of the stages' best choices under these cuts; None where a stage does not fit. `first`: how often
        operations of stage 0 count beside its tail."""
        choices = self._chosen(ends, first)
        if choices is None:
            return None
        parts = [choices[part % self.outer.p].options[part // self.outer.p] for part in range(self.outer.parts)]
        plan = Plan(outer=self.index, ends=ends, options=tuple(o for part in parts for o in part))
        return evaluate(self.problem, plan).step_ns, plan

    def _with_less_tail(self, ends: Ends, found: tuple[int, Plan]) -> tuple[int, Plan]:
        """Backwards end on stage 0, whose tail is then on most paths: where it has time to spare, options that take
        longer in every micro-batch may end the step sooner."""
        times = self.outer.m
        while self.outer.p > 1 and times > 1:
            times //= 2
            other = self.plan(ends, times)
            if other is not None and other[0] < found[0]:
                found = other
        return found

    def _improved(self, ends: Ends, found: tuple[int, Plan], lower: int) -> tuple[int, Plan]:
        """By moves of single layers that leave no stage busier than the busiest, as long as the bound leaves room."""
        left = MOST_MOVES
        for _ in range(4 * self.outer.parts):
            if found[0] <= lower * (1 + NEAR):
                return found
            most = self._busiest(ends)
            for moved in self._moves(ends):
                if left <= 0:
                    break
                if self._busiest(moved) > most:
                    continue
                left -= 1
                other = self.plan(moved)
                if other is not None and other[0] < found[0]:
                    ends, found = moved, other
                    break
            else:
                break
        return self._with_less_tail(ends, found)

    def _busiest(self, ends: Ends) -> int:
        choices = self._chosen(ends)
        return max(choice.busy_ns for choice in choices) if choices else 1 << 62

    # -- cuts -----------------------------------------------------------------------------------------
    def _starts(self, lower: int) -> Iterator[Ends]:
        count, parts = len(self.layers), self.outer.parts
        low, high = part_sizes(count, self.outer)
        if self.outer.v > 1:
            yield from self._even(low, count - low * parts)
            return
        for slack in SLACKS:
            first, last = self.bound.windows(int(lower * (1 + slack)))
            if last[-1] < count or any(a > b for a, b in zip(first, last, strict=True)):
                continue
            for share in SHARES:
                inner = [round(a + share * (b - a)) for a, b in zip(first[1:-1], last[1:-1], strict=True)]
                yield self._repaired(inner)
        yield self._repaired([round(count * s / parts) for s in range(1, parts)])

    def _repaired(self, inner: Sequence[int]) -> Ends:
        """The cuts, moved apart until no part is empty."""
        count, parts, ends = len(self.layers), self.outer.parts, [0]
        for part, cut in enumerate(inner, 1):
            ends.append(min(max(cut, ends[-1] + 1), count - (parts - part)))
        return (*ends[1:], count)

    def _even(self, low: int, longer: int) -> Iterator[Ends]:
        """Interleaved: which parts are one longer. The middle ones, the last ones, the first ones, an even spread."""
        parts = self.outer.parts
        middle = sorted(range(parts), key=lambda k: (k // self.outer.p, -min(k % self.outer.p,
                                                                             self.outer.p - 1 - k % self.outer.p), k))
        spread = sorted(range(parts), key=lambda k: (k * 0.6180339887) % 1)
        for order in (middle, range(parts)[::-1], range(parts), spread):
            chosen = set(list(order)[:longer])
            yield tuple(np.cumsum([low + (part in chosen) for part in range(parts)]).tolist())

    def _moves(self, ends: Ends) -> Iterator[Ends]:
        """One layer less on the busiest stage, one more on another."""
        choices = self._chosen(ends)
        assert choices is not None
        p, v = self.outer.p, self.outer.v
        order = sorted(range(p), key=lambda s: choices[s].busy_ns)
        sizes = [b - a for a, b in pairwise((0, *ends))]
        fewest, most = (part_sizes(len(self.layers), self.outer) if v > 1 else (1, len(self.layers)))
        for busiest in order[:-3:-1]:
            for other in order[:4] if v > 1 else order:
                for a in range(busiest, p * v, p):
                    for b in range(other, p * v, p):
                        if other != busiest and sizes[a] > fewest and sizes[b] < most:
                            moved = list(sizes)
                            moved[a], moved[b] = moved[a] - 1, moved[b] + 1
                            yield tuple(np.cumsum(moved).tolist())

    # -- stages ---------------------------------------------------------------------------------------
    def _chosen(self, ends: Ends, first: int | None = None) -> list[Choice] | None:
        """A choice per stage. Layouts at the cuts: the least sum of busy times and transfers, stage by stage."""
        spans, p = list(pairwise((0, *ends))), self.outer.p
        options = [self.choices(s, tuple(self.layers[a:b] for a, b in spans[s::p]),
                                first if first and s == 0 else self.outer.m) for s in range(p)]
        if not all(options):
            return None
        if self.outer.v > 1:
            return [min(own) for own in options]
        reached: dict[int, tuple[int, int, list[Choice]]] = {-1: (0, 0, [])}
        for own in options:
            following: dict[int, tuple[int, int, list[Choice]]] = {}
            for last, (slowest, total, before) in reached.items():
                for choice in own:
                    move = self.outer.transfer[last][choice.layouts[0][0]] if last >= 0 else None
                    ns = choice.busy_ns + (self.outer.m * (move.forward_ns + move.backward_ns) if move else 0)
                    new = max(slowest, ns), total + ns, [*before, choice]
                    if choice.layouts[0][1] not in following or new[:2] < following[choice.layouts[0][1]][:2]:
                        following[choice.layouts[0][1]] = new
            reached = following
        return min(reached.values(), key=lambda one: one[:2])[2]

    def choices(self, stage: int, kinds: tuple[tuple[int, ...], ...], times: int) -> tuple[Choice, ...]:
        """The least busy time of a stage by its boundary layouts; none when nothing fits."""
        if (stage, kinds, times) not in self._choices:
            self._choices[stage, kinds, times] = tuple(self._least(stage, kinds, times))
        return self._choices[stage, kinds, times]

    def _least(self, stage: int, kinds: tuple[tuple[int, ...], ...], times: int) -> Iterator[Choice]:
        states: dict[tuple[tuple[tuple[int, int], ...], Families], _Rows] = {((), ()): self._empty(stage)}
        for chunk, own in enumerate(kinds):
            following: dict[tuple[tuple[tuple[int, int], ...], Families], _Rows] = {}
            for (layouts, families), rows in states.items():
                for key, front in self.fronts.chain(own, Place(stage, chunk, times)).items():
                    joint = together(families, key.families)
                    if joint is not None:
                        new = (*layouts, (key.first, key.last)), joint if chunk + 1 < len(kinds) else ()
                        some = _spread(len(front.costs)) if len(kinds) > 1 else slice(None)
                        joined = self._joined(Place(stage, chunk, times), rows, front.costs[some], front.nodes[some])
                        following[new] = self._thin(_stack(following[new], joined) if new in following else joined)
            states = following
        for (layouts, _), rows in states.items():
            if len(rows.busy):
                row = int(rows.busy.argmin())
                yield Choice(int(rows.busy[row]), layouts, tuple(
                    tuple(self.fronts.history.options(int(node), own))
                    for node, own in zip(rows.nodes[row], kinds, strict=True)))

    def _empty(self, stage: int) -> _Rows:
        zero = np.zeros(1, np.int64)
        return _Rows(zero, zero, zero, np.zeros((1, len(self.tables.held(stage))), np.int64),
                     np.zeros((1, 0), np.int64))

    def _joined(self, place: Place, rows: _Rows, costs: Ints, nodes: Ints) -> _Rows:
        a, b = (index.ravel() for index in np.indices((len(rows.busy), len(costs))))
        chunk, until_b, until_w = place.chunk, costs[:, UNTIL_B], costs[:, UNTIL_W]
        moments = np.stack([held.until_b[chunk] * until_b + held.until_w[chunk] * until_w
                            for held in self.tables.held(place.stage)], axis=1)
        return _Rows(rows.static[a] + costs[b, STATIC], np.maximum(rows.transient[a], costs[b, TRANSIENT]),
                     rows.busy[a] + busy_ns(costs, place.times)[b], rows.moments[a] + moments[b],
                     np.hstack([rows.nodes[a], nodes[b, None]]))

    def _thin(self, rows: _Rows) -> _Rows:
        """What fits, the least busy at each memory, at most `MOST_ROWS` of them."""
        memory = rows.static + rows.transient + rows.moments.max(axis=1)
        fits = np.flatnonzero(memory <= self.problem.capacity_bytes)
        kept = fits[staircase(memory[fits], rows.busy[fits])]
        kept = kept[_spread(len(kept))]
        return _Rows(*(column[kept] for column in rows))


def _spread(rows: int) -> Ints:
    """At most `MOST_ROWS` of so many rows, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, min(rows, MOST_ROWS)).round().astype(np.int64))


def _stack(a: _Rows, b: _Rows) -> _Rows:
    return _Rows(*(np.concatenate(both) for both in zip(a, b, strict=True)))
