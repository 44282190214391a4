"""Which computation hides which communication, and what is left exposed.

Every collective has one window: the computation that it runs beside. A second of computation hides one second of
communication at most, so windows that overlap share: the narrow ones take first (a product's own gather), the wide ones
(gradients behind a whole backward pass) what is left. With C seconds of communication and W of its window left

    exposed = max(C - W, loss · C)        hidden = C - exposed, taken from the window

where `loss` is the slow-down of computation and communication that run together (Galvatron, VLDB 2022, measures it).
Computation that becomes faster by d exposes at most d more, whatever it hid: no faster part makes a layer slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from .layer_compute import LayerSeconds, Seconds
from .op_price import Rates, exposed_s

Phase = Literal["forward", "again", "backward", "last backward", "first forward"]
Window = Literal["nothing", "input gradients of products", "weight gradients of products", "attention", "products",
                 "another micro-batch", "the layer's forward", "the layer's backward"]
NARROW_FIRST: tuple[Window, ...] = (
    "nothing", "input gradients of products", "weight gradients of products", "attention", "products",
    "another micro-batch", "the layer's forward", "the layer's backward")
PHASES: tuple[Phase, ...] = ("forward", "again", "backward", "first forward", "last backward")
Pool = dict[tuple[str, str], float]  # seconds left, by (pass, what runs)


def exposed_by_window(seconds: Mapping[tuple[Phase, Window], float], compute: LayerSeconds,
                      rates: Rates) -> dict[tuple[Phase, Window], float]:
    """Exposed seconds of all communication that shares a phase and a window."""
    pool = _pool(compute)
    shown: dict[tuple[Phase, Window], float] = {}
    for phase in PHASES:  # what happens in every micro-batch takes before what happens once a step
        for window in NARROW_FIRST:
            if (phase, window) in seconds:
                shown[phase, window] = _hide(seconds[phase, window], phase, window, pool, rates)
    return shown


def _hide(communication_s: float, phase: Phase, window: Window, pool: Pool, rates: Rates) -> float:
    keys = _keys(phase, window, pool)
    part = {"products": rates.software.async_tp, "another micro-batch": rates.software.expert_overlap}.get(window, 1.0)
    shown = exposed_s(communication_s, part * sum(pool[k] for k in keys), rates.calibration.overlap_loss)
    hidden = communication_s - shown
    for key in keys:
        taken = min(hidden, pool[key])
        pool[key] -= taken
        hidden -= taken
    return shown


def _keys(phase: Phase, window: Window, pool: Pool) -> list[tuple[str, str]]:
    """The entries of the pool that make up a window, in the order in which they are used up."""
    passes = {"forward": ("forward",), "first forward": ("forward",), "again": ("again",),
              "backward": ("input", "weight"), "last backward": ("again", "input", "weight")}[phase]
    if window == "the layer's backward":
        passes = ("again", "input", "weight")
    if window == "input gradients of products":
        return [("input", "column")]
    if window == "weight gradients of products":
        return [("weight", "column")]
    kinds: tuple[str, ...] = {"nothing": (), "attention": ("attention",), "products": ("gemm", "column")}.get(
        window, ("rest", "attention", "gemm", "column"))
    return [(p, k) for k in kinds for p in passes if (p, k) in pool]


def _pool(compute: LayerSeconds) -> Pool:
    parts: dict[str, Seconds] = {"forward": compute.forward, "again": compute.again, "input": compute.input_gradient,
                                 "weight": compute.weight_gradient}
    return {(name, kind): value for name, s in parts.items() for kind, value in (
        ("column", s.column_s), ("gemm", s.gemm_s - s.column_s), ("attention", s.attention_s),
        ("rest", s.memory_s + s.launch_s))}
