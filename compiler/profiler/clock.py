"""Seconds of a call, on a CPU or a GPU, alone or while other ranks do the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], object]
Agree = Callable[[float], float]  # the largest value of all ranks, the same on each; all wait for the last one
REPEATS, LEAST_REPEATS = 9, 3
SLICE_S = 2e-3  # short calls are timed in loops of about this length
POINT_S = 0.25  # a point that takes longer than this is repeated LEAST_REPEATS times only


def alone(value: float) -> float:
    """`Agree` of one process."""
    return value


class Clock:
    """Times calls on a device ("cpu" or "cuda"). `agree` makes all ranks measure at the same time and gives the slowest
    one's seconds; `deadline` is a moment of `time.perf_counter`."""

    def __init__(self, device: str, agree: Agree = alone, deadline: float = math.inf) -> None:
        self.device, self.agree, self.deadline = device, agree, deadline

    def seconds(self, call: Call) -> float:
        """Of one call, after one to warm up: on a CPU the best of a few repetitions, because other programs only make a
        run slower; on a GPU, which is nobody else's and changes its clock, the median."""
        call()
        self.agree(0.0)
        once = self.agree(self._timed(call, 1))
        inner = max(1, min(1000, round(SLICE_S / max(once, 1e-7))))
        repeats = LEAST_REPEATS if once * inner * REPEATS > POINT_S else REPEATS
        found = sorted(self._timed(call, inner) for _ in range(repeats))
        return max(self.agree(found[len(found) // 2 if self.device == "cuda" else 0]), 1e-9)

    def late(self) -> bool:
        """Whether the time is up, on any rank."""
        return self.agree(float(time.perf_counter() > self.deadline)) > 0

    def _timed(self, call: Call, inner: int) -> float:
        if self.device == "cuda":
            return _device_seconds(call, inner)
        started = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - started) / inner

    def host_seconds(self, call: Call) -> float:
        """What the host takes for a call, whatever the device does."""
        if self.device != "cuda":
            return self.seconds(call)

        def timed() -> float:
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            return time.perf_counter() - started

        call()
        found = sorted(timed() for _ in range(REPEATS))
        torch.cuda.synchronize()
        return max(self.agree(found[len(found) // 2]), 1e-9)


def _device_seconds(call: Call, inner: int) -> float:
    """Between two events on the current stream; the host runs ahead in between."""
    start, end = (_event() for _ in range(2))
    start.record()
    for _ in range(inner):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / inner


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
