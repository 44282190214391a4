"""The least memory with which any plan fits, without times: exact over all (p, m) and layouts, in numpy.

Layers of a kind on a stage are equal, so each takes the option of least static + n · saved bytes among those whose
transient is at most τ, where n is what the stage holds in flight; a stage of layers i to j-1 needs

    min over τ of  Σ over its layers of min over options with transient ≤ τ (static + n · saved)  +  τ

which rises with j and falls with i: whether all stages fit into C is decided by letting each take as many layers as it
can, and the least C is found by bisection. 1F1B holds no more than GPipe and zero-bubble H1 do with the same cuts, so
it stands for them; interleaved plans, which hold more in all but more evenly, are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...cost_model.cluster import ClusterError
from ...cost_model.layer_memory import layer_memory
from ...cost_model.strategy import LayerStrategy
from .evaluate import evaluate
from .group_search import GroupSearch
from .pricing import GroupTables, Pricer
from .problem import Outer, Plan
from .space import Group, Layout

Ints = npt.NDArray[np.int64]
Family = tuple[Layout, int, int]  # with ep and etp
NONE = 1 << 48  # bytes of a layer without an option: more than any capacity, and 4,096 of them fit into 64 bits


class Held(NamedTuple):
    """What a layer holds under a strategy, as in the tables: bytes, those in flight of one micro-batch."""

    static: int
    saved: int
    transient: int
    strategy: LayerStrategy


class _Bytes(NamedTuple):
    """Of a layer under a strategy, as the cost model has them."""

    static: float
    until_b: float
    until_w: float
    transient: float


@dataclass(frozen=True)
class Least:
    """A plan of least memory: in `tables` of its own strategies, with its cuts; it needs `capacity_bytes`."""

    tables: GroupTables
    outer: Outer
    plan: Plan
    capacity_bytes: int


class MemoryOnly:
    """Answers for one space. `groups`: which (p, m) can be decided so; the pins may leave other schedules only.
    `tokens`: estimate for so large a part of the sequence, by the straight line through 2 and 4 samples. `one_sample`:
    look at micro-batches of one sample only, which spares captures of others."""

    def __init__(self, pricer: Pricer, *, tokens: float = 1.0, one_sample: bool = False) -> None:
        self.pricer, self.space, self.tokens, self.one_sample = pricer, pricer.space, tokens, one_sample
        self.order = np.array(self.space.order)

    def groups(self) -> Iterator[tuple[Group, str]]:
        """With the schedule that holds least. Larger micro-batches than a group needs are left to another group."""
        seen = set[tuple[int, int]]()
        for group in self.space.groups():
            names = [name for name, v in self.space.schedules(group) if v == 1]
            schedule = next((name for name in ("1f1b", "gpipe") if name in names), None)
            if (group.p, group.m) not in seen and schedule is not None and not self._needless(group):
                yield group, schedule
            seen.add((group.p, group.m))

    def _needless(self, group: Group) -> bool:
        """Whether more and smaller micro-batches leave every layout of the group what it is."""
        pins, batch = self.space.pins, self.space.global_batch
        if pins.micro_batches is not None or pins.micro_batch is not None:
            return False
        dps = {o.dp for o in self.space.layouts(self.pricer.placement(group).stage_gpus, group.m)}
        shared = math.lcm(*dps)
        samples = [shared // dp for dp in dps]
        return batch // group.m > shared and not any(n & (n - 1) for n in samples)

    def decides(self) -> bool:
        """Whether every group that the pins leave has such a schedule."""
        return all(any(v == 1 and name in ("1f1b", "gpipe") for name, v in self.space.schedules(group))
                   for group in self.space.groups())

    def fits(self) -> bool:
        """Whether a plan fits into the space's memory."""
        capacity = self.space.capacity_bytes
        return any(self._solved(group, name, capacity, capacity) is not None for group, name in self.groups())

    def least(self) -> Least | None:
        """The plan of least memory; None where no group has options for all layers."""
        best: Least | None = None
        for group, schedule in self.groups():
            found = self._solved(group, schedule, best.capacity_bytes - 1 if best else NONE - 1, 0)
            best = found or best
        return best

    def _solved(self, group: Group, schedule: str, below: int, enough: int) -> Least | None:
        """A plan that needs at most `below`: the least one, or any of at most `enough`. Options that lie in no way the
        cluster knows are found out when a plan takes them."""
        refused = set[Family]()
        while True:
            stages = _Stages(self._held(group, refused), self.order, group, schedule)
            capacity = stages.least(below, enough)
            if capacity is None:
                return None
            ends, strategies = stages.plan(capacity)
            new = {family_of(s) for kind, s in dict.fromkeys(zip(self.space.order, strategies, strict=True))
                   if self._refused(kind, s, group)}
            if not new:
                return self._priced(group, schedule, ends, strategies)
            refused |= new

    def _refused(self, kind: int, s: LayerStrategy, group: Group) -> bool:
        try:
            self.pricer.choice(kind, s, group, 0)
        except ClusterError:
            return True
        return False

    def _held(self, group: Group, refused: set[Family]) -> list[list[Held]]:
        """Per kind, what is nowhere above another option."""
        layouts = self.space.layouts(self.pricer.placement(group).stage_gpus, group.m)
        if self.one_sample:
            layouts = tuple(o for o in layouts if self.pricer.samples(o, group.m) == 1)
        found: list[list[Held]] = []
        for kind, layer in enumerate(self.space.kinds):
            own = [held for layout in layouts for ep, etp in self.space.families(layer, layout)
                   if (layout, ep, etp) not in refused
                   for held in self._family(kind, group, [s for s in self.space.strategies(layer, layout, ep, etp)
                                                          if not s.shard])]
            found.append(_undominated(own))
        return found

    def _family(self, kind: int, group: Group, own: list[LayerStrategy]) -> Iterator[Held]:
        """What is saved depends on recomputation, what is sharded on the ZeRO stage, and what lives only while a layer
        runs is a sum of both: one price for each of them and not for every pair."""
        if not own:
            return
        first = own[0]
        modes = {s.recompute: self._bytes(kind, group, s) for s in own if s.zero == first.zero}
        zeros = {s.zero: self._bytes(kind, group, s) for s in own if s.recompute == first.recompute}
        both = modes[first.recompute].transient
        more = self.pricer.with_margin
        for s in own:
            mode, zero = modes[s.recompute], zeros[s.zero]
            transient = math.ceil(round(mode.transient + zero.transient - both, 3))
            yield Held(math.ceil(zero.static), more(math.ceil(mode.until_b)) + more(math.ceil(mode.until_w)),
                       more(max(0, transient)), s)

    def _bytes(self, kind: int, group: Group, s: LayerStrategy) -> _Bytes:
        samples = self.space.global_batch // (group.m * s.dp)
        if self.tokens == 1:
            return self._at(kind, group, s, samples)
        two, four = (self._at(kind, group, s, n) for n in (2, 4))
        share = (samples * self.tokens - 2) / 2
        return _Bytes(*(max(0.0, a + (b - a) * share) for a, b in zip(two, four, strict=True)))

    def _at(self, kind: int, group: Group, s: LayerStrategy, samples: int) -> _Bytes:
        layer = self.pricer.model.kinds(samples)[kind]
        m = layer_memory(layer, s, self.pricer.training, owns_tied=group.p > 1)
        return _Bytes(m.static_bytes, m.saved_until_b_bytes, m.saved_until_w_bytes,
                      m.transient_bytes + m.communication_bytes)

    def _priced(self, group: Group, schedule: str, ends: tuple[int, ...], strategies: Sequence[LayerStrategy]) -> Least:
        layouts = list(dict.fromkeys(Layout.of(s) for s in strategies))
        own = [list(dict.fromkeys(s for s, k in zip(strategies, self.space.order, strict=True) if k == kind))
               for kind in range(len(self.space.kinds))]
        choices = tuple(tuple(self.pricer.choice(kind, s, group, layouts.index(Layout.of(s)), str(i))
                              for i, s in enumerate(of_kind)) for kind, of_kind in enumerate(own))
        tables = GroupTables(group, tuple(layouts), choices, *self.pricer.moves(layouts, group))
        outer = tables.outer(schedule, 1)  # type: ignore[arg-type]
        plan = Plan(outer=0, ends=ends, options=tuple(
            own[kind].index(s) for s, kind in zip(strategies, self.space.order, strict=True)))
        needed = max(stage.total_bytes for stage in evaluate(GroupSearch(self.pricer).problem([outer]), plan).memory)
        return Least(tables, outer, plan, needed)


