"""Lower bounds on J for one outer tuple, from the tables alone: no dominance, no incumbents, nothing of the search.

Every path through the schedule's order is a lower bound on the step. Three go through stage s, with all its operations:

    a   forwards reach s · all operations of s · its tail
    b   forwards reach s · all operations of s up to its last B · backwards return to stage 0 · its tail
    c   one micro-batch forward through all stages and back to s · what s has left · as b (GPipe: all of s)

Layers outside of s enter with their least times, whatever stage they are on, so the rest of a path depends only on
where s starts and ends: f_s(i, j) is the longest path with layers i to j-1 on stage s. Its least value is a knapsack:
the least weighted time of those layers under the stage's memory, families respected for the most frequent kind, exact
in integers for short runs, a linear relaxation for long ones. f_s falls with i and rises with j, so whether all stages
can stay within U is decided by letting each stage take as many layers as it can (`reaches`), and the bound is the least
U that passes, by bisection.

Interleaved: a stage's chunks are v separate stretches; where they start is known up to the parts that are one longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, combinations, product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .problem import Outer, Problem, part_sizes
from .tables import BACKWARD, FORWARD, STATIC, TAIL, TRANSIENT, UNTIL_B, UNTIL_W, WEIGHT, Ints, Tables

INFINITE = 1 << 62
MOST_EXACT = 1500  # sums of a run enumerated; above, its linear relaxation
MOST_PAIRS = 10_000  # of sums of two runs combined; above, the relaxation again
Floats = npt.NDArray[np.float64]

Content = tuple[tuple[tuple[int, int], ...], ...]  # per chunk: (kind, layers) pairs
_Pools = tuple[tuple[int, int, int, int], ...]  # (kind, micro-batches held until B, until W, layers)


class Weights(NamedTuple):
    """How often a path runs each operation of the stage, and whether it ends with the stage's tail."""

    forward: int
    backward: int
    weight: int
    tail: int


class _Run(NamedTuple):
    """The least cost of equal layers by memory: a staircase of points, or (convex) straight lines between them."""

    memory: Floats
    cost: Floats
    convex: bool


