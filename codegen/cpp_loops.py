"""The body of one emitted C++ function: loops, statements, accumulators (see cpp_plan.py for the shapes)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .cpp_expr import MEMORY_TYPE, VALUE_TYPE, c_cast, c_index, c_literal, c_name, c_op
from .cpp_plan import LoopPlan, Pass, element_level, lane_count, lane_text, plan_passes
from .cpp_reduce import SHORT_COLUMN, SHORT_ROW, Accumulator, accumulator
from .cpp_rowbuf import RowBuffer, choose_row_buffers
from .cpp_split import (
    CHUNK,
    CHUNK_LOOP,
    chunk_bounds,
    chunk_pragma,
    chunk_sizes,
    declare_parts,
    join_parts,
    keep_part,
)
from .expr import Expr, product, var
from .ir import Axis, Const, Definition, Index, Kernel, Load, Op, Reduce, Stmt, Store, phases, stmt_axes, uses


@dataclass
class Loop:
    """One `for` of a sweep. `before` and `after` stand around it; `axis` is what it runs over (None: blocks)."""

    header: str
    axis: str | None
    pragma: str = ""
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


class Body:
    """Emits the statements of one function into `lines`."""

    def __init__(self, plan: LoopPlan) -> None:
        self.plan = plan
        self.kernel: Kernel = plan.kernel
        self.definitions: dict[str, Definition] = {s.dst: s for s in self.kernel.body if not isinstance(s, Store)}
        self.dtype = {v: d.dtype for v, d in self.definitions.items()}
        self.varies = stmt_axes(self.kernel)
        self.phase = phases(self.kernel)
        self.element = element_level(self.kernel)
        self.lines: list[str] = []
        self.indent = 1
        self.in_item: set[str] = set()  # values already defined in the item's scope
        self.leaves: dict[str, str] = {}  # values read back from an array: the text that reads them
        passes, self.row_stores = plan_passes(self.kernel)
        self.passes: list[Pass] = passes
        self.buffers: list[RowBuffer] = choose_row_buffers(plan, passes) if plan.rows else []

    # -- text -------------------------------------------------------------------------------------
    def put(self, *lines: str) -> None:
        self.lines.extend("  " * self.indent + line for line in lines)

    def open(self, header: str) -> None:
        self.put(header + " {")
        self.indent += 1

    def close(self) -> None:
        self.indent -= 1
        self.put("}")

    # -- the whole body ---------------------------------------------------------------------------
    def emit(self) -> list[str]:
        for buffer in self.buffers:
            self.put(buffer.declaration())
        if self.plan.flat:
            self._finish()
        else:
            self._emit_items()
        return self.lines

    def _emit_items(self) -> None:
        axes = [(c_name(a.name), c_index(a.size)) for a in self.plan.outer]
        if self.plan.tile:
            axes.append(("tile", c_index(self.plan.tiles)))
        if len(axes) <= 1:
            name = axes[0][0] if axes else "item"
            self.open(f"for (int64_t {name} = begin; {name} < end; ++{name})")
            self._emit_item()
            self.close()
            return
        self._decode(axes)
        self.open("for (int64_t item = begin; item < end; ++item)")
        self._emit_item()
        step = f"++{axes[0][0]};"
        for name, size in axes[1:]:
            step = f"if (++{name} == {size}) {{ {name} = 0; {step} }}"
        self.put(step)
        self.close()

    def _decode(self, axes: list[tuple[str, str]]) -> None:
        """Axis values of item `begin`; later items step them like an odometer."""
        self.put("if (begin >= end) return;", "int64_t at = begin;")
        for name, size in reversed(axes[1:]):
            self.put(f"int64_t {name} = at % ({size}); at /= {size};")
        self.put(f"int64_t {axes[0][0]} = at;")

    def _emit_item(self) -> None:
        if self.plan.tile:
            assert self.plan.vector is not None
            tile, size = self.plan.tile, c_index(self.plan.vector.size)
            self.put(f"const int64_t lane0 = tile * {tile};",
                     f"const int64_t lanes = mw_min(lane0 + {tile}, int64_t({size}));")
        if self.plan.split is not None:
            self.put(*chunk_sizes(self.plan))
        for number, sweep in enumerate(self.passes):
            self._emit_pass(number, sweep)
        self._finish()

    def _finish(self) -> None:
        """Row-level stores (all stores of a pointwise kernel)."""
        if self.row_stores:
            self._nest([] if self.plan.vector is None or self.plan.rows else [self._vector_loop()],
                       [s.value for s in self.row_stores], self.row_stores, [self._store(s) for s in self.row_stores])

    # -- one sweep over the reduce axes -----------------------------------------------------------
    def _emit_pass(self, number: int, sweep: Pass) -> None:
        results = self._results() if number + 1 < len(self.passes) else {r.dst for r in sweep.reduces}
        accumulators = [accumulator(r, self.dtype[r.src], self._total(), self.plan, r.dst in results)
                        for r in sweep.reduces]
        for acc in accumulators:
            self.put(*acc.declare())
        if not self.plan.rows:
            self._materialise_columns(sweep)
        loops = self._sweep_loops(accumulators)
        roots = [r.src for r in sweep.reduces] + [s.value for s in sweep.stores]
        sinks = [line for acc in accumulators for line in acc.update(self._operand(acc.reduce.src), self._position())]
        for buffer in (b for b in self.buffers if b.written_in == number):
            roots.append(buffer.value)
            sinks.append(buffer.write(self._operand(buffer.value)))
        if self.plan.split is not None:
            loops = [self._chunks(accumulators, loops[0]), *loops]
        self._nest(loops, roots, [*sweep.reduces, *sweep.stores], sinks + [self._store(s) for s in sweep.stores])
        for acc in accumulators:
            self._publish(acc)
        for buffer in (b for b in self.buffers if b.written_in == number):
            self.leaves[buffer.value] = buffer.read()

    def _results(self) -> set[str]:
        """Values that the row-level stores read without another reduction between: a mean saved beside its variance."""
        found: set[str] = set()
        stack = [s.value for s in self.row_stores]
        while stack:
            value = stack.pop()
            if value not in found and value not in self.element:
                found.add(value)
                made = self.definitions[value]
                stack.extend(() if isinstance(made, Reduce) else uses(made))
        return found

    def _publish(self, acc: Accumulator) -> None:
        """Make a finished reduction readable under its SSA name."""
        if self.plan.rows or self.plan.vector is None:
            self.put(f"const {VALUE_TYPE[acc.reduce.dtype]} {c_name(acc.reduce.dst)} = {acc.result()};")
            self.in_item.add(acc.reduce.dst)
        else:
            self.leaves[acc.reduce.dst] = acc.result()

    def _materialise_columns(self, sweep: Pass) -> None:
        """Row-level values after a reduction that this sweep reads in every step: compute each column once."""
        wanted = self._row_values_of([r.src for r in sweep.reduces] + [s.value for s in sweep.stores])
        wanted = [v for v in wanted if self.phase[v] > 0 and v not in self.leaves]
        if not wanted or self.plan.vector is None:
            return
        sinks = []
        for value in wanted:
            name = c_name(value) + "_col"
            self.put(f"{MEMORY_TYPE[self.dtype[value]]} {name}[{self._lane_count()}];")
            sinks.append(f"{name}[{self._lane()}] = {c_name(value)};")
        self._nest([self._vector_loop()], wanted, [], sinks)
        for value in wanted:
            self.leaves[value] = f"{c_name(value)}_col[{self._lane()}]"

    def _row_values_of(self, roots: Iterable[str]) -> list[str]:
        """Row-level values that element-level statements below `roots` read directly."""
        found: list[str] = []
        seen: set[str] = set()
        stack = list(roots)
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            if value not in self.element:
                found.append(value)
            elif value not in self.leaves:
                stack.extend(uses(self.definitions[value]))
        return sorted(found, key=list(self.definitions).index)

    # -- loops ------------------------------------------------------------------------------------
    def _vector_loop(self, accumulators: Iterable[Accumulator] = ()) -> Loop:
        vector = self.plan.vector
        assert vector is not None
        name = c_name(vector.name)
        if vector.is_reduce:
            low, high = self._bounds(vector)
        elif self.plan.flat:
            low, high = "begin", "end"
        else:
            low, high = ("lane0", "lanes") if self.plan.tile else ("0", c_index(vector.size))
        clauses = "".join(acc.clause() for acc in accumulators if self.plan.rows)
        scalar = self.plan.rows and any(not acc.vectorises for acc in accumulators)
        return Loop(f"for (int64_t {name} = {low}; {name} < {high}; ++{name})", vector.name,
                    "" if scalar else f"#pragma omp simd{clauses}")

    def _sweep_loops(self, accumulators: list[Accumulator]) -> list[Loop]:
        """Reduce loops and the vector loop, with partial sums flushed around the innermost reduce loop."""
        loops = [self._plain_loop(a) for a in self.plan.reduce if a is not self.plan.vector]
        if self.plan.vector is not None:
            loops.append(self._vector_loop(accumulators))
        partial = [acc for acc in accumulators if acc.has_partial]
        if partial:
            at = max(i for i, loop in enumerate(loops) if loop.axis == self.plan.reduce[-1].name)
            loops[at : at + 1] = self._blocked(loops[at], self.plan.reduce[-1], partial)
        return loops

    def _bounds(self, axis: Axis) -> tuple[str, str]:
        """Where a reduce axis begins and ends: at the chunk's ends when it is split over threads."""
        return CHUNK if axis is self.plan.split else ("0", c_index(axis.size))

    def _plain_loop(self, axis: Axis) -> Loop:
        name = c_name(axis.name)
        low, high = self._bounds(axis)
        return Loop(f"for (int64_t {name} = {low}; {name} < {high}; ++{name})", axis.name)

    def _chunks(self, accumulators: list[Accumulator], first: Loop) -> Loop:
        """The loop over chunks around a sweep: each reduces into accumulators of its own, joined in order after it."""
        first.before[:0] = [*chunk_bounds(self.plan), *(line for acc in accumulators for line in acc.declare())]
        first.after += [line for acc in accumulators for line in keep_part(acc)]
        rooms = [line for acc in accumulators for line in declare_parts(acc)]
        return Loop(CHUNK_LOOP, None, chunk_pragma(self.plan), rooms, join_parts(accumulators))

    def _blocked(self, loop: Loop, axis: Axis, partial: list[Accumulator]) -> list[Loop]:
        step = SHORT_ROW if self.plan.rows else SHORT_COLUMN
        loop.before += [line for acc in partial for line in acc.open_block()]
        loop.after += [line for acc in partial for line in acc.close_block()]
        (low, high), name = self._bounds(axis), c_name(axis.name)
        if axis.size.is_const and axis.size.value <= step:
            return [loop]
        block = Loop(f"for (int64_t {name}_lo = {low}; {name}_lo < {high}; {name}_lo += {step})", None)
        loop.before.insert(0, f"const int64_t {name}_hi = mw_min({name}_lo + {step}, int64_t({high}));")
        loop.header = f"for (int64_t {name} = {name}_lo; {name} < {name}_hi; ++{name})"
        return [block, loop]

    def _nest(self, loops: list[Loop], roots: list[str], users: Iterable[Stmt], sinks: list[str]) -> None:
        """Emit `loops` around the statements that `roots` need, each as far out as it can stand."""
        wanted = roots + [v for s in users for v in uses(s)]
        placed = self._place(loops, self._closure(wanted))
        for value in placed[0]:
            self.in_item.add(value)
        for level, loop in enumerate([None, *loops]):
            if loop is not None:
                self.put(*loop.before, *([loop.pragma] if loop.pragma else []))
                self.open(loop.header)
            for value in placed[level]:
                self.put(self._define(value))
        self.put(*sinks)
        for loop in reversed(loops):
            self.close()
            self.put(*loop.after)

    def _closure(self, roots: Iterable[str]) -> list[str]:
        """Values to define for `roots`, in body order, stopping at what the item's scope already has."""
        found: set[str] = set()
        stack = list(roots)
        while stack:
            value = stack.pop()
            if value in found or value in self.in_item or isinstance(self.definitions[value], Const):
                continue
            found.add(value)
            if value not in self.leaves:
                stack.extend(uses(self.definitions[value]))
        return [v for v in self.definitions if v in found]

    def _place(self, loops: list[Loop], values: list[str]) -> list[list[str]]:
        """Values per loop depth: 0 is the item's scope, k the body of the k-th loop."""
        depth_of_axis = {loop.axis: i + 1 for i, loop in enumerate(loops) if loop.axis is not None}
        depth: dict[str, int] = {}
        placed: list[list[str]] = [[] for _ in range(len(loops) + 1)]
        for value in values:
            definition = self.definitions[value]
            if value in self.leaves:
                at = len(loops)
            else:
                own = _index_symbols(definition)
                at = max([depth_of_axis.get(n, 0) for n in own] + [depth.get(v, 0) for v in uses(definition)] + [0])
            depth[value] = at
            placed[at].append(value)
        return placed

    # -- statements -------------------------------------------------------------------------------
    def _operand(self, value: str) -> str:
        definition = self.definitions[value]
        return c_literal(definition.value, definition.dtype) if isinstance(definition, Const) else c_name(value)

    def _define(self, value: str) -> str:
        return f"const {VALUE_TYPE[self.dtype[value]]} {c_name(value)} = {self._expression(value)};"

    def _expression(self, value: str) -> str:
        if value in self.leaves:
            return self.leaves[value]
        match self.definitions[value]:
            case Load(buffer=buffer, index=index, mask=mask, dtype=dtype, other=other):
                text = f"{c_name(buffer)}[{self._index(index)}]" + (" != 0" if dtype == "b1" else "")
                return text if mask is None else f"{self._operand(mask)} ? {text} : {_memory_literal(other, dtype)}"
            case Index(expr=expr):
                return self._index(expr)
            case Op(op=op, dtype=dtype, args=args):
                return c_op(op, dtype, [self._operand(a) for a in args], [self.dtype[a] for a in args])
            case other_definition:
                raise AssertionError(f"{other_definition} is defined by its sweep")

    def _index(self, index: Expr) -> str:
        constants = {n: d.value for n in index.symbols() if isinstance(d := self.definitions.get(n), Const)}
        return c_index(index.subs({n: int(v) for n, v in constants.items()}))

    def _store(self, store: Store) -> str:
        return f"{c_name(store.buffer)}[{self._index(store.index)}] = {self._operand(store.value)};"

    # -- sizes ------------------------------------------------------------------------------------
    def _total(self) -> Expr:
        return product(a.size for a in self.plan.reduce)

    def _position(self) -> str:
        """Row-major position of an element among the kernel's reduce axes."""
        at: Expr = product([])
        at = at - 1
        for axis in self.kernel.reduce:
            at = at * axis.size + var(axis.name)
        return c_index(at)

    def _lane(self) -> str:
        return lane_text(self.plan)

    def _lane_count(self) -> int:
        return lane_count(self.plan)


def _index_symbols(definition: Definition) -> frozenset[str]:
    match definition:
        case Load(index=index):
            return index.symbols()
        case Index(expr=expr):
            return expr.symbols()
        case _:
            return frozenset()


def _memory_literal(value: float, dtype: str) -> str:
    if dtype in ("bf16", "f16"):
        return c_cast(c_literal(float(value), "f32"), "f32", dtype)
    if dtype in ("i16", "i8", "u8"):
        return f"{MEMORY_TYPE[dtype]}({int(value)})"
    return c_literal(value, dtype)
