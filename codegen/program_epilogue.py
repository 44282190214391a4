"""Rewrites of programs: an fp32 product and the element-wise kernel that alone reads it become one `Epilogue` step.

    addmm = x @ w + b                          epilogue fused_gelu_0(addmm = x @ w + b -> gelu)
    launch fused_gelu_0(addmm -> gelu)

The step may run as before, or with the kernel on every block of the product as it is finished, while it is in the
nearest cache; the product as a whole is then never written. Which of the two is measured (`program_cpp_epilogue`). For
the second way the kernel is rewritten to work on a block (`block_kernel`), in the same IR, printed by the same printer:

    kernel fused_gelu_0(s0, in0: f32 -> out0: f32)      kernel fused_gelu_0_block_3072(step, row, rows, ...)
      axes p0: 3072*s0                                    axes p0: rows, p1: columns
      %0: f32 = load in0[p0]                              %0: f32 = load in0[p0*step + p1]
      ...                                                 ...
      store out0[p0] = %8                                 store out0[3072*p0 + 3072*row + column + p1] = %8

Legal where the kernel computes each element from the same element of the product and of float32 operands that lie in
rows as the product does, or are one row or one column for all; where nothing else touches the product; and where the
kernel's result is memory of its own, since it is written while the product is still being read from its operands.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from ..runtime.program import Alloc, Epilogue, Gemm, Launch, Program, Release, Step, TensorSpec, View, reads
from .cpp import work_items
from .expr import Expr, const, var
from .ir import Axis, Index, Kernel, Load, Stmt, Store, expects
from .ir_text import parse_kernel
from .program_facts import ProgramFacts
from .program_memory import size_expr
from .schema import Unsupported
from .templates.cpu_gemm import EPILOGUE_TENSORS

log = logging.getLogger(__name__)
BLOCK_SIZES = ("step", "row", "rows", "column", "columns")  # in the order of the template's `Epilogue`
_NO_WORK = (Alloc, View, Release)


@dataclass(frozen=True)
class BlockKernel:
    """`kernel` reads a block of the product, then the operands, and writes its part of the result. `operands`: for each
    of them the distance of rows, of columns (0 or 1), and the first element. `launched`: the kernel it was made of."""

    launched: str
    kernel: Kernel
    operands: tuple[tuple[int, int, int], ...]


def fuse_epilogues(program: Program) -> Program:
    """`program` with every product whose only reader is the next launch, and fits, joined with it."""
    found = _Finder(program).found()
    if not found:
        return program
    steps: list[Step] = []
    held: list[Step] = []  # what is released between the two is read by the later one
    products = {launch: product for product, launch in found.items()}
    for i, step in enumerate(program.steps):
        if i in found:
            continue
        if i in products:
            product = program.steps[products[i]]
            assert isinstance(product, Gemm) and isinstance(step, Launch)
            steps += [Epilogue(product, step), *held]
            held = []
        elif isinstance(step, Release) and any(p < i < j for p, j in found.items()):
            held.append(step)
        else:
            steps.append(step)
    return replace(program, steps=tuple(steps))


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program, self.facts = program, ProgramFacts(program)
        self.root = self.facts.root
        self.made = {s.spec.name for s in program.steps if isinstance(s, Alloc)}
        self.kernel = cache(lambda name: parse_kernel(program.kernels[name]))

    def found(self) -> dict[int, int]:
        """The product's step -> the launch's."""
        pairs: dict[int, int] = {}
        for i, step in enumerate(self.program.steps):
            if not isinstance(step, Gemm):
                continue
            j = next((k for k, s in enumerate(self.program.steps[i + 1:], i + 1) if not isinstance(s, _NO_WORK)), i)
            launch = self.program.steps[j]
            if not isinstance(launch, Launch):
                continue
            try:
                self._check(step, launch, set(self.facts.users[self.root[step.out]]) - {i, j})
                pairs[i] = j
            except Unsupported as why:
                log.debug("%s runs behind the product %s: %s", launch.kernel, step.out, why)
        return pairs

    def _check(self, product: Gemm, launch: Launch, others: set[int]) -> None:
        """Raises `Unsupported` with the reason why the two do not become one."""
        home = self.root[product.out]
        if others or home in self.facts.leaving or home != product.out or home not in self.made:
            raise Unsupported("something else uses the product")
        of_product = [n for n in launch.inputs if self.root[n] == home]
        if len(of_product) != 1 or len(launch.outputs) != 1:
            raise Unsupported("the kernel does not read one tensor of the product and write one")
        target = self.root[launch.outputs[0]]
        if target not in self.made or target in {self.root[n] for n in (*reads(product), *launch.inputs)}:
            raise Unsupported("the kernel writes what the product or the kernel reads")
        if self.facts.offset.get(of_product[0]) != const(0):
            raise Unsupported("the kernel reads a part of the product")
        block_kernel(self.kernel(launch.kernel), launch, launch.inputs.index(of_product[0]),
                     self.facts.specs[product.out])


def block_kernel(kernel: Kernel, launch: Launch, position: int, product: TensorSpec) -> BlockKernel:
    """`kernel`, launched as in `launch` with `product` as its input number `position`, on one block of the product.
    Its name tells it from every other block kernel of the program.

    Raises `Unsupported` with the reason where the kernel is not element by element.
    """
    columns = size_expr(product.shape[-1])
    if len(product.shape) != 2 or not columns.is_const or [size_expr(s) for s in product.strides] != [columns, 1]:
        raise Unsupported("the product is no dense matrix with a constant number of columns")
    buffers = (*kernel.inputs, *kernel.outputs)
    if kernel.reduce or expects(kernel) or any(b.dtype != "f32" for b in buffers) or len(buffers) > EPILOGUE_TENSORS:
        raise Unsupported("the kernel reduces, checks indices, or has tensors of another type than float32")
    if set(BLOCK_SIZES) & {*kernel.sizes, *(b.name for b in buffers)}:
        raise Unsupported("the kernel uses names of a block kernel")
    place = _places(kernel, launch, size_expr(product.shape[0]), columns)
    dense = columns * (var("row") + var("p0")) + var("column") + var("p1")
    mine, operands = kernel.inputs[position].name, dict.fromkeys(b.name for b in kernel.inputs)
    body = []
    for stmt in kernel.body:
        moved, step = _moved(stmt, place)
        if isinstance(moved, Load) and moved.buffer == mine:
            if moved.index != dense:
                raise Unsupported("the kernel reads the product in another order")
            moved = replace(moved, index=var("step") * var("p0") + var("p1"))
        elif isinstance(moved, Load):
            if operands[moved.buffer] not in (None, step):
                raise Unsupported("the kernel reads an operand in two ways")
            operands[moved.buffer] = step
        elif isinstance(moved, Store) and moved.index != dense:
            raise Unsupported("the kernel writes in another order")
        body.append(moved)
    operands.pop(mine)
    inputs = (kernel.inputs[position], *(b for b in kernel.inputs if b.name != mine))
    name = f"{kernel.name}_block_{columns}" + (f"_{position}" if position else "")
    block = Kernel(name, BLOCK_SIZES, inputs, kernel.outputs,
                   (Axis("p0", var("rows")), Axis("p1", var("columns"))), tuple(body))
    if work_items(block) != var("rows"):
        raise Unsupported("the kernel does not walk along rows")
    return BlockKernel(kernel.name, block, tuple(step or (0, 0, 0) for step in operands.values()))


def _places(kernel: Kernel, launch: Launch, rows: Expr, columns: Expr) -> dict[str, Expr]:
    """What each axis of the kernel is at row p0 and column p1 of a block."""
    values: Mapping[str, Expr] = dict(zip(kernel.sizes, map(size_expr, launch.sizes), strict=True))
    row, column = var("row") + var("p0"), var("column") + var("p1")
    match [a.size.subs(values) for a in kernel.axes]:
        case [whole] if whole == rows * columns:
            return {kernel.axes[0].name: columns * row + column}
        case [first, second] if first == rows and second == columns:
            return {kernel.axes[0].name: row, kernel.axes[1].name: column}
    raise Unsupported("the kernel does not walk over the product's rows and columns")


def _moved(stmt: Stmt, place: Mapping[str, Expr]) -> tuple[Stmt, tuple[int, int, int]]:
    """`stmt` on a block, and for a load or store the distances of rows and columns, and the first element."""
    if isinstance(stmt, Index) or isinstance(stmt, Load) and stmt.mask is not None:
        raise Unsupported("the kernel computes with positions")
    if not isinstance(stmt, (Load, Store)):
        return stmt, (0, 0, 0)
    if not stmt.index.variables() <= place.keys():
        raise Unsupported(f"the kernel's index {stmt.index} is not affine in its axes alone")
    index = stmt.index.subs(place)
    start = {"row": const(0), "column": const(0)}
    try:
        step = (index.coefficient("p0").value, index.coefficient("p1").value,
                index.subs(start).without(("p0", "p1")).value)
    except ValueError:
        raise Unsupported(f"the kernel's index {stmt.index} is not affine") from None
    if step[0] < 0 or step[1] not in (0, 1) or step[2] < 0:
        raise Unsupported("the kernel reads an operand against its rows")
    return replace(stmt, index=index), step
