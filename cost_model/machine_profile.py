"""`MachineProfile`: a machine as `meshwright profile` measured it. Versioned JSON: facts about the device, the scalars
that the layer cost model reads, and the raw points that they were fitted to.

    device     name, peaks, memory          what `Device` is to the planner
    compute    per number of processes      efficiencies of products, attention and memory; seconds of a kernel
    links      inside a node, between nodes alpha and bandwidth that collectives reach
    tables     every measured point         `profile_fit.fitted` makes the scalars from them again

`profile_use.py` puts a profile in the place of presets; `compiler/profiler` measures one. Units are in the names, and a
number that only makes sense in another unit is refused.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

FORMAT = "meshwright-profile"
VERSION = 1
CPU_NAME = "cpu"
MOST_POINTS = 10_000
Dtype = Literal["float32", "tfloat32", "bfloat16", "float16"]
Level = Literal["inner", "network"]
CollectiveName = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "point-to-point"]


class MachineProfileError(ValueError):
    """A profile that can't be read or used: one sentence that says what was given and what was expected."""


def _in(unit: str, least: float, most: float) -> AfterValidator:
    """A finite number that makes sense in its unit."""
    def check(value: float) -> float:
        if not (math.isfinite(value) and least <= value <= most):
            raise ValueError(f"is {value:g} {unit}; expected {least:g} to {most:g} {unit}: is the unit right?")
        return value

    return AfterValidator(check)


Seconds = Annotated[float, _in("s", 1e-9, 1e4)]
Latency = Annotated[float, _in("s", 1e-9, 1.0)]
Bandwidth = Annotated[float, _in("bytes/s", 1e6, 1e15)]
Flops = Annotated[float, _in("FLOP/s", 1e6, 1e18)]
PerSecond = Annotated[float, _in("operations/s", 1e6, 1e18)]
Memory = Annotated[float, _in("bytes", 1e6, 1e15)]
Efficiency = Annotated[float, _in("(a fraction)", 1e-6, 1.0)]
Share = Annotated[float, _in("(a fraction)", 0.0, 1.0)]
Factor = Annotated[float, _in("(a ratio)", 1e-3, 1e3)]
Error = Annotated[float, _in("(a ratio)", 0.0, 1e6)]
DepthKnee = Annotated[float, _in("elements", 0.0, 1e6)]
AreaKnee = Annotated[float, _in("elements", 0.0, 1e12)]
Size = Annotated[int, Field(ge=1, le=1 << 40)]
Count = Annotated[int, Field(ge=1, le=1 << 24)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,79}$")]


class Data(BaseModel):
    """Plain values, checked when they are made: nothing unknown, nothing converted, nothing changed after."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# -- what was measured ----------------------------------------------------------------------------
class ProductPoint(Data):
    """`batch` products [m, k] · [k, n], while `processes` of the node did the same."""

    processes: Count
    dtype: Dtype
    batch: Size
    m: Size
    k: Size
    n: Size
    seconds: Seconds


class StreamPoint(Data):
    """An operator that moves `moved_bytes` (read plus written) through memory."""

    processes: Count
    operator: Text
    moved_bytes: Size
    seconds: Seconds


class AttentionPoint(Data):
    """torch's scaled_dot_product_attention, without a mask, forward or backward."""

    processes: Count
    dtype: Dtype
    batch: Size
    heads: Size
    seq: Size
    head_size: Size
    backward: bool
    seconds: Seconds


class OverheadPoint(Data):
    """`kernel`: one small kernel on the device. `operator`: one operator through the dispatcher and autograd, as the
    host sees it."""

    processes: Count
    what: Literal["kernel", "operator"]
    seconds: Seconds


class CollectivePoint(Data):
    """A collective over all ranks of a level's group (point-to-point: from one to the next); `size_bytes` as in
    `collectives.py`."""

    level: Level
    collective: CollectiveName
    ranks: Count
    size_bytes: Size
    seconds: Seconds


class OverlapPoint(Data):
    """Products alone, an all-reduce alone, and both at the same time."""

    ranks: Count
    size_bytes: Size
    compute_s: Seconds
    communication_s: Seconds
    together_s: Seconds


class Tables(Data):
    """Every point, in the order of measuring."""

    products: Annotated[tuple[ProductPoint, ...], Field(min_length=1, max_length=MOST_POINTS)]
    streams: Annotated[tuple[StreamPoint, ...], Field(min_length=1, max_length=MOST_POINTS)]
    attention: Annotated[tuple[AttentionPoint, ...], Field(max_length=MOST_POINTS)] = ()
    overheads: Annotated[tuple[OverheadPoint, ...], Field(min_length=1, max_length=MOST_POINTS)]
    collectives: Annotated[tuple[CollectivePoint, ...], Field(max_length=MOST_POINTS)] = ()
    overlap: Annotated[tuple[OverlapPoint, ...], Field(max_length=MOST_POINTS)] = ()


