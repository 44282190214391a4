"""The Triton matrix product whose end is a kernel of the IR: `epilogue(a @ b)` without the product in memory.

One program computes a tile of XBLOCK rows and RBLOCK columns, KBLOCK of the inner dimension at a time, in fp32.
Programs walk bands of GROUP tiles' height column by column, so that those that run at once share operands in the L2
cache (Tillet et al., MAPL 2019). The epilogue is printed by the printer of all other kernels, with `acc` for the tile,
`x` for its rows and `r` for its columns. Sizes and strides that the program knows are numbers in the text.

It is a candidate beside the library's product, never a replacement unseen: see `program_choices`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...runtime.triton_launch import Configure, Launch, TritonKernel
from ..expr import Expr
from ..ir import Buffer, Const, Index, Kernel, Load, Op, Store
from ..triton import KernelPrinter, check_names, index_bound, module_of
from ..triton_config import INDEX_LIMIT
from ..triton_epilogue import ACC
from ..triton_schedule import live_elements

Precision = Literal["exact", "tf32"]
CONSTANTS = ("XBLOCK", "RBLOCK", "KBLOCK", "GROUP")
GROUP = 8
K_UNIT = 64  # a multiple of every KBLOCK: where it divides the inner dimension, that needs no mask
LIVE_PER_THREAD = 256  # values of the epilogue a thread may hold at once; with 384 it spills on sm_80 and sm_90
INTERPRETED_TILE = 128  # the interpreter pays per program, not per element


@dataclass(frozen=True)
class Tile:
    """Launch constants of one way to run the template; `warps` of 32 threads."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}"


# Set by counting registers and shared memory with the ahead-of-time compiler: in 16 bits 128x256 spills on sm_80 and
# sm_90, in exact fp32 a depth of 32 does with some epilogues. Which of them is fastest is measured per product.
HALF_TILES = (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 4), Tile(16, 64, 64, 4, 4))
TF32_TILES = (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 64, 32, 4, 4), Tile(16, 64, 32, 4, 4))
FLOAT_TILES = (Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 4, 3), Tile(32, 64, 16, 4, 3))


@dataclass(frozen=True)
class GemmKernel:
    """`epilogue(a @ b)`, a [M, K], b [K, N], both of `dtype`; `a` and `b` are their strides (elements) along rows and
    columns. `epilogue` (see `codegen.triton_epilogue`) reads the product as `acc`; its sizes are those of the whole.
    Buffers, in order: a, b, the epilogue's other inputs, its outputs. `precision` is of fp32 products."""

    name: str
    dtype: str
    M: Expr
    N: Expr
    K: Expr
    a: tuple[Expr, Expr]
    b: tuple[Expr, Expr]
    epilogue: Kernel
    precision: Precision = "exact"

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        others = tuple(i for i in self.epilogue.inputs if i.name != ACC)
        return (Buffer("a", self.dtype), Buffer("b", self.dtype), *others, *self.epilogue.outputs)

    @property
    def sizes(self) -> tuple[str, ...]:
        return self.epilogue.sizes

    def renamed(self, name: str) -> GemmKernel:
        return replace(self, name=name)


def print_gemm(gemm: GemmKernel) -> str:
    """The Triton function, decorator included. Raises `IRError` for names that are no identifiers."""
    check_names(replace(gemm.epilogue, name=gemm.name))
    return _GemmPrinter(gemm).text()


def tiles_for(gemm: GemmKernel, sizes: Mapping[str, int]) -> tuple[Tile, ...]:
    """The tiles worth trying at these sizes: not more than half of them padding, and what the epilogue holds at once
    fits into registers. Where there is none, the smallest."""
    rows, live = gemm.M.evaluate(sizes), live_elements(gemm.epilogue)
    return tuple(t for t in _tiles(gemm) if t.rows < 2 * rows
                 and t.rows * t.columns * live <= LIVE_PER_THREAD * 32 * t.warps) or _tiles(gemm)[-1:]


def tile_named(gemm: GemmKernel, name: str) -> Tile:
    """The tile that prints as `name`."""
    return next(t for t in _tiles(gemm) if str(t) == name)


def _tiles(gemm: GemmKernel) -> tuple[Tile, ...]:
    if gemm.dtype != "f32":
        return HALF_TILES
    return TF32_TILES if gemm.precision == "tf32" else FLOAT_TILES


def gemm_kernel(gemm: GemmKernel, tile: Tile) -> TritonKernel:
    """`k(buffers, sizes)` with this tile: on the GPU of CUDA buffers, in the interpreter for CPU buffers."""
    return TritonKernel(gemm.name, module_of([print_gemm(gemm)]), configure(gemm, tile))


def configure(gemm: GemmKernel, tile: Tile) -> Configure:
    """The launch with `tile` as a function of the sizes."""

    def at(sizes: Sequence[int], interpret: bool) -> Launch:
        return gemm_launch(gemm, tile, dict(zip(gemm.sizes, sizes, strict=True)), interpret)

    return at


