"""Loop axes for the CPU: drop and merge axes, choose the one that runs along the vector lanes.

Both rewrites keep the meaning of a kernel; they only make its loops longer and its indices simpler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .expr import Expr, const, var
from .ir import DTYPES, Axis, Index, Kernel, Load, Reduce, Stmt, Store, stmt_axes


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
    from .expr import split_atom

    for name in expr.variables():
        call = split_atom(name)
        if call is not None and any(a.symbols() & names for a in call[1]):
            return True
    return False


def choose_vector_axis(kernel: Kernel) -> Axis | None:
    """The axis to put innermost: most bytes at unit stride, fewest strided ones; the last axis on a tie."""
    if not kernel.axes:
        return None
    varies = stmt_axes(kernel)
    ordered = any(isinstance(s, Reduce) and s.op.startswith("arg") for s in kernel.body)
    last_reduce = kernel.reduce[-1] if kernel.reduce else None
    candidates = [a for a in kernel.axes if not (a.is_reduce and ordered and a is not last_reduce)]
    return max(reversed(candidates), key=lambda a: _vector_score(kernel, a, varies))


def _vector_score(kernel: Kernel, axis: Axis, varies: dict[str, frozenset[str]]) -> float:
    dtypes = {b.name: b.dtype for b in kernel.inputs + kernel.outputs}
    reduce_names = {a.name for a in kernel.reduce}
    score = 0.0
    for stmt in kernel.body:
        if not isinstance(stmt, Load | Store):
            continue
        axes = stmt.index.symbols() | (varies[stmt.dst] if isinstance(stmt, Load) else frozenset())
        weight = DTYPES[dtypes[stmt.buffer]] * (2.0 if isinstance(stmt, Store) else 1.0)
        if reduce_names and not axes & reduce_names:
            weight *= 0.1  # touched once a row, not once an element
        score += weight * _stride_score(stmt.index, axis, axes)
    return score * min(_size_of(axis), 16) / 16 if score > 0 else score


def _stride_score(index: Expr, axis: Axis, axes: frozenset[str]) -> float:
    if axis.name not in axes:
        return 0.0
    try:
        return 1.0 if index.coefficient(axis.name) == 1 and index.variables() >= {axis.name} else -1.0
    except ValueError:
        return -1.0


def _size_of(axis: Axis) -> int:
    return axis.size.value if axis.size.is_const else 1024


def is_static(expr: Expr, at_most: int) -> bool:
    return expr.is_const and expr.value <= at_most


def sized(axis: Axis) -> Expr:
    return var(axis.name)
