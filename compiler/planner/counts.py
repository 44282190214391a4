"""How many equal layers take which option: an exact integer search whose cost hardly grows with the number of layers.

    minimise    max over lines j of  offset_j + Σ over pools s, options k of  n_sk · value_skj
    subject to  Σ_k n_sk = count_s  and  Σ_k n_sk · memory_sk ≤ capacity_s  for every pool s,  n_sk ≥ 0 integer

A pool is a stage of equal layers. Layers are interchangeable, so a solution is a vector of counts, and branch and bound
fixes one count after the other. The bound of a line relaxes the counts still open to real numbers; with one memory
limit per pool that optimum lies on the lower convex hull of (memory, value), so it is a look-up. The bound is convex in
the count being fixed: only an interval of counts around its minimum is tried.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A solution counts as better when it is so by more than the rounding of the sums compared.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Pool:
    """`count` equal layers that share `capacity`; option k takes `memory[k]` and adds `values[k][j]` to line j."""

    count: int
    capacity: int
    memory: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def least(self) -> int:
        """The least memory in which the pool fits."""
        return self.count * min(self.memory)


Counts = tuple[tuple[int, ...], ...]


def lower_bound(offsets: Sequence[float], pools: Sequence[Pool]) -> float:
    """No integer solution has a smaller value; infinite when a pool does not fit."""
    if any(pool.least > pool.capacity for pool in pools):
        return math.inf
    return max(offset + math.fsum(_Hull(pool.memory, [v[j] for v in pool.values]).total(pool.count, pool.capacity)
                                  for pool in pools) for j, offset in enumerate(offsets))


def minimise(offsets: Sequence[float], pools: Sequence[Pool], below: float = math.inf) -> tuple[float, Counts] | None:
    """The least value and counts per pool and option; None when nothing fits or nothing is smaller than `below`."""
    if any(pool.least > pool.capacity for pool in pools):
        return None
    kept = [_undominated(pool) for pool in pools]
    search = _Search(offsets, [_take(pool, ks) for pool, ks in zip(pools, kept, strict=True)], below)
    search.branch(0, 0, pools[0].count if pools else 0, pools[0].capacity if pools else 0, tuple(offsets), ())
    if search.best is None:
        return None
    found = iter(search.best)
    counts = []
    for pool, ks in zip(pools, kept, strict=True):
        full = [0] * len(pool.memory)
        for k in ks:
            full[k] = next(found)
        counts.append(tuple(full))
    return search.value, tuple(counts)


class _Hull:
    """The least value per layer at a mean memory per layer, options mixed in any real shares."""

    def __init__(self, memory: Sequence[int], values: Sequence[float]) -> None:
        points: list[tuple[int, float]] = []
        for m, v in sorted(zip(memory, values, strict=True)):
            if points and v >= points[-1][1]:
                continue
            while len(points) > 1 and _above(points[-2], points[-1], (m, v)):
                points.pop()
            points.append((m, v))
        self.memory = [m for m, _ in points]
        self.values = [v for _, v in points]

    def total(self, count: int, capacity: int) -> float:
        """The least sum of `count` layers within `capacity`; infinite when they do not fit."""
        if not count:
            return 0.0
        mean = capacity / count
        if capacity < count * self.memory[0]:
            return math.inf
        at = bisect.bisect_right(self.memory, mean)
        if at == len(self.memory) or at == 0:
            return count * self.values[at - 1 if at else 0]
        share = (mean - self.memory[at - 1]) / (self.memory[at] - self.memory[at - 1])
        return count * (self.values[at - 1] + share * (self.values[at] - self.values[at - 1]))


class _Search:
    def __init__(self, offsets: Sequence[float], pools: Sequence[Pool], below: float) -> None:
        self.pools, self.value = pools, below
        self.best: tuple[int, ...] | None = None
        lines = range(len(offsets))
        self.hulls = [[[_Hull(p.memory[k:], [v[j] for v in p.values[k:]]) for j in lines]
                       for k in range(len(p.memory))] for p in pools]
        self.later = [tuple(math.fsum(h[0][j].total(p.count, p.capacity)
                                      for h, p in zip(self.hulls[s + 1:], pools[s + 1:], strict=True)) for j in lines)
                      for s in range(len(pools))]

    def branch(self, s: int, k: int, left: int, capacity: int, sums: tuple[float, ...],
               counts: tuple[int, ...]) -> None:
        """Fix the count of option k of pool s, of which `left` layers and `capacity` are open."""
        if s == len(self.pools):
            if self._improves(max(sums)):
                self.value, self.best = max(sums), counts
            return
        pool = self.pools[s]
        value, own = pool.values[k], pool.memory[k]
        if k + 1 == len(pool.memory):
            if left * own <= capacity:
                following = self.pools[s + 1] if s + 1 < len(self.pools) else None
                self.branch(s + 1, 0, following.count if following else 0, following.capacity if following else 0,
                            _plus(sums, left, value), (*counts, left))
            return
        hulls, later = self.hulls[s][k + 1], self.later[s]

        def bound(n: int) -> float:
            rest, room = left - n, capacity - n * own
            return max(total + n * v + hull.total(rest, room) + after
                       for total, v, hull, after in zip(sums, value, hulls, later, strict=True))

        low, high = _fitting(left, capacity, own, min(pool.memory[k + 1:]))
        for lowest, n in sorted(_promising(bound, low, high, self._improves)):
            if not self._improves(lowest):
                return
            self.branch(s, k + 1, left - n, capacity - n * own, _plus(sums, n, value), (*counts, n))

    def _improves(self, value: float) -> bool:
        return value < self.value - ROUNDING * abs(self.value) if math.isfinite(self.value) else value < self.value


def _promising(bound: Callable[[int], float], low: int, high: int,
               improves: Callable[[float], bool]) -> list[tuple[float, int]]:
    """(bound, count) of the counts in [low, high] whose bound, convex in the count, may improve."""
    if low > high:
        return []
    left, right = low, high
    while right - left > 2:
        middle = (left + right) // 2
        if bound(middle) <= bound(middle + 1):
            right = middle + 1
        else:
            left = middle
    start = min(range(left, right + 1), key=bound)
    found = []
    for counts in (range(start, low - 1, -1), range(start + 1, high + 1)):
        for n in counts:
            value = bound(n)
            if not improves(value):
                break
            found.append((value, n))
    return found


def _fitting(left: int, capacity: int, own: int, others: int) -> tuple[int, int]:
    """The counts of an option with which the rest still fits, others taking at least `others` each."""
    spare = capacity - left * others
    if own == others:
        return (0, left) if spare >= 0 else (1, 0)
    if own > others:
        return 0, min(left, spare // (own - others))
    return max(0, -(spare // (others - own))), left


def _undominated(pool: Pool) -> list[int]:
    """Options that no other one beats in memory and in every line; of equal ones the first."""
    rows = [(m, *v) for m, v in zip(pool.memory, pool.values, strict=True)]
    return [k for k, row in enumerate(rows)
            if not any(all(a <= b for a, b in zip(other, row, strict=True)) and (other != row or i < k)
                       for i, other in enumerate(rows) if i != k)]


def _take(pool: Pool, options: Sequence[int]) -> Pool:
    return Pool(pool.count, pool.capacity, tuple(pool.memory[k] for k in options),
                tuple(pool.values[k] for k in options))


def _plus(sums: Sequence[float], n: int, value: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + n * v for a, v in zip(sums, value, strict=True))


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the segment from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
