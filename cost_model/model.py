"""What the planner knows about a model: its layers in order, and what one layer of each kind computes, holds and saves.

Pure data, filled by `compiler/planner/capture_model.py` from captured graphs. Everything is for one micro-batch of one
sequence length; `interpolated` gives the numbers of other micro-batches from two captures, exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .records import OpRecord

VERSION = 1
RecomputeMode = Literal["none", "min-cut", "selective", "full"]
RECOMPUTE_MODES: tuple[RecomputeMode, ...] = ("none", "min-cut", "selective", "full")
BoundaryRole = Literal["chain", "carried", "constant"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one dtype that are all trainable, or all frozen."""

    dtype: str
    trainable: bool
    count: int
    bytes: int


@dataclass(frozen=True)
class Boundary:
    """A tensor that enters a layer.

    `chain`: the hidden states that the previous layer made. `carried`: needs a gradient and comes from further back or
    goes to several layers (an encoder's output). `constant`: needs no gradient (masks, position embeddings, token ids).
    """

    name: str
    role: BoundaryRole
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Saved:
    """What one mode of recomputation keeps between forward and backward, and what it runs a second time.

    `bytes`: activations of this layer; parameters, and `carried` and `constant` boundaries, which several layers share,
    are not among them. `recomputed`: positions in the layer's `forward` records. `weight_bytes`: of `bytes`, what the
    weights' gradients read, which a schedule that delays these keeps longer.
    """

    bytes: int
    recomputed: tuple[int, ...] = ()
    weight_bytes: int = 0


@dataclass(frozen=True)
class LayerKind:
    """Layers that are equal in everything but their weights.

    `forward`, `backward`: the operators in order, views left out. `parameters` are owned here; `tied` are used here
    and owned by an earlier layer. `saved`: by `RecomputeMode`. `causal_flops_*`: the part of the FLOPs that stands in
    causal attention, where a kernel that skips masked blocks does about half. `expert_flops_*`: the part in experts.
    The counts at the end were found in the graph; None where there is no such thing.

    `weight_only`: positions in `backward` of what only the weights' gradients need. `fused_forward`, `fused_backward`:
    bytes that cross memory at each operator when neighbouring element-wise operators and reductions are one kernel, as
    a compiler makes them; empty where nobody looked. `vector_parameters`: of `parameters`, those of one dimension,
    which tensor parallelism repeats. `gradient_bytes`: gradients of activations that the weights' gradients read.
    """

    name: str
    forward: tuple[OpRecord, ...]
    backward: tuple[OpRecord, ...]
    parameters: tuple[ParameterGroup, ...]
    tied: tuple[ParameterGroup, ...]
    saved: Mapping[RecomputeMode, Saved]
    inputs: tuple[Boundary, ...]
    capture_s: float = 0.0
    causal_flops_forward: int = 0
    causal_flops_backward: int = 0
    expert_flops_forward: int = 0
    expert_flops_backward: int = 0
    expert_parameters: int = 0
    weight_only: tuple[int, ...] = ()
    fused_forward: tuple[int, ...] = ()
    fused_backward: tuple[int, ...] = ()
    gradient_bytes: int = 0
    vector_parameters: int = 0
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    experts: int | None = None
    top_k: int | None = None
    expert_ffn: int | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        bad = [path for path, value in _numbers(self, self.name) if value < 0 or value != value]
        if bad:
            raise ValueError(f"{bad[0]} is negative or not a number; expected sizes, counts and seconds from 0 up")
        for mode, saved in self.saved.items():
            if any(i >= len(self.forward) for i in saved.recomputed):
                raise ValueError(f"{self.name}: {mode} recomputes an operator that is not among the forward ones")
        if any(i >= len(self.backward) for i in self.weight_only) or any(
                fused and len(fused) != len(records) for fused, records in (
                    (self.fused_forward, self.forward), (self.fused_backward, self.backward))):
            raise ValueError(f"{self.name}: positions or fused bytes that don't fit its operators")

    @property
    def inputs_chain(self) -> bool:
        """Whether hidden states enter: not so for an embedding."""
        return any(b.role == "chain" for b in self.inputs)

    @property
    def flops_forward(self) -> int:
        return sum(r.flops for r in self.forward)

    @property
    def flops_backward(self) -> int:
        """Without recomputation: see `recomputed_flops`."""
        return sum(r.flops for r in self.backward)

    @property
    def parameter_count(self) -> int:
        """Parameters owned here, trainable or not."""
        return sum(p.count for p in self.parameters)

    @property
    def parameter_bytes(self) -> int:
        return sum(p.bytes for p in self.parameters)

    def recomputed_flops(self, mode: RecomputeMode) -> int:
        """FLOPs that `mode` runs a second time before the backward pass."""
        return sum(self.forward[i].flops for i in self.saved[mode].recomputed)


