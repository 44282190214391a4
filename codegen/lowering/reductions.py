"""Reductions: the operand is evaluated at the frame's point, the result lives on the frame's row."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..expr import Expr, product
from ..ir import COMPUTE_FLOATS
from .builder import TABLES, Frame, KernelBuilder, Value, compute_dtype, memory_order
from .pointwise import register, result_dtype
from .shapes import IR_DTYPES, CannotLower, shape_of

aten = torch.ops.aten
Idx = tuple[Expr, ...]

# target -> (IR reduction, position of `dim` in the arguments)
SIMPLE: dict[Any, str] = {
    aten.sum.default: "sum", aten.sum.dim_IntList: "sum", aten.prod.default: "prod", aten.prod.dim_int: "prod",
    aten.amax.default: "max", aten.amin.default: "min", aten.max.default: "max", aten.min.default: "min",
    aten.any.default: "any", aten.any.dim: "any", aten.any.dims: "any", aten.all.default: "all", aten.all.dim: "all",
    aten.all.dims: "all", aten.argmax.default: "argmax", aten.argmin.default: "argmin",
}
MEAN_LIKE = (aten.mean.default, aten.mean.dim, aten.var.correction, aten.var_mean.correction)
PAIRS = {aten.max.dim: ("max", "argmax"), aten.min.dim: ("min", "argmin")}
REDUCTIONS = (*SIMPLE, *MEAN_LIKE, *PAIRS)
_WHOLE = (aten.sum.default, aten.prod.default, aten.max.default, aten.min.default, aten.any.default, aten.all.default,
          aten.mean.default)


def reduced_dims(node: fx.Node) -> tuple[int, ...]:
    """Dimensions a reduction node reduces, non-negative and sorted."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = int(source.meta["val"].dim())
    asked: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if node.target in _WHOLE or asked is None or (isinstance(asked, (list, tuple)) and not asked):
        return tuple(range(rank))
    dims = asked if isinstance(asked, (list, tuple)) else [asked]
    return tuple(sorted({int(d) % max(rank, 1) for d in dims})) if rank else ()


def reduction_of(node: fx.Node) -> fx.Node | None:
    """The reduction a compute node performs: itself, or the multi-output parent it picks from."""
    if node.target in SIMPLE or node.target in MEAN_LIKE:
        return node
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in TABLES.multi:
        return node.args[0]
    return None


def frame_of_reduction(node: fx.Node) -> Frame:
    """The iteration space of a reduction: its operand's shape with the reduced dimensions marked."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = shape_of(source.meta["val"])
    dims = reduced_dims(node)
    keeps_order = node.target in (aten.argmax.default, aten.argmin.default) or node.target in PAIRS
    rank = len(shape.sizes)
    order = tuple(range(rank)) if keeps_order else memory_order(shape)
    return Frame(shape.sizes, tuple(d in dims for d in range(rank)), order)


def _source_value(b: KernelBuilder, node: fx.Node, index: Idx, dtype: str | None) -> Value:
    """The operand at the frame's point, after checking that this kernel's rows are this reduction's rows."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    sizes = shape_of(source.meta["val"]).sizes
    dims = reduced_dims(node)
    if _rows_and_points(sizes, dims) != (product(b.frame.row_sizes), product(b.frame.sizes)):
        raise CannotLower(f"{node.name} has other rows than this kernel's, or longer or shorter ones")
    point = b.element_index(sizes)
    kept = [point[d] for d in range(len(sizes)) if d not in dims]
    if [i for i in kept if i != 0] != [i for i in index if i != 0]:
        raise CannotLower(f"{node.name} reduces other rows than this kernel's")
    axes = set().union(*(point[d].symbols() for d in dims)) if dims else set()
    if any(not a.startswith("r") for a in axes & set(b.axes)) or {a for a in b.axes if a[0] == "r"} - axes:
        raise CannotLower(f"{node.name} reduces other axes than this kernel's")
    value = b.eval(source, point)
    return value if dtype is None else b.cast(value, dtype)


def _rows_and_points(sizes: Sequence[Expr], dims: Sequence[int]) -> tuple[Expr, Expr]:
    return product(s for d, s in enumerate(sizes) if d not in dims), product(sizes)


def _accumulate_dtype(node: fx.Node, source_dtype: str) -> str:
    """sum/prod of integers and bools accumulate in i64; floats in their compute dtype."""
    if source_dtype in COMPUTE_FLOATS:
        return source_dtype
    return "i64"


def _simple(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    op = SIMPLE[node.target]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dtype = compute_dtype(IR_DTYPES[source.meta["val"].dtype])
    if op in ("sum", "prod"):
        asked = node.kwargs.get("dtype")
        wanted = compute_dtype(IR_DTYPES[asked]) if isinstance(asked, torch.dtype) else None
        return b.reduce(op, _source_value(b, node, index, wanted or _accumulate_dtype(node, dtype)))
    if op in ("any", "all"):
        return b.reduce(op, _source_value(b, node, index, "b1"))
    if dtype == "b1":
        value = b.reduce(op, _source_value(b, node, index, "i32"))
        return value if op.startswith("arg") else b.cast(value, "b1")
    return b.reduce(op, _source_value(b, node, index, None))


for _target in SIMPLE:
    register(_target)(_simple)


def _count(b: KernelBuilder, node: fx.Node, dtype: str, minus: float = 0) -> Value:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    sizes = shape_of(source.meta["val"]).sizes
    n = product(sizes[d] for d in reduced_dims(node))
    if n.is_const:
        return b.const(float(max(n.value - minus, 0)), dtype)
    count = b.cast(b.index_value(n), dtype)
    if not minus:
        return count
    return b.op("max", dtype, b.op("sub", dtype, count, b.const(float(minus), dtype)), b.const(0.0, dtype))


def _mean_value(b: KernelBuilder, node: fx.Node, index: Idx, dtype: str) -> Value:
    total = b.reduce("sum", _source_value(b, node, index, dtype))
    return b.op("div", dtype, total, _count(b, node, dtype))


@register(aten.mean.default, aten.mean.dim)
def _mean(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _mean_value(b, node, index, result_dtype(node))


def _variance(b: KernelBuilder, node: fx.Node, index: Idx, dtype: str) -> tuple[Value, Value]:
    """Two passes: the mean, then the mean of squared distances from it (no cancellation)."""
    correction = node.kwargs.get("correction", 1)
    correction = 1 if correction is None else correction
    mean = _mean_value(b, node, index, dtype)
    away = b.op("sub", dtype, _source_value(b, node, index, dtype), mean)
    total = b.reduce("sum", b.op("mul", dtype, away, away))
    return b.op("div", dtype, total, _count(b, node, dtype, float(correction))), mean  # type: ignore[arg-type]


@register(aten.var.correction)
def _var(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _variance(b, node, index, result_dtype(node))[0]


def _var_mean(b: KernelBuilder, node: fx.Node, which: int, index: Idx) -> Value:
    dtype = compute_dtype(IR_DTYPES[node.meta["val"][0].dtype])
    return _variance(b, node, index, dtype)[which]


def _pair(b: KernelBuilder, node: fx.Node, which: int, index: Idx) -> Value:
    target: Any = node.target
    return b.reduce(PAIRS[target][which], _source_value(b, node, index, None))


TABLES.multi[aten.var_mean.correction] = _var_mean
for _target in PAIRS:
    TABLES.multi[_target] = _pair
