"""View operators: they compute nothing, they only say where an element of the result lives in the operand.

Each function maps (builder, node, index into the view) to (operand node, index into the operand).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..expr import Expr, const
from .builder import TABLES, KernelBuilder
from .shapes import CannotLower, shape_of, size_expr

aten = torch.ops.aten
Idx = tuple[Expr, ...]
Moved = tuple[fx.Node, Idx]
View = Callable[[KernelBuilder, fx.Node, Idx], Moved]


def register(*targets: Any) -> Callable[[View], View]:
    def put(view: View) -> View:
        for t in targets:
            TABLES.views[t] = view
        return view
    return put


def _split_registrar(*targets: Any) -> Callable[[View], View]:
    """Register how `getitem(split(x), k)` reads through to x."""
    def put(view: View) -> View:
        for t in targets:
            TABLES.split_views[t] = view
        return view
    return put


def _parent(node: fx.Node) -> tuple[fx.Node, int]:
    parent, which = node.args
    if not isinstance(parent, fx.Node) or not isinstance(which, int):
        raise CannotLower("getitem of no node")
    return parent, which


def _base(node: fx.Node) -> fx.Node:
    base = node.args[0]
    if not isinstance(base, fx.Node):
        raise CannotLower(f"{node.target} of no tensor")
    return base


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _dim(node: fx.Node, position: int, default: int = 0) -> int:
    """A `dim` argument of a view of `_base(node)`, made non-negative."""
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    if not isinstance(dim, int):
        raise CannotLower("symbolic dimension number")
    return dim % max(_rank(_base(node)), 1)


def as_size(value: Any) -> Expr:
    """A size argument: an int, or a node that holds a SymInt."""
    if isinstance(value, fx.Node):
        return size_expr(value.meta["val"])
    return size_expr(value)


@register(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_alias.default)
def _reshape(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    base = _base(node)
    return base, b.reshaped(index, shape_of(node.meta["val"]).sizes, shape_of(base.meta["val"]).sizes)


@register(aten.permute.default)
def _permute(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    rank = _rank(node)
    out: list[Expr] = [const(0)] * rank
    for position, dim in enumerate(node.args[1]):  # type: ignore[arg-type]
        out[int(dim) % rank] = index[position]  # type: ignore[arg-type]
    return _base(node), tuple(out)


@register(aten.transpose.int)
def _transpose(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    out = list(index)
    if out:
        i, j = _dim(node, 1), _dim(node, 2)
        out[i], out[j] = out[j], out[i]
    return _base(node), tuple(out)


@register(aten.t.default)
def _t(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    return _base(node), tuple(reversed(index))


@register(aten.expand.default)
def _expand(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    return _base(node), b.broadcast(_base(node), index)


@register(aten.unsqueeze.default)
def _unsqueeze(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    dim = int(node.args[1]) % _rank(node)  # type: ignore[arg-type]
    return _base(node), index[:dim] + index[dim + 1:]


@register(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    base = _base(node)
    rank = _rank(base)
    asked = node.args[1] if len(node.args) > 1 else list(range(rank))
    dims = {int(d) % max(rank, 1) for d in (asked if isinstance(asked, (list, tuple)) else [asked])}  # type: ignore
    rest = iter(index)
    sizes = shape_of(base.meta["val"]).sizes
    gone = [d in dims and s == 1 for d, s in enumerate(sizes)]
    return base, tuple(const(0) if g else next(rest) for g in gone)


@register(aten.slice.Tensor)
def _slice(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    base = _base(node)
    dim = _dim(node, 1)
    start = node.args[2] if len(node.args) > 2 else None
    step = node.args[4] if len(node.args) > 4 else 1
    size = shape_of(base.meta["val"]).sizes[dim]
    out = list(index)
    out[dim] = index[dim] * as_size(step) + slice_start(start, size)
    return base, tuple(out)


def slice_start(start: Any, size: Expr) -> Expr:
    """First position of a slice: negatives count from the end, and it is clamped into the dimension."""
    if start is None:
        return const(0)
    first = as_size(start)
    if first.is_const and first.value < 0:
        first = first + size
        if not size.is_const:
            raise CannotLower("slice from the end of a symbolic dimension")
    if first.is_const and size.is_const:
        return const(min(max(first.value, 0), size.value))
    if first == 0:
        return first
    if first.is_const or all(c >= 0 for _, c in first.terms):
        return first
    raise CannotLower(f"slice start {first} may be negative")


@register(aten.select.int)
def _select(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    base = _base(node)
    dim = _dim(node, 1)
    at = as_size(node.args[2])
    if at.is_const and at.value < 0:
        at = at + shape_of(base.meta["val"]).sizes[dim]
    elif not at.is_const and any(c < 0 for _, c in at.terms):
        raise CannotLower(f"selected position {at} may be negative")
    return base, (*index[:dim], at, *index[dim:])


@register(aten.alias.default, aten.detach.default, aten.lift_fresh.default)
def _same(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    return _base(node), index


@register(aten.flip.default)
def _flip(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    base = _base(node)
    sizes = shape_of(base.meta["val"]).sizes
    dims = {int(d) % max(len(sizes), 1) for d in node.args[1]}  # type: ignore[union-attr, arg-type]
    return base, tuple(s - 1 - i if d in dims else i for d, (s, i) in enumerate(zip(sizes, index, strict=True)))


@_split_registrar(aten.unbind.int)
def _unbind(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    parent, which = _parent(node)
    dim = _dim(parent, 1)
    return _base(parent), (*index[:dim], const(which), *index[dim:])


@_split_registrar(aten.split.Tensor, aten.split_with_sizes.default)
def _split(b: KernelBuilder, node: fx.Node, index: Idx) -> Moved:
    parent, which = _parent(node)
    dim, sizes = _dim(parent, 2), parent.args[1]
    if isinstance(sizes, (list, tuple)):
        start = sum((as_size(s) for s in sizes[:which]), const(0))
    else:
        start = as_size(sizes) * which
    return _base(parent), (*index[:dim], index[dim] + start, *index[dim + 1:])
