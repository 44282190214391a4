"""One long row on several threads: the row is cut into chunks, each reduced on its own, and the parts joined in order.

    const int64_t share = ..., chunks = ...;            // a function of the row's length alone
    double sum_parts[64];
    #pragma omp parallel for num_threads(...) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {  // sweeps over [chunk_lo, chunk_hi) into its own sum_acc
      ...
      sum_parts[chunk] = sum_acc;
    }
    for (int64_t i = 0; i < chunks; ++i) sum_acc += sum_parts[i];

Where the cuts are depends on the length only, so the bits don't depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

from .cpp_expr import c_index
from .cpp_plan import LONG_ROW, LoopPlan
from .cpp_reduce import SHORT_ROW, Accumulator
from .expr import product

MAX_CHUNKS = 64
CHUNK = ("chunk_lo", "chunk_hi")  # the part of the split axis a chunk runs over
CHUNK_LOOP = "for (int64_t chunk = 0; chunk < chunks; ++chunk)"


def chunk_sizes(plan: LoopPlan) -> list[str]:
    """Declares `share`, steps of the split axis per chunk, and `chunks`, at most `MAX_CHUNKS`; 1 for a short row."""
    axis = plan.split
    assert axis is not None
    size, total = c_index(axis.size), c_index(product(a.size for a in plan.reduce))
    whole = SHORT_ROW if axis is plan.vector else 1  # whole blocks of a sum where the axis is the innermost
    step = MAX_CHUNKS * whole
    part = f"(int64_t({size}) + {step - 1}) / {step} * {whole}"
    return [f"const int64_t share = int64_t({total}) < {LONG_ROW} ? mw_max(int64_t({size}), int64_t(1)) : {part};",
            f"const int64_t chunks = mw_max((int64_t({size}) + share - 1) / share, int64_t(1));"]


def chunk_pragma(plan: LoopPlan) -> str:
    """The team for the loop over chunks; one thread where the work is small or a team is already running."""
    return f"#pragma omp parallel for num_threads(mw_threads(chunks, {c_index(plan.work_per_item)})) schedule(static)"


def chunk_bounds(plan: LoopPlan) -> list[str]:
    """Declares where this chunk begins and ends."""
    assert plan.split is not None
    low, high = CHUNK
    size = c_index(plan.split.size)
    return [f"const int64_t {low} = chunk * share, {high} = mw_min({low} + share, int64_t({size}));"]


def declare_parts(acc: Accumulator) -> list[str]:
    """Room for the result of every chunk."""
    lines = [f"{acc.ctype} {acc.name}_parts[{MAX_CHUNKS}];"]
    return [*lines, f"int {acc.name}_nans[{MAX_CHUNKS}];"] if acc.flags_nan else lines


def keep_part(acc: Accumulator) -> list[str]:
    """At the end of a chunk."""
    lines = [f"{acc.name}_parts[chunk] = {acc.name}_acc;"]
    return [*lines, f"{acc.name}_nans[chunk] = {acc.name}_nan;"] if acc.flags_nan else lines


def join_parts(accumulators: Sequence[Accumulator]) -> list[str]:
    """After the last chunk: everything into the row's own accumulators, in the order of the chunks."""
    lines = []
    for acc in accumulators:
        lines.append(f"for (int64_t i = 0; i < chunks; ++i) {acc.join(acc.name + '_parts[i]')}")
        if acc.flags_nan:
            lines.append(f"for (int64_t i = 0; i < chunks; ++i) {acc.name}_nan |= {acc.name}_nans[i];")
    return lines
