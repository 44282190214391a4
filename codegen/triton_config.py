"""Launch constants of printed Triton kernels: block sizes and warps, chosen by a small table of rules.

The rules aim at 16 bytes per thread and load (the widest a GPU moves), a few thousand threads in flight per
multiprocessor, and no more live elements per thread than registers hold. They were set by counting registers with the
ahead-of-time compiler, not by timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..runtime.triton_launch import Launch
from .ir import DTYPES, Kernel
from .triton import index_bound
from .triton_axes import R, is_column_reduction, merge_axes, value_dims
from .triton_schedule import form_of, live_elements

INDEX_LIMIT = 2**31 - 2**21  # past it an index plus the slack of one block might not fit into 32 bits
FEW_PROGRAMS = 512  # below it a pointwise launch uses blocks of one warp, to occupy more multiprocessors
LIVE_PER_THREAD = 32  # element-level values a thread may hold at once; from about 48 on the compilers begin to spill
MOST_WARPS = 16
INTERPRETED_BLOCK = 16384  # the interpreter pays per program, not per element


@dataclass(frozen=True)
class Rule:
    """Applies up to `row` elements per row (None: any): `tile` elements per program, at most `xblock` rows."""

    row: int | None
    tile: int
    xblock: int
    warps: int


PERSISTENT_RULES = (
    Rule(row=64, tile=1024, xblock=64, warps=4),
    Rule(row=256, tile=1024, xblock=8, warps=4),
    Rule(row=1024, tile=1024, xblock=1, warps=4),
    Rule(row=2048, tile=2048, xblock=1, warps=8),
    Rule(row=None, tile=4096, xblock=1, warps=16),
)
LOOPED_ROW = Rule(row=None, tile=2048, xblock=1, warps=8)  # one row per program, walked 2048 elements at a time
LOOPED_SHORT_ROW = Rule(row=512, tile=1024, xblock=4, warps=4)
COLUMN = Rule(row=None, tile=2048, xblock=64, warps=4)  # 64 neighbouring columns, 32 rows at a time
POINTWISE_TILES = ((2, 1024), (4, 512), (8, 256))  # (widest element in bytes, elements per program): 16 bytes a thread
POINTWISE_WARPS = 4


def launch_config(kernel: Kernel, sizes: Mapping[str, int] | Sequence[int], interpret: bool = False) -> Launch:
    """Grid and constants for `kernel` at these sizes (in `kernel.sizes` order or by name)."""
    values = dict(sizes) if isinstance(sizes, Mapping) else dict(zip(kernel.sizes, sizes, strict=True))
    return _config(kernel, tuple(values[s] for s in kernel.sizes), interpret)


@lru_cache(maxsize=4096)
def _config(kernel: Kernel, sizes: tuple[int, ...], interpret: bool) -> Launch:
    values = dict(zip(kernel.sizes, sizes, strict=True))
    merged = _merged(kernel)
    rows, row = merged.rows.evaluate(values), merged.row_size.evaluate(values)
    form = form_of(merged)
    if form == "pointwise":
        xblock, rblock, warps = _pointwise(merged, rows)
    elif is_column_reduction(merged):
        xblock, rblock, warps = _column(row, form == "persistent")
    elif form == "persistent":
        xblock, rblock, warps = _persistent(merged, row)
    else:
        xblock, rblock, warps = _looped(row)
    if form != "pointwise":
        xblock, rblock, warps = _without_spills(merged, xblock, rblock, warps)
    if interpret:
        xblock, rblock = _interpreted(rows, row, form == "pointwise")
    constants = {"XBLOCK": xblock}
    if form == "looped":
        constants["RBLOCK"] = rblock
    wide = index_bound(kernel, values) >= INDEX_LIMIT
    return Launch(grid=-(-rows // xblock), constants=constants, num_warps=warps, wide_index=wide)


@lru_cache(maxsize=4096)
def _merged(kernel: Kernel) -> Kernel:
    return merge_axes(kernel)


def _pointwise(kernel: Kernel, rows: int) -> tuple[int, int, int]:
    widest = max(DTYPES[b.dtype] for b in (*kernel.inputs, *kernel.outputs))
    tile = next(t for limit, t in POINTWISE_TILES if widest <= limit)
    if rows // tile < FEW_PROGRAMS:
        return tile // POINTWISE_WARPS, 1, 1
    return tile, 1, POINTWISE_WARPS


def _persistent(kernel: Kernel, row: int) -> tuple[int, int, int]:
    rule = next(r for r in PERSISTENT_RULES if r.row is None or row <= r.row)
    block = _next_power_of_2(row)
    wide = sum(1 for d in value_dims(kernel).values() if R in d)
    xblock = max(1, min(rule.xblock, rule.tile // block))
    return (max(1, xblock // 2) if wide > 24 else xblock), block, rule.warps


def _looped(row: int) -> tuple[int, int, int]:
    rule = LOOPED_SHORT_ROW if row <= (LOOPED_SHORT_ROW.row or 0) else LOOPED_ROW
    return rule.xblock, rule.tile // rule.xblock, rule.warps


def _column(row: int, persistent: bool) -> tuple[int, int, int]:
    block = _next_power_of_2(row)
    return COLUMN.xblock, block if persistent else max(1, min(COLUMN.tile // COLUMN.xblock, block)), COLUMN.warps


def _without_spills(kernel: Kernel, xblock: int, rblock: int, warps: int) -> tuple[int, int, int]:
    """The block made smaller, then its warps more, until what lives at once fits into registers."""
    live, looped, column = live_elements(kernel), form_of(kernel) == "looped", is_column_reduction(kernel)
    narrowest, shortest = (16, 8) if column else (1, 256)
    while xblock * rblock * live > LIVE_PER_THREAD * 32 * warps:
        if looped and rblock > shortest:
            rblock //= 2
        elif xblock > narrowest:
            xblock //= 2
        elif warps < MOST_WARPS:
            warps *= 2
        else:
            break
    return xblock, rblock, warps


def _interpreted(rows: int, row: int, pointwise: bool) -> tuple[int, int]:
    if pointwise:
        return min(_next_power_of_2(max(rows, 1)), INTERPRETED_BLOCK), 1
    rblock = min(_next_power_of_2(max(row, 1)), INTERPRETED_BLOCK // 2)
    return min(_next_power_of_2(max(rows, 1)), max(1, 4 * INTERPRETED_BLOCK // _next_power_of_2(max(row, 1)))), rblock


def _next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
