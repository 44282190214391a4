"""A planning problem as integer tables, and a plan of it: what search, bounds, brute force and CP-SAT all read.

Nothing here knows a model or a cluster: pricing has already filled the tables, in nanoseconds and bytes per GPU. A
problem lists *outer tuples* (pipeline degree, chunks per stage, schedule, micro-batches, rank order); each prices every
kind of layer anew, because a stage's GPUs and a micro-batch's size depend on it. A plan picks an outer tuple, cuts the
layers into its parts and gives every layer an option:

    part k of p·v           layers ends[k-1] to ends[k]-1, none empty; it is chunk k // p of stage k mod p
    v > 1                   the parts differ by at most one layer, as interleaved schedules assume
    mixing off (default)    the layers of one kind on one stage take options of one family

Problems come from JSON through pydantic: integers only, within limits that keep every sum below 2**62.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...cost_model.schedules import Schedule, ScheduleName
from ...runtime.errors import InvalidInputError

MAX_LAYERS, MAX_STAGES = 4096, 4096
Amount = Annotated[int, Field(ge=0, le=10**15)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Name = Annotated[str, Field(max_length=200)]


class Data(BaseModel):
    """Plain values that are checked when they are made: nothing unknown, nothing converted, nothing changed after."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


D = TypeVar("D", bound=Data)


def read_json(kind: type[D], text: str | bytes, what: str, writer: str) -> D:
    """The `kind` that `text`, written by `writer`, holds. Raises `InvalidInputError`, one line that names `what` and
    the field, for anything else."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise InvalidInputError(f"{what}: {where}: {first['msg']}",
                                expected=f"a JSON document as {writer} it") from None


class Option(Data):
    """How one layer runs, per GPU. `saved_bytes` of a micro-batch are released by its B, `saved_until_w_bytes` by its W
    (the same moment where the schedule does not split the backward). Options of one `family` may mix freely."""

    name: Name
    family: Name = ""
    forward_ns: Amount
    input_gradient_ns: Amount
    weight_gradient_ns: Amount
    sync_ns: Amount = 0
    optimizer_ns: Amount = 0
    static_bytes: Amount = 0
    saved_bytes: Amount = 0
    saved_until_w_bytes: Amount = 0
    transient_bytes: Amount = 0
    layout_in: Annotated[int, Field(ge=0, le=1000)] = 0
    layout_out: Annotated[int, Field(ge=0, le=1000)] = 0


class Reshard(Data):
    """Bringing an activation from one layout to another between two layers of a part, per micro-batch."""

    forward_ns: Amount = 0
    backward_ns: Amount = 0
    saved_bytes: Amount = 0


class Transfer(Data):
    """Sending an activation to the next part and its gradient back, per micro-batch."""

    forward_ns: Amount = 0
    backward_ns: Amount = 0


class Outer(Data):
    """An outer tuple with its prices: `options[kind]`, simplest first, and `reshard[out][in]`, `transfer[out][in]` by
    layouts."""

    p: Annotated[int, Field(ge=1, le=MAX_STAGES)]
    v: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 1
    schedule: ScheduleName
    m: Count
    label: Name = ""
    options: tuple[tuple[Option, ...], ...]
    reshard: tuple[tuple[Reshard, ...], ...]
    transfer: tuple[tuple[Transfer, ...], ...]

    @cached_property
    def order(self) -> Schedule:
        """The schedule with its sizes."""
        return Schedule(self.schedule, self.p, self.m, self.v)

    @property
    def parts(self) -> int:
        return self.p * self.v

    @property
    def title(self) -> str:
        return f"p={self.p} v={self.v} {self.schedule} m={self.m}" + (f" {self.label}" if self.label else "")

    @model_validator(mode="after")
    def _check(self) -> Outer:
        Schedule(self.schedule, self.p, self.m, self.v)
        layouts = len(self.reshard)
        for name, table in (("reshard", self.reshard), ("transfer", self.transfer)):
            if len(table) != layouts or any(len(row) != layouts for row in table):
                raise ValueError(f"{self.title}: {name} is no table of {layouts} by {layouts} layouts")
        for option in (o for options in self.options for o in options):
            if max(option.layout_in, option.layout_out) >= layouts:
                raise ValueError(f"{self.title}: option {option.name!r} has a layout outside of the {layouts} known")
        return self


class Problem(Data):
    """All that a search needs. `layers[l]` is an index of `kinds`; `mixing` lets every layer take any option."""

    kinds: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1000)]
    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    gpus: Count
    global_batch: Count
    capacity_bytes: Amount
    outers: Annotated[tuple[Outer, ...], Field(min_length=1, max_length=100_000)]
    mixing: bool = False

    @model_validator(mode="after")
    def _check(self) -> Problem:
        if not all(0 <= kind < len(self.kinds) for kind in self.layers):
            raise ValueError(f"layers: a kind outside of the {len(self.kinds)} known")
        for outer in self.outers:
            if self.gpus % outer.p or self.global_batch % outer.m:
                raise ValueError(f"{outer.title}: p must divide {self.gpus} GPUs, m the batch of {self.global_batch}")
            if len(outer.options) != len(self.kinds):
                raise ValueError(f"{outer.title}: options for {len(outer.options)} of {len(self.kinds)} kinds")
            _check_sums(outer, len(self.layers))
        return self

    @classmethod
    def from_json(cls, text: str | bytes) -> Problem:
        """Raises `InvalidInputError`, one line that names the field, for anything that is no problem."""
        return read_json(cls, text, "planning problem", "Problem.to_json writes")

    def to_json(self) -> str:
        return self.model_dump_json()

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(kind, number of layers) of every stretch of equal layers."""
        return runs(self.layers)

    def plan_fault(self, plan: Plan) -> str | None:
        """Why `plan` is no plan of this problem, memory aside; None when it is one."""
        if not 0 <= plan.outer < len(self.outers):
            return f"outer tuple {plan.outer} of {len(self.outers)}"
        outer = self.outers[plan.outer]
        sizes = [b - a for a, b in pairwise((0, *plan.ends))]
        if len(sizes) != outer.parts or min(sizes) < 1 or plan.ends[-1] != len(self.layers):
            return f"ends {plan.ends} don't cut {len(self.layers)} layers into {outer.parts} parts"
        if outer.v > 1 and max(sizes) - min(sizes) > 1:
            return "parts of an interleaved plan differ by more than one layer"
        if len(plan.options) != len(self.layers):
            return f"{len(plan.options)} options for {len(self.layers)} layers"
        families: dict[tuple[int, int], str] = {}
        for layer, (part, choice) in enumerate(zip(plan.part_of_layer(), plan.options, strict=True)):
            kind = self.layers[layer]
            if not 0 <= choice < len(outer.options[kind]):
                return f"layer {layer} has no option {choice}"
            family = outer.options[kind][choice].family
            if not self.mixing and families.setdefault((part % outer.p, kind), family) != family:
                return f"layer {layer} is of family {family!r}, its kind on its stage of another"
        return None


