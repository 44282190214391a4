"""What a stretch of layers can cost: the undominated sums over its layers' options, by boundary layouts.

Equal layers whose options share one pair of layouts are interchangeable: only how many take which option matters, so n
layers and K options have C(n+K-1, K-1) sums and not K^n. Where that holds for all families of a part, its re-sharding
follows from the families alone, and only the number of layers of each kind is left. Other parts are chained run by run
or layer by layer. Where equal layers have more than `MOST_SUMS`, mixtures of at most two options stand for all (the
linear relaxation under one memory limit needs no more): a heuristic; exact fronts give up there (`TooLarge`).
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .problem import runs
from .tables import (
    BACKWARD,
    FORWARD,
    STATIC,
    TAIL,
    TRANSIENT,
    UNTIL_B,
    UNTIL_W,
    WEIGHT,
    Ints,
    Tables,
    activation_bytes,
    staircase,
)

MOST_SUMS = 2000
MOST_WORK = 2_000_000_000  # comparisons of numbers that the exact search may take: a few seconds

Families = tuple[tuple[int, int], ...]  # (kind, family) pairs in use, sorted


class Key(NamedTuple):
    """Layout of the first input and of the last output, and the families in use."""

    first: int
    last: int
    families: Families


@dataclass(frozen=True, eq=False)
class Step:
    """Equal layers: row r takes `counts[r][k]` times option `ids[k]` and costs `costs[r]`."""

    kind: int
    ids: tuple[int, ...]
    counts: Ints
    costs: Ints


class Front(NamedTuple):
    """Sums, array [rows, 8], and for each the node of `History` that tells its options."""

    costs: Ints
    nodes: Ints


class TooLarge(Exception):
    """The exact search would take too long: the outer tuple is left to the heuristic and the bound."""


class History:
    """Which options a sum consists of: a node is a row of a step, after a parent node."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._blocks: list[tuple[Ints | None, Step, Ints]] = []
        self._size = 0

    def add(self, parents: Ints | None, step: Step, rows: Ints) -> Ints:
        """New nodes, one per row."""
        self._starts.append(self._size)
        self._blocks.append((parents, step, rows))
        self._size += len(rows)
        return np.arange(self._size - len(rows), self._size)

    def options(self, node: int, kinds: tuple[int, ...]) -> list[int]:
        """The option of every layer of a part at this node; equal layers of a step take the simplest option first."""
        taken: list[tuple[int, list[int]]] = []
        at: int | None = node
        while at is not None:
            block = bisect.bisect_right(self._starts, at) - 1
            parents, step, rows = self._blocks[block]
            index = at - self._starts[block]
            counts = step.counts[rows[index]]
            taken.append((step.kind, [o for o, n in zip(step.ids, counts, strict=True) for _ in range(n)]))
            at = None if parents is None else int(parents[index])
        by_kind: dict[int, list[int]] = {}
        for kind, options in reversed(taken):
            by_kind.setdefault(kind, []).extend(options)
        following = {kind: iter(options) for kind, options in by_kind.items()}
        return [next(following[kind]) for kind in kinds]


