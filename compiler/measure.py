"""Timing two callables against each other: interleaved, medians, so that drift of a busy machine hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 41
TARGET_S = 0.2  # stop adding rounds after this long
BURST_S = 2e-4  # calls shorter than this are timed several at once


@dataclass(frozen=True)
class Timing:
    """Median seconds per call of both sides and how many rounds they come from."""

    before_s: float
    after_s: float
    rounds: int

    @property
    def faster(self) -> bool:
        return self.after_s < self.before_s


def compare(before: Callable[[], Any], after: Callable[[], Any], *, device: str = "cpu") -> Timing:
    """Time `before` and `after` in turn, each warmed up once."""
    sides = (before, after)
    singles = [_time(side, 1, device) for side in sides for _ in range(2)]
    bursts = max(1, int(BURST_S / max(min(singles), 1e-7)))
    samples: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(samples[0]) < MIN_ROUNDS or (len(samples[0]) < MAX_ROUNDS and time.perf_counter() - start < TARGET_S):
        for side, found in zip(sides, samples, strict=True):
            found.append(_time(side, bursts, device) / bursts)
    return Timing(statistics.median(samples[0]), statistics.median(samples[1]), len(samples[0]))


def _time(call: Callable[[], Any], times: int, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
