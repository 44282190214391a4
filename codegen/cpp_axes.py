"""Loop axes for the CPU: drop and merge axes, choose the one that runs along the vector lanes.

Both rewrites keep the meaning of a kernel; they only make its loops longer and its indices simpler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .expr import Expr, const, split_atom
from .ir import Axis, Index, Kernel, Load, Reduce, Stmt, Store, stmt_axes

_LANES = 16  # of f32 with AVX-512; other widths choose alike
_STRIDED = 0.75
_HORIZONTAL = 4.0


def simplify_axes(kernel: Kernel) -> Kernel:
    """`kernel` without axes of size 1 and with neighbours merged where every index map allows it."""
    kernel = _drop_unit_axes(kernel)
    at = 0
    while at + 1 < len(kernel.axes):
        merged = _merge(kernel, kernel.axes[at], kernel.axes[at + 1])
        if merged is None:
            at += 1
        else:
            kernel = merged
            at = max(at - 1, 0)
    return kernel


def index_maps(stmt: Stmt) -> Expr | None:
    """The integer expression a statement evaluates over the axes, if any."""
    match stmt:
        case Load(index=index) | Store(index=index):
            return index
        case Index(expr=expr):
            return expr
        case _:
            return None


def map_indices(kernel: Kernel, change: Callable[[Expr], Expr]) -> tuple[Stmt, ...]:
    out: list[Stmt] = []
    for stmt in kernel.body:
        match stmt:
            case Load(index=index) | Store(index=index):
                out.append(replace(stmt, index=change(index)))
            case Index(expr=expr):
                out.append(replace(stmt, expr=change(expr)))
            case _:
                out.append(stmt)
    return tuple(out)


def _drop_unit_axes(kernel: Kernel) -> Kernel:
    unit = [a for a in kernel.axes if a.size == 1]
    if kernel.reduce and all(a in unit for a in kernel.reduce):
        unit.remove(kernel.reduce[-1])  # reductions still need an axis to run over
    gone = {a.name: const(0) for a in unit}
    if not gone:
        return kernel
    body = map_indices(kernel, lambda e: e.subs(gone))
    return replace(kernel, axes=tuple(a for a in kernel.axes if a.name not in gone), body=body)


def _merge(kernel: Kernel, outer: Axis, inner: Axis) -> Kernel | None:
    """Fuse two neighbours of one kind: legal when stepping `outer` equals `inner.size` steps of `inner` everywhere."""
    if outer.kind != inner.kind:
        return None
    for stmt in kernel.body:
        expr = index_maps(stmt)
        if expr is None or not expr.symbols() & {outer.name, inner.name}:
            continue
        if not _steps_together(expr, outer, inner):
            return None
    fused = Axis(inner.name, outer.size * inner.size, inner.kind)
    axes = tuple(fused if a is inner else a for a in kernel.axes if a is not outer)
    return replace(kernel, axes=axes, body=map_indices(kernel, lambda e: e.without([outer.name])))


def _steps_together(expr: Expr, outer: Axis, inner: Axis) -> bool:
    names = {outer.name, inner.name}
    if names & (expr.symbols() - expr.variables()) or _inside_atoms(expr, names):
        return False
    try:
        return expr.coefficient(outer.name) == expr.coefficient(inner.name) * inner.size
    except ValueError:
        return False


def _inside_atoms(expr: Expr, names: set[str]) -> bool:
    for name in expr.variables():
        call = split_atom(name)
        if call is not None and any(a.symbols() & names for a in call[1]):
            return True
    return False


def choose_vector_axis(kernel: Kernel) -> Axis | None:
    """The axis to put innermost: the cheapest per element (`_cost_per_element`); the last one on a tie."""
    if not kernel.axes:
        return None
    varies = stmt_axes(kernel)
    ordered = any(isinstance(s, Reduce) and s.op.startswith("arg") for s in kernel.body)
    last_reduce = kernel.reduce[-1] if kernel.reduce else None
    candidates = [a for a in kernel.axes if not (a.is_reduce and ordered and a is not last_reduce)]
    return min(reversed(candidates), key=lambda a: _cost_per_element(kernel, a, varies))


def _cost_per_element(kernel: Kernel, axis: Axis, varies: dict[str, frozenset[str]]) -> float:
    """Instructions per element with `axis` in the lanes: an access at unit stride and an operation serve all lanes,
    a strided access only one; a reduction over the lanes ends with a few steps of its own."""
    reduce_names = {a.name for a in kernel.reduce}
    lanes = max(1, min(_size_of(axis), _LANES))
    cost = _HORIZONTAL / max(1, _size_of(axis)) if axis.is_reduce else 0.0
    for stmt in kernel.body:
        axes = varies[stmt.dst] if not isinstance(stmt, Store) else varies[stmt.value] | stmt.index.symbols()
        often = 0.1 if reduce_names and not axes & reduce_names else 1.0  # once a row or once an element
        if axis.name not in axes:
            continue
        one = isinstance(stmt, Load | Store) and not _unit_stride(stmt.index, axis)
        cost += often * (_STRIDED if one else 1.0 / lanes)
    return cost


def _unit_stride(index: Expr, axis: Axis) -> bool:
    """Whether neighbours along `axis` are neighbours in memory, or the same element."""
    if axis.name not in index.symbols():
        return not any(n.startswith("%") for n in index.symbols())
    try:
        return index.coefficient(axis.name) == 1 and axis.name in index.variables()
    except ValueError:
        return False


def _size_of(axis: Axis) -> int:
    return axis.size.value if axis.size.is_const else 1024
