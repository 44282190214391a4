"""A pointwise kernel as the end of a Triton product: its index maps in terms of the product's rows and columns.
(`program_epilogue` does the same for the CPU, whose template hands over finished blocks in memory.)

    kernel gelu(in0: bf16 -> out0: bf16)            kernel gelu(acc: f32, bias: bf16 -> out0: bf16)
      axes p0: 3145728                                axes m: 1024, n: 3072 reduce
      %0: bf16 = load in0[p0]             becomes     %acc: f32 = load acc[3072*m + n]
      %1: f32 = cast %0                               %bias: bf16 = load bias[n]
      ...                                             ...

`acc` is what a tile of the product has accumulated; `n` is called a reduce axis because the printer then lays both
directions of a block out as those of the tile. Nothing is reduced along it. The product is not rounded to its own
type in between: kernels keep their intermediates in f32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from .build import live
from .expr import Expr, atom, const, var
from .ir import Axis, Buffer, Index, IRError, Kernel, Load, Op, Stmt, Store, verify
from .triton_axes import map_expressions

ACC, BIAS = "acc", "bias"
_M, _N = var("m"), var("n")


class CannotFuse(Exception):
    """A kernel can't be a product's epilogue; the message says why."""


@dataclass(frozen=True)
class Bias:
    """What is added to a product [M, N] first: `dtype` elements at `rows`*m + `columns`*n (a stride of 0 repeats)."""

    dtype: str
    rows: Expr
    columns: Expr


def as_epilogue(kernel: Kernel, products: Collection[str], sizes: Mapping[str, Expr], M: Expr, N: Expr,
                bias: Bias | None = None) -> Kernel:
    """`kernel` over the axes m: M, n: N, reading `acc` where it read a buffer of `products`.

    The product lies row by row in the buffers it is read from. `sizes` gives the kernel's sizes in the caller's
    symbols, which the result uses. Its other inputs are called in0, in1, …, its outputs out0, …, in their order.
    Raises `CannotFuse` for a kernel that reduces or reads the product elsewhere than at the point it computes.
    """
    if kernel.reduce:
        raise CannotFuse("the kernel reduces")
    kernel = replace(kernel, body=map_expressions(kernel, lambda e: e.subs(sizes)),
                     axes=tuple(replace(a, size=a.size.subs(sizes)) for a in kernel.axes))
    reads = [s for s in kernel.body if isinstance(s, Load) and s.buffer in products]
    if len({s.index for s in reads}) != 1 or any(s.mask is not None for s in reads):
        raise CannotFuse("the kernel reads the product at several places or under a mask")
    places = _places(reads[0].index, kernel.axes, M, N)
    others = [b for b in kernel.inputs if b.name not in products]
    names = {b.name: f"in{i}" for i, b in enumerate(others)} | {b.name: f"out{i}" for i, b in enumerate(kernel.outputs)}
    rest = _rest(map_expressions(kernel, lambda e: e.subs(places)), products, bias)
    body = [*_start(N, bias), *(_on(s, names) for s in rest)]
    inputs = [Buffer(ACC, "f32"), *([Buffer(BIAS, bias.dtype)] if bias else []), *(_renamed(b, names) for b in others)]
    made = Kernel(kernel.name, _symbols(M, N, body), tuple(inputs), tuple(_renamed(b, names) for b in kernel.outputs),
                  (Axis("m", M), Axis("n", N, "reduce")), tuple(live(body)))
    try:
        verify(made)
    except IRError as error:
        raise CannotFuse(str(error)) from None
    return made


def _places(index: Expr, axes: Sequence[Axis], M: Expr, N: Expr) -> dict[str, Expr]:
    """Every axis in terms of m and n, when `index` walks the whole product [M, N], each element once."""
    places = {a.name: const(0) for a in axes if a.size == 1}
    index = index.subs(dict(places))
    left = {a.name: a.size for a in axes if a.size != 1}
    if index.symbols() - index.variables():
        raise CannotFuse("the kernel computes where it reads the product")
    try:
        strides = {name: index.coefficient(name) for name in left}
    except ValueError as error:
        raise CannotFuse(str(error)) from None
    stride = const(1)
    while left:
        name = next((n for n in left if strides[n] == stride), None)
        if name is None:
            raise CannotFuse("the kernel reads the product in another order than row by row, or only parts of it")
        size = left.pop(name)
        places[name] = _place(stride, size, M, N)
        stride = stride * size
    if stride != M * N or index.without(strides) != 0:
        raise CannotFuse("the kernel walks over something else than the product")
    return places


def _place(stride: Expr, size: Expr, M: Expr, N: Expr) -> Expr:
    """The position along an axis of `stride` elements of the product: of its rows, its columns, or both."""
    span = stride * size
    step = stride.divide_exact(N)
    if step is not None:
        row = atom("floordiv", _M, step)
        return row if span == M * N else atom("mod", row, size)
    if N.divide_exact(span) is not None:
        column = atom("floordiv", _N, stride)
        return column if span == N else atom("mod", column, size)
    across = N.divide_exact(stride)  # positions of one row
    rows = size.divide_exact(across) if across is not None else None
    if across is None or rows is None:
        raise CannotFuse("an axis of the kernel ends inside a row of the product")
    return (_M if span == M * N else atom("mod", _M, rows)) * across + atom("floordiv", _N, stride)


def _start(N: Expr, bias: Bias | None) -> list[Stmt]:
    found: list[Stmt] = [Load("%acc", "f32", ACC, N * _M + _N)]
    if bias is not None:
        found.append(Load("%bias", bias.dtype, BIAS, bias.rows * _M + bias.columns * _N))
        found.append(Op("%wide", "f32", "cast", ("%bias",)))
        found.append(Op("%product", "f32", "add", ("%acc", "%wide")))
    return found


def _rest(body: Sequence[Stmt], products: Collection[str], bias: Bias | None) -> list[Stmt]:
    """The kernel's own statements; what it read of the product is the sum of this kernel."""
    total = "%acc" if bias is None else "%product"
    same: dict[str, str] = {}  # values that are the product in f32
    narrow: set[str] = set()
    out: list[Stmt] = []
    for s in body:
        match s:
            case Load(dst=dst, dtype=dtype, buffer=buffer) if buffer in products:
                if dtype == "f32":
                    same[dst] = total
                else:
                    narrow.add(dst)
                    out.append(Op(dst, dtype, "cast", (total,)))
            case Op(dst=dst, op="cast", dtype="f32", args=(value,)) if value in narrow:
                same[dst] = total
            case Op(args=args):
                out.append(replace(s, args=tuple(same.get(a, a) for a in args)))
            case Store(value=value):
                out.append(replace(s, value=same.get(value, value)))
            case _:
                out.append(s)
    return out


def _on(s: Stmt, names: Mapping[str, str]) -> Stmt:
    return replace(s, buffer=names.get(s.buffer, s.buffer)) if isinstance(s, (Load, Store)) else s


def _renamed(buffer: Buffer, names: Mapping[str, str]) -> Buffer:
    return replace(buffer, name=names[buffer.name])


def _symbols(M: Expr, N: Expr, body: Sequence[Stmt]) -> tuple[str, ...]:
    found = M.symbols() | N.symbols()
    for s in body:
        if isinstance(s, (Load, Store)):
            found |= s.index.symbols()
        elif isinstance(s, Index):
            found |= s.expr.symbols()
    return tuple(sorted(n for n in found if n not in ("m", "n") and not n.startswith("%")))

