"""What the cost model needs to know about an operator call or an emitted kernel: plain numbers, no tensors.

The compiler fills these from its graphs and its kernel IR (`compiler/records.py`); the planner fills them from layer
shapes. `cost_model/op_cost.py` turns them into seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OpKind = Literal["pointwise", "reduction", "gemm", "conv", "attention", "view", "copy", "gather", "other"]


@dataclass(frozen=True)
class ElementOps:
    """Counts of scalar operations by what they cost: `simple` (add, multiply, compare, select), `division` (divide,
    square root), `transcendental` (exp, tanh, erf, …), `single` (done one element at a time: transposed and indirect
    accesses; in ATen also comparisons and selects), `serial` (steps that wait for one another: running variance,
    arg-max, prefix sum)."""

    simple: int = 0
    division: int = 0
    transcendental: int = 0
    single: int = 0
    serial: int = 0

    def __add__(self, other: ElementOps) -> ElementOps:
        return ElementOps(self.simple + other.simple, self.division + other.division,
                          self.transcendental + other.transcendental, self.single + other.single,
                          self.serial + other.serial)

    def times(self, points: int) -> ElementOps:
        """These operations, `points` times each."""
        return ElementOps(self.simple * points, self.division * points, self.transcendental * points,
                          self.single * points, self.serial * points)


@dataclass(frozen=True)
class OpRecord:
    """One operator call in eager mode.

    `flops` are those of matrix products (2 per multiply-add) and 0 elsewhere; `elements` are output elements (input
    elements of a reduction); bytes are those that must cross memory once, expanded dimensions counted once. `dtype` is
    torch's name (`"float32"`). `dispatches`: trips through the framework's dispatcher, 0 for tuple indexing. `shape`:
    of a product (batch, m, k, n), of a grouped product (groups, rows of all groups, k, n), of attention (batch, heads,
    queries, keys, head size, heads of keys); empty elsewhere.
    """

    op: str
    kind: OpKind
    dtype: str = "float32"
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    elements: int = 0
    element_ops: ElementOps = ElementOps()
    dispatches: int = 1
    shape: tuple[int, ...] = ()

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def transcendentals(self) -> int:
        return self.element_ops.transcendental


@dataclass(frozen=True)
class KernelRecord:
    """One launch of an emitted kernel.

    `elements` are the points of its whole iteration space, `rows` those of its parallel axes, `row_size` those of its
    reduce axes. `phases`: sweeps over the reduce axes. `column_reduction`: the reduced axis is not the contiguous one.
    """

    name: str
    bytes_read: int
    bytes_written: int
    elements: int
    element_ops: ElementOps = ElementOps()
    rows: int = 1
    row_size: int = 1
    phases: int = 1
    column_reduction: bool = False

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written
