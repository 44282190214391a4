"""How a kernel's axes become C++ loops: work items outside, vector lanes inside, reductions between.

Three shapes cover every kernel:

* *flat*: one parallel axis and nothing else; the work items are its points and the item loop is the vector loop.
* *columns*: the vector axis is parallel. An item is one point of the other parallel axes (and one tile of the
  vector axis); reduce loops, if any, stand outside the vector loop and accumulate into small arrays.
* *rows*: the vector axis is a reduce axis. An item is one point of all parallel axes; reductions are scalars. A kernel
  that is one long row splits the row itself over the threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cpp_axes import choose_vector_axis, simplify_axes
from .expr import Expr, as_expr, atom, product
from .ir import Axis, Const, Index, Kernel, Load, Op, Reduce, Stmt, Store, phases, stmt_axes

LONG_ROW = 65536  # elements from which a single row is worth several threads


@dataclass(frozen=True)
class LoopPlan:
    """The loop structure of one (simplified) kernel. `tile` is the tile of the vector axis, 0 for none."""

    kernel: Kernel
    vector: Axis | None
    outer: tuple[Axis, ...]
    reduce: tuple[Axis, ...]  # in loop order, the vector axis last when it is a reduce axis
    tile: int

    @property
    def rows(self) -> bool:
        return self.vector is not None and self.vector.is_reduce

    @property
    def flat(self) -> bool:
        return self.vector is not None and not self.vector.is_reduce and not self.outer and not self.tile

    @property
    def split(self) -> Axis | None:
        """The reduce axis that is cut into chunks for the threads: the outermost one, where all there is is one long
        row (see cpp_split.py). Positions (argmax) are not split."""
        if not self.rows or self.outer:
            return None
        if any(isinstance(s, Reduce) and s.op.startswith("arg") for s in self.kernel.body):
            return None
        total = product(a.size for a in self.reduce)
        return None if total.is_const and total.value < LONG_ROW else self.reduce[0]

    @property
    def tiles(self) -> Expr:
        assert self.vector is not None
        return atom("floordiv", self.vector.size + (self.tile - 1), self.tile)

    @property
    def items(self) -> Expr:
        """Number of work items, the unit of the parallel split."""
        if self.flat:
            assert self.vector is not None
            return self.vector.size
        return product(a.size for a in self.outer) * (self.tiles if self.tile else 1)

    @property
    def work_per_item(self) -> Expr:
        """Work of one item, roughly: points of the inner loops times the cost of the body's statements."""
        inner = as_expr(sum(map(statement_cost, self.kernel.body))) * product(a.size for a in self.reduce)
        if self.vector is None or self.rows or self.flat:
            return inner
        return inner * (self.tile or self.vector.size)


_CHEAP = frozenset(("add", "sub", "mul", "max", "min", "neg", "abs", "cast", "where", "and", "or", "xor", "not",
                    "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "expect", "floor", "ceil", "round", "trunc",
                    "sign"))


def statement_cost(stmt: Stmt) -> int:
    """Cost of one statement for one element, in additions or loads from L1."""
    match stmt:
        case Const() | Index():
            return 0
        case Load(index=index):
            return 4 if any(n.startswith("%") for n in index.symbols()) else 1
        case Op(op=op):
            return 1 if op in _CHEAP else 4 if op in ("div", "sqrt", "rsqrt", "reciprocal") else 10
        case _:
            return 1


def plan_loops(kernel: Kernel) -> LoopPlan:
    """Choose the loop shape of `kernel` (see the module's text)."""
    kernel = simplify_axes(kernel)
    vector = choose_vector_axis(kernel)
    outer = tuple(a for a in kernel.parallel if a is not vector)
    reduce = tuple(a for a in kernel.reduce if a is not vector)
    if vector is not None and vector.is_reduce:
        return LoopPlan(kernel, vector, outer, (*reduce, vector), 0)
    if vector is None:
        return LoopPlan(kernel, None, outer, reduce, 0)
    tile = _column_tile(vector) if reduce else _pointwise_tile(outer, vector)
    return LoopPlan(kernel, vector, outer, reduce, tile)


def _column_tile(vector: Axis) -> int:
    """Columns whose accumulators stay in L1, few enough that a narrow matrix still makes several items."""
    if not vector.size.is_const:
        return 128
    size = vector.size.value
    return max(1, min(size, 64)) if size <= 256 else 128 if size <= 2048 else 256


def _pointwise_tile(outer: tuple[Axis, ...], vector: Axis) -> int:
    """Tile long rows when there are too few of them to feed the threads."""
    rows = product(a.size for a in outer)
    few = bool(outer) and rows.is_const and rows.value < 32
    long = not vector.size.is_const or vector.size.value > 8192
    return 4096 if few and long else 0


@dataclass(frozen=True)
class Pass:
    """One sweep over the reduce axes: the reductions it feeds and the element-level stores it makes."""

    phase: int
    reduces: tuple[Reduce, ...]
    stores: tuple[Store, ...]


def element_level(kernel: Kernel) -> frozenset[str]:
    """Values that vary over a reduce axis."""
    names = {a.name for a in kernel.reduce}
    return frozenset(v for v, axes in stmt_axes(kernel).items() if axes & names)


def plan_passes(kernel: Kernel) -> tuple[list[Pass], list[Store]]:
    """Sweeps in order, and the row-level stores that follow them.

    Element-level stores wait for the last sweep: an output may share memory with an input of the same index map,
    so no earlier sweep may overwrite what a later one reads again.
    """
    phase, element = phases(kernel), element_level(kernel)
    names = {a.name for a in kernel.reduce}
    reduces = [s for s in kernel.body if isinstance(s, Reduce)]
    stores = [s for s in kernel.body if isinstance(s, Store)]
    wide = [s for s in stores if s.value in element or s.index.symbols() & names]
    by_phase: dict[int, list[Reduce]] = {}
    for r in reduces:
        by_phase.setdefault(phase[r.src], []).append(r)
    if wide:
        last = max([phase[s.value] for s in wide] + list(by_phase))
        by_phase.setdefault(last, [])
    else:
        last = -1
    passes = [Pass(k, tuple(rs), tuple(wide) if k == last else ()) for k, rs in sorted(by_phase.items())]
    return passes, [s for s in stores if s not in wide]


def lane_text(plan: LoopPlan) -> str:
    """Where the current column stands in the item's accumulator arrays."""
    assert plan.vector is not None
    return f"{plan.vector.name} - lane0" if plan.tile else plan.vector.name


def lane_count(plan: LoopPlan) -> int:
    return plan.tile
