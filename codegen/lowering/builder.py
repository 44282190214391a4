"""`KernelBuilder`: turns a group of ATen nodes into one kernel by evaluating outputs at an index.

The builder works backwards: to store output `y[i]` it asks for the value of node `y` at index `i`; the lowering of
`y`'s operator asks for its operands at their own indices, views only change the index, and nodes outside the group
become loads. Whatever is asked for twice at the same index is computed once.

The loop nest comes from a `Frame`: the shape of a reference tensor whose dimensions are *row* (parallel) or *reduced*.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..expr import Expr, const, var
from ..ir import COMPUTE, Const, Index, Load, Op, Reduce, Scalar, Stmt, Store
from .indexing import AxisSizes, NotAffine, divmod_index, linearize, reindex
from .shapes import CannotLower, Shape, from_sympy, shape_of, size_expr

NARROW = {"bf16": "f32", "f16": "f32", "i16": "i32", "i8": "i32", "u8": "i32"}
MAX_BODY = 400
_FLOAT_OPERATIONS = {"Add": "add", "Mul": "mul", "IntTrueDiv": "div", "FloatTrueDiv": "div", "Pow": "pow",
                     "FloatPow": "pow", "PowByNatural": "pow", "ToFloat": "cast", "OpaqueUnaryFn_sqrt": "sqrt"}


@dataclass(frozen=True)
class Value:
    """An SSA value and its dtype (always a compute dtype or b1 between lowerings)."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Frame:
    """The iteration space: a reference shape in row-major order, `reduced[d]` marking the reduced dimensions,
    `priority[d]` the memory stride order (outermost first)."""

    sizes: tuple[Expr, ...]
    reduced: tuple[bool, ...]
    priority: tuple[int, ...]

    @property
    def has_reduction(self) -> bool:
        return any(self.reduced)

    @property
    def row_sizes(self) -> tuple[Expr, ...]:
        return tuple(s for s, r in zip(self.sizes, self.reduced, strict=True) if not r)


def memory_order(shape: Shape) -> tuple[int, ...]:
    """Dimensions from outermost to innermost in memory; the logical order where strides are symbolic or equal."""
    strides = [s.value if s.is_const else None for s in shape.strides]
    if any(s is None for s in strides):
        return tuple(range(len(strides)))
    return tuple(sorted(range(len(strides)), key=lambda d: (-(strides[d] or 0), d)))


Lowering = Callable[["KernelBuilder", fx.Node, tuple[Expr, ...]], Value]
View = Callable[["KernelBuilder", fx.Node, tuple[Expr, ...]], tuple[fx.Node, tuple[Expr, ...]]]


@dataclass
class Tables:
    """The operator tables the builder reads (filled by `lowering/__init__.py`)."""

    compute: dict[Any, Lowering] = field(default_factory=dict)
    views: dict[Any, View] = field(default_factory=dict)
    split_views: dict[Any, View] = field(default_factory=dict)
    multi: dict[Any, Callable[[KernelBuilder, fx.Node, int, tuple[Expr, ...]], Value]] = field(default_factory=dict)
    generators: dict[Any, Lowering] = field(default_factory=dict)


TABLES = Tables()


