"""The kernel IR: one small language that both printers (Triton, C++) read.

A `Kernel` is a perfect nest of named axes, *parallel* ones outside and *reduce* ones inside, and a body in
SSA form: loads with integer index maps, element operations, reductions over **all** reduce axes, stores.
There are no branches and no loops in the body; a printer decides how the axes become loops or blocks.

    kernel rms_norm(s0, x: f32, w: f32 -> y: f32)
      axes p0: s0, r0: 768 reduce
      %0: f32 = load x[768*p0 + r0]
      %1: f32 = mul %0, %0
      %2: f32 = reduce_sum %1
      %3: f32 = const 0.0013020833333333333
      ...
      store y[768*p0 + r0] = %9

Rules (held by `verify`):

* A value lives at *row level* when it depends on no reduce axis, else at *element level*. A reduction takes an
  element-level value to row level. Row-level values may be used anywhere, so a statement after a reduction may
  again be at element level: a printer then makes another pass over the reduce axes.
* Arithmetic happens in f32, f64, i32 and i64; `and`/`or`/`xor`/`not` also on b1. Narrow types (bf16, f16, i16, i8, u8)
  exist only in memory: `cast` right after the load and right before the store. A cast f32→bf16→f32 rounds.
* Indices count elements from the buffer's data pointer. A masked load reads nothing where its mask is false.
* `max`/`min` propagate NaN; `argmax`/`argmin` give the first position in row-major order of the reduce axes, NaN wins.
* `expect` gives back its operand. A launch in which one was false raises `IndexOutOfRangeError` where the printer can
  (C++), after all stores; guard the load with the same value, so that nothing foreign is read.
* Integer `div` is `truncdiv`/`floordiv`; shifts are arithmetic; `pow` on integers has a non-negative exponent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Union

from .expr import Expr, ExprLike, as_expr, product, var

DTYPES: dict[str, int] = {  # name -> bytes
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "b1": 1,
}
COMPUTE_FLOATS = ("f32", "f64")
COMPUTE_INTS = ("i32", "i64")
COMPUTE = COMPUTE_FLOATS + COMPUTE_INTS

FLOAT_UNARY = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan",
    "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid",
    "floor", "ceil", "round", "trunc",
)  # round is half-to-even
ANY_UNARY = ("neg", "abs", "sign")
FLOAT_BINARY = ("div", "pow", "atan2", "copysign", "hypot")
ANY_BINARY = ("add", "sub", "mul", "max", "min", "mod", "fmod", "floordiv", "truncdiv")  # mod: sign of the divisor
BIT_BINARY = ("and", "or", "xor")  # ints and b1
INT_BINARY = ("shl", "shr", "ipow")
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")  # result b1; also on b1 for eq/ne
FLOAT_TEST = ("isnan", "isinf")  # result b1
CHECKS = ("expect",)  # of b1: the value itself; where it is false the launch is reported as failed
REDUCTIONS = ("sum", "prod", "max", "min", "argmax", "argmin", "any", "all")

AxisKind = Literal["parallel", "reduce"]
Scalar = Union[int, float, bool]


@dataclass(frozen=True)
class Axis:
    """A loop of the kernel. `size` may be symbolic (and may be 0 at run time)."""

    name: str
    size: Expr
    kind: AxisKind = "parallel"

    @property
    def is_reduce(self) -> bool:
        return self.kind == "reduce"


@dataclass(frozen=True)
class Buffer:
    """A tensor's memory: flat, `dtype` elements, addressed by the index maps."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Load:
    """`dst = buffer[index]`, or `other` where `mask` (a b1 value) is false."""

    dst: str
    dtype: str
    buffer: str
    index: Expr
    mask: str | None = None
    other: Scalar = 0


@dataclass(frozen=True)
class Const:
    dst: str
    dtype: str
    value: Scalar


@dataclass(frozen=True)
class Index:
    """An integer expression over axes and sizes as an i64 value (`arange`, flips, guards)."""

    dst: str
    expr: Expr
    dtype: str = "i64"


@dataclass(frozen=True)
class Op:
    """An element operation; `cast` converts to `dtype`, `where` takes (b1, a, b)."""

    dst: str
    dtype: str
    op: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Reduce:
    """A reduction of `src` over all reduce axes of the kernel."""

    dst: str
    dtype: str
    op: str
    src: str


@dataclass(frozen=True)
class Store:
    buffer: str
    index: Expr
    value: str