class Bound:
    """Bounds for one outer tuple. Raises nothing: a tuple in which nothing fits has bound `INFINITE`."""

    def __init__(self, problem: Problem, outer: Outer) -> None:
        self.problem, self.outer, self.tables = problem, outer, Tables(problem, outer)
        self.layers, self.count = problem.layers, len(problem.layers)
        self.open = self.count >= outer.parts and all(len(self.tables.options[kind]) for kind in set(self.layers))
        if not self.open:
            return
        self.forward, self.turn = self._prefix(FORWARD), self._prefix(FORWARD, BACKWARD)
        self.tail = self._prefix(WEIGHT, TAIL)  # W is 0 where the backward is not split
        self.work = self._prefix(FORWARD, BACKWARD, WEIGHT)[-1]
        self.send_forward = min(t.forward_ns for row in outer.transfer for t in row)
        self.send_turn = min(t.forward_ns + t.backward_ns for row in outer.transfer for t in row)
        kinds = range(len(problem.kinds))
        self.counts = np.concatenate([np.zeros((1, len(kinds)), np.int64), np.cumsum(
            np.array(self.layers)[:, None] == np.array(kinds)[None, :], axis=0)])
        self._least: dict[tuple[int, Content, Weights], int] = {}
        self._pooled: dict[tuple[_Pools, Weights], int] = {}
        self._paths: dict[int, list[int | None]] = {}  # interleaved: by stage
        self._chunks: dict[int, list[list[int]]] = {}  # interleaved: chunks of a stage that are alike
        self._run_of: dict[tuple[int, int, int, int, Weights, tuple[int, ...] | None], _Run] = {}

    def _prefix(self, *columns: int) -> list[int]:
        """The least sums of these columns over the first layers, none, one, two, …"""
        least = [int(t[:, columns].sum(axis=1).min()) if len(t) else 0 for t in self.tables.options]
        return list(accumulate((least[kind] for kind in self.layers), initial=0))

    def quick(self) -> int:
        """A bound in no time, without memory: the busiest stage has at least the mean of the work."""
        return -(-self.outer.m * self.work // self.outer.p) if self.open else INFINITE

    def reaches(self, limit: int) -> bool:
        """Whether a plan of at most `limit` ns may exist; False proves that there is none."""
        if not self.open:
            return False
        if self.outer.v > 1:
            return self._reaches_interleaved(limit)
        starts = self._starts(limit)
        if starts[0] > 0:
            return False
        return self.outer.p == 1 or self._ends(limit, self.tail[max(1, starts[1])])[-1] == self.count

    def lower_bound(self, below: int = INFINITE, relative: float = 1e-4, known: int = 0) -> int:
        """No plan of the tuple takes less time than this or `below`, whichever is smaller. Bisection starts from a
        bound already `known` and stops at the `relative` width."""
        low = max(1, known, self.quick())
        if low >= below or (below < INFINITE and not self.reaches(below - 1)):
            return below
        if below == INFINITE and not self.fits():
            return INFINITE
        high, step = low, 1 + low // 32
        while not self.reaches(high):
            low, high, step = high + 1, high + step, 2 * step
        while high - low > relative * low:
            middle = (low + high) // 2
            if self.reaches(middle):
                high = middle
            else:
                low = middle + 1
        return low

    def fits(self) -> bool:
        """Whether the bound leaves room for any plan; False proves that nothing fits."""
        return self.open and self.reaches(INFINITE - 1)

    def windows(self, limit: int) -> tuple[list[int], list[int]]:
        """Where each stage (v = 1) may start in a plan of at most `limit` ns: first and last layer."""
        tail = self.tail[1]
        return self._starts(limit), self._ends(limit, tail)

    def _ends(self, limit: int, tail: int) -> list[int]:
        """The most layers that stages 0 to s take together, each within the limit. `tail` is stage 0's at least."""
        ends, p = [0], self.outer.p
        for stage in range(p):
            start, most = ends[-1], self.count - (p - 1 - stage)
            guess = start + (ends[-1] - ends[-2] if stage > 1 else max(1, self.count // p))
            ends.append(_last_true(partial(self._takes, stage, start, tail, limit), start, most, guess))
        return ends

    def _starts(self, limit: int) -> list[int]:
        """The fewest layers that stages 0 to s-1 must have taken for the others to stay within the limit."""
        starts, p, tail = [self.count], self.outer.p, self.tail[1]
        for stage in reversed(range(p)):
            end = starts[-1]
            starts.append(end - _last_true(partial(self._ends_with, stage, end, tail, limit), 0, max(0, end - stage),
                                           max(1, self.count // p)))
        return starts[::-1]

    def _takes(self, stage: int, start: int, tail: int, limit: int, end: int) -> bool:
        return self._path(stage, start, end, tail) <= limit

    def _ends_with(self, stage: int, end: int, tail: int, limit: int, layers: int) -> bool:
        return self._path(stage, end - layers, end, tail) <= limit

    def _path(self, s: int, i: int, j: int, tail: int) -> int:
        """f_s(i, j): the longest of the paths a, b and c; `tail` is what stage 0 has left after its last B."""
        outer, m = self.outer, self.outer.m
        content = self.content([(i, j)])
        split = outer.order.splits_backward
        before_last = max(0, m - s - 1) if split else 0  # weight gradients that precede the last B
        if outer.schedule == "gpipe":
            around = self.turn[i] + self.turn[-1] - self.turn[j] + (outer.p - 1) * self.send_turn
            arrive = self.forward[i] + self.turn[-1] - self.turn[j] + s * self.send_forward \
                + (outer.p - 1 - s) * self.send_turn
            return max(arrive + self.least(s, content, Weights(m, m, 0, 1)),
                       around + tail + self.least(s, content, Weights(m, m, 0, 0)))
        a = self.forward[i] + s * self.send_forward + self.least(s, content, Weights(m, m, m if split else 0, 1))
        b = self.turn[i] + s * self.send_turn + tail + self.least(s, content, Weights(m, m, before_last, 0))
        again = Weights(1 + max(0, m - outer.p + s), m, before_last, 0)
        c = self.turn[i] + self.turn[-1] - self.turn[j] + (outer.p - 1) * self.send_turn + tail \
            + self.least(s, content, again)
        return max(a, b, c)

    def content(self, spans: Sequence[tuple[int, int]]) -> Content:
        """How many layers of each kind lie in each of these stretches."""
        rows = [self.counts[j] - self.counts[i] for i, j in spans]
        return tuple(tuple((int(k), int(row[k])) for k in np.flatnonzero(row)) for row in rows)

    # -- interleaved ----------------------------------------------------------------------------------
    def _reaches_interleaved(self, limit: int) -> bool:
        """Every stage has v parts of `low` layers and some one more: how many more can all stages together hold?"""
        low, _ = part_sizes(self.count, self.outer)
        longer = self.count - low * self.outer.parts
        held = 0
        for stage in range(self.outer.p):
            most = None
            for n, path in enumerate(self._longer_parts(stage, low, longer)):
                if path is not None:
                    if path > limit:
                        break
                    most = n
            if most is None:
                return False
            held += most
        return held >= longer

    def _longer_parts(self, stage: int, low: int, longer: int) -> Iterator[int | None]:
        """The least path with none, one, two, … parts of the stage longer; None where no cuts are like that."""
        found = self._paths.setdefault(stage, [])
        for n in range(min(self.outer.v, longer) + 1):
            if n == len(found):
                paths = [path for extra in self._longer_choices(stage, low, longer, n)
                         if (path := self._interleaved_path(stage, low, longer, extra)) is not None]
                found.append(min(paths, default=None))
            yield found[n]

    def _longer_choices(self, stage: int, low: int, longer: int, n: int) -> Iterator[tuple[int, ...]]:
        """Which n chunks of the stage are longer, up to chunks that hold as much and contain as much."""
        if stage not in self._chunks:
            held = max(self.tables.held(stage), key=lambda h: sum(h.until_b) + sum(h.until_w))
            alike: dict[object, list[int]] = {}
            for chunk in range(self.outer.v):
                rows = tuple(self._fewest(stage, chunk, low, longer, own) for own in (0, 1))
                alike.setdefault((held.until_b[chunk], held.until_w[chunk], rows), []).append(chunk)
            self._chunks[stage] = list(alike.values())
        groups = self._chunks[stage]
        for counts in product(*(range(min(n, len(g)) + 1) for g in groups)):
            if sum(counts) == n:
                yield tuple(chunk for g, k in zip(groups, counts, strict=True) for chunk in g[:k])

    def _fewest(self, stage: int, chunk: int, low: int, longer: int, own: int) -> tuple[tuple[int, int], ...] | None:
        """The least number of layers of each kind in a chunk, `own` 1 for a longer one; None where it can't be that."""
        part = chunk * self.outer.p + stage
        after = self.outer.parts - part - 1  # of the other longer parts, as many as fit may come before this one
        starts = range(part * low + max(0, longer - own - after), part * low + min(part, longer - own) + 1)
        windows = [self.counts[i + low + own] - self.counts[i] for i in starts]
        if not windows:
            return None
        row = np.min(windows, axis=0)
        return tuple((int(k), int(row[k])) for k in np.flatnonzero(row))

    def _interleaved_path(self, s: int, low: int, longer: int, extra: tuple[int, ...]) -> int | None:
        """The longest of the paths a and b with these chunks one longer; None where no cuts are like that."""
        m = self.outer.m
        chunks = [self._fewest(s, chunk, low, longer, int(chunk in extra)) for chunk in range(self.outer.v)]
        content, start = tuple(c for c in chunks if c is not None), s * low
        if len(content) < len(chunks):
            return None
        a = self.forward[start] + s * self.send_forward + self.least(s, content, Weights(m, m, 0, 1))
        b = self.turn[start] + s * self.send_turn + self.tail[1] + self.least(s, content, Weights(m, m, 0, 0))
        return max(a, b)

    # -- the knapsack of a stage ----------------------------------------------------------------------
    def least(self, stage: int, content: Content, weights: Weights) -> int:
        """The least weighted time of these layers on the stage under its memory; `INFINITE` when they don't fit."""
        key = stage, content, weights
        if key not in self._least:
            self._least[key] = self._solve(stage, content, weights)
        return self._least[key]

    def _solve(self, stage: int, content: Content, weights: Weights) -> int:
        held = max(self.tables.held(stage), key=lambda h: sum(h.until_b) + sum(h.until_w))
        pooled: dict[tuple[int, int, int], int] = {}  # chunks that hold as much are as one
        for chunk, pairs in enumerate(content):
            for kind, n in pairs:
                key = kind, held.until_b[chunk], held.until_w[chunk]
                pooled[key] = pooled.get(key, 0) + n
        pools = tuple(sorted((*key, n) for key, n in pooled.items()))
        if (pools, weights) not in self._pooled:
            self._pooled[pools, weights] = self._solve_pools(pools, weights)
        return self._pooled[pools, weights]

    def _solve_pools(self, pools: _Pools, weights: Weights) -> int:
        totals: dict[int, int] = {}
        for kind, _, _, n in pools:
            totals[kind] = totals.get(kind, 0) + n
        if not totals:
            return 0
        major = max(totals, key=lambda kind: totals[kind])
        least = {kind: self.costs(kind, weights) for kind in totals}
        others = sum(n * int(least[kind].min()) for kind, n in totals.items() if kind != major)
        families = sorted((totals[major] * int(least[major][list(family)].min()) + others, family)
                          for family in self.tables.families[major])
        best = math.inf
        for without_memory, family in families:
            if without_memory >= best:
                break
            room = self.problem.capacity_bytes - max(
                int(self.tables.options[kind][list(family) if kind == major else slice(None), TRANSIENT].min())
                for kind in totals)
            parts = [self._runs(kind, n, until_b, until_w, weights, family if kind == major else None)
                     for kind, until_b, until_w, n in pools]
            best = min(best, _least_together(parts, room))
        return INFINITE if best == math.inf else max(0, math.ceil(best * (1 - 1e-12) - 1e-6))

    def least_among(self, parts: Sequence[tuple[int, int, tuple[int, ...]]]) -> float:
        """The least busy time of (kind, layers, options) under the memory of stage 0; infinite when they don't fit."""
        held = max(self.tables.held(0), key=lambda h: sum(h.until_b) + sum(h.until_w))
        weights = Weights(self.outer.m, self.outer.m, self.outer.m, 1)
        runs = [self._runs(kind, n, round(sum(held.until_b) / self.outer.v), round(sum(held.until_w) / self.outer.v),
                           weights, ids) for kind, n, ids in parts]
        return _least_together(runs, self.problem.capacity_bytes)

    def costs(self, kind: int, weights: Weights) -> Ints:
        """Weighted time of every option."""
        found: Ints = self.tables.options[kind][:, [FORWARD, BACKWARD, WEIGHT, TAIL]] @ np.array(weights)
        return found

    def _runs(self, kind: int, count: int, until_b: int, until_w: int, weights: Weights,
              family: tuple[int, ...] | None) -> _Run:
        key = kind, count, until_b, until_w, weights, family
        if key not in self._run_of:
            table = self.tables.options[kind]
            cost = self.costs(kind, weights)
            memory = table[:, STATIC] + until_b * table[:, UNTIL_B] + until_w * table[:, UNTIL_W]
            groups = self.tables.families[kind] if family is None else (family,)
            self._run_of[key] = _union([_run(memory[list(g)], cost[list(g)], count) for g in groups])
        return self._run_of[key]


def _run(memory: Ints, cost: Ints, count: int) -> _Run:
    """`count` equal layers that share out the options given."""
    if math.comb(count + len(memory) - 1, len(memory) - 1) <= MOST_EXACT:
        ways = _ways(count, len(memory))
        return _Run(*_stairs(ways @ memory, ways @ cost), False)
    return _hull(count * memory.astype(float), count * cost.astype(float))


def _union(found: list[_Run]) -> _Run:
    """The best of several: of straight lines their common lower hull, which may only be less."""
    if len(found) == 1:
        return found[0]
    memory, cost = np.concatenate([r.memory for r in found]), np.concatenate([r.cost for r in found])
    return _hull(memory, cost) if any(r.convex for r in found) else _Run(*_stairs(memory, cost), False)


def _least_together(found: list[_Run], room: int) -> float:
    """The least total cost within `room`: staircases combined point by point, straight lines by slope."""
    memory, cost = np.zeros(1), np.zeros(1)
    convex = [r for r in found if r.convex]
    for run in (r for r in found if not r.convex):
        if len(memory) * len(run.memory) > MOST_PAIRS:
            convex.append(_hull(run.memory, run.cost))
            continue
        memory, cost = _stairs((memory[:, None] + run.memory).ravel(), (cost[:, None] + run.cost).ravel())
        fits = memory <= room
        memory, cost = memory[fits], cost[fits]
        if not len(memory):
            return math.inf
    if not convex:
        return float(cost.min())
    pieces = [(float(dm), float(dc)) for r in convex for dm, dc in zip(np.diff(r.memory), np.diff(r.cost), strict=True)]
    pieces.sort(key=lambda piece: piece[1] / piece[0])
    at = np.cumsum([sum(float(r.memory[0]) for r in convex), *(m for m, _ in pieces)])
    value = np.cumsum([sum(float(r.cost[0]) for r in convex), *(c for _, c in pieces)])
    left = room - memory
    fits = left >= at[0]
    return float((cost[fits] + np.interp(left[fits], at, value)).min()) if fits.any() else math.inf


def _stairs(memory: Ints | Floats, cost: Ints | Floats) -> tuple[Floats, Floats]:
    order = np.lexsort((cost, memory))
    rising: Floats = memory[order].astype(float)
    falling: Floats = np.minimum.accumulate(cost[order].astype(float))
    first = np.append(True, falling[1:] < falling[:-1])
    return rising[first], falling[first]


def _hull(memory: Floats, cost: Floats) -> _Run:
    points: list[tuple[float, float]] = []
    for m, c in zip(*_stairs(memory, cost), strict=True):
        while len(points) > 1 and (points[-1][1] - points[-2][1]) * (m - points[-2][0]) >= (
                c - points[-2][1]) * (points[-1][0] - points[-2][0]):
            points.pop()
        points.append((float(m), float(c)))
    return _Run(np.array([m for m, _ in points]), np.array([c for _, c in points]), True)


@lru_cache(maxsize=512)
def _ways(count: int, options: int) -> Ints:
    """Every way to share `count` out among options: the positions of bars between stars."""
    placed = list(combinations(range(count + options - 1), options - 1))
    bars = np.array(placed, dtype=np.int64).reshape(len(placed), options - 1)
    edges = np.hstack([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), count + options - 1)])
    ways: Ints = np.diff(edges, axis=1) - 1
    return ways


def _last_true(holds: Callable[[int], bool], low: int, high: int, guess: int) -> int:
    """The largest n in [low, high] with holds(n), which is true up to some n and then false; low when none is."""
    good, bad, step = low, high + 1, 1
    probe = min(max(guess, low + 1), high)
    while good + 1 < bad:
        if holds(probe):
            good = probe
            probe = min(good + step, bad - 1) if bad > good + step else (good + bad) // 2
        else:
            bad = probe
            probe = max(bad - step, good + 1) if bad - step > good else (good + bad) // 2
        step *= 2
    return good
