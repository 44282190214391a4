"""Where a plan puts what: mesh, cuts and options. Rules and names only, no lists of ranks.

    stage GPUs   D = gpus / pp;  tp · cp · dp = D and etp · ep · edp = D for every layer
    rank         Σ coordinate · stride over the axes of `Mesh.order`, the first one innermost (stride 1)
    part k       of pp · v parts in the order of the model: chunk k // pp of stage k mod pp
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from .plan_data import MAX_LAYERS, Count, Degree, Name, PlanData, Text

AxisName = Literal["tp", "cp", "dp", "pp"]
ExpertAxisName = Literal["etp", "ep", "edp", "pp"]
CpKind = Literal["none", "ulysses", "ring", "all-gather"]
RecomputeMode = Literal["none", "min-cut", "selective", "full"]  # those of cost_model/model.py
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1"]  # those of cost_model/schedules.py


class LayerOptions(PlanData):
    """How one layer runs on the D GPUs of its stage.

    Sequence parallelism in Megatron's sense comes with `sequence_parallel` and tp > 1. `zero`: 0 replicates, 1 shards
    optimizer states, 2 gradients too, 3 parameters too, over `zero_shard` ranks of dp · cp (fewer than all of them:
    HSDP); experts shard theirs over edp. `variant`: a rewrite, "none" for the layer as it is. `runnable`: whether
    `meshwright run` can execute it, and if not, why.
    """

    tp: Degree = 1
    sequence_parallel: bool = False
    cp: Degree = 1
    cp_kind: CpKind = "none"
    dp: Degree = 1
    ep: Degree = 1
    etp: Degree = 1
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    zero_shard: Degree = 1
    recompute: RecomputeMode = "none"
    variant: Name = "none"
    runnable: bool = False
    why_not_runnable: Text = ""

    @model_validator(mode="after")
    def _check(self) -> LayerOptions:
        if self.gpus % (self.ep * self.etp):
            raise ValueError(f"ep {self.ep} · etp {self.etp} does not divide the stage's {self.gpus} GPUs")
        if (self.cp > 1) != (self.cp_kind != "none"):
            raise ValueError(f"cp {self.cp} of kind {self.cp_kind!r}; expected a kind exactly where cp is above 1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel with tp 1; it shares tensor parallelism's ranks")
        if (self.dp * self.cp) % self.zero_shard or (self.zero == 0 and self.zero_shard > 1):
            raise ValueError(f"zero_shard {self.zero_shard} with ZeRO {self.zero}; expected a divisor of dp · cp = "
                             f"{self.dp * self.cp}, and 1 where nothing is sharded")
        if self.runnable == bool(self.why_not_runnable):
            raise ValueError("expected a reason in why_not_runnable exactly where runnable is false")
        return self

    @property
    def gpus(self) -> int:
        """GPUs of the stage."""
        return self.tp * self.cp * self.dp

    @property
    def edp(self) -> int:
        """Replicas of an expert's shard."""
        return self.gpus // (self.ep * self.etp)

    @property
    def title(self) -> str:
        """`tp 8 · sp · cp 2 ring · dp 4 · ep 8 · ZeRO-3 · recompute full`; what is off is left out."""
        parts = [f"tp {self.tp}"] if self.tp > 1 else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += [f"cp {self.cp} {self.cp_kind}"] if self.cp > 1 else []
        parts += [f"dp {self.dp}"] if self.dp > 1 else []
        parts += [f"ep {self.ep}"] if self.ep > 1 else []
        parts += [f"etp {self.etp}"] if self.etp > 1 else []
        if self.zero:
            over = "" if self.zero_shard == self.dp * self.cp else f" over {self.zero_shard}"
            parts.append(f"ZeRO-{self.zero}{over}")
        parts += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        parts += [self.variant] if self.variant != "none" else []
        return " · ".join(parts) or "one GPU"


class LayerRange(PlanData):
    """`count` neighbouring layers, `first` to `last` by module name, that run the same way. `kind` is the name of what
    they are (a layer class), `experts` how many experts each of them has. A range lies within one part."""

    first: Name
    last: Name
    count: Count
    kind: Name
    experts: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    options: LayerOptions


class Part(PlanData):
    """A stretch of the model, by module names, on one stage; `chunk` counts a stage's parts."""

    stage: Annotated[int, Field(ge=0)]
    chunk: Annotated[int, Field(ge=0)] = 0
    first: Name
    last: Name


class Schedule(PlanData):
    """The pipeline's schedule: `stages` p, `chunks` v of each, `micro_batches` m of `micro_batch_samples` samples over
    all replicas (a replica gets that divided by its dp)."""

    name: ScheduleName
    stages: Count
    chunks: Count = 1
    micro_batches: Count
    micro_batch_samples: Count

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if (self.chunks > 1) != (self.name == "interleaved"):
            raise ValueError(f"schedule {self.name} with {self.chunks} chunk(s) per stage")
        if self.name == "interleaved" and self.micro_batches % self.stages:
            raise ValueError(f"schedule interleaved: {self.micro_batches} micro-batches are no multiple of "
                             f"{self.stages} stages")
        return self

    @property
    def title(self) -> str:
        """`pp 4 × 2 chunks interleaved, 32 micro-batches`."""
        batches = f"{self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''}"
        if self.stages == 1:
            return f"pp 1, {batches}"
        interleave = f" × {self.chunks} chunks" if self.chunks > 1 else ""
        return f"pp {self.stages}{interleave} {self.name}, {batches}"