Definition = Union[Load, Const, Index, Op, Reduce]
Stmt = Union[Load, Const, Index, Op, Reduce, Store]


@dataclass(frozen=True)
class Kernel:
    """One fused loop nest. `sizes` are the int64 symbols its expressions mention, in argument order."""

    name: str
    sizes: tuple[str, ...]
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    axes: tuple[Axis, ...]
    body: tuple[Stmt, ...]

    @property
    def parallel(self) -> tuple[Axis, ...]:
        return tuple(a for a in self.axes if not a.is_reduce)

    @property
    def reduce(self) -> tuple[Axis, ...]:
        return tuple(a for a in self.axes if a.is_reduce)

    @property
    def rows(self) -> Expr:
        """Number of points of the parallel axes."""
        return product(a.size for a in self.parallel)

    @property
    def row_size(self) -> Expr:
        """Number of points of the reduce axes (1 when there are none)."""
        return product(a.size for a in self.reduce)

    def renamed(self, name: str) -> Kernel:
        return replace(self, name=name)

    def __str__(self) -> str:
        from .ir_text import print_kernel

        return print_kernel(self)


class IRError(ValueError):
    """A kernel breaks a rule of this module; the message names the statement."""


def uses(stmt: Stmt) -> Iterator[str]:
    """SSA values a statement reads, those inside index maps included."""
    match stmt:
        case Op(args=args):
            yield from args
        case Reduce(src=src):
            yield src
        case Load(index=index, mask=mask):
            if mask is not None:
                yield mask
            yield from sorted(n for n in index.symbols() if n.startswith("%"))
        case Index(expr=expr):
            yield from sorted(n for n in expr.symbols() if n.startswith("%"))
        case Store(index=index, value=value):
            yield value
            yield from sorted(n for n in index.symbols() if n.startswith("%"))


def stmt_axes(kernel: Kernel) -> dict[str, frozenset[str]]:
    """For every value, the axes it varies over (a reduction drops the reduce axes)."""
    names = frozenset(a.name for a in kernel.axes)
    reduce_names = frozenset(a.name for a in kernel.reduce)
    out: dict[str, frozenset[str]] = {}
    for stmt in kernel.body:
        if isinstance(stmt, Store):
            continue
        axes: frozenset[str] = frozenset()
        for value in uses(stmt):
            axes |= out[value]
        if isinstance(stmt, Load):
            axes |= stmt.index.symbols() & names
        elif isinstance(stmt, Index):
            axes |= stmt.expr.symbols() & names
        elif isinstance(stmt, Reduce):
            axes -= reduce_names
        out[stmt.dst] = axes
    return out


def phases(kernel: Kernel) -> dict[str, int]:
    """For every value, how many reductions in sequence it waits for (0: computable in the first pass)."""
    out: dict[str, int] = {}
    for stmt in kernel.body:
        if isinstance(stmt, Store):
            continue
        phase = max((out[v] for v in uses(stmt)), default=0)
        out[stmt.dst] = phase + 1 if isinstance(stmt, Reduce) else phase
    return out


def expects(kernel: Kernel) -> bool:
    """True when a launch of `kernel` may be reported as failed."""
    return any(isinstance(s, Op) and s.op in CHECKS for s in kernel.body)


def verify(kernel: Kernel) -> None:
    """Raise `IRError` when `kernel` breaks a rule of this module."""
    if len({b.name for b in kernel.inputs + kernel.outputs}) != len(kernel.inputs) + len(kernel.outputs):
        raise IRError(f"{kernel.name}: two buffers share a name")
    order = [a.is_reduce for a in kernel.axes]
    if order != sorted(order):
        raise IRError(f"{kernel.name}: reduce axes must come after parallel axes")
    types: dict[str, str] = {}
    for stmt in kernel.body:
        try:
            _verify_stmt(kernel, stmt, types)
        except IRError as error:
            raise IRError(f"{kernel.name}: {error}\n  in: {_show(stmt)}") from None
    if not any(isinstance(s, Store) for s in kernel.body):
        raise IRError(f"{kernel.name}: no store")


def _show(stmt: Stmt) -> str:
    from .ir_text import print_stmt

    return print_stmt(stmt)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise IRError(message)


