"""Bounding time: run a step in a watched thread, and give up on it when it hangs.

Python can't stop a thread, so a hanging step keeps its (daemon) thread; it works on copies only, and its result, should
it ever come, is thrown away. What was given up on is in the report.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch

from .report import Report
from .settings import CompileSettings

T = TypeVar("T")
LIMITED_PHASES = ("passes", "lowering", "compiler", "check", "measure")  # bounded together, over all graphs
HANG_LIMIT_S = 60.0  # one find, one check or one measurement; far above what any of ours takes


class TimeUp(Exception):
    """A step took longer than it was given; the message says how long that was."""


def remaining_s(settings: CompileSettings, report: Report) -> float:
    """Seconds that passes, kernels, checks and measurements may still take (infinite without a limit)."""
    if settings.time_limit_s is None:
        return float("inf")
    return settings.time_limit_s - sum(report.phases.get(p, 0.0) for p in LIMITED_PHASES)


def deadline(settings: CompileSettings, report: Report) -> float | None:
    """The `time.monotonic()` at which the limit ends when everything from now on counts; None without a limit."""
    return None if settings.time_limit_s is None else time.monotonic() + remaining_s(settings, report)


def in_time(future: Future[Any], deadline: float | None) -> bool:
    """Wait for `future`, at most until `deadline`; True when it is done."""
    timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
    return bool(wait([future], timeout_s).done)


def watched(step: Callable[[], T], settings: CompileSettings, report: Report) -> T:
    """`step()` in a thread with this thread's grad mode. Raises what it raises, or `TimeUp` when it takes too long."""
    limit_s = min(HANG_LIMIT_S, remaining_s(settings, report))
    if limit_s <= 0:
        raise TimeUp(f"the time limit of {settings.time_limit_s:g} s was used up before")
    box: dict[str, Any] = {}
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                box["value"] = step()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run, name="meshwright-watched", daemon=True)
    thread.start()
    thread.join(limit_s)
    if "error" in box:
        raise box["error"]
    if "value" not in box:
        raise TimeUp(f"still running after {limit_s:.3g} s")
    return box["value"]  # type: ignore[no-any-return]
