"""The prices of one outer tuple as arrays. A row holds the sums of a stretch of layers; `COLUMNS` names its columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...cost_model.in_flight import Held, held_at_peaks
from .problem import Outer, Problem

Ints = npt.NDArray[np.int64]

COLUMNS = ("forward", "backward", "weight", "tail", "static", "until_b", "until_w", "transient")
FORWARD, BACKWARD, WEIGHT, TAIL, STATIC, UNTIL_B, UNTIL_W, TRANSIENT = range(8)


MOST_SHARED = 16
_Filled = tuple[object, tuple[Ints, ...], tuple[list[list[int]], ...], tuple[tuple[tuple[int, ...], ...], ...]]
_SHARED: dict[tuple[int, bool, bool], _Filled] = {}
"""Arrays of the last few tables: outer tuples that differ in their schedule only have the same ones."""


@dataclass(frozen=True)
class Tables:
    """`options[kind]` is an array [options, 8] of ns and bytes. Where the schedule does not split the backward, B takes
    both gradients and releases everything: the columns of W are then 0. `families[kind]` lists the options that may
    share a stage, all of them where the problem lets them mix."""

    problem: Problem
    outer: Outer
    options: tuple[Ints, ...] = field(init=False)
    rows: tuple[list[list[int]], ...] = field(init=False)  # the same as plain numbers
    families: tuple[tuple[tuple[int, ...], ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        kinds = range(len(self.problem.kinds))
        key = id(self.outer.options), self.outer.order.splits_backward, self.problem.mixing
        kept = _SHARED.get(key)
        if kept is None or kept[0] is not self.outer.options:
            options = tuple(map(self._priced, kinds))
            kept = (self.outer.options, options, tuple(table.tolist() for table in options),
                    tuple(map(self._grouped, kinds)))
            if len(_SHARED) >= MOST_SHARED:
                _SHARED.clear()
            _SHARED[key] = kept
        object.__setattr__(self, "options", kept[1])
        object.__setattr__(self, "rows", kept[2])
        object.__setattr__(self, "families", kept[3])

    def _priced(self, kind: int) -> Ints:
        rows = [(o.forward_ns, o.input_gradient_ns, o.weight_gradient_ns, o.sync_ns + o.optimizer_ns, o.static_bytes,
                 o.saved_bytes, o.saved_until_w_bytes, o.transient_bytes) for o in self.outer.options[kind]]
        table = np.array(rows, dtype=np.int64).reshape(-1, 8)
        if not self.outer.order.splits_backward:
            for all_of_it, part in ((BACKWARD, WEIGHT), (UNTIL_B, UNTIL_W)):
                table[:, all_of_it] += table[:, part]
                table[:, part] = 0
        return table

    def _grouped(self, kind: int) -> tuple[tuple[int, ...], ...]:
        options = self.outer.options[kind]
        names = dict.fromkeys("" if self.problem.mixing else o.family for o in options)
        return tuple(tuple(i for i, o in enumerate(options) if self.problem.mixing or o.family == name)
                     for name in names)

    def held(self, stage: int) -> tuple[Held, ...]:
        """The counts of micro-batches held at the moments that can be the stage's peak."""
        return held_at_peaks(self.outer.order, stage)

    def fullest(self, stage: int) -> Held:
        """The moment at which the stage holds most micro-batches, of equal ones the first."""
        return max(self.held(stage), key=lambda h: sum(h.until_b) + sum(h.until_w))


def activation_bytes(held: tuple[Held, ...], chunks: list[Ints]) -> Ints:
    """The peak of saved activations for rows of every chunk of a stage."""
    moments = [sum(h.until_b[c] * rows[:, UNTIL_B] + h.until_w[c] * rows[:, UNTIL_W] for c, rows in enumerate(chunks))
               for h in held]
    peak: Ints = np.max(np.stack(moments), axis=0)
    return peak


def staircase(memory: Ints, cost: Ints) -> npt.NDArray[np.intp]:
    """The undominated of two columns, by rising memory."""
    order = np.lexsort((cost, memory))
    falling = np.minimum.accumulate(cost[order])
    return order[np.concatenate(([True], falling[1:] < falling[:-1]))] if len(order) else order
