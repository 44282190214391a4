"""Lower bounds on J for one outer tuple, from the tables alone: no dominance, no incumbents, nothing of the search.

Every path through the schedule's order is a lower bound on the step. These go through stage s, with all or most of its
operations (v = 1; `interleaved_bound.py` has those of several chunks):

    a   forwards reach s · all operations of s · its tail
    b   forwards reach s · all operations of s up to its last B · backwards return to stage 0 · its tail
    c   a micro-batch goes from s to the last stage and back; the one that s starts right after it does so, too; … ·
        what s then has left · as b (GPipe: once, and all of s)

Layers outside of s enter with their least times, whatever stage they are on, so the rest of a path depends only on
where s starts and ends: f_s(i, j) is the longest path with layers i to j-1 on stage s. Its least value is a knapsack
(`knapsack.py`), taken at three levels, the cheapest first. f_s falls with i and rises with j, so whether all stages can
stay within U is decided by letting each stage take as many layers as it can (`reaches`), and the bound is the least U
that passes, by bisection. Where that leaves few places for every cut, these are gone through from the first stage on
(`CHAINED`): what comes before a stage is then the least that stages with their own memory can take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from ...cost_model.in_flight import Held
from .interleaved_bound import Interleaved
from .knapsack import FREE, INFINITE, LINEAR, WHOLE, Knapsack, Pool, Weights
from .problem import Outer, Problem
from .tables import BACKWARD, FORWARD, TAIL, WEIGHT, Tables

CHAINED = WHOLE + 1
LEVELS = (FREE, LINEAR, WHOLE, CHAINED)
MOST_SPANS = 2000  # of layers that stages may have, looked at one after the other

Content = tuple[tuple[tuple[int, int], ...], ...]  # per chunk: (kind, layers) pairs


class _Path(NamedTuple):
    """A path through stage s of v = 1. Before s: forwards, and with `returns` backwards and what stage 0 then has left;
    after s: `loops` times there and back; `sends_ns` for all transfers; on s itself `weights`."""

    returns: bool
    loops: int
    sends_ns: int
    weights: Weights


class _Before(NamedTuple):
    """The least time there and back through the first `layers` layers, with what stage 0 has left at the end."""

    layers: int
    least_ns: int


class Bound:
    """Bounds for one outer tuple. Raises nothing: a tuple in which nothing fits has bound `INFINITE`."""

    def __init__(self, problem: Problem, outer: Outer) -> None:
        self.problem, self.outer, self.tables = problem, outer, Tables(problem, outer)
        self.layers, self.count = problem.layers, len(problem.layers)
        self.open = self.count >= outer.parts and all(len(self.tables.rows[kind]) for kind in set(self.layers))
        if not self.open:
            return
        self.knapsack = Knapsack(self.tables)
        self.forward, self.turn = self._prefix(FORWARD), self._prefix(FORWARD, BACKWARD)
        self.ends_first = self._prefix(FORWARD, BACKWARD, WEIGHT, TAIL)  # W is 0 where the backward is not split
        self.work = self._prefix(FORWARD, BACKWARD, WEIGHT)[-1]
        self.send_forward = min(t.forward_ns for row in outer.transfer for t in row)
        self.send_turn = min(t.forward_ns + t.backward_ns for row in outer.transfer for t in row)
        self.kinds = tuple(dict.fromkeys(self.layers))
        self.before = {kind: list(accumulate((int(kind == own) for own in self.layers), initial=0))
                       for kind in self.kinds}
        self._prefixes: dict[tuple[int, int, int], int] = {}
        self._fullest: dict[int, Held] = {}
        self._stage_paths: dict[int, tuple[_Path, ...]] = {}
        self._interleaved = Interleaved(self) if outer.v > 1 else None

    def _prefix(self, *columns: int) -> list[int]:
        """The least sums of these columns over the first layers, none, one, two, …"""
        least = self.least_of(*columns)
        return list(accumulate((least[kind] for kind in self.layers), initial=0))

    def least_of(self, *columns: int) -> list[int]:
        """The least sum of these columns, by kind."""
        return [min((sum(row[c] for c in columns) for row in rows), default=0) for rows in self.tables.rows]

    def quick(self) -> int:
        """A bound in no time, without memory: the busiest stage has at least the mean of the work."""
        return -(-self.outer.m * self.work // self.outer.p) if self.open else INFINITE

    def reaches(self, limit: int, last: int = CHAINED) -> bool:
        """Whether a plan of at most `limit` ns may exist; False proves that there is none. `last`: the finest level."""
        return self.open and all(self._reaches(limit, level) for level in LEVELS if level <= last)

    def _reaches(self, limit: int, level: int) -> bool:
        if level == FREE and limit >= INFINITE - 1:
            return True  # only memory may be in the way
        if self._interleaved is not None:
            return level == CHAINED or self._interleaved.reaches(limit, level)
        if level == CHAINED:
            return self.outer.p == 1 or self._chains(limit)
        starts = self._starts(limit, level)
        if starts[0] > 0:
            return False
        return self.outer.p == 1 or self._ends(limit, self._befores(starts, level), level)[-1] == self.count

    def lower_bound(self, below: int = INFINITE, relative: float = 1e-4, known: int = 0, last: int = CHAINED) -> int:
        """No plan of the tuple takes less time than this or `below`, whichever is smaller. Bisection starts from a
        bound already `known` and stops at the `relative` width. `last`: the finest level."""
        low = max(1, known, self.quick())
        if low >= below or (below < INFINITE and not self.reaches(below - 1, last)):
            return below
        if below == INFINITE and not self.fits():
            return INFINITE
        for level in LEVELS[:last + 1]:
            low = self._least_reached(low, relative, level)
        return min(low, below)

    def _least_reached(self, low: int, relative: float, level: int) -> int:
        if self._reaches(low, level):
            return low
        low, high, step = low + 1, low + 1 + low // 32, 1 + low // 32
        while not self._reaches(high, level):
            low, step = high + 1, 2 * step
            high += step
        while high - low > relative * low:
            middle = (low + high) // 2
            if self._reaches(middle, level):
                high = middle
            else:
                low = middle + 1
        return low

    def fits(self) -> bool:
        """Whether the bound leaves room for any plan; False proves that nothing fits."""
        return self.open and self.reaches(INFINITE - 1)

    def windows(self, limit: int) -> tuple[list[int], list[int]]:
        """Where each stage (v = 1) may start in a plan of at most `limit` ns: first and last layer."""
        starts = self._starts(limit, WHOLE)
        return starts, self._ends(limit, self._befores(starts, WHOLE), WHOLE)

    def _befores(self, starts: Sequence[int], level: int) -> list[_Before]:
        """What a micro-batch takes there and back before each stage, where at least `starts[s]` layers lie, and on
        stage 0 what is left after its last B. Together these stages have so many times the capacity."""
        own = max(1, starts[1]) if self.outer.p > 1 else 1
        found = [_Before(0, 0)]
        for s in range(1, self.outer.p):
            least = self.ends_first[own] + self.turn[max(own, starts[s])] - self.turn[own]
            if level > FREE:
                least = max(least, self._together(s, own, max(own, starts[s])))
            found.append(_Before(max(own, starts[s]), least))
        return found

    def _chains(self, limit: int) -> bool:
        """Whether any cuts are left when those of one stage decide on what comes before the next one."""
        p, split = self.outer.p, int(self.outer.order.splits_backward)
        first, last = self.windows(limit)
        if sum((last[s] - first[s] + 1) * (last[s + 1] - first[s + 1] + 1) for s in range(p)) > MOST_SPANS:
            return True
        reached = {0: 0}
        for s in range(p):
            once, following = Weights(1, 1, 0, 0) if s else Weights(1, 1, split, 1), dict[int, int]()
            for i, least in reached.items():
                for j in range(max(i + 1, first[s + 1]), last[s + 1] + 1):
                    if not self._takes(s, i, _Before(i, least), limit, WHOLE, j):
                        break
                    ns = least + self._busy(s, self._own(i, j), once, WHOLE)
                    following[j] = min(ns, following.get(j, ns))
            reached = following
        return self.count in reached

    def _together(self, s: int, own: int, end: int) -> int:
        key = s, own, end
        if key not in self._prefixes:
            held, tail = self.fullest(s - 1), Weights(1, 1, int(self.outer.order.splits_backward), 1)
            until_w = min(self.fullest(r).until_w[0] for r in range(s))
            pools = tuple(Pool(kind, held.until_b[0], until_w, weights, n)
                          for a, b, weights in ((0, own, tail), (own, end, Weights(1, 1, 0, 0)))
                          for kind in self.kinds if (n := self.before[kind][b] - self.before[kind][a]))
            self._prefixes[key] = self.knapsack.shared(pools, s)
        return self._prefixes[key]

    def _ends(self, limit: int, before: Sequence[_Before], level: int) -> list[int]:
        """The most layers that stages 0 to s take together, each within the limit."""
        ends, p = [0], self.outer.p
        for stage in range(p):
            start, most = ends[-1], self.count - (p - 1 - stage)
            guess = start + (ends[-1] - ends[-2] if stage > 1 else max(1, self.count // p))
            ends.append(_last_true(partial(self._takes, stage, start, before[stage], limit, level), start, most, guess))
        return ends

    def _starts(self, limit: int, level: int) -> list[int]:
        """The fewest layers that stages 0 to s-1 must have taken for the others to stay within the limit."""
        starts, p, least = [self.count], self.outer.p, _Before(1, self.ends_first[1])
        for stage in reversed(range(p)):
            end = starts[-1]
            starts.append(end - _last_true(partial(self._ends_with, stage, end, least, limit, level), 0,
                                           max(0, end - stage), max(1, self.count // p)))
        return starts[::-1]

    def _ends_with(self, stage: int, end: int, before: _Before, limit: int, level: int, layers: int) -> bool:
        return self._takes(stage, end - layers, before, limit, level, end)

    def _takes(self, s: int, i: int, before: _Before, limit: int, level: int, j: int) -> bool:
        """Whether f_s(i, j), the longest of the paths, is within the limit."""
        own = self._own(i, j)
        after = self.turn[-1] - self.turn[j]
        returned = before.least_ns + max(0, self.turn[i] - self.turn[before.layers]) if s else 0
        for path in self._paths(s):
            left = limit - path.sends_ns - (returned if path.returns else self.forward[i]) - path.loops * after
            if left < 0 or self._busy(s, own, path.weights, level) > left:
                return False
        return True

    def _own(self, i: int, j: int) -> list[tuple[int, int]]:
        return [(kind, n) for kind in self.kinds if (n := self.before[kind][j] - self.before[kind][i])]

    def _busy(self, s: int, own: Sequence[tuple[int, int]], weights: Weights, level: int) -> int:
        held = self.fullest(s)
        pools = tuple(Pool(kind, held.until_b[0], held.until_w[0], weights, n) for kind, n in own)
        return self.knapsack.least(pools, level)

    def _paths(self, s: int) -> tuple[_Path, ...]:
        if s not in self._stage_paths:
            self._stage_paths[s] = tuple(self._found_paths(s))
        return self._stage_paths[s]

    def _found_paths(self, s: int) -> list[_Path]:
        p, m, split = self.outer.p, self.outer.m, self.outer.order.splits_backward
        there, back, after = s * self.send_forward, s * self.send_turn, (p - 1 - s) * self.send_turn
        ends = int(s == 0)  # with its tail
        if self.outer.schedule == "gpipe":
            return [_Path(False, 1, there + after, Weights(m, m, 0, 1)),
                    _Path(True, 1, back + after, Weights(m, m, 0, ends))]
        before_last = max(0, m - s - 1) if split else 0  # weight gradients that precede the last B
        found = [_Path(False, 0, there, Weights(m, m, m if split else 0, 1))]
        if s:
            found.append(_Path(True, 0, back, Weights(m, m, before_last, 0)))
        ahead = p - s  # micro-batches that s starts before it has one back
        for loops in sorted({1, (m - 1) // ahead + 1}) if s < p - 1 else ():
            started = (loops - 1) * ahead  # the micro-batch of the last loop
            found.append(_Path(True, loops, back + loops * after, Weights(
                loops + max(0, m - loops * ahead), loops + m - 1 - started,
                max(0, m - 1 - max(s, started)) + ends if split else 0, ends)))
        return found

    def fullest(self, stage: int) -> Held:
        """See `Tables.fullest`."""
        if stage not in self._fullest:
            self._fullest[stage] = self.tables.fullest(stage)
        return self._fullest[stage]

    def content(self, spans: Sequence[tuple[int, int]]) -> Content:
        """How many layers of each kind lie in each of these stretches."""
        return tuple(tuple(sorted(self._own(i, j))) for i, j in spans)

    def least(self, stage: int, content: Content, weights: Weights) -> int:
        """The least weighted time of these layers, by chunk, on the stage under its memory; `INFINITE` when they don't
        fit."""
        return self.knapsack.least(self.pools(stage, content, [weights] * len(content)))

    def least_among(self, parts: Sequence[tuple[int, int, tuple[int, ...]]]) -> float:
        """The least busy time of (kind, layers, options) under the memory of stage 0; infinite when they don't fit."""
        held, v, m = self.fullest(0), self.outer.v, self.outer.m
        until_b, until_w = round(sum(held.until_b) / v), round(sum(held.until_w) / v)
        return self.knapsack.among([(Pool(kind, until_b, until_w, Weights(m, m, m, 1), n), ids)
                                    for kind, n, ids in parts])

    def pools(self, stage: int, content: Content, weights: Sequence[Weights]) -> tuple[Pool, ...]:
        """Of a stage's chunks: chunks that hold as much, and count as often, are as one."""
        held = self.fullest(stage)
        found: dict[tuple[int, int, int, Weights], int] = {}
        for chunk, own in enumerate(content):
            for kind, n in own:
                key = kind, held.until_b[chunk], held.until_w[chunk], weights[chunk]
                found[key] = found.get(key, 0) + n
        return tuple(sorted(Pool(*key, n) for key, n in found.items()))


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
