"""Row buffers: costly element-level values that several sweeps over a row need are kept, not recomputed.

Softmax is the example: `exp(x - max)` is summed in one sweep and divided in the next. The buffer holds one row in
L1 or L2; a value that costs no more than reading its inputs again is recomputed instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cpp_expr import MEMORY_TYPE, c_index, c_name
from .cpp_plan import LoopPlan, Pass, element_level, statement_cost
from .expr import Expr, as_expr, product, var
from .ir import DTYPES, Definition, Store, phases, uses

STACK_BYTES = 32768
WORTH = 8  # cost above which a value is kept; see `statement_cost`


@dataclass(frozen=True)
class RowBuffer:
    """One row of `value`, written in sweep number `written_in` and read in later ones."""

    value: str
    dtype: str
    written_in: int
    size: Expr
    index: Expr
    slot: int

    @property
    def name(self) -> str:
        return c_name(self.value) + "_row"

    def declaration(self) -> str:
        ctype = MEMORY_TYPE[self.dtype]
        if self.size.is_const and self.size.value * DTYPES[self.dtype] <= STACK_BYTES:
            return f"alignas(64) {ctype} {self.name}[{max(self.size.value, 1)}];"
        block = f"mw_scratch({self.slot}, ({c_index(self.size)}) * sizeof({ctype}))"
        return f"{ctype}* {self.name} = static_cast<{ctype}*>({block});"

    def write(self, operand: str) -> str:
        return f"{self.name}[{c_index(self.index)}] = {operand};"

    def read(self) -> str:
        return f"{self.name}[{c_index(self.index)}]" + (" != 0" if self.dtype == "b1" else "")


def choose_row_buffers(plan: LoopPlan, passes: list[Pass]) -> list[RowBuffer]:
    """Values worth keeping, each with the sweep that computes it first."""
    kernel = plan.kernel
    definitions: dict[str, Definition] = {s.dst: s for s in kernel.body if not isinstance(s, Store)}
    element, phase = element_level(kernel), phases(kernel)
    first: dict[str, int] = {}
    chosen: dict[str, int] = {}
    for number, sweep in enumerate(passes):
        stack = [r.src for r in sweep.reduces] + [v for s in sweep.stores for v in uses(s)]
        while stack:
            value = stack.pop()
            if value not in element or value in chosen and chosen[value] < number:
                continue
            if value in first and first[value] < number and phase[value] < number:
                if _cost(value, definitions, element, chosen) >= WORTH:
                    chosen[value] = first[value]
                    continue
            first.setdefault(value, number)
            stack.extend(uses(definitions[value]))
    size, index = _row_layout(plan)
    ordered = sorted(chosen.items(), key=lambda c: list(definitions).index(c[0]))
    return [RowBuffer(v, definitions[v].dtype, n, size, index, slot) for slot, (v, n) in enumerate(ordered)]


def _row_layout(plan: LoopPlan) -> tuple[Expr, Expr]:
    """Elements of a row, and the place of the current one in loop order."""
    index = as_expr(0)
    for axis in plan.reduce:
        index = index * axis.size + var(axis.name)
    return product(a.size for a in plan.reduce), index


def _cost(value: str, definitions: dict[str, Definition], element: frozenset[str], kept: dict[str, int]) -> int:
    """Work to compute `value` again in another sweep, from the values `kept` so far."""
    seen: set[str] = set()
    stack, total = [value], 0
    while stack:
        at = stack.pop()
        if at in seen or at not in element:
            continue
        seen.add(at)
        if at in kept:
            total += 1
            continue
        definition = definitions[at]
        total += statement_cost(definition)
        stack.extend(uses(definition))
    return total
