"""One comparison of a whole compiled graph with eager, after its regions were accepted one by one.

Regions are held to the lossless rule (see `acceptance`). Through a whole graph, rounding differences grow, in eager as
in ours, so this last check looks for wrong wiring, a wrong product or a stale buffer, not for rounding: it fails when
more than `SHARE` of an output's elements are off by more than the dtype's `TOLERANCE` of the output's scale, and eager
itself does not move as much when its inputs move by one unit in the last place. Graphs whose run would be felt twice
(random numbers, writes into inputs) and outputs too large to hold twice are not compared, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .acceptance import FLOATS, jitter
from .program_builder import is_effect

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
SHARE = 0.1
MAX_BYTES = 1 << 30


class WrongResult(RuntimeError):
    """A compiled graph whose regions all passed gives another result than eager."""


def why_not_compared(gm: fx.GraphModule, outputs: Sequence[Any]) -> str:
    """Empty when the graph may run once more, else the reason."""
    if any(n.op == "call_function" and is_effect(n) for n in gm.graph.nodes):
        return "it draws random numbers or writes into its inputs"
    held = sum(o.numel() * o.element_size() for o in outputs if isinstance(o, torch.Tensor))
    return f"its outputs hold {held / 2**30:.1f} GiB" if held > MAX_BYTES else ""


def compare_whole(ours: Sequence[Any], eager: Sequence[Any], rerun: Callable[[Sequence[Any]], Sequence[Any]],
                  inputs: Sequence[Any]) -> None:
    """Raises `WrongResult` when `ours` is not eager's result. `rerun` runs the graph in eager."""
    suspects = {i: share for i, (mine, theirs) in enumerate(zip(ours, eager, strict=True))
                if (share := off(mine, theirs)) > SHARE}
    if not suspects:
        return
    moved = rerun([jitter(x, i) for i, x in enumerate(inputs)])
    for i, share in suspects.items():
        if off(moved[i], eager[i]) < share / 2:
            raise WrongResult(f"{share:.0%} of output {i}'s elements differ from eager's, though every region passed")


def off(mine: Any, theirs: Any) -> float:
    """The share of elements that differ by more than the tolerance; 1 for another shape or dtype."""
    if not isinstance(theirs, torch.Tensor):
        return 0.0
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return 1.0
    if theirs.numel() == 0:
        return 0.0
    if theirs.dtype not in FLOATS:
        return float((mine != theirs).double().mean())
    if agree(mine, theirs):
        return 0.0
    finite = torch.isfinite(theirs)
    scale = theirs[finite].abs().max() if bool(finite.any()) else theirs.new_tensor(0.0)
    wrong = (mine - theirs).abs() > TOLERANCE[theirs.dtype] * scale
    return float(torch.where(finite, wrong | ~torch.isfinite(mine), torch.isfinite(mine)).double().mean())


def agree(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether everything is finite and no element is off, in two sweeps: the usual case."""
    scale, worst = (float(torch.linalg.vector_norm(x, math.inf)) for x in (theirs, mine - theirs))
    return math.isfinite(scale) and worst <= TOLERANCE[theirs.dtype] * scale
