"""Which products of a program use a packed weight: those where the packed product measures faster on this machine.

Measured once per shape and number of threads, before the first result (so results do not depend on when), on the real
weight; remembered on disk by processor, compiler and instruction set.
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..runtime import cache
from ..runtime.packing import Found, PackedWeights
from ..runtime.toolchain import toolchain
from .program_cpp_gemm import PackedWeight
from .templates.cpu_gemm import SOURCE

TYPICAL_ROWS = 128  # stands for a symbolic number of rows
_ALIGN = 64
_SMALL = 1 << 20  # products of fewer multiplications are not measured: the packed form saves a call into the library
_COLD_FLOATS = 4 << 20
_LONG_S = 0.02  # after two runs this long, two are enough


class GemmWeights:
    """The weights that one program's products multiply by, in the order of the program's slots."""

    def __init__(self, weights: Sequence[PackedWeight], library: ctypes.PyDLL) -> None:
        self._weights, self._library = list(weights), library
        self._by_threads: dict[int, tuple[list[int], PackedWeights]] = {}
        self._last: tuple[Found, Any] | None = None

    def addresses(self, inputs: Sequence[torch.Tensor], threads: int) -> Any:
        """An array of addresses, null where the library's own product is the choice."""
        chosen = self._by_threads.get(threads)
        if chosen is None:
            slots = [k for k, w in enumerate(self._weights) if self._pays(w, inputs[w.position], threads)]
            wanted = [((w.position,), w.variant, self._packer(w)) for w in (self._weights[k] for k in slots)]
            chosen = self._by_threads[threads] = slots, PackedWeights(wanted)
        slots, packed = chosen
        found, last = packed.lookup(inputs), self._last
        if last is not None and last[0] is found:
            return last[1]
        array = (ctypes.c_void_p * max(1, len(self._weights)))()
        for slot, copy in zip(slots, found.copies, strict=True):
            array[slot] = copy.data_ptr() if copy is not None else None
        self._last = found, array
        return array

    def _packer(self, weight: PackedWeight) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: pack(self._library, weight, tensor)

    def _pays(self, weight: PackedWeight, tensor: torch.Tensor, threads: int) -> bool:
        rows = weight.rows or TYPICAL_ROWS
        if rows * weight.K * weight.N < _SMALL:
            return True
        key = cache.key_of("packed product, cold", SOURCE, *toolchain().identity(), processor(), str(torch.__version__),
                           f"{rows} {weight.K} {weight.N} {weight.stride_k == 1} {threads}")
        known = cache.get_json(key)
        if not isinstance(known, dict):
            own_s, library_s = measure(self._library, weight, tensor, rows, threads)
            known = {"own_s": own_s, "library_s": library_s}
            cache.put_json(key, known)
        return bool(known["own_s"] <= known["library_s"])


def pack(library: ctypes.PyDLL, weight: PackedWeight, tensor: torch.Tensor) -> torch.Tensor:
    """Columns of the matrix as panels, aligned for vector loads."""
    floats = int(library.mw_packed_floats(weight.K, weight.N))
    room = torch.empty(floats + _ALIGN, dtype=torch.float32)
    skip = -room.data_ptr() % _ALIGN // 4
    out = room[skip:skip + floats]
    library.mw_pack_b(tensor.data_ptr() + 4 * weight.offset, weight.stride_k, weight.stride_n, weight.K, weight.N,
                      out.data_ptr())
    return out


def measure(library: ctypes.PyDLL, weight: PackedWeight, tensor: torch.Tensor, rows: int,
            threads: int) -> tuple[float, float]:
    """Seconds of the packed and of the library's product at `rows` rows: the fastest of interleaved runs."""
    a, out = torch.ones(rows, weight.K), torch.empty(rows, weight.N)
    copy = pack(library, weight, tensor)
    b = tensor.data_ptr() + 4 * weight.offset
    M, N, K = rows, weight.N, weight.K
    runs: list[Callable[[], Any]] = [
        lambda: library.mw_gemm_packed(threads, M, N, K, a.data_ptr(), K, 1, copy.data_ptr(), None, 0,
                                       out.data_ptr(), N),
        lambda: library.mw_gemm(threads, 1, M, N, K, a.data_ptr(), 0, K, 1, b, 0, weight.stride_k, weight.stride_n,
                                None, 0, 0, out.data_ptr(), 0, N),
    ]
    # In a model, a weight comes from beyond the second-level cache each time; so it must here.
    cold = torch.empty(_COLD_FLOATS)
    best = [float("inf"), float("inf")]
    for turn in range(6):
        for k, run in enumerate(runs):
            cold.zero_()
            start = time.perf_counter()
            run()
            best[k] = min(best[k], time.perf_counter() - start)
        if turn and max(best) > _LONG_S:
            break
    return best[0], best[1]


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name: what a timing belongs to."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return named[0] if named else platform.processor()
