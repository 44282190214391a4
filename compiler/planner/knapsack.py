"""The least weighted time of layers on a stage under its memory: what `bound.py` needs of a stage.

Layers that hold as much for as long, and whose times count as often, are a *pool*; a stage has one per kind of layer,
and one per kind and chunk where it has several chunks. Within a pool only how many layers take which option matters.

    FREE     memory aside: every layer takes its cheapest option
    LINEAR   under the memory, layers divisible: straight lines between options, filled by slope
    WHOLE    as LINEAR, but layers whole where they are few, and the largest transient is that of the options taken:
             for each value that it may have, the options that stay within it have the room that it leaves

Each level is at least as large as the one before and at most the truth. The most frequent kind keeps to one family of
options; the others take what they like.
"""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .tables import BACKWARD, FORWARD, STATIC, TAIL, TRANSIENT, UNTIL_B, UNTIL_W, WEIGHT, Tables

INFINITE = 1 << 62
FREE, LINEAR, WHOLE = range(3)
MOST_EXACT = 1500  # sums of a pool's layers enumerated; above, they stay divisible
MOST_PAIRS = 10_000  # of sums of two pools combined; above, the second one's are divisible
Floats = npt.NDArray[np.float64]
Line = tuple[tuple[float, float], ...]  # (memory, cost) with rising memory and falling cost


class Weights(NamedTuple):
    """How often a path runs each operation of a chunk, and whether it ends with the stage's tail."""

    forward: int
    backward: int
    weight: int
    tail: int


class Pool(NamedTuple):
    """So many layers of a kind that hold that many micro-batches until B and until W."""

    kind: int
    until_b: int
    until_w: int
    weights: Weights
    layers: int


class _Of(NamedTuple):
    """What a pool's numbers come from, layers aside."""

    kind: int
    until_b: int
    until_w: int
    weights: Weights


class _Choice(NamedTuple):
    """One option in a pool: ns, bytes of each layer, bytes while it runs."""

    cost: int
    memory: int
    transient: int


