"""`Program`: what one compiled graph does at run time, as plain data.

A program is a list of steps over named tensors: allocate, launch a kernel, call an ATen operator, make a view, release.
It holds no weights, no code and no live objects, so it can be printed as a readable program (Python or C++), stored as
JSON next to the kernel IR, and read back from a stranger's file without running anything.

Sizes and strides are integer expressions in text (`"768*s0"`, see `codegen.expr`) over the program's symbols; every
symbol is bound on entry, from an integer argument or from a dimension of an input.

    symbols:  s0 = size(x, 0)
    inputs:   x f32[s0, 768], w f32[768, 768], b f32[768]
    steps:    t0 = aten.addmm.default(b, x, view(w))
              t1 = alloc f32[s0, 768]
              launch gelu_0(t0 -> t1) [s0]
              release t0
    outputs:  t1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union

Size = Union[str, int]  # an integer expression as text, or an int
Json = Any  # int | float | bool | str | None | list | dict: an argument tree, see `Call`

TORCH_DTYPES = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32",
    "i16": "int16", "i8": "int8", "u8": "uint8", "b1": "bool",
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides (elements), dtype (`"float32"`, torch's own name) and device of a tensor. `static`: a Parameter or
    buffer of the model, whose address is stable between calls (its packed or stacked copies may be cached)."""

    name: str
    dtype: str
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    device: str = "cpu"
    static: bool = False
    source: str | None = None


@dataclass(frozen=True)
class Symbol:
    """A run-time integer: `argument` is its position among the inputs when it is passed as an int; otherwise it is
    dimension `dim` of the input tensor called `tensor`."""

    name: str
    argument: int | None = None
    tensor: str | None = None
    dim: int = 0


@dataclass(frozen=True)
class Alloc:
    """A new uninitialised tensor. `escapes`: it (or a view of it) is returned, so its memory can't come from the
    arena."""

    spec: TensorSpec
    escapes: bool = False
    kind: Literal["alloc"] = "alloc"


@dataclass(frozen=True)
class View:
    """`spec` is a strided view of `base`, `offset` elements after base's own first element. No data moves."""

    spec: TensorSpec
    base: str
    offset: Size = 0
    kind: Literal["view"] = "view"


@dataclass(frozen=True)
class Launch:
    """Run kernel `kernel` (a key of `Program.kernels`) on its inputs then outputs, with its `sizes` in order.

    `outputs` may name tensors that are also in `inputs` (memory reused in place, index maps equal)."""

    kernel: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: tuple[Size, ...] = ()
    kind: Literal["launch"] = "launch"


@dataclass(frozen=True)
class Call:
    """`outs = op(*args, **kwargs)`, `op` being `"aten.addmm.default"`. In the trees a tensor is `{"tensor": name}`, a
    symbolic integer `{"size": expr}`, and `{"dtype"|"device"|"layout"|"memory_format": name}` the torch constants;
    floats that JSON lacks are `{"float": "inf"}`. An unused result is None in `outs`. `specs` describes the results
    used."""

    op: str
    args: tuple[Json, ...]
    kwargs: dict[str, Json]
    outs: tuple[str | None, ...]
    specs: tuple[TensorSpec | None, ...] = ()
    kind: Literal["call"] = "call"


@dataclass(frozen=True)
class Gemm:
    """`out = a @ b + bias` in fp32 on tensors that exist: a [.., M, K], b [.., K, N], out [.., M, N] (rows
    contiguous), with at most one batch dimension. `bias` is [N] or broadcasts to `out`. Where `b` is static, a
    packed copy may serve."""

    out: str
    a: str
    b: str
    bias: str | None = None
    kind: Literal["gemm"] = "gemm"


@dataclass(frozen=True)
class Gemms:
    """Products with the same left side `a` (query, key and value; gate and up), done in one pass over it."""

    products: tuple[Gemm, ...]
    kind: Literal["gemms"] = "gemms"


@dataclass(frozen=True)
class Epilogue:
    """`product`, then the element-wise `launch`, which alone reads its result: as one where the product's template
    measures faster so, and then `product.out` is left unspecified. `launch` writes nothing that the two read."""

    product: Gemm
    launch: Launch
    kind: Literal["epilogue"] = "epilogue"


