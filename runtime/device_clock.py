"""Timing on a GPU: what a choice between two ways to do the same work is based on."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

TURNS = 15
WARM_UP = 2  # calls before: the first compiles
FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache holds


class DeviceClock(Protocol):
    """What choosing needs of a device; `CudaClock` is the real one, tests bring their own."""

    def identity(self, device: torch.device) -> tuple[str, ...]:
        """What times belong to: the device's name and the versions of its compiler."""

    def ready(self, device: torch.device) -> bool:
        """False while nothing can be timed (the current stream is being captured)."""

    def free_bytes(self, device: torch.device) -> int:
        """Memory that is free now."""

    def seconds(self, runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
        """Seconds of each of `runs`."""


class CudaClock:
    """Device events, runs interleaved, the median of `TURNS`.

    Before each run 256 MiB are written: that empties the caches (in a model, a weight comes from memory each time), and
    while it lasts the launches queue up, so that the time is the device's and not Python's.
    """

    def identity(self, device: torch.device) -> tuple[str, ...]:
        found = torch.cuda.get_device_properties(device)
        return (found.name, f"{found.major}.{found.minor}", str(torch.version.cuda or torch.version.hip),
                importlib.metadata.version("triton"))

    def ready(self, device: torch.device) -> bool:
        return not torch.cuda.is_current_stream_capturing()

    def free_bytes(self, device: torch.device) -> int:
        return int(torch.cuda.mem_get_info(device)[0])

    def seconds(self, runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
        with torch.cuda.device(device):
            filler = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            for run in runs:
                for _ in range(WARM_UP):
                    run()
            marks = [[self._timed(run, filler) for run in runs] for _ in range(TURNS)]
            torch.cuda.synchronize(device)
        return [statistics.median(turn[i][0].elapsed_time(turn[i][1]) for turn in marks) / 1e3
                for i in range(len(runs))]

    def _timed(self, run: Callable[[], Any], filler: torch.Tensor) -> tuple[Any, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        filler.zero_()
        start.record()
        run()
        end.record()
        return start, end