def view_of(node: fx.Node) -> View | None:
    """How `node` reads through to its operand, when it is a view the index algebra knows."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return TABLES.split_views.get(node.args[0].target)
    return TABLES.views.get(node.target)


def compute_dtype(dtype: str) -> str:
    return NARROW.get(dtype, dtype)


class KernelBuilder:
    """Builds the body of one kernel. `inside` are the nodes to compute; all others are loaded."""

    def __init__(self, inside: Iterable[fx.Node], frame: Frame, splits: Sequence[tuple[str, Expr]] = ()) -> None:
        self.inside = set(inside)
        self.frame = frame
        self.stmts: list[Stmt] = []
        self.types: dict[str, str] = {}
        self.inputs: dict[fx.Node, str] = {}
        self.axes: dict[str, Expr] = {}
        self.axis_order: list[str] = []
        self._memo: dict[Any, Value] = {}
        self._masks: list[Value] = []
        self._active: set[fx.Node] = set()
        self.frame_index = self._make_axes(splits)

    # -- axes ---------------------------------------------------------------------------------
    def _make_axes(self, splits: Sequence[tuple[str, Expr]]) -> tuple[Expr, ...]:
        index: list[Expr] = []
        names: list[list[str]] = []
        for d, size in enumerate(self.frame.sizes):
            name = ("r" if self.frame.reduced[d] else "p") + str(d)
            if size == 1:
                index.append(const(0))
                names.append([])
                continue
            self.axes[name] = size
            index.append(var(name))
            names.append([name])
        for axis, inner in splits:
            self._split(axis, inner, index, names)
        order = [n for d in self.frame.priority for n in names[d]]
        self.axis_order = [n for n in order if n[0] == "p"] + [n for n in order if n[0] == "r"]
        return tuple(index)

    def _split(self, axis: str, inner: Expr, index: list[Expr], names: list[list[str]]) -> None:
        size = self.axes.pop(axis)
        outer = size.divide_exact(inner)
        if outer is None:
            raise CannotLower(f"axis {axis} of size {size} can't be split by {inner}")
        a, b = axis + "a", axis + "b"
        self.axes[a], self.axes[b] = outer, inner
        for d, parts in enumerate(names):
            if axis in parts:
                at = parts.index(axis)
                parts[at: at + 1] = [a, b]
                index[d] = index[d].subs({axis: inner * var(a) + var(b)})

    def element_index(self, sizes: Sequence[Expr]) -> tuple[Expr, ...]:
        """The frame's point as an index into a tensor of as many elements as the whole frame."""
        return reindex(self.frame_index, self.frame.sizes, sizes, self.axes)

    def row_index(self, sizes: Sequence[Expr]) -> tuple[Expr, ...]:
        """The frame's row as an index into a tensor of as many elements as there are rows."""
        rows = [i for i, r in zip(self.frame_index, self.frame.reduced, strict=True) if not r]
        return reindex(rows, self.frame.row_sizes, sizes, self.axes)

    # -- statements ---------------------------------------------------------------------------
    def _emit(self, key: Any, dtype: str, make: Callable[[str], Stmt]) -> Value:
        found = self._memo.get(key)
        if found is not None:
            return found
        if len(self.stmts) >= MAX_BODY:
            raise CannotLower(f"more than {MAX_BODY} statements")
        value = Value(f"%{len(self.types)}", dtype)
        self.types[value.name] = dtype
        self.stmts.append(make(value.name))
        self._memo[key] = value
        return value

    def op(self, name: str, dtype: str, *args: Value) -> Value:
        return self._emit((name, dtype, args), dtype, lambda d: Op(d, dtype, name, tuple(a.name for a in args)))

    def const(self, value: Scalar, dtype: str) -> Value:
        if dtype in ("f32", "f64"):
            value = float(value)
        elif dtype == "b1":
            value = bool(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise CannotLower(f"constant {value} as {dtype}")
        else:
            value = int(value)
        return self._emit(("const", dtype, repr(value)), dtype, lambda d: Const(d, dtype, value))

    def cast(self, value: Value, dtype: str) -> Value:
        return value if value.dtype == dtype else self.op("cast", dtype, value)

    def index_value(self, e: Expr) -> Value:
        """An integer expression over axes and sizes as an i64 value."""
        if e.is_const:
            return self.const(e.value, "i64")
        return self._emit(("index", e), "i64", lambda d: Index(d, e))

    def float_value(self, e: Any) -> Value:
        """A sympy expression of sizes that is no integer (`n/(n - 1)`) as an f64 value, as Python computes it."""
        if e.is_Float or e.is_Rational and not e.is_Integer:
            return self.const(float(e), "f64")
        operation = _FLOAT_OPERATIONS.get(type(e).__name__)
        if operation is None or e.is_integer:
            return self.cast(self.index_value(from_sympy(e)), "f64")
        first, *others = (self.float_value(a) for a in e.args)
        if not others:
            return first if operation == "cast" else self.op(operation, "f64", first)
        for other in others:
            first = self.op(operation, "f64", first, other)
        return first

    def reduce(self, op: str, value: Value) -> Value:
        if self._masks:
            raise CannotLower("a reduction under a mask")
        if not any(a[0] == "r" for a in self.axes):  # reducing dimensions of size 1
            return self.const(0, "i64") if op.startswith("arg") else value
        dtype = "i64" if op.startswith("arg") else value.dtype
        return self._emit(("reduce", op, value), dtype, lambda d: Reduce(d, dtype, op, value.name))

    def load(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        """Element `index` of a tensor that exists in memory, upcast to its compute dtype."""
        shape = shape_of(node.meta["val"])
        offset = const(0)
        for i, stride in zip(index, shape.strides, strict=True):
            offset = offset + i * stride
        buffer = self.inputs.setdefault(node, f"in{len(self.inputs)}")
        mask = self._masks[-1] if self._masks else None
        name = mask.name if mask else None
        raw = self._emit(("load", buffer, offset, name), shape.dtype,
                         lambda d: Load(d, shape.dtype, buffer, offset, name, False if shape.dtype == "b1" else 0))
        return self.cast(raw, compute_dtype(shape.dtype))

    def store(self, node: fx.Node, buffer: str, index: tuple[Expr, ...]) -> None:
        shape = shape_of(node.meta["val"])
        value = self.cast(self.eval(node, index), shape.dtype)
        offset = const(0)
        for i, stride in zip(index, shape.strides, strict=True):
            offset = offset + i * stride
        self.stmts.append(Store(buffer, offset, value.name))

    # -- masks --------------------------------------------------------------------------------
    def masked(self, condition: Value, evaluate: Callable[[], Value]) -> Value:
        """Evaluate with every load guarded by `condition` (and the guards already in force)."""
        if self._masks:
            condition = self.op("and", "b1", self._masks[-1], condition)
        self._masks.append(condition)
        try:
            return evaluate()
        finally:
            self._masks.pop()

    def expect(self, condition: Value) -> Value:
        """`condition`, whose falsehood is an error wherever the guards in force hold."""
        if self._masks:
            condition = self.op("or", "b1", self.op("not", "b1", self._masks[-1]), condition)
        return self.op("expect", "b1", condition)

    def in_range(self, position: Expr, low: Expr | int, high: Expr | int) -> Value | None:
        """`low <= position < high` as a b1 value; None when it always holds."""
        tests = []
        low, high = self._expr(low), self._expr(high)
        if not self._proved(position - low):
            tests.append(self.op("ge", "b1", self.index_value(position), self.index_value(low)))
        if not self._proved_below(position, high):
            tests.append(self.op("lt", "b1", self.index_value(position), self.index_value(high)))
        if not tests:
            return None
        return tests[0] if len(tests) == 1 else self.op("and", "b1", *tests)

    @staticmethod
    def _expr(e: Expr | int) -> Expr:
        return e if isinstance(e, Expr) else const(e)

    @staticmethod
    def _proved(e: Expr) -> bool:
        return all(c >= 0 for _, c in e.terms)

    def _proved_below(self, position: Expr, high: Expr) -> bool:
        if not self._proved(position):
            return False
        top = position.subs({a: self.axes[a] - 1 for a in position.variables() if a in self.axes})
        return self._proved(high - 1 - top)

    # -- evaluation ---------------------------------------------------------------------------
    def eval(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        """The value of tensor `node` at `index`, in its compute dtype."""
        mask = self._masks[-1] if self._masks else None
        key = (node, index, mask)
        found = self._memo.get(key)
        if found is None:
            found = self._eval(node, index)
            self._memo[key] = found
        return found

    def _eval(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        if node.op == "call_function":
            view = view_of(node)
            if view is not None:
                return self.eval(*view(self, node, index))
            if node.target in TABLES.generators:
                return TABLES.generators[node.target](self, node, index)
            if node in self.inside:
                return self._compute(node, index)
        return self.load(node, index)

    def _compute(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        parent = node.args[0] if node.args else None
        if isinstance(parent, fx.Node) and parent.target in TABLES.multi:
            return TABLES.multi[parent.target](self, parent, int(node.args[1]), index)  # type: ignore[arg-type]
        value = TABLES.compute[node.target](self, node, index)
        stored = shape_of(node.meta["val"]).dtype
        if stored in ("i16", "i8", "u8"):  # narrow integers wrap after every operation
            value = self.cast(self.cast(value, stored), "i32")
        wanted = compute_dtype(stored)
        return value if value.dtype == wanted else self.cast(value, wanted)

    def operand(self, arg: Any, index: tuple[Expr, ...], dtype: str) -> Value:
        """An operator's argument at the (broadcast) index of its result, as `dtype`: a tensor, number or size."""
        if isinstance(arg, fx.Node):
            value = arg.meta["val"]
            if isinstance(value, torch.Tensor):
                return self._to(self.eval(arg, self.broadcast(arg, index)), dtype)
            if isinstance(value, (torch.SymInt, int)):
                return self._to(self.index_value(size_expr(value)), dtype)
            if isinstance(value, torch.SymFloat):
                return self._to(self.float_value(value.node.expr), dtype)
            raise CannotLower(f"operand {arg.name} of type {type(value).__name__}")
        if isinstance(arg, (bool, int, float)):
            return self.const(arg, dtype)
        raise CannotLower(f"operand of type {type(arg).__name__}")

    def _to(self, value: Value, dtype: str) -> Value:
        return self.cast(value, dtype if dtype in COMPUTE or dtype == "b1" else compute_dtype(dtype))

    def broadcast(self, arg: fx.Node, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """`index` of a result as an index of its operand `arg`: leading dims dropped, size-1 dims pinned to 0."""
        sizes = shape_of(arg.meta["val"]).sizes
        tail = index[len(index) - len(sizes):] if sizes else ()
        return tuple(const(0) if s == 1 else i for s, i in zip(sizes, tail, strict=True))

    def divmod_value(self, e: Expr, divisor: Expr) -> tuple[Expr, Expr]:
        """Quotient and remainder, computed at run time as index values where they aren't affine."""
        try:
            return divmod_index(e, divisor, self.axes)
        except NotAffine:
            position, by = self.index_value(e), self.index_value(divisor)
            q = self.op("floordiv", "i64", position, by)
            r = self.op("mod", "i64", position, by)
            return var(q.name), var(r.name)

    def reshaped(self, index: Sequence[Expr], old: Sequence[Expr], new: Sequence[Expr]) -> tuple[Expr, ...]:
        """`reindex`, falling back on run-time index arithmetic where the reshape isn't affine."""
        try:
            return reindex(index, old, new, self.axes)
        except NotAffine:
            rest = linearize(index, old)
            out: list[Expr] = []
            for size in reversed(list(new)[1:]):
                rest, digit = self.divmod_value(rest, size)
                out.append(digit)
            return (rest, *reversed(out)) if len(new) else ()

    def check_row(self, node: fx.Node, index: tuple[Expr, ...], kept: Sequence[Expr]) -> None:
        """Raise `CannotLower` unless `index` is this kernel's own row (a reduction's result lives there only)."""
        if index != self.row_index(shape_of(node.meta["val"]).sizes):
            raise CannotLower(f"{node.name} is reduced over other rows than this kernel's")

    def axis_sizes(self) -> AxisSizes:
        return self.axes
