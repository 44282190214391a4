"""Operators that make or gather data: constants, ranges, embedding, indexing, concatenation, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..expr import Expr, const, var
from .builder import TABLES, KernelBuilder, Value, compute_dtype
from .pointwise import register, result_dtype
from .shapes import IR_DTYPES, CannotLower, shape_of
from .views import as_size, slice_start

aten, prims = torch.ops.aten, torch.ops.prims
Idx = tuple[Expr, ...]


def generator(*targets: Any) -> Callable[[Any], Any]:
    """Operators without tensor operands to read: recomputed wherever their value is wanted."""
    def put(body: Any) -> Any:
        for t in targets:
            TABLES.generators[t] = body
        return body
    return put


def _filled(b: KernelBuilder, node: fx.Node, index: Idx, value: Any) -> Value:
    stored = IR_DTYPES[node.meta["val"].dtype]
    dtype = compute_dtype(stored)
    if isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor):
        raise CannotLower("fill with a tensor")
    filled = b.operand(value, (), dtype)
    return filled if stored == dtype else b.cast(b.cast(filled, stored), dtype)


@generator(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _filled(b, node, index, node.args[2 if node.target is aten.new_full.default else 1])


@generator(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _filled(b, node, index, 0)


@generator(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _filled(b, node, index, 1)


@generator(aten.scalar_tensor.default)
def _scalar_tensor(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _filled(b, node, index, node.args[0])


def _line(b: KernelBuilder, node: fx.Node, index: Idx, start: Any, step: Any) -> Value:
    dtype = result_dtype(node)
    if any(isinstance(v, float) for v in (start, step)):
        i = b.cast(b.index_value(index[0]), dtype)
        scaled = b.op("mul", dtype, i, b.const(step, dtype))
        return b.op("add", dtype, scaled, b.const(start, dtype))
    return b.cast(b.index_value(index[0] * as_size(step) + as_size(start)), dtype)


@generator(aten.arange.start_step)
def _arange(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _line(b, node, index, node.args[0], node.args[2] if len(node.args) > 2 else 1)


@generator(aten.arange.default)
def _arange_end(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _line(b, node, index, 0, 1)


@generator(aten.arange.start)
def _arange_start(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _line(b, node, index, node.args[0], 1)


@generator(prims.iota.default)
def _iota(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return _line(b, node, index, node.kwargs.get("start", 0), node.kwargs.get("step", 1))


# -- gathers ------------------------------------------------------------------------------------
def _gathered(b: KernelBuilder, indices: Value, size: Expr, wrap: bool) -> tuple[Expr, Value]:
    """An index value as an expression, and the guard `0 <= index < size` that keeps the load inside the tensor. Eager
    raises `IndexError` where the guard is false, so it is expected to hold."""
    position = b.cast(indices, "i64")
    limit = b.index_value(size)
    if wrap:
        moved = b.op("add", "i64", position, limit)
        position = b.op("where", "i64", b.op("lt", "b1", position, b.const(0, "i64")), moved, position)
    inside = b.op("and", "b1", b.op("ge", "b1", position, b.const(0, "i64")), b.op("lt", "b1", position, limit))
    return var(position.name), b.expect(inside)


@register(aten.embedding.default)
def _embedding(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    weight, indices = node.args[:2]
    assert isinstance(weight, fx.Node) and isinstance(indices, fx.Node)
    row, inside = _gathered(b, b.eval(indices, index[:-1]), shape_of(weight.meta["val"]).sizes[0], wrap=False)
    return b.masked(inside, lambda: b.eval(weight, (row, index[-1])))


@register(aten.gather.default)
def _gather(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    source, dim, indices = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(indices, fx.Node) and isinstance(dim, int)
    sizes = shape_of(source.meta["val"]).sizes
    if not sizes:
        return b.eval(source, ())
    if indices.meta["val"].dim() not in (0, len(sizes)):
        raise CannotLower("gather by an empty index of another rank")  # eager takes any rank where nothing is gathered
    dim %= len(sizes)
    at, inside = _gathered(b, b.eval(indices, index), sizes[dim], wrap=False)
    return b.masked(inside, lambda: b.eval(source, (*index[:dim], at, *index[dim + 1:])))


@register(aten.index.Tensor)
def _index(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    """`x[i, j, :, k]`: the index tensors broadcast together and stand where the first of them stood, or at the
    front when a kept dimension separates them."""
    source, indices = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    sizes = shape_of(source.meta["val"]).sizes
    given = [d for d, i in enumerate(indices) if i is not None]
    tensors = [indices[d] for d in given]
    if any(not isinstance(t, fx.Node) or t.meta["val"].dtype in (torch.bool, torch.uint8) for t in tensors):
        raise CannotLower("indexing with a mask")
    rank = max(int(t.meta["val"].dim()) for t in tensors)  # type: ignore[union-attr]
    adjacent = given == list(range(given[0], given[-1] + 1))
    front = given[0] if adjacent else 0
    picked = index[front: front + rank]
    kept = iter(index[:front] + index[front + rank:])
    place: list[Expr] = []
    guard: Value | None = None
    for d, size in enumerate(sizes):
        if d not in given:
            place.append(next(kept))
            continue
        tensor = indices[d]
        assert isinstance(tensor, fx.Node)
        at, inside = _gathered(b, b.eval(tensor, b.broadcast(tensor, picked)), size, wrap=True)
        guard = inside if guard is None else b.op("and", "b1", guard, inside)
        place.append(at)
    assert guard is not None
    return b.masked(guard, lambda: b.eval(source, tuple(place)))


@register(aten.index_select.default)
def _index_select(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    source, dim, indices = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(indices, fx.Node) and isinstance(dim, int)
    sizes = shape_of(source.meta["val"]).sizes
    if not sizes:
        raise CannotLower("index_select of a scalar")
    dim %= len(sizes)
    wanted = (index[dim],) if indices.meta["val"].dim() else ()
    at, inside = _gathered(b, b.eval(indices, wanted), sizes[dim], wrap=False)
    return b.masked(inside, lambda: b.eval(source, (*index[:dim], at, *index[dim + 1:])))


# -- joining ------------------------------------------------------------------------------------
def _choose(b: KernelBuilder, condition: Value | None, inside: Callable[[], Value],
            outside: Callable[[], Value], dtype: str) -> Value:
    if condition is None:
        return inside()
    chosen = b.cast(b.masked(condition, inside), dtype)
    other = b.cast(b.masked(b.op("not", "b1", condition), outside), dtype)
    return b.op("where", dtype, condition, chosen, other)


@register(aten.cat.default)
def _cat(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    given: Any = node.args[0]
    tensors = [t for t in given if shape_of(t.meta["val"]).sizes != (const(0),)]
    if not isinstance(dim, int) or not tensors:
        raise CannotLower("concatenation of nothing")
    dim %= len(index)
    dtype = result_dtype(node)

    def piece(k: int, start: Expr) -> Value:
        tensor = tensors[k]
        size = shape_of(tensor.meta["val"]).sizes[dim]
        moved = (*index[:dim], index[dim] - start, *index[dim + 1:])

        def take() -> Value:
            return b.cast(b.eval(tensor, moved), dtype)

        if k == len(tensors) - 1:
            return take()
        condition = b.in_range(index[dim], 0, start + size) or b.const(True, "b1")
        return _choose(b, condition, take, lambda: piece(k + 1, start + size), dtype)

    return piece(0, const(0))


@register(aten.constant_pad_nd.default)
def _pad(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    source, pads = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(pads, (list, tuple))
    fill = node.args[2] if len(node.args) > 2 else 0
    sizes = shape_of(source.meta["val"]).sizes
    dtype = result_dtype(node)
    moved, condition = list(index), None
    for k in range(len(pads) // 2):
        d = len(sizes) - 1 - k
        moved[d] = index[d] - as_size(pads[2 * k])
        test = b.in_range(moved[d], 0, sizes[d])
        if test is not None:
            condition = test if condition is None else b.op("and", "b1", condition, test)
    return _choose(b, condition, lambda: b.eval(source, tuple(moved)), lambda: b.operand(fill, (), dtype), dtype)


@register(aten.slice_scatter.default)
def _slice_scatter(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    source, patch = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(patch, fx.Node)
    arg = dict(zip(("dim", "start", "end", "step"), node.args[2:], strict=False)) | dict(node.kwargs)
    dim = int(arg.get("dim") or 0) % len(index)  # type: ignore[arg-type]
    if arg.get("step") not in (None, 1):
        raise CannotLower("strided slice_scatter")
    start = slice_start(arg.get("start"), shape_of(source.meta["val"]).sizes[dim])
    length = shape_of(patch.meta["val"]).sizes[dim]
    moved = (*index[:dim], index[dim] - start, *index[dim + 1:])
    dtype = result_dtype(node)
    condition = b.in_range(moved[dim], 0, length)
    return _choose(b, condition, lambda: b.eval(patch, moved), lambda: b.eval(source, index), dtype)


@register(aten.select_scatter.default)
def _select_scatter(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    source, patch, dim, at = node.args[:4]
    assert isinstance(source, fx.Node) and isinstance(patch, fx.Node) and isinstance(dim, int)
    dim %= len(index)
    size = shape_of(source.meta["val"]).sizes[dim]
    place = as_size(at)
    if place.is_const and place.value < 0:
        place = place + size
    dtype = result_dtype(node)
    condition = b.in_range(index[dim] - place, 0, 1)
    rest = index[:dim] + index[dim + 1:]
    return _choose(b, condition, lambda: b.eval(patch, rest), lambda: b.eval(source, index), dtype)
