"""Lower bounds for outer tuples with several chunks per stage: v separate stretches of known length, up to the parts
that are one longer.

Of the paths through stage s, with the first p micro-batches of chunk 0 first, then those of chunk 1, and so on:

    a   the first micro-batch's forwards reach chunk 0 of s · all operations of s · its tail
    b   the same · all operations of s · the last micro-batch's backwards return from chunk 0 of s to stage 0 · its tail
    d   the first micro-batch's forwards go through the pipeline v - 1 times and reach the last chunk of s · what s does
        from there up to the last micro-batch's backward of that chunk · its backwards go all the way back · as b

d skips p - 1 micro-batches in every earlier chunk of s, and passes as many other stages and all transfers instead. What
the other stages take on it depends on their own memory, so they are knapsacks as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from .knapsack import FREE, INFINITE, Pool, Weights
from .problem import part_sizes
from .tables import BACKWARD, FORWARD, TAIL

if TYPE_CHECKING:
    from .bound import Bound

MOST_CHOICES = 12  # of which chunks are longer; above, those that contain as much count as if they held as little
Counts = tuple[tuple[int, int], ...]  # (kind, layers)


class Chunk(NamedTuple):
    """The least that a chunk contains if it is one of the shorter parts, and if it is a longer one; None where it can't
    be."""

    shorter: Counts | None
    longer: Counts | None

    @property
    def least(self) -> Counts:
        """Whichever it is."""
        if self.shorter is None or self.longer is None:
            return self.shorter or self.longer or ()
        other = dict(self.longer)
        return tuple((kind, min(n, other[kind])) for kind, n in self.shorter if kind in other)

    @property
    def added(self) -> Counts:
        """What it contains more as a longer part."""
        assert self.shorter is not None and self.longer is not None
        before = dict(self.shorter)
        return tuple((kind, n - before.get(kind, 0)) for kind, n in self.longer if n > before.get(kind, 0))


class Interleaved:
    """The part of `Bound` for v > 1."""

    def __init__(self, bound: Bound) -> None:
        self.bound, self.outer = bound, bound.outer
        outer, self.p, self.v = bound.outer, bound.outer.p, bound.outer.v
        self.low, _ = part_sizes(bound.count, outer)
        self.longer = bound.count - self.low * outer.parts
        self.chunks = contents(bound.layers, self.p, self.v)
        tails = bound.least_of(TAIL)
        self.first_tail = sum(n * tails[kind] for chunk in self.chunks[0] for kind, n in chunk.least)
        self._found: dict[tuple[int, int], list[int | None]] = {}  # by stage and level: with 0, 1, … longer parts
        self._others: dict[int, tuple[list[int], list[int]]] = {}
        self._missing: dict[int, dict[int, int]] = {}
        self._once = bound.least_of(FORWARD, BACKWARD)
        self._costs: dict[tuple[int, Weights], int] = {}

    def reaches(self, limit: int, level: int) -> bool:
        """Every stage has v parts of `low` layers and some one more: how many more can all stages together hold?"""
        held = 0
        for stage in dict.fromkeys((0, self.p - 1, *range(self.p))):  # the fullest and the one reached last at first
            most = None
            for n, path in enumerate(self._by_longer(stage, level)):
                if path is not None:
                    if path > limit:
                        break
                    most = n
            if most is None:
                return False
            held += most
        return held >= self.longer

    def _by_longer(self, stage: int, level: int) -> Iterator[int | None]:
        """The longest path with none, one, two, … parts of the stage longer; None where no cuts are like that."""
        found = self._found.setdefault((stage, level), [])
        for n in range(min(self.v, self.longer) + 1):
            if n == len(found):
                found.append(min((self._path(stage, pools, level) for pools in self._pools(stage, n, level)),
                                 default=None))
            yield found[n]

    def _pools(self, stage: int, n: int, level: int) -> Iterator[list[tuple[int, Counts, tuple[int, int]]]]:
        """(chunk, layers, micro-batches held until B and until W): what the stage may contain with n longer parts. Of
        chunks that contain as much, the first ones are longer where they hold as much; where that leaves too many
        choices, the layers more count as if they were held by the chunk that holds least."""
        held, own = self.bound.fullest(stage), self.chunks[stage]
        hold = list(zip(held.until_b, held.until_w, strict=True))
        alike: dict[object, list[int]] = {}
        for chunk, content in enumerate(own):
            alike.setdefault((content, hold[chunk] if level > FREE else ()), []).append(chunk)
        choices = list(_shares(n, [(len(g), own[g[0]].shorter is not None, own[g[0]].longer is not None)
                                   for g in alike.values()], MOST_CHOICES))
        if len(choices) <= MOST_CHOICES:
            for counts in choices:
                longer = {c for g, k in zip(alike.values(), counts, strict=True) for c in g[:k]}
                yield [(c, (own[c].longer if c in longer else own[c].shorter) or (), hold[c]) for c in range(self.v)]
            return
        yield from self._pooled(own, hold, n)

    def _pooled(self, own: Sequence[Chunk], hold: list[tuple[int, int]],
                n: int) -> Iterator[list[tuple[int, Counts, tuple[int, int]]]]:
        free = [c for c in range(self.v) if own[c].shorter is not None and own[c].longer is not None]
        forced = sum(own[c].shorter is None for c in range(self.v))
        if not 0 <= n - forced <= len(free):
            return
        added = [dict(own[c].added) for c in free]
        least = {kind: min(a.get(kind, 0) for a in added) for kind in added[0]} if added else {}
        lightest = min(own_hold for own_hold in hold)
        base = [(c, own[c].least if c in free else (own[c].shorter or own[c].longer or ()), hold[c])
                for c in range(self.v)]
        more = tuple((kind, k * (n - forced)) for kind, k in least.items() if k and n > forced)
        yield [*base, (0, more, (lightest[0], min(b for _, b in hold)))]

    # -- paths ----------------------------------------------------------------------------------------
    def _path(self, s: int, content: list[tuple[int, Counts, tuple[int, int]]], level: int) -> int:
        """The longest of the paths."""
        m, p, last, bound = self.outer.m, self.p, self.v - 1, self.bound
        every = [Weights(m, m, 0, 1)] * self.v
        there, back, tail = self._before(s)
        a = there + s * bound.send_forward + self._least(content, every, level)
        if a >= INFINITE:
            return a
        b = back + s * bound.send_turn + tail + self._least(content, [Weights(m, m, 0, 0)] * self.v, level)
        some = [Weights(m - p + 1, m - p + 1, 0, 0)] * last + [Weights(m, m, 0, 0)]
        above, below = self._around(level)
        if s == 0:
            some = [w._replace(tail=1) for w in some]
        d = sum(above[:s]) + sum(below[s + 1:]) + (last * p + s) * bound.send_turn + self._least(content, some, level)
        missing = dict(self._not_counted(s))
        for _, own, _ in content:
            for kind, n in own:
                missing[kind] -= n
        d += sum(n * self._once[kind] for kind, n in missing.items() if n > 0)
        return max(a, b, d)

    def _not_counted(self, s: int) -> dict[int, int]:
        """Layers that d passes, by kind, without those that `_around` counts on other stages: with longer parts these
        are the fewest that may be there, and d passes all layers up to the last chunk of s."""
        if s not in self._missing:
            part = (self.v - 1) * self.p + s + 1
            end = part * self.low + max(0, self.longer - (self.outer.parts - part))
            found = {kind: counts[end] for kind, counts in self.bound.before.items()}
            for r in range(self.p):
                for chunk in self.chunks[r][:self.v - int(r > s)] if r != s else ():
                    for kind, n in chunk.least:
                        found[kind] -= n
            self._missing[s] = found
        return self._missing[s]

    def _free(self, content: list[tuple[int, Counts, tuple[int, int]]], weights: Sequence[Weights]) -> int:
        total = 0
        for chunk, own, _ in content:
            for kind, n in own:
                key = kind, weights[chunk]
                cost = self._costs.get(key)
                if cost is None:
                    cost = self._costs[key] = min(self.bound.knapsack.costs(*key))
                total += n * cost
        return total

    def _least(self, content: list[tuple[int, Counts, tuple[int, int]]], weights: Sequence[Weights],
               level: int) -> int:
        if level == FREE:
            return self._free(content, weights)
        found: dict[tuple[int, int, int, Weights], int] = {}
        for chunk, own, (until_b, until_w) in content:
            for kind, n in own:
                key = kind, until_b, until_w, weights[chunk]
                found[key] = found.get(key, 0) + n
        return self.bound.knapsack.least(tuple(sorted(Pool(*key, n) for key, n in found.items())), level)

    def _before(self, s: int) -> tuple[int, int, int]:
        """Forwards of the first chunks of the stages before s, their forwards and backwards, and stage 0's tail."""
        start = s * self.low
        return self.bound.forward[start], self.bound.turn[start], self.first_tail

    def _around(self, level: int) -> tuple[list[int], list[int]]:
        """What one micro-batch takes there and back on every stage: in all of its chunks (on stage 0, where it ends,
        with the tail), and in all but the last."""
        if level not in self._others:
            never = Weights(0, 0, 0, 0)
            found: tuple[list[int], list[int]] = [], []
            for s in range(self.p):
                once = Weights(1, 1, 0, int(s == 0))
                held = self.bound.fullest(s)
                content = [(c, self.chunks[s][c].least, (held.until_b[c], held.until_w[c])) for c in range(self.v)]
                for own, weights in zip(found, ([once] * self.v, [once] * (self.v - 1) + [never]), strict=True):
                    own.append(self._least(content, weights, level))
            self._others[level] = found
        return self._others[level]


