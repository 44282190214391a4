"""Interleaved timing in one process, hardware and versions, result files and tables.

Single times on a shared CPU mean little, ratios do: every round calls every leg once (A B C, B C A, …), so a slow spell
hits all of them, and a reported ratio is the median over rounds of the ratio *within* a round.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("meshwright", "torch", "triton", "transformers", "onnxruntime", "onnx", "onnxscript", "numpy")
MIN_ROUNDS = 5


@dataclass
class Leg:
    """One way to run the same work. `call()` does it once; `prepare(threads)` is run before a thread count is timed."""

    name: str
    call: Callable[[], Any]
    prepare: Callable[[int], None] = field(default=lambda threads: None)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one leg, one entry a round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    legs: Sequence[Leg], *, rounds: int = 15, warmup: int = 3, slice_s: float = 0.05, limit_s: float = 60.0
) -> dict[str, Timing]:
    """Time `legs` in turns and give seconds per call by name.

    Each leg is warmed up, then called in slices of about `slice_s` seconds so that the clock's resolution and the
    caches left by the leg before matter little. Stops after `rounds` rounds, or after `limit_s` seconds but never
    before 5 rounds.
    """
    repeats = {leg.name: _repeats(leg, warmup, slice_s) for leg in legs}
    seconds: dict[str, list[float]] = {leg.name: [] for leg in legs}
    started, was_on = time.perf_counter(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(max(rounds, MIN_ROUNDS)):
            if turn >= MIN_ROUNDS and time.perf_counter() - started > limit_s:
                break
            first = turn % len(legs)
            for leg in (*legs[first:], *legs[:first]):
                seconds[leg.name].append(_slice(leg.call, repeats[leg.name]))
    finally:
        if was_on:
            gc.enable()
    return {name: Timing(name, tuple(values)) for name, values in seconds.items()}


def _repeats(leg: Leg, warmup: int, slice_s: float) -> int:
    once = math.inf
    for _ in range(max(warmup, 1)):
        once = min(once, _slice(leg.call, 1))
    return max(1, round(slice_s / max(once, 1e-7)))


def _slice(call: Callable[[], Any], repeats: int) -> float:
    call()  # brings this leg's weights and buffers back into the caches
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def speedup(timings: Mapping[str, Timing], ours: str, peer: str) -> float:
    """How many times faster `ours` is than `peer`: the median over rounds of the ratio within the round."""
    return statistics.median(p / o for p, o in zip(timings[peer].seconds, timings[ours].seconds, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    found = [v for v in values if v > 0]
    return math.exp(sum(map(math.log, found)) / len(found)) if found else math.nan


# -- where it ran ---------------------------------------------------------------------------------
def cpu_name() -> str:
    """The processor's own name, or the machine type where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def hardware() -> dict[str, Any]:
    """Processor, instruction set as torch sees it, CPUs this process may use, memory in bytes."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpus": cpus,
        "memory_bytes": memory,
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def hardware_slug(found: Mapping[str, Any] | None = None) -> str:
    """A short name for result files: `intel-xeon-processor-avx512-2cpu`."""
    found = found or hardware()
    name = found["gpus"][0] if found["gpus"] else f"{found['cpu']} {found['isa']} {found['cpus']}cpu"
    name = re.sub(r"\((r|tm)\)|@.*?ghz", "", str(name).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def versions() -> dict[str, str]:
    """Versions of what takes part, where installed, and of Python."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def write_result(name: str, payload: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `folder/<name>-<hardware>.json` with date, hardware and versions beside `payload`."""
    found = hardware()
    document = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": found,
        "versions": versions(),
        **payload,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hardware_slug(found)}.json"
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")
    return path


# -- tables ---------------------------------------------------------------------------------------
def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A rich table; numbers get three significant digits, None a dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*[show(cell) for cell in row])
    Console(width=None if os.isatty(1) else 160).print(table)


def show(cell: Any) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.3g}" if abs(cell) >= 10 or abs(cell) < 0.1 else f"{cell:.3f}"
    return str(cell)


def goal_line(what: str, value: float, goal: float, *, at_least: bool = True) -> str:
    """One line that says whether a goal is met: `meets: …` or `falls short: …`."""
    met = value >= goal if at_least else value <= goal
    sign = "≥" if at_least else "≤"
    return f"{'meets' if met else 'falls short'}: {what} {value:.3f} (goal {sign} {goal})"
