"""Accumulators: how each reduction of the IR is kept, updated and read in an emitted loop.

Rows reduce into scalars (vector lanes are combined by `omp simd reduction`), columns into one array entry per
lane. f32 sums are kept in doubles, or in f32 blocks that are then added to a double (see `accumulator`).
`max` and `min` of floats keep a NaN flag (rows) or propagate NaN in every step (columns).
"""

from __future__ import annotations

from dataclasses import dataclass

from .cpp_expr import VALUE_TYPE, c_name
from .cpp_plan import LoopPlan, lane_count, lane_text
from .expr import Expr
from .ir import Reduce

SHORT_ROW = 128  # f32 sums over a row: longer ones go in blocks of this length into a double (eager adds in double)
SHORT_COLUMN = 64  # the same for a column, whose terms one lane adds up
_SYMBOL = {"sum": "+", "prod": "*", "any": "|", "all": "&", "max": "max", "min": "min"}
_LOWEST = {"f32": "-INFINITY", "f64": "-double(INFINITY)", "i32": "INT32_MIN", "i64": "INT64_MIN"}
_HIGHEST = {"f32": "INFINITY", "f64": "double(INFINITY)", "i32": "INT32_MAX", "i64": "INT64_MAX"}


@dataclass(frozen=True)
class Accumulator:
    """State of one reduction. `partial` is "block" (f32 blocks into a double), "double", or "" (one level)."""

    reduce: Reduce
    source: str  # dtype of the reduced values
    partial: str
    plan: LoopPlan

    @property
    def name(self) -> str:
        return c_name(self.reduce.dst)

    @property
    def is_arg(self) -> bool:
        return self.reduce.op.startswith("arg")

    @property
    def vectorises(self) -> bool:
        return not self.is_arg

    @property
    def has_partial(self) -> bool:
        return self.partial == "block"

    @property
    def flags_nan(self) -> bool:
        return self.plan.rows and self.reduce.op in ("max", "min") and self.source in ("f32", "f64")

    @property
    def ctype(self) -> str:
        if self.reduce.op in ("any", "all"):
            return "int" if self.plan.rows else "uint8_t"
        return "double" if self.partial else VALUE_TYPE[self.source]

    @property
    def identity(self) -> str:
        op = self.reduce.op
        if op in ("max", "argmax"):
            return _LOWEST[self.source]
        if op in ("min", "argmin"):
            return _HIGHEST[self.source]
        return "1" if op in ("prod", "all") else "0"

    # -- text -------------------------------------------------------------------------------------
    def _new(self, ctype: str, suffix: str, value: str) -> list[str]:
        if self.plan.rows:
            return [f"{ctype} {self.name}{suffix} = {value};"]
        count = lane_count(self.plan)
        return [f"{ctype} {self.name}{suffix}[{count}];",
                f"for (int64_t i = 0; i < {count}; ++i) {self.name}{suffix}[i] = {value};"]

    def _cell(self, suffix: str) -> str:
        return self.name + suffix + ("" if self.plan.rows else f"[{lane_text(self.plan)}]")

    def declare(self) -> list[str]:
        """State at the start of the sweep."""
        lines = self._new(self.ctype, "_acc", self.identity)
        if self.is_arg:
            lines += self._new("int64_t", "_at", "0")
        if self.flags_nan:
            lines += self._new("int", "_nan", "0")
        return lines

    def open_block(self) -> list[str]:
        return self._new("float", "_part", "0")

    def close_block(self) -> list[str]:
        if self.plan.rows:
            return [f"{self.name}_acc += {self.name}_part;"]
        return [f"for (int64_t i = 0; i < {lane_count(self.plan)}; ++i) {self.name}_acc[i] += {self.name}_part[i];"]

    def clause(self) -> str:
        """The `omp simd` clause that combines vector lanes (rows only)."""
        if self.is_arg:
            return ""
        name = self.name + ("_part" if self.has_partial else "_acc")
        flag = f" reduction(|:{self.name}_nan)" if self.flags_nan else ""
        return f" reduction({_SYMBOL[self.reduce.op]}:{name}){flag}"

    def update(self, value: str, position: str) -> list[str]:
        """Take in one element; `position` is its row-major place among the reduce axes."""
        op, cell = self.reduce.op, self._cell("_part" if self.has_partial else "_acc")
        if self.is_arg:
            order, better = ">" if op == "argmax" else "<", self.name + "_better"
            test = f"{value} {order} {cell}"
            if self.source in ("f32", "f64"):
                test = f"({test}) | (({value} != {value}) & ({cell} == {cell}))"
            at = self._cell("_at")
            return [f"const bool {better} = {test};", f"{cell} = {better} ? {value} : {cell};",
                    f"{at} = {better} ? {position} : {at};"]
        if self.flags_nan:
            return [f"{cell} = {cell} {'>' if op == 'max' else '<'} {value} ? {cell} : {value};",
                    f"{self.name}_nan |= {value} != {value};"]
        if op in ("max", "min"):
            return [f"{cell} = mw_{op}({cell}, {value});"]
        return [f"{cell} {_SYMBOL[op]}= {value};"]

    def join(self, part: str) -> str:
        """Take in the accumulator of another part of the row (rows only; a NaN is in its flag)."""
        cell, op = self._cell("_acc"), self.reduce.op
        if op in ("max", "min"):
            return f"{cell} = {cell} {'>' if op == 'max' else '<'} {part} ? {cell} : {part};"
        return f"{cell} {_SYMBOL[op]}= {part};"

    def result(self) -> str:
        """The finished value, of the reduction's own dtype."""
        if self.is_arg:
            return self._cell("_at")
        cell = self._cell("_acc")
        if self.flags_nan:
            return f"{self.name}_nan ? {VALUE_TYPE[self.source]}(NAN) : {cell}"
        if self.reduce.op in ("any", "all"):
            return f"{cell} != 0"
        return f"float({cell})" if self.partial else cell


def accumulator(reduce: Reduce, source: str, total: Expr, plan: LoopPlan, result: bool) -> Accumulator:
    """How to accumulate `reduce` over `total` elements of dtype `source`; `result`: the kernel stores what becomes of
    it, or no later sweep over the row reads it.

    A sum over a row that is the kernel's result is as exact as eager's, which adds in double: what cancels in a mean
    would show. A sum that only a later sweep over the same row consumes (softmax's denominator) reads from L1, and
    f32 blocks do.
    """
    partial = ""
    if reduce.op == "prod" and source == "f32":
        partial = "double"
    if reduce.op == "sum" and source == "f32":
        short = total.is_const and total.value <= (SHORT_ROW if plan.rows else SHORT_COLUMN)
        inner = plan.reduce[-1].size
        tiny = not plan.rows and inner.is_const and inner.value < SHORT_COLUMN // 4
        partial = "double" if (result and plan.rows) or (tiny and not short) else "" if short else "block"
    return Accumulator(reduce, source, partial, plan)
