"""`this_machine(threads)`: the CPU we run on as a `Device`, measured in a fraction of a second.

Everything is the best of a few repetitions: other programs can only make a run slower. Bandwidths come from `neg` with
an output that exists (one read, one write), at four working-set sizes; the levels' capacities lie between those.
"""

from __future__ import annotations

import itertools
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .device import Device, ElementRates, MemoryLevel, device_from_dict

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
Load = Callable[[str], Any]
Save = Callable[[str, Any], None]

FORMAT = 2  # raise when a measurement changes its meaning
WORKING_SETS = (64 << 10, 1 << 20, 8 << 20, 48 << 20)
FRESH_ABOVE_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX: bigger blocks always come from the system
KERNEL_LAUNCH_S = 0.3e-6  # one call of a compiled function through its C entry, seen from Python


def this_machine(threads: int | None = None, *, load: Load | None = None, save: Save | None = None) -> Device:
    """This CPU with `threads` threads (default: torch's current number).

    `load(key)` returns what `save(key, value)` stored (JSON data) or None; anything else found there is measured anew.
    Raises `ValueError` when `threads` is below 1.
    """
    import torch

    count = torch.get_num_threads() if threads is None else threads
    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    key = f"device-cpu-{FORMAT}-{count}-torch{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}-{cpu_name()}"
    stored = load(key) if load is not None else None
    if stored is not None:
        try:
            return device_from_dict(stored)
        except ValueError as error:
            log.info("ignoring a stored device description: %s", error)
    with ThreadPoolExecutor(1) as fresh:  # a new thread has no modes: no fake tensors of a trace, no autocast
        device = fresh.submit(measure, count).result()
    if save is not None:
        save(key, device.as_dict())
    return device


def cpu_name() -> str:
    """The processor's model name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = [ln.partition(":")[2].strip() for ln in lines if ln.startswith("model name")]
    except OSError:
        found = []
    return found[0] if found else platform.processor() or platform.machine()


def measure(threads: int) -> Device:
    """Measure now. Takes 0.1 to 0.3 seconds and about 150 MB; torch's thread count is put back."""
    with _threads(1):
        eager_op_s, eager_view_s = _dispatch_s()
        serial = [_bandwidth(size, eager_op_s) for size in WORKING_SETS]
        peaks = {name: _gemm_flops_per_s(name, size) * threads for name, size in
                 (("float32", 384), ("float64", 256), ("bfloat16", 128), ("float16", 128))}
        rates = _rates(peaks["float32"] / threads, eager_op_s)
        fresh = _fresh_bytes_per_s()
    parallel, region_s = serial, 0.0
    if threads > 1:
        with _threads(threads):
            parallel = [max(_bandwidth(size, eager_op_s), s) for size, s in zip(WORKING_SETS, serial, strict=True)]
            region_s = _region_s(threads, eager_op_s)
    return Device(name=cpu_name(), kind="cpu", peak_flops_per_s=peaks, levels=_levels(parallel, serial), rates=rates,
                  eager_op_s=eager_op_s, eager_view_s=eager_view_s, kernel_launch_s=KERNEL_LAUNCH_S,
                  parallel_region_s=region_s, threads=threads, fresh_above_bytes=FRESH_ABOVE_BYTES,
                  fresh_bytes_per_s=fresh)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def best_s(call: Callable[[], object], inner: int = 1, repeats: int = 5) -> float:
    """Seconds of one `call`: the best of `repeats` runs of `inner` calls, after one to warm up."""
    call()
    found = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in itertools.repeat(None, inner):
            call()
        found = min(found, (time.perf_counter() - start) / inner)
    return found