@dataclass(frozen=True)
class ModelDescription:
    """A model as a pipeline of layers: the layer at position `i` is of kind `kinds[order[i]]` and stands in the model
    under the name `modules[i]` (for parts of `forward` outside of any layer: what they lie between).

    `seq` tokens and `micro_batch` samples are what was captured. `imbalance`: rows an expert gets, over the mean.
    `notes` say what the numbers leave out or assume.
    """

    name: str
    seq: int
    micro_batch: int
    imbalance: float
    kinds: tuple[LayerKind, ...]
    order: tuple[int, ...]
    modules: tuple[str, ...]
    notes: tuple[str, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"a model description of version {self.version}; this release reads version {VERSION}")
        if self.seq < 1 or self.micro_batch < 1 or not self.imbalance >= 1:
            raise ValueError(f"seq {self.seq}, micro-batch {self.micro_batch}, imbalance {self.imbalance}: "
                             "expected 1 or more of each")
        if len(self.order) != len(self.modules) or any(not 0 <= k < len(self.kinds) for k in self.order):
            raise ValueError(f"{self.name}: the order of layers names kinds or modules that are not there")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.seq * self.micro_batch

    @property
    def parameter_count(self) -> int:
        """Parameters of the model; tied ones count once."""
        return sum(self.kinds[k].parameter_count for k in self.order)

    def count(self, kind: int) -> int:
        """How many layers are of that kind."""
        return self.order.count(kind)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def model_from_json(text: str) -> ModelDescription:
    """Inverse of `json.dumps(description.as_dict())`. Raises `ValueError` for anything else, in one sentence."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(ModelDescription).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"not a model description: {where}: {first['msg']}") from None


def interpolated(one: ModelDescription, two: ModelDescription, micro_batch: int) -> ModelDescription:
    """The description for another micro-batch from captures of two: every number is a + b · micro-batch.

    Exact where no rows are rounded up (imbalance 1), but for the bytes that a gather reads of a table smaller than what
    it gathers: those stop growing. One sample is no point of the line: how a tensor with a dimension of 1 is walked
    through is another matter. Raises `ValueError` when the two differ in more
    than their numbers, or when a number would not be whole.
    """
    if one.micro_batch == two.micro_batch or min(one.micro_batch, two.micro_batch, micro_batch) < 2:
        raise ValueError(f"captures of micro-batches {one.micro_batch} and {two.micro_batch} for {micro_batch}; "
                         "expected two different ones, all above 1")
    line = _Line(one.micro_batch, two.micro_batch, micro_batch)
    return _zipped(one, two, line, one.name)  # type: ignore[no-any-return]


_MEASURED = ("capture_s", "imbalance")  # the same for every micro-batch


@dataclass(frozen=True)
class _Line:
    first: int
    second: int
    wanted: int

    def at(self, a: int, b: int, where: str) -> int:
        value, rest = divmod((b - a) * (self.wanted - self.first), self.second - self.first)
        if rest:
            raise ValueError(f"{where} does not grow by a whole number per sample")
        return a + value


def _zipped(a: Any, b: Any, line: _Line, where: str) -> Any:
    if type(a) is not type(b):
        raise ValueError(f"{where} is {a!r} in one capture and {b!r} in the other")
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        names = [f.name for f in dataclasses.fields(a)]
        return type(a)(**{n: getattr(a, n) if n in _MEASURED else
                          _zipped(getattr(a, n), getattr(b, n), line, f"{where}.{n}") for n in names})
    if isinstance(a, Mapping):
        return {k: _zipped(v, b.get(k), line, f"{where}.{k}") for k, v in a.items()}
    if isinstance(a, tuple) and len(a) == len(b):
        return tuple(_zipped(x, y, line, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    if isinstance(a, int) and not isinstance(a, bool):
        return line.at(a, b, where)
    if a != b:
        raise ValueError(f"{where} is {a!r} in one capture and {b!r} in the other")
    return a


def _numbers(value: Any, path: str) -> list[tuple[str, float]]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [(path, value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [n for f in dataclasses.fields(value) for n in _numbers(getattr(value, f.name), f"{path}.{f.name}")]
    if isinstance(value, Mapping):
        return [n for k, v in value.items() for n in _numbers(v, f"{path}.{k}")]
    return [n for i, v in enumerate(value) for n in _numbers(v, f"{path}[{i}]")] if isinstance(value, tuple) else []