class Mesh(PlanData):
    """`gpus` of the cluster are used and `idle_gpus` are not. `order`: how ranks are laid out in dense layers,
    innermost axis first; `expert_order` the same for experts."""

    gpus: Degree
    gpus_per_node: Degree
    idle_gpus: Annotated[int, Field(ge=0)] = 0
    pp: Degree = 1
    order: tuple[AxisName, ...] = ("tp", "cp", "dp", "pp")
    expert_order: tuple[ExpertAxisName, ...] = ("etp", "ep", "edp", "pp")

    @model_validator(mode="after")
    def _check(self) -> Mesh:
        for name, order, axes in (("order", self.order, get_args(AxisName)),
                                  ("expert_order", self.expert_order, get_args(ExpertAxisName))):
            if sorted(order) != sorted(axes):
                raise ValueError(f"{name} {', '.join(order)}; expected every one of {', '.join(axes)} once")
        if self.gpus % self.pp:
            raise ValueError(f"pp {self.pp} does not divide {self.gpus} GPUs")
        return self

    @property
    def stage_gpus(self) -> int:
        return self.gpus // self.pp

    def axes(self, options: LayerOptions, experts: bool = False) -> dict[str, tuple[int, int]]:
        """(degree, stride between neighbours) of every axis for a layer: rank = Σ coordinate · stride."""
        degrees = {"tp": options.tp, "cp": options.cp, "dp": options.dp, "etp": options.etp, "ep": options.ep,
                   "edp": options.edp, "pp": self.pp}
        found: dict[str, tuple[int, int]] = {}
        stride = 1
        for axis in self.expert_order if experts else self.order:
            found[axis] = degrees[axis], stride
            stride *= degrees[axis]
        return found

    def fault(self, options: LayerOptions) -> str | None:
        """Why a layer can't lie in this mesh. Where pp is not outermost, its stride must be the same in all layers: the
        first one's is compared by `layout_fault`."""
        if options.gpus != self.stage_gpus:
            return f"tp · cp · dp = {options.gpus}, but a stage has {self.stage_gpus} GPUs"
        return None


def layout_fault(mesh: Mesh, schedule: Schedule, layers: tuple[str, ...], parts: tuple[Part, ...],
                 ranges: tuple[LayerRange, ...]) -> str | None:
    """What is wrong first with a plan's layout, in one phrase, or None."""
    if schedule.stages != mesh.pp:
        return f"the schedule has {schedule.stages} stages, the mesh pp {mesh.pp}"
    at = {name: i for i, name in enumerate(layers)}
    if len(at) != len(layers):
        return "model.layers names a module twice"
    fault = _stretches_fault("parts", [(p.first, p.last) for p in parts], at)
    fault = fault or _stretches_fault("layers", [(r.first, r.last) for r in ranges], at)
    if fault:
        return fault
    wanted = [(k % mesh.pp, k // mesh.pp) for k in range(mesh.pp * schedule.chunks)]
    if [(p.stage, p.chunk) for p in parts] != wanted:
        return f"parts: expected {len(wanted)} of them, part k being chunk k // {mesh.pp} of stage k mod {mesh.pp}"
    strides: set[int] = set()
    for r in ranges:
        if at[r.last] - at[r.first] + 1 != r.count:
            return f"layers from {r.first!r} to {r.last!r} are not {r.count}"
        if not any(at[p.first] <= at[r.first] and at[r.last] <= at[p.last] for p in parts):
            return f"the layers from {r.first!r} to {r.last!r} lie in two parts"
        fault = mesh.fault(r.options)
        if fault:
            return f"layers from {r.first!r}: {fault}"
        strides.add(mesh.axes(r.options)["pp"][1])
        if r.options.ep * r.options.etp > 1:
            strides.add(mesh.axes(r.options, experts=True)["pp"][1])
    if len(strides) > 1:
        return "layers disagree on how far apart the stages' ranks are; expected pp outermost or equal degrees inside"
    return None


def _stretches_fault(what: str, stretches: list[tuple[str, str]], at: dict[str, int]) -> str | None:
    end = 0
    for first, last in stretches:
        unknown = [name for name in (first, last) if name not in at]
        if unknown:
            return f"{what}: {unknown[0]!r} is not among model.layers"
        if at[first] != end or at[last] < at[first]:
            return f"{what}: {first!r} to {last!r} does not continue at layer {end}"
        end = at[last] + 1
    return None if end == len(at) else f"{what}: end at layer {end} of {len(at)}"


LayerNames = Annotated[tuple[Name, ...], Field(min_length=1, max_length=MAX_LAYERS)]
Parts = Annotated[tuple[Part, ...], Field(min_length=1, max_length=MAX_LAYERS)]
Ranges = Annotated[tuple[LayerRange, ...], Field(min_length=1, max_length=MAX_LAYERS)]

