"""Axis normalisation and value levels, read by the Triton printer and its launch table.

A Triton kernel sees at most two directions: `x`, all parallel axes flattened, and `r`, all reduce axes flattened.
`merge_axes` glues neighbouring axes that every index walks through as one, so that the common contiguous kernel has a
single axis in each direction and needs no division to find its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .expr import Expr, const, product, split_atom
from .ir import Axis, Index, Kernel, Load, Reduce, Stmt, Store, stmt_axes, uses

Dims = frozenset[str]  # subset of {"x", "r"}: the directions a value varies along
X, R = "x", "r"


def expressions(kernel: Kernel) -> Iterator[Expr]:
    """Every index expression of the body."""
    for stmt in kernel.body:
        if isinstance(stmt, (Load, Store)):
            yield stmt.index
        elif isinstance(stmt, Index):
            yield stmt.expr


def map_expressions(kernel: Kernel, change: Callable[[Expr], Expr]) -> tuple[Stmt, ...]:
    """The body with every index expression replaced by `change(expression)`."""
    out: list[Stmt] = []
    for stmt in kernel.body:
        if isinstance(stmt, (Load, Store)):
            stmt = replace(stmt, index=change(stmt.index))
        elif isinstance(stmt, Index):
            stmt = replace(stmt, expr=change(stmt.expr))
        out.append(stmt)
    return tuple(out)


def merge_axes(kernel: Kernel) -> Kernel:
    """The same kernel with axes of size 1 dropped and contiguous neighbours merged (row-major order is kept)."""
    ones = {a.name: const(0) for a in kernel.axes if a.size == 1}
    if kernel.reduce and all(a.name in ones for a in kernel.reduce):
        del ones[kernel.reduce[-1].name]  # a row of one element is still a row
    if ones:
        body = map_expressions(kernel, lambda e: e.subs(ones))
        kernel = replace(kernel, axes=tuple(a for a in kernel.axes if a.name not in ones), body=body)
    position = 0
    while position + 1 < len(kernel.axes):
        merged = _merge_pair(kernel, position)
        if merged is None:
            position += 1
        else:
            kernel, position = merged, max(position - 1, 0)
    return kernel


def _merge_pair(kernel: Kernel, position: int) -> Kernel | None:
    outer, inner = kernel.axes[position], kernel.axes[position + 1]
    if outer.kind != inner.kind or not all(_walks_as_one(e, outer, inner) for e in expressions(kernel)):
        return None
    glue = {outer.name: const(0)}
    axis = Axis(inner.name, outer.size * inner.size, inner.kind)
    axes = (*kernel.axes[:position], axis, *kernel.axes[position + 2:])
    return replace(kernel, axes=axes, body=map_expressions(kernel, lambda e: e.subs(glue)))


def _walks_as_one(e: Expr, outer: Axis, inner: Axis) -> bool:
    """True when `e` depends on the two axes only through `outer * inner.size + inner`."""
    for name in e.variables():
        call = split_atom(name)
        if call and any({outer.name, inner.name} & arg.symbols() for arg in call[1]):
            return False
    try:
        left, right = e.coefficient(outer.name), e.coefficient(inner.name)
    except ValueError:
        return False
    if {outer.name, inner.name} & (left.symbols() | right.symbols()):
        return False
    return left == right * inner.size


def expr_dims(kernel: Kernel, e: Expr, known: dict[str, Dims]) -> Dims:
    """Directions along which an index expression varies (`known`: those of the SSA values)."""
    kinds = {a.name: R if a.is_reduce else X for a in kernel.axes}
    out: set[str] = set()
    for name in e.symbols():
        if name in kinds:
            out.add(kinds[name])
        elif name.startswith("%"):
            out |= known[name]
    return frozenset(out)


def value_dims(kernel: Kernel) -> dict[str, Dims]:
    """Directions along which every SSA value varies. A guarded load is a block even where nothing varies: Triton takes
    no scalar mask, so it and all that depends on it vary along `x`."""
    own = stmt_axes(kernel)
    kinds = {a.name: R if a.is_reduce else X for a in kernel.axes}
    out: dict[str, Dims] = {}
    for stmt in kernel.body:
        if isinstance(stmt, Store):
            continue
        dims = frozenset(kinds[a] for a in own[stmt.dst]).union(*(out[v] for v in uses(stmt)))
        if isinstance(stmt, Reduce):
            dims -= {R}
        out[stmt.dst] = dims or frozenset({X}) if isinstance(stmt, Load) and stmt.mask is not None else dims
    return out


def inner_strides(kernel: Kernel) -> tuple[int, int]:
    """How many loads and stores have unit stride along the innermost (parallel, reduce) axis."""
    counts = []
    for axes in (kernel.parallel, kernel.reduce):
        name = axes[-1].name if axes else ""
        counts.append(sum(1 for e in expressions(kernel) if name and _unit(e, name)))
    return counts[0], counts[1]


def _unit(e: Expr, name: str) -> bool:
    try:
        return e.coefficient(name) == 1
    except ValueError:
        return False


def is_column_reduction(kernel: Kernel) -> bool:
    """True when memory is contiguous along the parallel axes, so that a block must be wide in `x`."""
    along_x, along_r = inner_strides(kernel)
    return bool(kernel.reduce) and along_x > along_r


def size_of(axes: tuple[Axis, ...]) -> Expr:
    return product(a.size for a in axes)


def decode(axes: tuple[Axis, ...], flat: str) -> list[tuple[str, str, Expr | None, Expr]]:
    """How each axis is found in the flat position: (name, flat, size or None for the outermost, stride)."""
    out: list[tuple[str, str, Expr | None, Expr]] = []
    stride = const(1)
    for position in range(len(axes) - 1, -1, -1):
        axis = axes[position]
        out.append((axis.name, flat, axis.size if position else None, stride))
        stride = stride * axis.size
    return out[::-1]