# -- what follows from it -------------------------------------------------------------------------
class ProfiledDevice(Data):
    """`name`: "cpu", a preset's name, or one made from the hardware's. Peaks and memory bandwidth are the data sheet's
    for a preset, the best measured rate otherwise. `memory_bytes`: of a GPU, or of the whole machine for a CPU, whose
    processes share it. `threads`: of one process."""

    name: Name
    kind: Literal["cpu", "gpu"]
    hardware: Text
    memory_bytes: Memory
    threads: Count = 1
    peak_flops_per_s: Annotated[dict[Dtype, Flops], Field(min_length=1)]
    memory_bandwidth_bytes_per_s: Bandwidth
    transcendental_per_s: PerSecond


class Products(Data):
    """Of one dtype: `efficiency` · peak is the ceiling; the knees as in `calibration.py`. `median_error`: of the fit's
    points."""

    efficiency: Efficiency
    depth_knee: DepthKnee
    area_knee: AreaKnee
    median_error: Error


class Attention(Data):
    """`efficiency` of the forward pass over the peak; the backward pass reaches `backward` times that."""

    efficiency: Efficiency
    backward: Factor
    median_error: Error


class Compute(Data):
    """One process, while `processes` of the node compute."""

    processes: Count
    products: Annotated[dict[Dtype, Products], Field(min_length=1)]
    attention: dict[Dtype, Attention] = {}
    memory_efficiency: Efficiency
    memory_median_error: Error
    kernel_s: Latency
    eager_op_s: Latency


class Link(Data):
    """A level of links as collectives see it: alpha of a step, and what they reach of one rank's port (`inner`) or of
    one NIC (`network`). `ranks`: of the groups measured."""

    level: Level
    ranks: Count
    nics_per_node: Count | None = None
    latency_s: Latency
    bandwidth_bytes_per_s: Bandwidth
    median_error: Error


class MachineProfile(Data):
    """The document; see the top of this file."""

    format: Literal["meshwright-profile"] = FORMAT  # type: ignore[assignment]
    version: Literal[1] = VERSION  # type: ignore[assignment]
    made: Text
    writer: Text
    torch: Text
    system: Text
    backend: Literal["none", "gloo", "nccl"]
    nodes: Count = 1
    ranks_per_node: Count = 1
    device: ProfiledDevice
    compute: Annotated[tuple[Compute, ...], Field(min_length=1, max_length=64)]
    collective_launch_s: Latency | None = None
    links: Annotated[tuple[Link, ...], Field(max_length=2)] = ()
    overlap_loss: Share | None = None
    tables: Tables

    @model_validator(mode="after")
    def _check(self) -> MachineProfile:
        levels = [link.level for link in self.links]
        if levels not in ([], ["inner"], ["network"], ["inner", "network"]):
            raise ValueError(f"links {', '.join(levels)}; expected inner, then network, each at most once")
        if bool(self.links) != (self.collective_launch_s is not None):
            raise ValueError("links and collective_launch_s; expected both or none of them")
        counts = [c.processes for c in self.compute]
        if counts != sorted(set(counts)):
            raise ValueError(f"compute of {', '.join(map(str, counts))} processes; expected each once, ascending")
        if (self.device.name == CPU_NAME) != (self.device.kind == "cpu"):
            raise ValueError(f"device {self.device.name} of kind {self.device.kind}; expected the name cpu of a CPU "
                             "only")
        return self

    def to_json(self) -> str:
        """The document as it is written to a file."""
        return self.model_dump_json(indent=1) + "\n"

    def link(self, level: Level) -> Link | None:
        """The measured links of a level."""
        return next((link for link in self.links if link.level == level), None)


def profile_from_json(text: str | bytes) -> MachineProfile:
    """The profile in JSON text whose size and depth were looked at. Raises `MachineProfileError`."""
    try:
        return MachineProfile.model_validate_json(text)
    except ValidationError as error:
        raise MachineProfileError(_first(error)) from None


def _first(error: ValidationError) -> str:
    """pydantic's first complaint as one sentence that names the field."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where, message = ".".join(map(str, found["loc"])), found["msg"]
    if found["type"] == "value_error":
        return f"{where} {message.removeprefix('Value error, ')}".strip()
    if found["type"] == "extra_forbidden":
        return f"unknown field {where[:80]!r}; expected a profile as meshwright profile writes it"
    if found["type"] == "missing":
        return f"{where} is missing; expected it in every profile"
    return f"{where}: {message[:1].lower()}{message[1:]}" if where else message