class Fronts:
    """The fronts of one outer tuple, each computed once. `chain(kinds)` is exact, but for what keeps a stage busy for
    `below_ns` or more, and raises `TooLarge` once that took more than `most_work` comparisons. A `place`, a stage and
    chunk, keeps only the least busy time at each memory there, two columns instead of eight: that scales. `allowed` may
    leave only some options of a kind there."""

    def __init__(self, tables: Tables, below_ns: int = 1 << 62, most_work: int = MOST_WORK,
                 allowed: Sequence[frozenset[int]] | None = None) -> None:
        self.tables, self.below_ns, self.history, self.work = tables, below_ns, History(), 0
        self.most_work, self.allowed = most_work, allowed
        self._chains: dict[tuple[tuple[int, ...], Place | None], dict[Key, Front]] = {}
        self._runs: dict[tuple[int, tuple[int, ...], int, Place | None, int], Step] = {}

    def chain(self, kinds: tuple[int, ...], place: Place | None = None) -> dict[Key, Front]:
        """Fronts of consecutive layers, by key."""
        found = self._chains.get((kinds, place))
        if found is None:
            found = self._chains[kinds, place] = self._chain(kinds, place)
        return found

    def _chain(self, kinds: tuple[int, ...], place: Place | None) -> dict[Key, Front]:
        families = {kind: self._families(kind, place) for kind in dict.fromkeys(kinds)}
        if all(len(self._by_layouts(kind, ids)) == 1 for kind, own in families.items() for ids in own):
            return self._by_kind(kinds, families, place)
        state: dict[Key, list[Front]] = {}
        first = True
        for kind, count in runs(kinds):
            reached: dict[Key, list[Front]] = {}
            for family, ids in enumerate(families[kind]):
                steps, repeat = self._steps(kind, ids, count, place)
                own, start = state, first
                for _ in range(repeat):
                    own, start = self._extended(own, start, kind, family, steps, place), False
                for key, fronts in own.items():
                    reached.setdefault(key, []).extend(fronts)
            state, first = {key: [self._merged(fronts, place)] for key, fronts in reached.items()}, False
        return {key: fronts[0] for key, fronts in state.items() if len(fronts[0].costs)}

    def _by_kind(self, kinds: tuple[int, ...], families: dict[int, tuple[tuple[int, ...], ...]],
                 place: Place | None) -> dict[Key, Front]:
        """All options of a family have one pair of layouts: the order of layers matters only to re-sharding."""
        if place is None and math.prod(map(len, families.values())) > MOST_SUMS:
            raise TooLarge
        pairs, totals = Counter(pairwise(kinds)), Counter(kinds)
        none = np.zeros(8, np.int64)
        states: list[tuple[Families, dict[int, tuple[int, int]], Front | None]] = [((), {}, None)]
        for kind, own in families.items():
            following: list[tuple[Families, dict[int, tuple[int, int]], Front | None]] = []
            for chosen, layouts, front in states:
                for family, ids in enumerate(own):
                    step = self._run(kind, ids, totals[kind], place, pairs[kind, kind])
                    joined = self._joined(front, step, none, place) if front is not None else Front(
                        step.costs, self.history.add(None, step, np.arange(len(step.costs))))
                    if len(joined.costs):
                        layout = next(iter(self._by_layouts(kind, ids)))
                        following.append(((*chosen, (kind, family)), {**layouts, kind: layout}, joined))
            states = following
        found: dict[Key, list[Front]] = {}
        for chosen, layouts, front in states:
            assert front is not None
            moves = (n * self._reshard(layouts[a][1], layouts[b][0]) for (a, b), n in pairs.items() if a != b)
            added = sum(moves, none)
            kept = self._kept(front.costs + added, place)
            in_use = () if self.tables.problem.mixing else tuple(sorted(chosen))
            found.setdefault(Key(layouts[kinds[0]][0], layouts[kinds[-1]][1], in_use), []).append(
                Front(front.costs[kept] + added, front.nodes[kept]))
        return {key: front for key, fronts in found.items() if len((front := self._merged(fronts, place)).costs)}

    def _families(self, kind: int, place: Place | None) -> tuple[tuple[int, ...], ...]:
        """Options that a run may mix. At a place, if all may mix, those of equal layouts: a heuristic that scales."""
        found = self.tables.families[kind]
        if place is None:
            return found
        if self.tables.problem.mixing:
            found = tuple(self._by_layouts(kind, found[0]).values()) if found else ()
        if self.allowed is None:
            return found
        own = self.allowed[kind]
        return tuple(left for ids in found if (left := tuple(i for i in ids if i in own)))

    def _by_layouts(self, kind: int, ids: tuple[int, ...]) -> dict[tuple[int, int], tuple[int, ...]]:
        options = self.tables.outer.options[kind]
        found: dict[tuple[int, int], tuple[int, ...]] = {}
        for i in ids:
            pair = options[i].layout_in, options[i].layout_out
            found[pair] = (*found.get(pair, ()), i)
        return found

    def _steps(self, kind: int, ids: tuple[int, ...], count: int,
               place: Place | None) -> tuple[list[tuple[int, int, Step]], int]:
        """(layout in, layout out, sums) of a step, and how many such steps make the run."""
        by_layouts = self._by_layouts(kind, ids)
        at_once = count if len(by_layouts) == 1 else 1
        return [(a, b, self._run(kind, own, at_once, place, at_once - 1))
                for (a, b), own in by_layouts.items()], count // at_once

    def _run(self, kind: int, ids: tuple[int, ...], count: int, place: Place | None, neighbours: int) -> Step:
        """`count` layers of one pair of layouts, of which so many directly follow one another."""
        key = kind, ids, count, place, neighbours
        if key not in self._runs:
            counts, complete = compositions(count, len(ids))
            if not complete and place is None:
                raise TooLarge
            option, table = self.tables.outer.options[kind][ids[0]], self.tables.options[kind][list(ids)]
            costs = counts @ table + neighbours * self._reshard(option.layout_out, option.layout_in)
            costs[:, TRANSIENT] = np.where(counts > 0, table[:, TRANSIENT], 0).max(axis=1)
            kept = self._kept(costs, place)
            self._runs[key] = Step(kind, ids, counts[kept], costs[kept])
        return self._runs[key]

    def _reshard(self, last: int, first: int) -> Ints:
        """What a change of layout between two layers adds."""
        move = self.tables.outer.reshard[last][first]
        added = np.zeros(8, np.int64)
        added[[FORWARD, BACKWARD, UNTIL_B]] = move.forward_ns, move.backward_ns, move.saved_bytes
        return added

    def _extended(self, state: dict[Key, list[Front]], start: bool, kind: int, family: int,
                  steps: list[tuple[int, int, Step]], place: Place | None) -> dict[Key, list[Front]]:
        found: dict[Key, list[Front]] = {}
        own = () if self.tables.problem.mixing else ((kind, family),)
        for first, last, step in steps:
            if start:
                nodes = self.history.add(None, step, np.arange(len(step.costs)))
                found.setdefault(Key(first, last, own), []).append(Front(step.costs, nodes))
            for key, fronts in state.items():
                families = together(key.families, own)
                if families is not None:
                    added = self._reshard(key.last, first)
                    found.setdefault(Key(key.first, last, families), []).extend(
                        self._joined(front, step, added, place) for front in fronts)
        return {key: [self._merged(fronts, place)] for key, fronts in found.items()}

    def _joined(self, front: Front, step: Step, added: Ints, place: Place | None) -> Front:
        costs = add_rows(front.costs, step.costs) + added
        kept = self._kept(costs, place)
        before, own = np.divmod(kept, max(1, len(step.costs)))
        return Front(costs[kept], self.history.add(front.nodes[before], step, own))

    def _merged(self, fronts: list[Front], place: Place | None) -> Front:
        if len(fronts) == 1:
            return fronts[0]
        costs, nodes = np.concatenate([f.costs for f in fronts]), np.concatenate([f.nodes for f in fronts])
        kept = self._kept(costs, place)
        return Front(costs[kept], nodes[kept])

    def _kept(self, costs: Ints, place: Place | None) -> Ints:
        """The rows that fit (as far as these layers go) and that no other makes needless."""
        capacity = self.tables.problem.capacity_bytes
        if place is None:
            held = costs[:, STATIC] + costs[:, UNTIL_B] + costs[:, UNTIL_W] + costs[:, TRANSIENT]
            busy = busy_ns(costs, self.tables.outer.m)
            fitting = np.flatnonzero((held <= capacity) & (busy < self.below_ns))
            return fitting[self.undominated(costs[fitting])]
        memory = place.memory(self.tables, costs)
        fitting = np.flatnonzero(memory <= capacity)
        return fitting[staircase(memory[fitting], busy_ns(costs[fitting], place.times))]


    def undominated(self, rows: Ints) -> npt.NDArray[np.intp]:
        """The rows that no other row is nowhere above, in their order; of equal rows the first."""
        left = np.argsort(rows.sum(axis=1), kind="stable")
        kept = []
        while len(left):
            first = left[0]
            kept.append(first)
            rest = left[1:]
            left = rest[(rows[rest] < rows[first]).any(axis=1)]
            self.work += len(rest) * rows.shape[1]
            if self.work > self.most_work:
                raise TooLarge
        return np.sort(np.array(kept, dtype=np.intp))