def gemm_launch(gemm: GemmKernel, tile: Tile, sizes: Mapping[str, int], interpret: bool = False) -> Launch:
    """Grid and constants at these sizes."""
    M, N, K = (e.evaluate(sizes) for e in (gemm.M, gemm.N, gemm.K))
    rows, columns = (INTERPRETED_TILE, INTERPRETED_TILE) if interpret else (tile.rows, tile.columns)
    constants = dict(zip(CONSTANTS, (rows, columns, tile.depth, GROUP), strict=True))
    reach = [(M * side[0].evaluate(sizes) + K * side[1].evaluate(sizes)) if side is gemm.a else
             (K * side[0].evaluate(sizes) + N * side[1].evaluate(sizes)) for side in (gemm.a, gemm.b)]
    wide = max(*reach, index_bound(gemm.epilogue, sizes)) >= INDEX_LIMIT
    return Launch(-(-M // rows) * -(-N // columns), constants, tile.warps, tile.stages, wide)


class _GemmPrinter(KernelPrinter):
    """Prints the product's loop, then the epilogue on the tile it leaves behind."""

    def __init__(self, gemm: GemmKernel) -> None:
        super().__init__(gemm.epilogue)
        self.gemm = gemm
        self.row_mask = True  # a tile may reach over the last column

    def text(self) -> str:
        self._product()
        for stmt in self.kernel.body:
            if not isinstance(stmt, Store):
                self.define(stmt)
        for stmt in self.kernel.body:
            if isinstance(stmt, Store):
                self.store(stmt)
        body = "\n".join(self._without_unused_constants())
        return f"{self._signature()}\n{body}\n"

    def _signature(self) -> str:
        sizes = [self.names[s] for s in self.gemm.sizes]
        fixed = f"(do_not_specialize={sizes!r})" if sizes else ""
        arguments = [*(self.pointer(b.name) for b in self.gemm.buffers), *sizes,
                     *(f"{c}: tl.constexpr" for c in (*CONSTANTS, "INDEX"))]
        return f"@triton.jit{fixed}\ndef {self.gemm.name}({', '.join(arguments)}):"

    def _product(self) -> None:
        M, N, K = (self.expr(e) for e in (self.gemm.M, self.gemm.N, self.gemm.K))
        for size in self.gemm.sizes:
            self.line(f"{self.names[size]} = {self.names[size]}.to(INDEX)")
        self.line("program = tl.program_id(0).to(INDEX)")
        self.line(f"tall = ({M} + XBLOCK - 1) // XBLOCK")
        self.line(f"wide = ({N} + RBLOCK - 1) // RBLOCK")
        self.line("first = program // (GROUP * wide) * GROUP")
        self.line("height = tl.minimum(tall - first, GROUP)")
        self.line("place = program % (GROUP * wide)")
        self.line("x = ((first + place % height) * XBLOCK + tl.arange(0, XBLOCK))[:, None]")
        self.line("r = (place // height * RBLOCK + tl.arange(0, RBLOCK))[None, :]")
        self.line(f"xmask = x < {M}")
        self.line(f"rmask = r < {N}")
        self.line("k = tl.arange(0, KBLOCK).to(INDEX)")
        self.line(f"a_at = a_ptr + {self._at('x', self.gemm.a[0])} + {self._at('k[None, :]', self.gemm.a[1])}")
        self.line(f"b_at = b_ptr + {self._at('k[:, None]', self.gemm.b[0])} + {self._at('r', self.gemm.b[1])}")
        self.line("acc = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)")
        self.line(f"for start in range(0, {K}, KBLOCK):")
        self.indent += 1
        a_mask, b_mask = "xmask", "rmask"
        if self.gemm.K.divide_exact(K_UNIT) is None:
            a_mask, b_mask = f"xmask & (k[None, :] < {K} - start)", f"(k[:, None] < {K} - start) & rmask"
        self.line(f"a = tl.load(a_at, mask={a_mask}, other=0)")
        self.line(f"b = tl.load(b_at, mask={b_mask}, other=0)")
        self.line(f"acc = {self._dot()}(a, b, acc)")
        self.line(f"a_at += {self._at('KBLOCK', self.gemm.a[1])}")
        self.line(f"b_at += {self._at('KBLOCK', self.gemm.b[0])}")
        self.indent -= 1

    def _dot(self) -> str:
        if self.gemm.dtype != "f32":
            return "tile_dot"
        return f"tile_dot_{self.gemm.precision}"

    def _at(self, position: str, stride: Expr) -> str:
        return position if stride == 1 else f"{position} * {self.factor(stride)}"

    def _value(self, stmt: Load | Const | Index | Op) -> str:
        if isinstance(stmt, Load) and stmt.buffer == ACC:
            return "acc"
        return super()._value(stmt)
