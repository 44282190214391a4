"""Fills a problem's tables from the cost model: integer nanoseconds and bytes, once per group of outer tuples.

    tables = Pricer(model, space, training, calibration).full(group)      every option, dominated ones dropped
    tables = Pricer(…).relaxed(group)                                     one option per layout that none is below

Relaxed tables are cheap: of each layout the least time (nothing recomputed, no expert traffic, no ZeRO traffic) and the
least memory (everything recomputed and sharded). A group whose relaxed tables leave no room below the best plan needs
no others: its bound holds for the full ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from ...cost_model.calibration import Calibration, Software, committed_software
from ...cost_model.cluster import ClusterError
from ...cost_model.layer_compute import LayerSeconds, layer_seconds
from ...cost_model.layer_memory import ALLOCATOR_SHARE, LayerMemory, allocator_bytes, layer_memory
from ...cost_model.layer_price import (
    LayerPrice,
    MovePrice,
    hidden_bytes,
    price_layer,
    reshard_price,
    transfer_price,
)
from ...cost_model.op_price import Rates
from ...cost_model.schedules import Schedule, ScheduleName
from ...cost_model.strategy import LayerStrategy, Placement, Training
from .captured import ModelAtAnyBatch
from .problem import Option, Outer, Reshard, Transfer
from .space import MODES, Group, Layout, Space

Relaxed = Literal["", "relaxed", "half relaxed"]
RELAXED: tuple[Relaxed, ...] = get_args(Relaxed)
COLUMNS = ("forward_ns", "input_gradient_ns", "weight_gradient_ns", "static_bytes", "saved_bytes",
           "saved_until_w_bytes", "transient_bytes")
DYNAMIC = ("saved_bytes", "saved_until_w_bytes", "transient_bytes")  # what an allocator's margin is a share of


class Choice(NamedTuple):
    """An option of the tables and what it stands for."""

    option: Option
    strategy: LayerStrategy


@dataclass(frozen=True)
class Origin:
    """Where scalars come from that are not the committed ones: `facts` for fingerprints, and what to doubt."""

    facts: Mapping[str, str | float]
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroupTables:
    """The tables of a group: per kind its choices; moves between layouts."""

    group: Group
    layouts: tuple[Layout, ...]
    choices: tuple[tuple[Choice, ...], ...]
    reshard: tuple[tuple[Reshard, ...], ...]
    transfer: tuple[tuple[Transfer, ...], ...]
    relaxed: Relaxed = ""
    tails: tuple[dict[int, float], ...] = ()  # relaxed: per kind and layout, likely seconds of a step besides these

    def outers(self, space: Space) -> list[Outer]:
        """An outer tuple per schedule."""
        return [self.outer(name, v) for name, v in space.schedules(self.group)]

    def outer(self, schedule: ScheduleName, v: int) -> Outer:
        """The outer tuple of a schedule. The cost model's own values are not checked again. Raises `ValueError` for
        sizes that the schedule does not allow."""
        Schedule(schedule, self.group.p, self.group.m, v)
        label = ", ".join(word for word in (self.group.label, self.relaxed) if word)
        return Outer.model_construct(p=self.group.p, v=v, schedule=schedule, m=self.group.m, label=label,
                                     options=self._options, reshard=self.reshard, transfer=self.transfer)

    @cached_property
    def _options(self) -> tuple[tuple[Option, ...], ...]:
        return tuple(tuple(c.option for c in own) for own in self.choices)


class Pricer:
    """Prices of one model on one cluster; equal questions are answered once. `allocator_share`: margin on top of saved
    activations, working set and buffers, in every table: see `cost_model.layer_memory.allocator_bytes`."""

    def __init__(self, model: ModelAtAnyBatch, space: Space, training: Training, calibration: Calibration,
                 software: Software | None = None, origin: Origin | None = None,
                 allocator_share: float = ALLOCATOR_SHARE) -> None:
        self.origin = origin or Origin({})
        self.model, self.space, self.training, self.calibration = model, space, training, calibration
        self.software, self.allocator_share = software or committed_software(), allocator_share
        self.rates = Rates(space.cluster.device, calibration, self.software, training)
        self._placements: dict[tuple[int, tuple[str, ...]], Placement] = {}
        self._prices: dict[tuple[int, int, LayerStrategy, Placement], LayerPrice] = {}
        self._computed: dict[tuple[int, int, int, int, int, int, str], LayerSeconds] = {}
        self._fastest: dict[tuple[object, ...], tuple[float, float, float]] = {}
        self.dominated = self.priced = 0

    @property
    def capacity_bytes(self) -> int:
        """See `Space.capacity_bytes`."""
        return self.space.capacity_bytes

    def placement(self, group: Group) -> Placement:
        """Where the group's stages lie."""
        key = group.p, group.order
        if key not in self._placements:
            self._placements[key] = Placement(self.space.cluster, group.p, group.order)
        return self._placements[key]

    def samples(self, layout: Layout, m: int) -> int:
        """Of a replica's micro-batch."""
        return self.space.global_batch // (m * layout.dp)

    def price(self, kind: int, samples: int, strategy: LayerStrategy, placement: Placement) -> LayerPrice:
        """Of a layer of that kind. Raises `ClusterError` for groups that lie in no way the cost model knows."""
        key = kind, samples, strategy, placement
        if key not in self._prices:
            layer = self.model.kinds(samples)[kind]
            self._prices[key] = price_layer(layer, strategy, self.training, placement, self.calibration, self.software,
                                            self._seconds(kind, samples, strategy))
        return self._prices[key]

    def choice(self, kind: int, strategy: LayerStrategy, group: Group, layout: int, family: str = "",
               name: str = "") -> Choice:
        """The priced option of a layer under a strategy, with the allocator's margin; `layout`: its index in the
        group's tables. Raises `ClusterError` and `StrategyError` for what can't be priced."""
        samples = self.space.global_batch // (group.m * strategy.dp)
        numbers = self.price(kind, samples, strategy, self.placement(group)).integers()
        numbers |= {what: self.with_margin(numbers[what]) for what in DYNAMIC}
        fields: dict[str, Any] = {"name": name or _name(strategy), "family": family, "layout_in": layout,
                                  "layout_out": layout, **numbers}
        return Choice(Option.model_construct(**fields), strategy)

    def with_margin(self, dynamic_bytes: int) -> int:
        """Bytes that come and go, and what the allocator holds beyond them."""
        return dynamic_bytes + allocator_bytes(dynamic_bytes, self.allocator_share)

    def _seconds(self, kind: int, samples: int, strategy: LayerStrategy) -> LayerSeconds:
        s = strategy
        key = kind, samples, s.tp, s.cp, s.ep, s.etp, s.recompute
        if key not in self._computed:
            self._computed[key] = layer_seconds(self.model.kinds(samples)[kind], s, self.rates)
        return self._computed[key]

    def _least_seconds(self, kind: int, samples: int, base: LayerStrategy,
                       families: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
        """Computation of F, B and W of the family of experts that is fastest in each."""
        key = kind, samples, base.tp, base.cp, tuple(families)
        if key not in self._fastest:
            times = [self._seconds(kind, samples, replace(base, ep=ep, etp=etp)) for ep, etp in families]
            self._fastest[key] = (min(t.forward.total_s for t in times), min(t.input_gradient.total_s for t in times),
                                  min(t.weight_gradient.total_s for t in times))
        return self._fastest[key]

    # -- tables -----------------------------------------------------------------------------------
    def full(self, group: Group) -> GroupTables:
        """All options of the group. Within a family, and between families of one layout, what another one is nowhere
        above is dropped."""
        layouts = self.space.layouts(self.placement(group).stage_gpus, group.m)
        choices = tuple(tuple(self._choices(kind, layouts, group)) for kind in range(len(self.space.kinds)))
        return GroupTables(group, layouts, choices, *self.moves(layouts, group))

    def relaxed(self, group: Group) -> GroupTables:
        """See the top of this file."""
        layouts = self.space.layouts(self.placement(group).stage_gpus, group.m)
        tails: tuple[dict[int, float], ...] = tuple({} for _ in self.space.kinds)
        choices = tuple(tuple(self._least(kind, layouts, group, tails[kind])) for kind in range(len(self.space.kinds)))
        free = tuple(tuple(Reshard() for _ in layouts) for _ in layouts)
        moved = tuple(tuple(Transfer() for _ in layouts) for _ in layouts)
        return GroupTables(group, layouts, choices, free, moved, "relaxed", tails)

    def half_relaxed(self, group: Group) -> GroupTables:
        """Two options per family: parameters sharded, with their gathering in every micro-batch, or not, with their
        memory. Nothing is recomputed in time, everything in memory, and synchronisation is free."""
        layouts = self.space.layouts(self.placement(group).stage_gpus, group.m)
        choices = tuple(tuple(self._halves(kind, layouts, group)) for kind in range(len(self.space.kinds)))
        return GroupTables(group, layouts, choices, *self.moves(layouts, group), "half relaxed")

    def _halves(self, kind: int, layouts: Sequence[Layout], group: Group) -> Iterator[Choice]:
        layer, placement = self.space.kinds[kind], self.placement(group)
        for index, layout in enumerate(layouts):
            samples = self.samples(layout, group.m)
            described = self.model.kinds(samples)[kind]
            for ep, etp in self.space.families(layer, layout):
                own = list(self.space.strategies(layer, layout, ep, etp))
                for third in (False, True):
                    these = [s for s in own if (s.zero == 3) == third]
                    if not these:
                        continue
                    fastest = {replace(s, zero=s.zero if third else min(1, s.zero), recompute="none") for s in these}
                    smallest = {replace(s, zero=s.zero if third else 2 * bool(s.zero), shard=0) for s in these}
                    try:
                        prices = [self.price(kind, samples, s, placement) for s in fastest]
                    except ClusterError:
                        break  # as in full tables: no option of the family
                    held = [layer_memory(described, s, self.training, owns_tied=False) for s in smallest]
                    yield Choice(Option.model_construct(
                        name="least", family=f"{layout.title} ep{ep} etp{etp}", layout_in=index, layout_out=index,
                        forward_ns=math.floor(min(p.forward_s for p in prices) * 1e9),
                        input_gradient_ns=math.floor(min(p.input_gradient_s for p in prices) * 1e9),
                        weight_gradient_ns=math.floor(min(p.weight_gradient_s for p in prices) * 1e9),
                        **self._least_bytes(held)), these[0])

    def _choices(self, kind: int, layouts: Sequence[Layout], group: Group) -> Iterator[Choice]:
        layer = self.space.kinds[kind]
        for index, layout in enumerate(layouts):
            families = []
            for ep, etp in self.space.families(layer, layout):
                own = self._family(kind, index, layout, ep, etp, group)
                if own:
                    families.append(own)
            yield from (c for own in self._undominated_families(families) for c in own)

    def _family(self, kind: int, index: int, layout: Layout, ep: int, etp: int, group: Group) -> list[Choice]:
        found = []
        for strategy in self.space.strategies(self.space.kinds[kind], layout, ep, etp):
            try:
                found.append(self.choice(kind, strategy, group, index, f"{layout.title} ep{ep} etp{etp}"))
            except ClusterError as error:
                self.space.leave("layout", layout.title, str(error))
                return []
            self.priced += 1
        kept = _undominated(found)
        self.dominated += len(found) - len(kept)
        return kept

    def _undominated_families(self, families: list[list[Choice]]) -> list[list[Choice]]:
        """Families of one layout: one whose every option another family has something nowhere above for is dropped."""
        kept: list[list[Choice]] = []
        for own in families:
            if any(_covers(other, own) for other in kept):
                self.dominated += len(own)
                continue
            covered = [other for other in kept if _covers(own, other)]
            self.dominated += sum(map(len, covered))
            kept = [*(other for other in kept if not any(other is c for c in covered)), own]
        return kept

    def _least(self, kind: int, layouts: Sequence[Layout], group: Group, tails: dict[int, float]) -> Iterator[Choice]:
        layer, placement = self.space.kinds[kind], self.placement(group)
        modes = [mode for mode in MODES if mode in layer.saved]
        for index, layout in enumerate(layouts):
            samples = self.samples(layout, group.m)
            families = list(self.space.families(layer, layout))
            if not families:
                continue
            free = next(iter(self.space.strategies(layer, layout, *families[0])), None)
            if free is None:
                continue
            base = replace(free, zero=int(layout.dp * layout.cp > 1), shard=0, recompute="none")
            largest = max(ep for ep, _ in families)  # the fewest experts on a GPU have the most rows each
            times = self._least_seconds(kind, samples, base, [own for own in families if own[0] == largest])
            try:
                traffic = self.price(kind, samples, base, placement) if not layer.experts else None
                likely = traffic or self.price(kind, samples, replace(base, ep=largest), placement)
            except ClusterError:
                continue
            moved = 0.0 if traffic else group.m * likely.exposed_s("forward", "backward")
            tails[index] = likely.sync_s + likely.optimizer_s + moved
            sparse = replace(base, zero=3)  # where dp is 1, experts may still be sharded over edp
            held = [layer_memory(self.model.kinds(samples)[kind], replace(sparse, recompute=mode), self.training,
                                 owns_tied=False) for mode in modes]  # sharded over all, experts take the same anyhow
            forward = traffic.forward_s if traffic else times[0]
            again = traffic.input_gradient_s if traffic else times[1]
            yield Choice(Option.model_construct(
                name="least", family=layout.title, forward_ns=math.floor(forward * 1e9),
                input_gradient_ns=math.floor(again * 1e9),
                weight_gradient_ns=math.floor(times[2] * 1e9),
                layout_in=index, layout_out=index, **self._least_bytes(held)), base)

    def _least_bytes(self, held: Sequence[LayerMemory]) -> dict[str, Any]:
        """The least of each sort of bytes, below that of every option's of these memories."""
        more = 1 + self.allocator_share
        return {"static_bytes": math.floor(min(m.static_bytes for m in held)),
                "saved_bytes": math.floor(more * min(m.saved_until_b_bytes for m in held)),
                "saved_until_w_bytes": math.floor(more * min(m.saved_until_w_bytes for m in held))}

    def moves(self, layouts: Sequence[Layout], group: Group) -> tuple[tuple[tuple[Reshard, ...], ...],
                                                                      tuple[tuple[Transfer, ...], ...]]:
        """Re-sharding and transfers from every layout to every one."""
        placement = self.placement(group)
        strategies = [LayerStrategy(o.tp, o.cp, o.dp, cp_kind=o.cp_kind) for o in layouts]
        sizes = [self._hidden_bytes(self.samples(o, group.m)) for o in layouts]

        def move(a: int, b: int) -> MovePrice:
            return reshard_price(sizes[a], strategies[a], strategies[b], placement, self.calibration)

        sends = [transfer_price(size, s, placement, self.calibration)
                 for size, s in zip(sizes, strategies, strict=True)]
        every = range(len(layouts))
        moves = [[move(a, b) for b in every] for a in every]
        reshard = tuple(tuple(Reshard.model_construct(
            forward_ns=math.ceil(one.forward_s * 1e9), backward_ns=math.ceil(one.backward_s * 1e9),
            saved_bytes=self.with_margin(math.ceil(one.saved_bytes))) for one in row) for row in moves)
        transfer = tuple(tuple(Transfer.model_construct(
            forward_ns=math.ceil((sends[a].forward_s + moves[a][b].forward_s) * 1e9),
            backward_ns=math.ceil((sends[a].backward_s + moves[a][b].backward_s) * 1e9)) for b in every) for a in every)
        return reshard, transfer

    def _hidden_bytes(self, samples: int) -> float:
        return max(hidden_bytes(kind) for kind in self.model.kinds(samples))


def _name(s: LayerStrategy) -> str:
    words = [f"tp{s.tp}"] if s.tp > 1 else []
    words += [f"cp{s.cp} {s.cp_kind}"] if s.cp > 1 else []
    words += [f"dp{s.dp}"] if s.dp > 1 else []
    words += [f"ep{s.ep}"] if s.ep > 1 else []
    words += [f"etp{s.etp}"] if s.etp > 1 else []
    words += [f"zero{s.zero}"] if s.zero else []
    words += [f"over {s.shard}"] if s.shard else []
    words += [f"recompute {s.recompute}"] if s.recompute != "none" else []
    return " ".join(words) or "one GPU"


def _row(choice: Choice) -> tuple[int, ...]:
    o = choice.option
    return (*(getattr(o, name) for name in COLUMNS), o.sync_ns + o.optimizer_ns)


def _undominated(choices: Sequence[Choice]) -> list[Choice]:
    """Without those that another one is nowhere above; of equal ones the first stays."""
    rows = [_row(c) for c in choices]
    return [c for i, c in enumerate(choices) if not any(
        (rows[j] != rows[i] or j < i) and all(a <= b for a, b in zip(rows[j], rows[i], strict=True))
        for j in range(len(rows)) if j != i)]


def _covers(these: Sequence[Choice], those: Sequence[Choice]) -> bool:
    rows = [_row(c) for c in these]
    return all(any(all(a <= b for a, b in zip(row, other, strict=True)) for row in rows)
               for other in map(_row, those))