class _Stages:
    """One (p, m): how many layers each stage can take within a capacity."""

    def __init__(self, held: list[list[Held]], order: Ints, group: Group, schedule: str) -> None:
        self.held, self.order, self.p = held, order, group.p
        self.in_flight = [group.m if schedule == "gpipe" else min(group.m, group.p - s) for s in range(group.p)]
        used = set(order.tolist())
        self.open = all(held[kind] for kind in used) and group.p <= len(order)
        if not self.open:
            return
        self.limits = np.array(sorted({h.transient for kind in used for h in held[kind]}), dtype=np.int64)
        self.sums = {n: self._sums(n) for n in set(self.in_flight)}

    def _sums(self, n: int) -> Ints:
        """[limits, layers + 1]: the least bytes of the first layers with n micro-batches in flight."""
        cost = np.full((len(self.limits), len(self.held)), NONE, dtype=np.int64)
        for kind in set(self.order.tolist()):
            transient = np.array([h.transient for h in self.held[kind]])
            needed = np.array([h.static + n * h.saved for h in self.held[kind]])
            cost[:, kind] = np.where(transient <= self.limits[:, None], needed, NONE).min(axis=1)
        sums = np.zeros((len(self.limits), len(self.order) + 1), dtype=np.int64)
        sums[:, 1:] = np.cumsum(cost[:, self.order], axis=1)
        return sums

    def _ends(self, capacity: int) -> list[int] | None:
        """Where stages end when each takes all that fits; None when layers are left."""
        ends, count = [0], len(self.order)
        room = capacity - self.limits
        for stage, n in enumerate(self.in_flight):
            start, sums = ends[-1], self.sums[n]
            most = count - (self.p - 1 - stage)
            fits = sums[:, start + 1:most + 1] - sums[:, start:start + 1] <= room[:, None]
            taken = int(fits.sum(axis=1).max()) if fits.size else 0
            if not taken:
                return None
            ends.append(start + taken)
        return ends[1:] if ends[-1] == count else None

    def least(self, below: int, enough: int) -> int | None:
        """The least capacity up to `below` at which everything fits, or one of at most `enough`."""
        if not self.open or self._ends(below) is None:
            return None
        if enough and self._ends(min(enough, below)) is not None:
            return min(enough, below)
        low, high = -1, min(below, 1 << 30)
        while self._ends(high) is None:
            low, high = high, min(below, 2 * high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._ends(middle) is not None else (middle, high)
        return high

    def plan(self, capacity: int) -> tuple[tuple[int, ...], list[LayerStrategy]]:
        """The cuts within a capacity that suffices, and what each layer does."""
        ends = self._ends(capacity)
        assert ends is not None
        strategies: list[LayerStrategy] = []
        for n, (start, end) in zip(self.in_flight, pairwise((0, *ends)), strict=True):
            needed = self.sums[n][:, end] - self.sums[n][:, start] + self.limits
            limit = self.limits[int(needed.argmin())]
            for kind in self.order[start:end].tolist():
                best = min((h for h in self.held[kind] if h.transient <= limit), key=lambda h: h.static + n * h.saved)
                strategies.append(best.strategy)
        return tuple(ends), strategies


def family_of(s: LayerStrategy) -> Family:
    """How it divides activations and experts."""
    return Layout.of(s), s.ep, s.etp


def _undominated(own: list[Held]) -> list[Held]:
    kept: list[Held] = []
    for h in sorted(own, key=lambda h: h[:3]):
        if not any(k.static <= h.static and k.saved <= h.saved and k.transient <= h.transient for k in kept):
            kept.append(h)
    return kept
