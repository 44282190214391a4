"""Times that decide which method a product, convolution or attention uses.

Taken once per shape, number of threads, processor, compiler and instruction set, and kept on disk. A saved model
carries the times its methods were chosen by, so that it chooses the same ones, and gives the same bits, where the disk
is empty.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..runtime import cache
from ..runtime.toolchain import toolchain

Seconds = Mapping[str, float]
METHODS = ("own", "library")  # where there is one template and the library
TYPICAL = 128  # stands for a symbolic size
HOST_FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}  # templates get addresses: no default of the user's counts


class Timings:
    """The times of one program's methods. `given`: what a saved model brought; `used`: what decided so far, by key."""

    def __init__(self, given: Mapping[str, Seconds] | None = None) -> None:
        self._given = dict(given or {})
        self.used: dict[str, dict[str, float]] = {}

    def seconds(self, kind: str, source: str, what: str, methods: Sequence[str],
                take: Callable[[], Seconds]) -> Seconds:
        """Seconds by method, for each of `methods`. `source` is the text of the templates, `what` the shape and number
        of threads; `take` measures where nobody has."""
        key = cache.key_of(kind, source, *toolchain().identity(), processor(), str(torch.__version__), what)
        known: tuple[Callable[[str], Any], ...] = (self.used.get, self._given.get, cache.get_json)  # the disk last
        found = next((times for look in known if valid(times := look(key), methods)), None)
        if found is None:
            found = dict(take())
            cache.put_json(key, found)
        self.used[key] = dict(found)
        return self.used[key]


def fastest(runs: Sequence[Callable[[], Any]], *, before: Callable[[int], None] = lambda run: None, turns: int = 6,
            long_s: float = math.inf) -> list[float]:
    """Seconds of each of `runs`, the fastest of `turns` interleaved calls; two are enough once one took `long_s`.
    `before(i)` prepares the caches for run i and is not timed."""
    best = [math.inf] * len(runs)
    for turn in range(turns):
        for i, run in enumerate(runs):
            before(i)
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
        if turn and max(best) > long_s:
            break
    return best


def valid(times: Any, methods: Sequence[str] = ()) -> bool:
    """Whether an object from a file is a table of seconds that has all of `methods`."""
    return isinstance(times, Mapping) and all(
        isinstance(n, str) and isinstance(s, float) and math.isfinite(s) and s >= 0 for n, s in times.items()) and all(
        m in times for m in methods)


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name: what a timing belongs to."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return named[0] if named else platform.processor()