class Knapsack:
    """The stages of one outer tuple; equal questions are answered once."""

    def __init__(self, tables: Tables) -> None:
        self.tables, self.capacity = tables, tables.problem.capacity_bytes
        self.solved = 0  # stages solved under their memory
        self._choices: dict[_Of, tuple[_Choice, ...]] = {}
        self._least: tuple[dict[tuple[Pool, ...], int], ...] = ({}, {}, {})
        self._cheapest: dict[tuple[_Of, tuple[int, ...] | None], _Choice] = {}
        self._cheapest_capped: dict[tuple[_Of, tuple[int, ...] | None, int], _Choice] = {}
        self._different: dict[tuple[int, tuple[int, ...] | None], list[int]] = {}
        self._lines: dict[tuple[_Of, tuple[int, ...] | None, int], Line] = {}
        self._stairs: dict[tuple[_Of, tuple[int, ...] | None, int, int], tuple[Floats, Floats] | None] = {}

    def least(self, pools: tuple[Pool, ...], level: int = WHOLE) -> int:
        """ns at that level; `INFINITE` when the pools' layers don't fit the stage."""
        found = self._least[level].get(pools)
        if found is None:
            found = self._least[level][pools] = self._free(pools) if level == FREE else self._solve(pools, level)
        return found

    def _free(self, pools: tuple[Pool, ...]) -> int:
        return sum(pool.layers * self.cheapest(_Of(*pool[:4]), None).cost for pool in pools)

    def _solve(self, pools: tuple[Pool, ...], level: int) -> int:
        self.solved += 1
        totals: dict[int, int] = {}
        for pool in pools:
            totals[pool.kind] = totals.get(pool.kind, 0) + pool.layers
        if not totals:
            return 0
        major = max(totals, key=lambda kind: totals[kind])
        others = [(_Of(*pool[:4]), None, pool.layers) for pool in pools if pool.kind != major]
        own = [(_Of(*pool[:4]), pool.layers) for pool in pools if pool.kind == major]
        least = sum(n * self.cheapest(of, None).cost for of, _, n in others)
        families = sorted((least + sum(n * self.cheapest(of, family).cost for of, n in own), family)
                          for family in self.tables.families[major])
        best, promising = math.inf, list[tuple[float, int, tuple[int, ...]]]()
        for free, family in families:
            if free >= best:
                break
            linear = self._within([*((of, family, n) for of, n in own), *others], free, math.inf, LINEAR)
            promising.append((linear, free, family))
            best = min(best, linear) if level == LINEAR else best
        for linear, free, family in sorted(promising) if level == WHOLE else ():
            if linear >= best:
                break
            best = min(best, self._within([*((of, family, n) for of, n in own), *others], free, best, level))
        return INFINITE if best == math.inf else max(0, math.ceil(best * (1 - 1e-12) - 1e-6))

    def _within(self, parts: list[tuple[_Of, tuple[int, ...] | None, int]], free: int, below: float,
                level: int) -> float:
        """The least cost of (pool, options, layers), or anything from `below` on. `free`: memory aside."""
        cheapest = [(self.cheapest(of, ids), n) for of, ids, n in parts]
        if sum(n * c.memory for c, n in cheapest) + max(c.transient for c, _ in cheapest) <= self.capacity:
            return free
        transients = [self._transients(of, ids) for of, ids, _ in parts]
        least = max(own[0] for own in transients)
        if level == LINEAR:
            return self._linear(parts, [own[-1] for own in transients], self.capacity - least)
        best = below
        for largest in sorted({t for own in transients for t in own if t >= least}, reverse=True):
            caps = [own[bisect.bisect_right(own, largest) - 1] for own in transients]
            if sum(n * self._capped(of, ids, cap).cost for (of, ids, n), cap in zip(parts, caps, strict=True)) >= best:
                break  # fewer options only cost more
            if self._linear(parts, caps, self.capacity - largest) < best:
                best = min(best, self._together(parts, caps, self.capacity - largest))
        return best if best < below else math.inf

    def among(self, parts: list[tuple[Pool, tuple[int, ...]]]) -> float:
        """The least time of pools under their memory, transients aside, each with these options only."""
        own: list[tuple[_Of, tuple[int, ...] | None, int]] = [(_Of(*pool[:4]), ids, pool.layers) for pool, ids in parts]
        most = [self._transients(of, ids)[-1] for of, ids, _ in own]
        return self._linear(own, most, self.capacity)

    def shared(self, pools: tuple[Pool, ...], stages: int) -> int:
        """The least time of layers that so many stages share out in any way, layers divisible, families free."""
        parts: list[tuple[_Of, tuple[int, ...] | None, int]] = [(_Of(*pool[:4]), None, pool.layers) for pool in pools]
        if not parts:
            return 0
        cheapest = [(self.cheapest(of, None), n) for of, _, n in parts]
        transients = [self._transients(of, None) for of, _, _ in parts]
        room = stages * (self.capacity - min(own[0] for own in transients))
        free = sum(n * c.cost for c, n in cheapest)
        if sum(n * c.memory for c, n in cheapest) <= room:
            return free
        best = self._linear(parts, [own[-1] for own in transients], room)
        return INFINITE if best == math.inf else max(free, math.ceil(best * (1 - 1e-12) - 1e-6))

    # -- options of a pool --------------------------------------------------------------------------
    def choices(self, of: _Of) -> tuple[_Choice, ...]:
        """All options, in the tables' order."""
        found = self._choices.get(of)
        if found is None:
            w, kept = of.weights, []
            for row in self.tables.rows[of.kind]:
                cost = (w.forward * row[FORWARD] + w.backward * row[BACKWARD] + w.weight * row[WEIGHT]
                        + w.tail * row[TAIL])
                memory = row[STATIC] + of.until_b * row[UNTIL_B] + of.until_w * row[UNTIL_W]
                kept.append(_Choice(cost, memory, row[TRANSIENT]))
            found = self._choices[of] = tuple(kept)
        return found

    def costs(self, kind: int, weights: Weights) -> list[int]:
        """Weighted time of every option."""
        return [choice.cost for choice in self.choices(_Of(kind, 0, 0, weights))]

    def _some(self, of: _Of, ids: tuple[int, ...] | None, cap: int | None = None) -> list[_Choice]:
        all_ = self.choices(of)
        some = all_ if ids is None else [all_[i] for i in ids]
        return [c for c in some if cap is None or c.transient <= cap]

    def cheapest(self, of: _Of, ids: tuple[int, ...] | None) -> _Choice:
        """Of those options; of equally cheap ones the one that holds least."""
        found = self._cheapest.get((of, ids))
        if found is None:
            found = self._cheapest[of, ids] = min(self._some(of, ids))
        return found

    def _capped(self, of: _Of, ids: tuple[int, ...] | None, cap: int) -> _Choice:
        key = of, ids, cap
        if key not in self._cheapest_capped:
            self._cheapest_capped[key] = min(self._some(of, ids, cap))
        return self._cheapest_capped[key]

    def _transients(self, of: _Of, ids: tuple[int, ...] | None) -> list[int]:
        """Rising."""
        key = of.kind, ids
        if key not in self._different:
            self._different[key] = sorted({c.transient for c in self._some(of, ids)})
        return self._different[key]

    # -- layers that share the options out --------------------------------------------------------------
    def _linear(self, parts: list[tuple[_Of, tuple[int, ...] | None, int]], caps: list[int], room: int) -> float:
        """The least total cost within `room`, layers divisible, no transient above its cap."""
        at, value = _filled([(self._line(of, ids, cap), n) for (of, ids, n), cap in zip(parts, caps, strict=True)])
        if at[0] > room:
            return math.inf
        last = bisect.bisect_right(at, room) - 1
        if last + 1 == len(at):
            return value[-1]
        return value[last] + (room - at[last]) * (value[last + 1] - value[last]) / (at[last + 1] - at[last])

    def _together(self, parts: list[tuple[_Of, tuple[int, ...] | None, int]], caps: list[int], room: int) -> float:
        """The least total cost within `room`, no transient above its cap: whole layers point by point, divisible ones
        by slope."""
        lines: list[tuple[Line, int]] = []
        memory, cost = np.zeros(1), np.zeros(1)
        for (of, ids, n), cap in zip(parts, caps, strict=True):
            stairs = self._whole(of, ids, cap, n)
            if stairs is None or len(memory) * len(stairs[0]) > MOST_PAIRS:
                lines.append((self._line(of, ids, cap), n))
                continue
            memory, cost = _stairs((memory[:, None] + stairs[0]).ravel(), (cost[:, None] + stairs[1]).ravel())
            fits = memory <= room
            memory, cost = memory[fits], cost[fits]
            if not len(memory):
                return math.inf
        if not lines:
            return float(cost.min())
        at, value = _filled(lines)
        left = room - memory
        fits = left >= at[0]
        return float((cost[fits] + np.interp(left[fits], at, value)).min()) if fits.any() else math.inf

    def _line(self, of: _Of, ids: tuple[int, ...] | None, cap: int) -> Line:
        """Of one layer: the lower hull of its options."""
        key = of, ids, cap
        if key not in self._lines:
            groups = self.tables.families[of.kind] if ids is None else (ids,)
            self._lines[key] = _hull(_staircase([c for g in groups for c in self._some(of, g, cap)]))
        return self._lines[key]

    def _whole(self, of: _Of, ids: tuple[int, ...] | None, cap: int, count: int) -> tuple[Floats, Floats] | None:
        """Sums of `count` layers that keep to one family; None where there are too many."""
        key = of, ids, cap, count
        if key not in self._stairs:
            groups = self.tables.families[of.kind] if ids is None else (ids,)
            steps = [_staircase(self._some(of, g, cap)) for g in groups]
            self._stairs[key] = None
            if all(math.comb(count + len(own) - 1, max(0, len(own) - 1)) <= MOST_EXACT for own in steps):
                sums = [_sums(own, count) for own in steps if own]
                self._stairs[key] = _stairs(np.concatenate([m for m, _ in sums]), np.concatenate([c for _, c in sums]))
        return self._stairs[key]


