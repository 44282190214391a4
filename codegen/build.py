"""Build one kernel from a group of nodes, and bring it to canonical form.

Canonical: axes merged wherever every index map allows it, named p0, p1, …, r0, …; buffers in0, …, out0, …; symbolic
sizes s0, s1, … in order of appearance. Structurally equal groups (the layers of a model) therefore give equal text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from .expr import Expr, const, product, var
from .ir import Axis, Buffer, Index, IRError, Kernel, Load, Op, Reduce, Stmt, Store, uses, verify
from .lowering.builder import Frame, KernelBuilder, memory_order
from .lowering.indexing import NeedSplit
from .lowering.reductions import frame_of_reduction, reduction_of
from .lowering.shapes import CannotLower, shape_of

MAX_SPLITS = 8


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel with its place in the graph: tensors read and written in buffer order, and what `kernel.sizes` are in
    the graph's own symbols."""

    kernel: Kernel
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    sizes: tuple[Expr, ...]

    @property
    def key(self) -> str:
        """Equal for structurally equal kernels."""
        return str(self.kernel)


def frame_for(nodes: Iterable[fx.Node], outputs: Sequence[fx.Node]) -> Frame:
    """A reduction's frame when the group has one, else the shape of its largest output."""
    for node in nodes:
        reduction = reduction_of(node)
        if reduction is not None:
            return frame_of_reduction(reduction)
    shapes = [shape_of(o.meta["val"]) for o in outputs]
    chosen = max(shapes, key=lambda s: (s.numel.value if s.numel.is_const else 0, len(s.sizes)))
    return Frame(chosen.sizes, (False,) * len(chosen.sizes), memory_order(chosen))