def _verify_index(kernel: Kernel, index: Expr, types: Mapping[str, str]) -> None:
    known = {a.name for a in kernel.axes} | set(kernel.sizes)
    for name in index.symbols():
        if name.startswith("%"):
            _need(types.get(name) in COMPUTE_INTS, f"index value {name} must be a defined i32 or i64")
        else:
            _need(name in known, f"unknown axis or size {name!r}; known: {sorted(known)}")


def _verify_stmt(kernel: Kernel, stmt: Stmt, types: dict[str, str]) -> None:
    for value in uses(stmt):
        _need(value in types, f"{value} is used before it is defined")
    match stmt:
        case Load(buffer=buffer, dtype=dtype, index=index, mask=mask):
            declared = {b.name: b.dtype for b in kernel.inputs}
            _need(declared.get(buffer) == dtype, f"load of {buffer!r} as {dtype}, declared {declared.get(buffer)}")
            _need(mask is None or types[mask] == "b1", "a load's mask must be b1")
            _verify_index(kernel, index, types)
        case Store(buffer=buffer, index=index, value=value):
            declared = {b.name: b.dtype for b in kernel.outputs}
            _need(declared.get(buffer) == types[value],
                  f"store of {types[value]} into {buffer!r}, declared {declared.get(buffer)}")
            _verify_index(kernel, index, types)
        case Index(expr=expr, dtype=dtype):
            _need(dtype == "i64", "index values are i64")
            _verify_index(kernel, expr, types)
        case Const(dtype=dtype, value=number):
            _need(dtype in COMPUTE or dtype == "b1", f"constants are {COMPUTE} or b1, not {dtype}")
            _need(dtype in COMPUTE_FLOATS or float(number).is_integer(), f"{number} is no {dtype}")
        case Op(op=op, args=args, dtype=dtype):
            _verify_op(op, [types[a] for a in args], dtype)
        case Reduce(op=op, src=src, dtype=dtype):
            _need(op in REDUCTIONS, f"unknown reduction {op!r}; known: {REDUCTIONS}")
            wanted = "i64" if op.startswith("arg") else types[src]
            _need(types[src] in (("b1",) if op in ("any", "all") else COMPUTE), f"{op} of {types[src]}")
            _need(dtype == wanted, f"{op} of {types[src]} gives {wanted}, not {dtype}")
    if not isinstance(stmt, Store):
        _need(stmt.dst not in types and stmt.dst.startswith("%"), f"{stmt.dst} is defined twice or badly named")
        _need(stmt.dtype in DTYPES, f"unknown dtype {stmt.dtype!r}")
        types[stmt.dst] = stmt.dtype


def _verify_op(op: str, args: list[str], dtype: str) -> None:
    if op == "cast":
        _need(len(args) == 1, "cast takes one value")
        return
    if op == "where":
        _need(len(args) == 3 and args[0] == "b1" and args[1] == args[2] == dtype, f"where of {args} gives {dtype}")
        return
    unary = FLOAT_UNARY + ANY_UNARY + FLOAT_TEST + CHECKS + ("not",)
    binary = FLOAT_BINARY + ANY_BINARY + BIT_BINARY + INT_BINARY + COMPARE
    _need(op in unary or op in binary, f"unknown operation {op!r}")
    _need(len(args) == (1 if op in unary else 2), f"{op} takes {1 if op in unary else 2} values, got {len(args)}")
    _need(len(set(args)) == 1, f"{op} mixes {args}")
    allowed = (
        COMPUTE_FLOATS if op in FLOAT_UNARY + FLOAT_BINARY + FLOAT_TEST
        else ("b1",) if op in CHECKS
        else COMPUTE_INTS + ("b1",) if op in BIT_BINARY + ("not",)
        else COMPUTE_INTS if op in INT_BINARY
        else COMPUTE + ("b1",) if op in COMPARE
        else COMPUTE
    )
    _need(args[0] in allowed, f"{op} on {args[0]}, expected one of {allowed}")
    wanted = "b1" if op in COMPARE + FLOAT_TEST else args[0]
    _need(dtype == wanted, f"{op} of {args[0]} gives {wanted}, not {dtype}")


def is_finite_constant(value: Scalar) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def axis_var(axis: Axis) -> Expr:
    return var(axis.name)


def flat_index(axes: tuple[Axis, ...], strides: tuple[ExprLike, ...]) -> Expr:
    """Sum of axis × stride: the affine index of a strided tensor."""
    out = as_expr(0)
    for axis, stride in zip(axes, strides, strict=True):
        out = out + var(axis.name) * as_expr(stride)
    return out