class Place(NamedTuple):
    """A chunk of a stage, and how often its operations count beside its tail where least busy is chosen."""

    stage: int
    chunk: int
    times: int

    def memory(self, tables: Tables, costs: Ints) -> Ints:
        """Bytes of these rows there; with several chunks at the moment that holds most micro-batches."""
        held = tables.held(self.stage)
        if tables.outer.v == 1:
            active = activation_bytes(held, [costs])
        else:
            fullest = max(held, key=lambda h: sum(h.until_b))
            active = fullest.until_b[self.chunk] * costs[:, UNTIL_B] + fullest.until_w[self.chunk] * costs[:, UNTIL_W]
        total: Ints = costs[:, STATIC] + active + costs[:, TRANSIENT]
        return total


def busy_ns(costs: Ints, micro_batches: int) -> Ints:
    """Time in which a stage of these rows does not wait."""
    busy: Ints = micro_batches * (costs[:, FORWARD] + costs[:, BACKWARD] + costs[:, WEIGHT]) + costs[:, TAIL]
    return busy


def add_rows(a: Ints, b: Ints) -> Ints:
    """Every row of a with every row of b: sums, of transients the larger."""
    both = (a[:, None, :] + b[None, :, :]).reshape(-1, a.shape[1])
    both[:, TRANSIENT] = np.maximum(a[:, None, TRANSIENT], b[None, :, TRANSIENT]).reshape(-1)
    return both


def together(a: Families, b: Families) -> Families | None:
    """Both choices of families, None where they disagree."""
    union = dict(a)
    if any(union.setdefault(kind, family) != family for kind, family in b):
        return None
    return tuple(sorted(union.items()))


@lru_cache(maxsize=1024)
def compositions(count: int, options: int) -> tuple[Ints, bool]:
    """Ways to give `count` equal layers to options, an array [ways, options], and whether these are all. The simplest
    come first."""
    if math.comb(count + options - 1, options - 1) <= MOST_SUMS:
        return np.array(list(_all(count, options)), dtype=np.int64).reshape(-1, options), True
    pairs = list(combinations(range(options), 2))
    taken = np.unique(np.linspace(0, count, max(2, min(count + 1, 4 * MOST_SUMS // len(pairs)))).round().astype(int))
    rows = np.zeros((len(pairs) * len(taken), options), dtype=np.int64)
    for i, (a, b) in enumerate(pairs):
        block = rows[i * len(taken):(i + 1) * len(taken)]
        block[:, a], block[:, b] = count - taken, taken
    return rows, False


def _all(count: int, options: int) -> Iterator[tuple[int, ...]]:
    if options == 1:
        yield (count,)
        return
    for n in range(count, -1, -1):
        for rest in _all(count - n, options - 1):
            yield (n, *rest)