def build(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> BuiltKernel:
    """The kernel that computes `outputs` (some of `nodes`, in graph order). Raises `CannotLower` with the reason."""
    frame = frame_for(nodes, outputs)
    splits: list[tuple[str, Expr]] = []
    while True:
        builder = KernelBuilder(nodes, frame, splits)
        try:
            return _finish(builder, outputs)
        except NeedSplit as wanted:
            if len(splits) == MAX_SPLITS:
                raise CannotLower("more than 8 axis splits") from wanted
            splits.append((wanted.axis, wanted.inner))


def _finish(b: KernelBuilder, outputs: Sequence[fx.Node]) -> BuiltKernel:
    whole, rows = product(b.frame.sizes), product(b.frame.row_sizes)
    buffers: list[Buffer] = []
    for k, node in enumerate(outputs):
        shape = shape_of(node.meta["val"])
        if shape.numel == whole and not (b.frame.has_reduction and reduction_of(node) is not None):
            index = b.element_index(shape.sizes)
        elif shape.numel == rows:
            index = b.row_index(shape.sizes)
        else:
            raise CannotLower(f"{node.name} has {shape.numel} elements, the kernel {whole} in {rows} rows")
        buffers.append(Buffer(f"out{k}", shape.dtype))
        b.store(node, f"out{k}", index)
    axes = tuple(Axis(n, b.axes[n], "reduce" if n[0] == "r" else "parallel") for n in b.axis_order)
    ins = tuple(Buffer(name, shape_of(n.meta["val"]).dtype) for n, name in b.inputs.items())
    raw = Kernel("kernel", (), ins, tuple(buffers), axes, tuple(b.stmts))
    kernel, inputs, sizes = canonical(raw, list(b.inputs))
    try:
        verify(kernel)
    except IRError as broken:  # an operator on a dtype the IR has no form for (min of bools): ATen computes it
        raise CannotLower(str(broken).splitlines()[0]) from None
    return BuiltKernel(kernel, tuple(inputs), tuple(outputs), tuple(sizes))


# -- canonical form -----------------------------------------------------------------------------
def _map_exprs(stmt: Stmt, f: dict[str, Expr]) -> Stmt:
    match stmt:
        case Load(index=index) | Store(index=index):
            return replace(stmt, index=index.subs(f))
        case Index(expr=expr):
            return replace(stmt, expr=expr.subs(f))
    return stmt


def _exprs(body: Iterable[Stmt]) -> list[Expr]:
    out: list[Expr] = []
    for s in body:
        match s:
            case Load(index=e) | Store(index=e) | Index(expr=e):
                out.append(e)
    return out


def _mergeable(outer: Axis, inner: Axis, exprs: Iterable[Expr]) -> bool:
    for e in exprs:
        if {outer.name, inner.name} & (e.symbols() - e.variables()):  # inside an atom
            return False
        try:
            if e.coefficient(outer.name) != e.coefficient(inner.name) * inner.size:
                return False
        except ValueError:
            return False
    return True


def merge_axes(axes: Sequence[Axis], body: Sequence[Stmt]) -> tuple[list[Axis], list[Stmt]]:
    """Join neighbouring axes that every index map walks as one. Argmax positions are not affected: order is kept."""
    axes, body = list(axes), list(body)
    exprs = list(dict.fromkeys(_exprs(body)))
    i = len(axes) - 2
    while i >= 0:
        outer, inner = axes[i], axes[i + 1]
        if outer.kind == inner.kind and _mergeable(outer, inner, exprs):
            gone = {outer.name: const(0)}
            body = [_map_exprs(s, dict(gone)) for s in body]
            exprs = list(dict.fromkeys(_exprs(body)))
            axes[i: i + 2] = [Axis(inner.name, outer.size * inner.size, inner.kind)]
        i -= 1
    return axes, body


def live(body: Sequence[Stmt]) -> list[Stmt]:
    """Statements that reach a store."""
    wanted: set[str] = set()
    out: list[Stmt] = []
    for s in reversed(body):
        if isinstance(s, Store) or s.dst in wanted:
            wanted.update(uses(s))
            out.append(s)
    return out[::-1]


def canonical(kernel: Kernel, nodes: list[fx.Node]) -> tuple[Kernel, list[fx.Node], list[Expr]]:
    """The canonical kernel, the input nodes still read, and the graph expressions of its sizes."""
    axes, body = merge_axes(kernel.axes, live(kernel.body))
    used = {s.buffer for s in body if isinstance(s, Load)}
    kept = [(b, n) for b, n in zip(kernel.inputs, nodes, strict=True) if b.name in used]
    buffer_names = {b.name: f"in{k}" for k, (b, _) in enumerate(kept)}
    counts = {"p": 0, "r": 0}
    names: dict[str, Expr] = {}
    renamed: list[Axis] = []
    for a in axes:
        letter = "r" if a.is_reduce else "p"
        new = f"{letter}{counts[letter]}"
        counts[letter] += 1
        names[a.name] = var(new)
        renamed.append(Axis(new, a.size, a.kind))
    symbols = _size_symbols(axes, body)
    names.update({s: var(f"s{k}") for k, s in enumerate(symbols)})
    values: dict[str, str] = {}
    out = [_rename(_map_exprs(s, names), values, buffer_names) for s in body]
    sized = tuple(Axis(a.name, a.size.subs(names), a.kind) for a in renamed)
    result = Kernel(kernel.name, tuple(f"s{k}" for k in range(len(symbols))),
                    tuple(Buffer(buffer_names[b.name], b.dtype) for b, _ in kept), kernel.outputs, sized, tuple(out))
    return result, [n for _, n in kept], [var(s) for s in symbols]


def _size_symbols(axes: Sequence[Axis], body: Sequence[Stmt]) -> list[str]:
    taken = {a.name for a in axes}
    found: dict[str, None] = {}
    for e in [a.size for a in axes] + _exprs(body):
        for name in sorted(e.symbols()):
            if name not in taken and not name.startswith("%"):
                found.setdefault(name)
    return list(found)


def _rename(s: Stmt, values: dict[str, str], buffers: dict[str, str]) -> Stmt:
    """Number SSA values from %0 and rename input buffers."""
    if isinstance(s, Store):
        return replace(s, value=values[s.value], index=_rename_values(s.index, values))
    fresh = f"%{len(values)}"
    match s:
        case Load(buffer=buffer, index=index, mask=mask):
            new: Stmt = replace(s, dst=fresh, buffer=buffers[buffer], index=_rename_values(index, values),
                                mask=values[mask] if mask else None)
        case Index(expr=expr):
            new = replace(s, dst=fresh, expr=_rename_values(expr, values))
        case Op(args=args):
            new = replace(s, dst=fresh, args=tuple(values[a] for a in args))
        case Reduce(src=src):
            new = replace(s, dst=fresh, src=values[src])
        case _:
            new = replace(s, dst=fresh)
    values[s.dst] = fresh
    return new


def _rename_values(e: Expr, values: dict[str, str]) -> Expr:
    names = [n for n in e.symbols() if n.startswith("%")]
    if not names:
        return e
    return e.subs({n: var(values[n]) for n in names})
