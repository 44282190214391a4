"""The strategy space: which outer tuples and options there are, and for every one left out, why.

    stage GPUs    D = G / p
    layouts       tp · cp · dp = D, where heads, feed-forward width and sequence divide
    experts       ep · etp · edp = D, where experts and their width divide
    micro-batches m · dp | B; a replica's micro-batch has B / (m · dp) samples
    per layer     ZeRO stage and its shard group (all of dp, or HSDP within a level of links), recomputation

Degrees need not be powers of two. Two cuts are made because something else is never worse: a context-parallel layout
whose samples could be spread over more replicas instead does the same work with more communication; a rank order that
puts every group where another one does is the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, get_args

from ...cost_model.cluster import Cluster
from ...cost_model.layer_price import FIXED_CONTEXT_BYTES
from ...cost_model.model import LayerKind, RecomputeMode
from ...cost_model.schedules import ScheduleName
from ...cost_model.strategy import ORDER, CpKind, LayerStrategy
from ...runtime.errors import InvalidInputError, UnknownNameError

UNEVEN = 8  # interleaved: at most one part in so many is a layer longer or shorter than the others
INNERMOST_PIPELINE = ("pp", "tp", "cp", "dp")
MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")
BANS = ("hsdp", "ring", "ulysses", "gpipe", "1f1b", "interleaved", "zb-h1", "zero0", "zero1", "zero2", "zero3",
        "selective", "full", "pipeline-innermost", "tp1", "cp1", "pp1", "ep1")  # tp1: only plans that use tp


class Layout(NamedTuple):
    """How a stage's GPUs divide activations."""

    tp: int
    cp: int
    cp_kind: CpKind
    dp: int

    @classmethod
    def of(cls, s: LayerStrategy) -> Layout:
        """The one that a strategy has."""
        return cls(s.tp, s.cp, s.cp_kind if s.cp > 1 else "ring", s.dp)

    @property
    def title(self) -> str:
        return f"tp{self.tp} cp{self.cp}{self.cp_kind if self.cp > 1 else ''} dp{self.dp}"


@dataclass(frozen=True)
class Pins:
    """What the user fixed: degrees, ZeRO stage, recomputation, schedule, and names of `BANS`. None leaves an axis free.
    `micro_batch`: samples of a replica's micro-batch. Raises `InvalidInputError`."""

    tp: int | None = None
    cp: int | None = None
    dp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None
    zero: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    interleave: int | None = None
    micro_batches: int | None = None
    micro_batch: int | None = None
    banned: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "dp", "pp", "ep", "etp", "interleave", "micro_batches", "micro_batch"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value < 1 << 31):
                raise InvalidInputError(f"{name} {repr(value)[:40]}", expected="a whole number of at least 1")
        if self.zero is not None and (type(self.zero) is not int or self.zero not in (0, 1, 2, 3)):
            raise InvalidInputError(f"ZeRO stage {str(self.zero)[:40]}", expected="0, 1, 2 or 3")
        if self.recompute is not None and self.recompute not in MODES:
            raise UnknownNameError("recomputation", self.recompute, MODES)
        if self.schedule is not None and self.schedule not in get_args(ScheduleName):
            raise UnknownNameError("schedule", self.schedule, get_args(ScheduleName))
        for name in self.banned:
            if name not in BANS:
                raise UnknownNameError("ban", name, BANS)
        degrees = [(axis, f"{axis}{getattr(self, axis)}") for axis in ("tp", "cp", "pp", "ep", "zero")]
        for axis, pinned in (*degrees, ("schedule", self.schedule), ("recompute", self.recompute)):
            if getattr(self, axis) is not None and pinned in self.banned:
                raise InvalidInputError(f"--{axis} {getattr(self, axis)} and --ban {pinned}", expected="one of them")
        if {f"zero{stage}" for stage in range(4)} <= self.banned:
            raise InvalidInputError("bans of all ZeRO stages", expected="zero0 or another one left")

    def allows(self, axis: str, value: Any) -> bool:
        """Whether a value of an axis agrees with the pin, if there is one, and is not banned."""
        return getattr(self, axis) in (None, value) and f"{axis}{value}" not in self.banned

    def reason(self, axis: str, value: Any) -> str:
        """Why it is not allowed."""
        return "banned" if f"{axis}{value}" in self.banned else f"pinned to {getattr(self, axis)}"

    def words(self) -> tuple[str, ...]:
        """As on the command line."""
        named = [(f.name.replace("_", "-"), getattr(self, f.name)) for f in fields(self) if f.name != "banned"]
        return (*(f"--{n} {v}" for n, v in named if v is not None), *(f"--ban {n}" for n in sorted(self.banned)))