def _staircase(choices: list[_Choice]) -> list[tuple[int, int]]:
    """(memory, cost) of the options that no other one is below in both, by rising memory."""
    found: list[tuple[int, int]] = []
    for memory, cost in sorted((c.memory, c.cost) for c in choices):
        if not found or cost < found[-1][1]:
            found.append((memory, cost))
    return found


def _hull(points: list[tuple[int, int]]) -> Line:
    found: list[tuple[int, int]] = []
    for m, c in points:
        while len(found) > 1 and (found[-1][1] - found[-2][1]) * (m - found[-2][0]) >= (
                c - found[-2][1]) * (found[-1][0] - found[-2][0]):
            found.pop()
        found.append((m, c))
    return tuple(found)


def _filled(lines: list[tuple[Line, int]]) -> tuple[list[float], list[float]]:
    """The least cost of all lines together, each taken so many times, as corners: memory and cost."""
    pieces = [(n * (b[0] - a[0]), n * (b[1] - a[1])) for line, n in lines for a, b in zip(line, line[1:], strict=False)]
    pieces.sort(key=lambda piece: piece[1] / piece[0])
    at, value = [sum(n * line[0][0] for line, n in lines)], [sum(n * line[0][1] for line, n in lines)]
    for m, c in pieces:
        at.append(at[-1] + m)
        value.append(value[-1] + c)
    return at, value


def _sums(points: list[tuple[int, int]], count: int) -> tuple[Floats, Floats]:
    """The undominated sums of `count` layers that each take one of the points."""
    memory, cost = np.zeros(1), np.zeros(1)
    own_memory, own_cost = np.array([m for m, _ in points], float), np.array([c for _, c in points], float)
    powers: list[tuple[Floats, Floats]] = [(own_memory, own_cost)]
    while 2 ** len(powers) <= count:
        m, c = powers[-1]
        powers.append(_stairs((m[:, None] + m).ravel(), (c[:, None] + c).ravel()))
    for bit, (m, c) in enumerate(powers):
        if count >> bit & 1:
            memory, cost = _stairs((memory[:, None] + m).ravel(), (cost[:, None] + c).ravel())
    return memory, cost


def _stairs(memory: Floats, cost: Floats) -> tuple[Floats, Floats]:
    order = np.lexsort((cost, memory))
    rising: Floats = memory[order]
    falling: Floats = np.minimum.accumulate(cost[order])
    first = np.append(True, falling[1:] < falling[:-1])
    return rising[first], falling[first]