@dataclass(frozen=True)
class Conv:
    """`spec = relu(scale * convolution(x, weight, bias) + shift + other)`, channels last, weights packed at call time.

    `scale` and `shift` are trees over the per-channel tensors `sources` (see codegen/affine.py)."""

    spec: TensorSpec
    x: str
    weight: str
    bias: str | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    scale: tuple[Any, ...]
    shift: tuple[Any, ...]
    sources: tuple[str, ...] = ()
    other: str | None = None
    relu: bool = False
    kind: Literal["conv"] = "conv"


@dataclass(frozen=True)
class Attention:
    """`out = softmax(scale * q @ k^T + mask) @ v` in fp32 on tensors that exist: q and out [B, H, L, D], k and v
    [B, H', S, D] with H' dividing H (head h reads head h // (H / H')), the last dimension contiguous. `mask` is added
    and broadcasts to [B, H, L, S]; `causal`: query i sees keys up to i. A row that sees no key is 0. `logsumexp`
    [B, H, L] is written where it is named."""

    out: str
    q: str
    k: str
    v: str
    scale: float
    mask: str | None = None
    causal: bool = False
    logsumexp: str | None = None
    kind: Literal["attention"] = "attention"


@dataclass(frozen=True)
class Release:
    """The last use of these tensors is behind us; their memory may be reused."""

    names: tuple[str, ...]
    kind: Literal["release"] = "release"


Step = Union[Alloc, View, Launch, Call, Gemm, Gemms, Epilogue, Conv, Attention, Release]


@dataclass(frozen=True)
class SymbolInput:
    """An input that is a plain integer; `Symbol.argument` refers to its position."""

    name: str


@dataclass(frozen=True)
class Program:
    """One graph. `kernels` maps kernel names to kernel IR text; `outputs` are tensor names, `{"size": expr}` or
    None."""

    name: str
    inputs: tuple[TensorSpec | SymbolInput, ...]
    symbols: tuple[Symbol, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Json, ...]
    kernels: dict[str, str] = field(default_factory=dict)
    inference: bool = True  # packed weight caches are allowed (no autograd graph is being built through this program)

    @property
    def device(self) -> str:
        """Type of the device this program runs on: "cpu" or "cuda"."""
        for item in (*self.inputs, *(s.spec for s in self.steps if isinstance(s, (Alloc, View)))):
            if isinstance(item, TensorSpec) and not item.device.startswith("cpu"):
                return item.device.split(":")[0]
        return "cpu"


def tensors_in(tree: Json) -> list[str]:
    """Names of the tensors an argument tree refers to, in order."""
    if isinstance(tree, dict):
        return [tree["tensor"]] if "tensor" in tree else []
    if isinstance(tree, (list, tuple)):
        return [name for item in tree for name in tensors_in(item)]
    return []


def reads(step: Step) -> Sequence[str]:
    """Tensors a step reads."""
    match step:
        case Launch(inputs=inputs):
            return inputs
        case Call(args=args, kwargs=kwargs):
            return tensors_in(list(args)) + tensors_in(list(kwargs.values()))
        case View(base=base):
            return (base,)
        case Gemm(a=a, b=b, bias=bias):
            return (a, b) if bias is None else (a, b, bias)
        case Gemms(products=products):
            return tuple(dict.fromkeys(name for product in products for name in reads(product)))
        case Epilogue(product=product, launch=launch):
            return tuple(dict.fromkeys((*reads(product), *launch.inputs)))
        case Attention(q=q, k=k, v=v, mask=mask):
            return (q, k, v) if mask is None else (q, k, v, mask)
        case Conv(x=x, other=other):  # weights and sources are static inputs: packed outside of the steps
            return (x,) if other is None else (x, other)
    return ()


def defines(step: Step) -> Sequence[str]:
    """Tensors a step brings into being (a `Launch` only fills memory that exists)."""
    match step:
        case Alloc(spec=spec) | View(spec=spec) | Conv(spec=spec):
            return (spec.name,)
        case Call(outs=outs):
            return tuple(o for o in outs if o is not None)
    return ()