def _shares(n: int, groups: Sequence[tuple[int, bool, bool]], most: int) -> Iterator[tuple[int, ...]]:
    """How many of each group are longer, n in all: groups as (size, may be shorter, may be longer); one more than
    `most` of them at most."""
    ranges = [range(0 if short else size, (size if long else 0) + 1) for size, short, long in groups]
    found = 0
    left_least = list(accumulate((r.start for r in reversed(ranges)), initial=0))[::-1]
    left_most = list(accumulate((r.stop - 1 for r in reversed(ranges)), initial=0))[::-1]

    def walk(at: int, left: int, taken: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        nonlocal found
        if at == len(ranges):
            found += 1
            yield taken
            return
        for k in ranges[at]:
            if found > most:
                return
            if left_least[at + 1] <= left - k <= left_most[at + 1]:
                yield from walk(at + 1, left - k, (*taken, k))

    yield from walk(0, n, ())


@lru_cache(maxsize=256)
def contents(layers: tuple[int, ...], p: int, v: int) -> tuple[tuple[Chunk, ...], ...]:
    """By stage and chunk, whatever parts are the longer ones."""
    parts = p * v
    low, longer = len(layers) // parts, len(layers) % parts
    before = {kind: list(accumulate((int(kind == own) for own in layers), initial=0)) for kind in sorted(set(layers))}

    def fewest(part: int, own: int) -> Counts | None:
        after = parts - part - 1  # of the other longer parts, as many as fit may come before this one
        first, last = part * low + max(0, longer - own - after), part * low + min(part, longer - own)
        if first > last:
            return None
        counts = ((kind, min(c[i + low + own] - c[i] for i in range(first, last + 1))) for kind, c in before.items())
        return tuple((kind, n) for kind, n in counts if n)

    return tuple(tuple(Chunk(fewest(chunk * p + s, 0), fewest(chunk * p + s, 1)) for chunk in range(v))
                 for s in range(p))