class Left(NamedTuple):
    """A value of an axis that was left out, and why."""

    axis: str
    value: str
    reason: str


class Group(NamedTuple):
    """Outer tuples that share their prices: they differ in schedule and chunks only."""

    p: int
    m: int
    order: tuple[str, ...]

    @property
    def label(self) -> str:
        if self.order == ORDER:
            return ""
        return "pp innermost" if self.order == INNERMOST_PIPELINE else "-".join(self.order)


@dataclass
class Space:
    """Everything that a plan may be. `left` fills while the space is walked."""

    kinds: tuple[LayerKind, ...]
    order: tuple[int, ...]
    seq: int
    cluster: Cluster
    global_batch: int
    pins: Pins = field(default_factory=Pins)
    left: dict[Left, None] = field(default_factory=dict)
    _layouts: dict[tuple[int, int], tuple[Layout, ...]] = field(default_factory=dict)

    @property
    def capacity_bytes(self) -> int:
        """What a plan may use of a GPU: without what is reserved, and without the process's fixed context."""
        return max(0, math.floor(self.cluster.usable_memory_bytes - FIXED_CONTEXT_BYTES))

    @cached_property
    def sample_bytes(self) -> int:
        """What the largest layer saves of one sample at the least, or brings back to run its backward pass."""
        return max((min(k.saved[mode].bytes for mode in ("none", "min-cut") if mode in k.saved)
                    for k in self.kinds if "none" in k.saved), default=0)

    def leave(self, axis: str, value: object, reason: str) -> None:
        """Note what was left out."""
        self.left[Left(axis, str(value), reason)] = None

    # -- outer tuples -----------------------------------------------------------------------------
    def groups(self) -> Iterator[Group]:
        """All (p, m, rank order), simplest first."""
        gpus, layers = self.cluster.gpus, len(self.order)
        for p in divisors(gpus):
            if not self.pins.allows("pp", p):
                self.leave("pp", p, self.pins.reason("pp", p))
            elif p > layers:
                self.leave("pp", p, f"{layers} layers for {p} stages")
            else:
                for m in divisors(self.global_batch):
                    if not self.pins.allows("micro_batches", m):
                        self.leave("micro-batches", m, f"pinned to {self.pins.micro_batches}")
                    elif self.layouts(gpus // p, m):
                        yield from (Group(p, m, order) for order in self._orders(p))

    def _orders(self, p: int) -> Iterator[tuple[str, ...]]:
        yield ORDER
        per_node = self.cluster.gpus_per_node
        if p == 1 or len(self.cluster.levels) < 2 or p == self.cluster.gpus:
            return
        if "pipeline-innermost" in self.pins.banned:
            self.leave("rank order", ", ".join(INNERMOST_PIPELINE), "banned")
        elif p > per_node or per_node % p:
            self.leave("rank order", ", ".join(INNERMOST_PIPELINE),
                       f"{p} stages side by side do not fill nodes of {per_node} GPUs evenly")
        else:
            yield INNERMOST_PIPELINE
        self.leave("rank order", "all others", "groups that talk in every layer would span more links: tp stays inside "
                                               "of cp, and cp of dp")

    def schedules(self, group: Group) -> Iterator[tuple[ScheduleName, int]]:
        """(schedule, chunks per stage), simplest first."""
        p, m, layers = group.p, group.m, len(self.order)
        if p == 1:  # without a pipeline all schedules are the same; a pin that asks for one leaves nothing
            if self.pins.schedule in (None, "1f1b", "gpipe") and self.pins.interleave in (None, 1):
                yield "1f1b", 1
            else:
                self.leave("pp", 1, "the pinned schedule needs a pipeline")
            return
        for name in ("1f1b", "gpipe", "zb-h1"):
            if self._scheduled(name) and self.pins.interleave in (None, 1):
                yield name, 1  # type: ignore[misc]
        if not self._scheduled("interleaved"):
            return
        if m % p:
            self.leave("interleave", f"p={p} m={m}", f"{p} stages do not divide {m} micro-batches")
            return
        for v in range(2, layers // p + 1):
            if not self.pins.allows("interleave", v):
                continue
            uneven = min(layers % (p * v), -layers % (p * v))
            if uneven * UNEVEN > p * v and self.pins.interleave is None:
                self.leave("interleave", f"{v} at pp {p}", f"{uneven} of {p * v} parts would differ by a layer from "
                                                           "the others (pin it to have it)")
            else:
                yield "interleaved", v

    def _scheduled(self, name: str) -> bool:
        if not self.pins.allows("schedule", name) or name in self.pins.banned:
            self.leave("schedule", name, "banned" if name in self.pins.banned else f"pinned to {self.pins.schedule}")
            return False
        return True

    # -- layouts ----------------------------------------------------------------------------------
    def layouts(self, gpus: int, m: int) -> tuple[Layout, ...]:
        """Ways to divide a stage of that many GPUs whose replicas share the batch, simplest first."""
        if (gpus, m) not in self._layouts:
            self._layouts[gpus, m] = self._found_layouts(gpus, m)
        return self._layouts[gpus, m]

    def _found_layouts(self, gpus: int, m: int) -> tuple[Layout, ...]:
        found = []
        for tp in divisors(gpus):
            if not self.pins.allows("tp", tp):
                self.leave("tp", tp, self.pins.reason("tp", tp))
                continue
            near = self.cluster.levels[0].group_size
            if tp > near > 1 and self.pins.tp is None:
                self.leave("tp", tp, f"its collectives in every layer would leave the {near} GPUs that "
                                     f"{self.cluster.levels[0].name} joins (pin it to have it)")
                continue
            if not any(self.refusal(kind, tp, 1, "ring") is None for kind in self.kinds if _is_layer(kind)):
                reasons = [self.refusal(kind, tp, 1, "ring") for kind in self.kinds if _is_layer(kind)]
                self.leave("tp", tp, next((r for r in reasons if r), "no layer can be divided"))
                continue
            for cp in divisors(gpus // tp):
                found += [Layout(tp, cp, kind, gpus // tp // cp) for kind in self._cp_kinds(gpus, m, tp, cp)]
        return tuple(sorted(found, key=lambda o: (o.tp * o.cp, o.cp, o.cp_kind)))

    def _cp_kinds(self, gpus: int, m: int, tp: int, cp: int) -> Iterator[CpKind]:
        dp = gpus // tp // cp
        if not self.pins.allows("cp", cp) or not self.pins.allows("dp", dp):
            pinned, value = ("cp", cp) if not self.pins.allows("cp", cp) else ("dp", dp)
            self.leave(pinned, value, self.pins.reason(pinned, value))
            return
        if self.global_batch % (m * dp):
            if self.global_batch % dp:
                self.leave("dp", dp, f"does not divide the global batch of {self.global_batch}")
            return
        if not self.pins.allows("micro_batch", self.global_batch // (m * dp)):
            return
        samples = self.global_batch // (m * dp)
        if samples & (samples - 1) and self.pins.micro_batches is None and self.pins.micro_batch is None:
            self.leave("micro-batch", samples, "only powers of two are searched (pin it to have it)")
            return
        if samples > 1 and samples * self.sample_bytes > self.capacity_bytes * tp * cp and \
                self.pins.micro_batches is None and self.pins.micro_batch is None:
            self.leave("micro-batch", f"{samples} at tp {tp}, cp {cp}", "one layer's activations alone exceed the "
                                                                        "memory; smaller micro-batches are searched")
            return
        if cp == 1:
            yield "ring"
            return
        more = next((q for q in _primes(cp) if self.global_batch % (m * dp * q) == 0), None)
        free = self.pins.cp is None and self.pins.dp is None and self.pins.micro_batch is None
        if more is not None and free and "cp1" not in self.pins.banned:
            self.leave("cp", f"{cp} at dp {dp}, m {m}", f"dp {dp * more} and cp {cp // more} do the same work with "
                                                        "less communication: the batch has samples enough")
            return
        for kind in ("ring", "ulysses"):
            if kind in self.pins.banned:
                self.leave("cp", kind, "banned")
                continue
            reasons = [self.refusal(k, tp, cp, kind) for k in self.kinds if _is_layer(k)]  # type: ignore[arg-type]
            if all(reasons):
                self.leave("cp", f"{cp} {kind} with tp {tp}", reasons[0] if reasons and reasons[0] else "no layers")
            else:
                yield kind  # type: ignore[misc]

    def refusal(self, kind: LayerKind, tp: int, cp: int, cp_kind: CpKind) -> str | None:
        """Why a kind of layer can't be divided so; None when it can."""
        for count, name in ((kind.heads, "heads"), (kind.kv_heads, "KV heads"),
                            (kind.ffn, "feed-forward columns")):
            if count is not None and count % tp:
                return f"tp {tp} does not divide {count} {name} of {kind.name}"
        divided = kind.heads is not None or kind.ffn is not None or kind.vocabulary is not None
        if tp > 1 and not divided and any(r.kind in ("gemm", "conv") for r in kind.forward):
            return f"{kind.name} has products that are no attention, feed-forward or vocabulary"
        if tp * cp > 1 and self.seq % (tp * cp):
            return f"tp {tp} · cp {cp} does not divide the sequence of {self.seq}"
        if cp == 1:
            return None
        if cp_kind == "ring" and self.seq % (2 * cp):
            return f"ring cp {cp} needs 2 · {cp} equal chunks of the sequence of {self.seq}"
        if cp_kind == "ulysses" and kind.heads is not None and kind.heads % (tp * cp):
            return f"Ulysses: tp {tp} · cp {cp} does not divide {kind.heads} heads of {kind.name}"
        kv = kind.kv_heads
        if cp_kind == "ulysses" and kv is not None and kv % (tp * cp) and (tp * cp) % kv:
            return f"Ulysses: tp {tp} · cp {cp} and {kv} KV heads of {kind.name} do not divide one another"
        return None

    # -- options of a layer -----------------------------------------------------------------------
    def families(self, kind: LayerKind, layout: Layout) -> Iterator[tuple[int, int]]:
        """(ep, etp) of a kind in a layout; (1, 1) for layers without experts."""
        if self.refusal(kind, layout.tp, layout.cp, layout.cp_kind) is not None:
            return
        if not kind.experts:
            yield 1, 1
            return
        gpus = layout.tp * layout.cp * layout.dp
        if layout.tp > 3:
            self.leave("etp", f"between 1 and {layout.tp}", "experts are whole or cut as tp cuts; no other is priced")
        for etp in sorted({1, layout.tp}):
            if not self.pins.allows("etp", etp):
                self.leave("etp", etp, f"pinned to {self.pins.etp}")
                continue
            if kind.expert_ffn is not None and kind.expert_ffn % etp:
                self.leave("etp", etp, f"does not divide {kind.expert_ffn} feed-forward columns of an expert")
                continue
            for ep in divisors(gpus // etp):
                if etp > 1 and self.pins.etp is None and kind.experts % (ep * etp) == 0 and gpus % (ep * etp) == 0:
                    self.leave("etp", f"{etp} with ep {ep}",
                               f"ep {ep * etp} holds as much per GPU and moves fewer rows")
                elif kind.experts % ep:
                    self.leave("ep", ep, f"does not divide {kind.experts} experts of {kind.name}")
                elif self.pins.allows("ep", ep):
                    yield ep, etp
                else:
                    self.leave("ep", ep, self.pins.reason("ep", ep))

    def strategies(self, kind: LayerKind, layout: Layout, ep: int, etp: int) -> Iterator[LayerStrategy]:
        """What is free per layer, simplest first."""
        self.leave("recompute", "min-cut", "it is what fused kernels keep with none")
        modes = [r for r in MODES if self.pins.allows("recompute", r) and r not in self.pins.banned
                 and r in kind.saved]
        for mode in modes:
            for zero in range(4):
                if not self.pins.allows("zero", zero) or f"zero{zero}" in self.pins.banned:
                    continue
                for shard in self._shards(layout, zero):
                    yield LayerStrategy(layout.tp, layout.cp, layout.dp, ep, etp, layout.cp_kind, zero, shard, mode)

    def _shards(self, layout: Layout, zero: int) -> Sequence[int]:
        """0: over all of dp; else HSDP: as far as a level of links reaches."""
        if zero == 0 or layout.dp == 1:
            return (0,)
        if "hsdp" in self.pins.banned:
            self.leave("zero", "hsdp", "banned")
            return (0,)
        self.leave("zero", "hsdp over other sizes", "shards end where a level of links does: smaller groups use the "
                                                    "same links and hold more")
        width = layout.tp * layout.cp
        within = {level.group_size // width for level in self.cluster.levels if level.group_size % width == 0}
        return (0, *sorted(n for n in within if 1 < n < layout.dp and layout.dp % n == 0))


def _is_layer(kind: LayerKind) -> bool:
    """Embedding and head follow the layers; a model without any other part is its own."""
    return kind.vocabulary is None


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """All of them, rising."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*low, *(number // d for d in low)}))


@lru_cache(maxsize=4096)
def _primes(number: int) -> tuple[int, ...]:
    return tuple(d for d in divisors(number) if d > 1 and len(divisors(d)) == 2)
