"""In which pass over the reduce axes each statement of a kernel runs.

Three forms of kernel: *pointwise* (no reduce axes, one flat block), *persistent* (the row fits into one block, so
every statement runs once, in order) and *looped* (the row is walked in chunks, once per phase: statements at element
level are computed again in every pass that needs them).

Stores always come last: a launch may reuse an input's memory for an output, so nothing may be read after it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from .ir import Kernel, Reduce, Stmt, Store, phases, uses
from .triton_axes import Dims, R, expr_dims, is_column_reduction, value_dims

Form = Literal["pointwise", "persistent", "looped"]

MAX_PERSISTENT_ROW = 4096  # elements of a row kept in registers; above it a chunked loop spills less
MAX_PERSISTENT_COLUMN = 64  # the same where the block must also be wide along the parallel axes
MAX_LIVE_ELEMENTS = 32768  # row size x element-level values, past which a persistent row would spill


@dataclass(frozen=True)
class Pass:
    """One walk over the row: `body` in order, then `reductions` are folded into accumulators, then `stores`."""

    body: tuple[Stmt, ...]
    reductions: tuple[Reduce, ...]
    stores: tuple[Store, ...] = ()


@dataclass(frozen=True)
class Looped:
    """`before[k]` are the row-level statements that run before pass k; `after` those after the last pass."""

    before: tuple[tuple[Stmt, ...], ...]
    passes: tuple[Pass, ...]
    after: tuple[Stmt, ...]
    row_stores: tuple[Store, ...]


def form_of(kernel: Kernel) -> Form:
    """Which form a (merged) kernel is printed in; depends on the kernel alone, never on run-time sizes."""
    if not kernel.reduce:
        return "pointwise"
    row = kernel.row_size
    if not row.is_const:
        return "looped"
    limit = MAX_PERSISTENT_COLUMN if is_column_reduction(kernel) else MAX_PERSISTENT_ROW
    wide = sum(1 for d in value_dims(kernel).values() if R in d)
    return "persistent" if row.value <= limit and row.value * min(wide, 8) <= MAX_LIVE_ELEMENTS else "looped"


def store_dims(kernel: Kernel, store: Store, dims: dict[str, Dims]) -> Dims:
    return expr_dims(kernel, store.index, dims) | dims[store.value]


def live(kernel: Kernel) -> frozenset[str]:
    """Values that reach a store."""
    needed: set[str] = set()
    for stmt in reversed(kernel.body):
        if isinstance(stmt, Store) or stmt.dst in needed:
            needed.update(uses(stmt))
    return frozenset(needed)


def schedule(kernel: Kernel) -> Looped:
    """The passes of a looped kernel."""
    dims, phase, alive = value_dims(kernel), phases(kernel), live(kernel)
    values = [s for s in kernel.body if not isinstance(s, Store) and s.dst in alive]
    reductions = [s for s in values if isinstance(s, Reduce)]
    stores = [s for s in kernel.body if isinstance(s, Store)]
    wide_stores = [s for s in stores if R in store_dims(kernel, s, dims)]
    row_level = [s for s in values if R not in dims[s.dst] and not isinstance(s, Reduce)]
    last = max([phase[s.dst] - 1 for s in reductions] + [phase[v] for s in wide_stores for v in uses(s)])
    passes = []
    for k in range(last + 1):
        folded = tuple(s for s in reductions if phase[s.dst] == k + 1)
        written = tuple(wide_stores) if k == last else ()
        passes.append(Pass(_closure(kernel, [*folded, *written], lambda v: R in dims[v]), folded, written))
    before = tuple(tuple(s for s in row_level if phase[s.dst] == k) for k in range(last + 1))
    after = tuple(s for s in row_level if phase[s.dst] > last)
    return Looped(before, tuple(passes), after, tuple(s for s in stores if s not in wide_stores))


def _closure(kernel: Kernel, targets: Iterable[Stmt], inside: Callable[[str], bool]) -> tuple[Stmt, ...]:
    """Definitions in body order that `targets` need, among the values that are `inside` the loop."""
    needed = {v for t in targets for v in uses(t)}
    chosen: list[Stmt] = []
    for stmt in reversed(kernel.body):
        if isinstance(stmt, (Store, Reduce)) or stmt.dst not in needed or not inside(stmt.dst):
            continue
        chosen.append(stmt)
        needed.update(uses(stmt))
    return tuple(reversed(chosen))


def live_elements(kernel: Kernel) -> int:
    """How many element-level values are alive at once, accumulators included: registers per element of a block."""
    dims = value_dims(kernel)
    if form_of(kernel) == "looped":
        return max(_most_alive(one.body, {s.src for s in one.reductions}, one.stores, dims) + _accumulators(one)
                   for one in schedule(kernel).passes)
    alive = live(kernel)
    body = tuple(s for s in kernel.body if not isinstance(s, Store) and s.dst in alive)
    return _most_alive(body, set(), tuple(s for s in kernel.body if isinstance(s, Store)), dims)


def _accumulators(one: Pass) -> int:
    return sum(3 if s.op in ("argmax", "argmin") else 1 for s in one.reductions)


def _most_alive(body: tuple[Stmt, ...], kept: set[str], stores: tuple[Store, ...], dims: Mapping[str, Dims]) -> int:
    """Walks `body` backwards from its end, where `kept` and what `stores` read are alive."""
    alive = kept | {v for s in stores for v in uses(s)}
    most = 0
    for stmt in reversed(body):
        assert not isinstance(stmt, Store)
        alive.discard(stmt.dst)
        alive |= set(uses(stmt))
        most = max(most, sum(R in dims[v] for v in alive) + (R in dims[stmt.dst]))
    return most