class Plan(Data):
    """x: the outer tuple (its index), where each part ends (exclusive), and the option of every layer (an index)."""

    outer: int
    ends: tuple[int, ...]
    options: tuple[int, ...]

    def part_of_layer(self) -> list[int]:
        """The part that holds each layer."""
        return [part for part, (a, b) in enumerate(pairwise((0, *self.ends))) for _ in range(b - a)]


def runs(kinds: tuple[int, ...]) -> list[tuple[int, int]]:
    """(kind, length) of every stretch of equal kinds."""
    found: list[tuple[int, int]] = []
    for kind in kinds:
        if found and found[-1][0] == kind:
            found[-1] = kind, found[-1][1] + 1
        else:
            found.append((kind, 1))
    return found


def part_sizes(layers: int, outer: Outer) -> tuple[int, int]:
    """The fewest and the most layers that a part of a plan can hold."""
    if outer.v > 1:
        return layers // outer.parts, -(-layers // outer.parts)
    return 1, layers - outer.parts + 1


def _check_sums(outer: Outer, layers: int) -> None:
    """Keeps sums over layers and micro-batches within 64-bit integers."""
    def most(items: Any, *names: str) -> int:
        return max((sum(getattr(item, name) for name in names) for item in items), default=0)

    options = [o for of_kind in outer.options for o in of_kind]
    reshards, transfers = [r for row in outer.reshard for r in row], [t for row in outer.transfer for t in row]
    step = layers * outer.m * (most(options, "forward_ns", "input_gradient_ns", "weight_gradient_ns")
                               + most(reshards, "forward_ns", "backward_ns")
                               + most(transfers, "forward_ns", "backward_ns"))
    step += layers * most(options, "sync_ns", "optimizer_ns")
    held = layers * (most(options, "static_bytes", "transient_bytes") + outer.m * outer.v * (
        most(options, "saved_bytes", "saved_until_w_bytes") + most(reshards, "saved_bytes")))
    if max(step, held) >= 1 << 62:
        raise ValueError(f"{outer.title}: a step of {step:.1e} ns or {held:.1e} bytes is beyond 64-bit integers")