def _dispatch_s() -> tuple[float, float]:
    """Seconds of one operator (the mean of a usual mixture) and of one view on tensors too small to matter."""
    import torch

    aten = torch.ops.aten
    a, b, mask = torch.ones(2, 4), torch.ones(4), torch.ones(2, 1, dtype=torch.bool)

    def mixture() -> None:
        aten.add.Tensor(a, b)
        aten.mul.Tensor(a, 2.0)
        aten.sum.dim_IntList(a, [1], True)
        aten.where.self(mask, a, b)

    def views() -> None:
        aten.view.default(a, [8])
        aten.permute.default(a, [1, 0])

    return best_s(mixture, 20, 20) / 4, best_s(views, 20, 20) / 2


def _bandwidth(working_set_bytes: int, eager_op_s: float) -> float:
    """Bytes per second (reads plus writes) at a working set."""
    import torch

    x = torch.ones(working_set_bytes // 8)
    y = torch.empty_like(x)
    inner = max(1, (2 << 20) // working_set_bytes)
    seconds = best_s(lambda: torch.neg(x, out=y), inner, repeats=4)
    return working_set_bytes / max(seconds - eager_op_s / 2, seconds / 4)  # out= saves about half of a dispatch


def _levels(parallel: Sequence[float], serial: Sequence[float]) -> tuple[MemoryLevel, ...]:
    """Levels whose capacities lie (geometrically) between the measured working sets; outer ones are never faster."""
    edges = [math.sqrt(a * b) for a, b in itertools.pairwise(WORKING_SETS)] + [math.inf]
    down_parallel, down_serial = (list(itertools.accumulate(v, min)) for v in (parallel, serial))
    return tuple(MemoryLevel(*v) for v in zip(edges, down_parallel, down_serial, strict=True))


def _gemm_flops_per_s(dtype: str, size: int) -> float:
    import torch

    a = torch.ones(size, size, dtype=getattr(torch, dtype))
    return 2 * size**3 / best_s(lambda: torch.mm(a, a), repeats=3)


def _rates(peak_fp32_flops_per_s: float, eager_op_s: float) -> ElementRates:
    """Rates of one thread. A chain of simple operations is taken at a quarter of the product peak: half because a fused
    multiply-add counts twice there, half because a kernel waits for loads and dependencies now and then."""
    import torch

    x = torch.linspace(0.1, 2.0, 16384)
    y = torch.empty_like(x)

    def rate(call: Callable[[], torch.Tensor]) -> float:
        seconds = best_s(call, 4, repeats=8)
        return x.numel() / max(seconds - eager_op_s / 2, seconds / 4)

    functions = (torch.exp, torch.tanh, torch.erf)
    transcendental = len(functions) / sum(1 / rate(lambda f=f: f(x, out=y)) for f in functions)  # type: ignore[misc]
    rows = x.view(64, 256)
    square, turned = x.view(128, 128), y.view(128, 128)
    mask, zero = square > 1, torch.zeros(())
    turns, selects = rate(lambda: torch.neg(square.t(), out=turned)), rate(lambda: torch.where(mask, square, zero))
    single = 2 / (1 / turns + 1 / selects)
    return ElementRates(peak_fp32_flops_per_s / 4, rate(lambda: torch.div(x, x, out=y)), transcendental, single,
                        rate(lambda: torch.var(rows, dim=1)))


def _fresh_bytes_per_s() -> float:
    """Speed of writing memory for the first time."""
    import torch

    size = FRESH_ABOVE_BYTES + (2 << 20)
    return size / best_s(lambda: torch.empty(size, dtype=torch.uint8).zero_(), repeats=3)


def _region_s(threads: int, eager_op_s: float) -> float:
    """What waking the team costs: a small shared operator against its ideal time."""
    import torch

    x = torch.ones(65536)
    y = torch.empty_like(x)
    shared = best_s(lambda: torch.neg(x, out=y), 20)
    torch.set_num_threads(1)
    alone = best_s(lambda: torch.neg(x, out=y), 20)
    torch.set_num_threads(threads)
    ideal = eager_op_s / 2 + max(0.0, alone - eager_op_s / 2) / threads
    return min(max(shared - ideal, 5e-7), 5e-5)
