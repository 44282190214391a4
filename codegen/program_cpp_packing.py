"""How each product of a program is done: by the library, with a packed weight, or split into bf16 parts.

Measured once per shape and number of threads, before the first result (so results do not depend on when), on the real
weight; see `timings` for where the times are kept.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..runtime.locks import ForkSafeLock
from ..runtime.packing import Found, PackedWeights
from ..runtime.settings import settings
from .program_cpp_epilogue import ProductStruct, Way, timed_runs
from .program_cpp_gemm import Product, Weight
from .templates.cpu_gemm import FP32, LIBRARY, SOURCE, SPLIT, SPLIT_NOW
from .timings import HOST_FLOATS, TYPICAL, Seconds, Timings, fastest

_ALIGN = 64
_HUGE = 1 << 21  # bytes of a huge page: a weight is read once per call, and small pages cost a look-up each
_SMALL = 1 << 20  # products of fewer multiplications are not measured: the packed form saves a call into the library
_COLD_FLOATS = 4 << 20
_LONG_S = 0.02  # after two runs this long, two are enough
INSIDE = 4  # added to a method: the kernel behind the product runs on its blocks
_NAMES = {LIBRARY: "library", FP32: "fp32", SPLIT: "split", FP32 + INSIDE: "fp32, kernel inside",
          SPLIT + INSIDE: "split, kernel inside"}


@dataclass(frozen=True)
class BehindProduct:
    """How a product of `sizes` (rows, K, columns) and the element-wise kernel behind it are done, and the seconds of
    both by each method that was measured (none where there was nothing to choose)."""

    kernel: str
    sizes: tuple[int, int, int]
    threads: int
    method: str
    seconds: Seconds


class _Untimed(Exception):
    """A choice needs times that are not known."""


class ProductMethods:
    """The methods of one program's products, in the order of the program's slots."""

    def __init__(self, products: Sequence[Product], library: ctypes.PyDLL, timings: Timings,
                 program: ctypes.CDLL | None = None) -> None:
        self._products, self._library, self._timings, self._program = list(products), library, timings, program
        self.behind: list[BehindProduct] = []  # how products with a kernel behind them are done
        self._guard = ForkSafeLock()
        self._by_threads: dict[int, tuple[list[int], list[int], PackedWeights]] = {}
        self._last: tuple[Found, Any] | None = None
        self._called = False

    def addresses(self, inputs: Sequence[torch.Tensor], threads: int) -> Any:
        """An array of the program's products: `how` is null where the library is the choice."""
        chosen = self._by_threads.get(threads)
        if chosen is None:
            self._called = True
            with self._guard:  # two at once would spoil each other's timings
                chosen = self._by_threads.get(threads) or self._choose(inputs, threads)
                self._by_threads[threads] = chosen
        methods, packed_slots, packed = chosen
        found, last = packed.lookup(inputs), self._last
        if last is not None and last[0] is found:
            return last[1]
        array: Any = (Way * len(methods))()
        for slot, method in enumerate(methods):
            array[slot] = Way(SPLIT_NOW if method & ~INSIDE == SPLIT else None, method >= INSIDE)
        for slot, copy in zip(packed_slots, found.copies, strict=True):
            if copy is not None:
                array[slot].how = copy.data_ptr()
        array.found = found  # a call in another thread, whose weights changed, must not free what this one reads
        self._last = found, array
        return array

    def prepare(self, inputs: Sequence[torch.Tensor], threads: int) -> None:
        """Pack what `addresses` would, without other threads, where every choice was timed before. The first call ends
        this, and packs the rest with all threads."""
        with self._guard:
            if threads in self._by_threads:
                return
            try:
                chosen = self._choose(inputs, threads, may_measure=False)
            except _Untimed:
                return
            chosen[2].prepare(inputs, lambda: self._called)
            self._by_threads[threads] = chosen

    def _choose(self, inputs: Sequence[torch.Tensor], threads: int, *,
                may_measure: bool = True) -> tuple[list[int], list[int], PackedWeights]:
        """Raises `_Untimed` where it may not measure and has to."""
        methods: list[int] = []
        behind: list[BehindProduct] = []
        for product in self._products:
            allowed = self._allowed(product, methods)
            tensor = inputs[product.weight.position] if product.weight else None
            seconds = self._seconds(product, tensor, threads, allowed, may_measure) if len(allowed) > 1 else {}
            methods.append(min(allowed, key=lambda method: seconds.get(_NAMES[method], 0.0)))
            if product.behind is not None:
                behind.append(
                    BehindProduct(product.behind.launched, _sizes(product), threads, _NAMES[methods[-1]], seconds))
        slots, wanted = [], []
        for slot, (product, method) in enumerate(zip(self._products, methods, strict=True)):
            if product.weight is not None and method != LIBRARY:
                slots.append(slot)
                kind = method & ~INSIDE
                # graphs of one model find the weight at other positions, and share its copy
                wanted.append(((product.weight.position,), ("gemm", kind, replace(product.weight, position=0)),
                               self._packer(product.weight, kind)))
        self.behind += behind
        return methods, slots, PackedWeights(wanted)

    def _packer(self, weight: Weight, method: int) -> Callable[..., torch.Tensor]:
        return partial(pack, self._library, weight, method=method)

    def _allowed(self, product: Product, methods: Sequence[int]) -> list[int]:
        """`methods`: of the products before this one."""
        small = math.prod(_sizes(product)) < _SMALL
        if product.twin is not None:
            found = list(dict.fromkeys((LIBRARY, methods[product.twin] & ~INSIDE)))
        elif small:
            found = [FP32 if product.weight is not None else LIBRARY]
        else:
            found = [LIBRARY] + [FP32] * (product.weight is not None) + [SPLIT] * may_split(self._library)
        wanted, inside = settings().epilogues, [m + INSIDE for m in found if m != LIBRARY]
        if product.behind is None or self._program is None or wanted == "never":
            return found
        return (inside or found) if wanted == "always" else found if small else found + inside

    def _seconds(self, product: Product, tensor: torch.Tensor | None, threads: int, allowed: Sequence[int],
                 may_measure: bool) -> Seconds:
        """Seconds by name of each method."""
        def take() -> dict[str, float]:
            if not may_measure:
                raise _Untimed
            taken = measure(self._library, product, tensor, sizes, threads, allowed, self._program)
            return {_NAMES[method]: s for method, s in taken.items()}

        sizes, behind = _sizes(product), product.behind
        what = (f"{' '.join(map(str, sizes))} {product.a_rows} {product.b_rows} {product.weight is not None} {threads}"
                + (f" {behind.kernel.renamed('block')} {behind.operands}" if behind is not None else ""))
        return self._timings.seconds("product", SOURCE, what, [_NAMES[m] for m in allowed], take)


def _sizes(product: Product) -> tuple[int, int, int]:
    """Rows, K and columns, a typical number for what is symbolic."""
    rows, K, N = (TYPICAL if n is None else n for n in (product.rows, product.K, product.N))
    return rows, K, N


def may_split(library: ctypes.PyDLL) -> bool:
    """True where the machine has the instructions for split products and the user did not forbid them."""
    return settings().split_products and bool(library.mw_split_ready())


def pack(library: ctypes.PyDLL, weight: Weight, tensor: torch.Tensor, method: int, alone: bool = False) -> torch.Tensor:
    """A packed copy of the matrix (bytes), aligned for vector loads; large ones for huge pages. `alone`: by this thread
    only."""
    size = int(library.mw_packed_bytes(method, weight.K, weight.N))
    align = _HUGE if size >= _HUGE else _ALIGN
    room = torch.empty(size + align, dtype=torch.uint8, device="cpu")  # what is skipped is never touched
    out = room[-room.data_ptr() % align:]
    if not library.mw_pack_b(method, tensor.data_ptr() + 4 * weight.offset, weight.stride_k, weight.stride_n,
                             weight.K, weight.N, out.data_ptr(), alone):
        raise AssertionError(f"method {method} was chosen for {weight}, which it can't pack")
    return out


def measure(library: ctypes.PyDLL, product: Product, tensor: torch.Tensor | None, sizes: tuple[int, int, int],
            threads: int, methods: Sequence[int], program: ctypes.CDLL | None = None) -> dict[int, float]:
    """Seconds of one product [M, K] @ [K, N] by each method, and of the kernel behind it where `program` holds one: the
    fastest of interleaved runs. `sizes`: M, K, N."""
    M, K, N = sizes
    weight = product.weight
    a, b, out = (torch.ones(shape, **HOST_FLOATS) for shape in ((M, K), (K, N), (M, N)))
    strides_a = (K, 1) if product.a_rows else (1, M)
    if weight is not None and tensor is not None:
        address, strides_b = tensor.data_ptr() + 4 * weight.offset, (weight.stride_k, weight.stride_n)
        copies = {m: pack(library, weight, tensor, m) for m in {m & ~INSIDE for m in methods} - {LIBRARY}}
        how = {m: copies[m & ~INSIDE].data_ptr() if m != LIBRARY else None for m in methods}
    else:
        address, strides_b = b.data_ptr(), (N, 1) if product.b_rows else (1, K)
        how = {m: SPLIT_NOW if m & ~INSIDE == SPLIT else None for m in methods}
    # In a model, a weight comes from memory each time; so it must here (where nothing can be evicted, from beyond L2).
    cold = torch.empty(_COLD_FLOATS, **HOST_FLOATS)
    read: dict[int, tuple[int, int]] = {}
    if weight is not None and tensor is not None:  # an expanded weight has fewer bytes than elements
        reach = (K - 1) * weight.stride_k + (N - 1) * weight.stride_n + 1
        read = {LIBRARY: (address, 4 * reach), **{m: (copy.data_ptr(), copy.numel()) for m, copy in copies.items()}}

    def make_cold(run: int) -> None:
        if read:
            library.mw_evict(*read[methods[run] & ~INSIDE])
        else:
            cold.zero_()

    sides = [ProductStruct(N, address, *strides_b, None, 0, out.data_ptr(), N, how[method]) for method in methods]
    runs: list[Callable[[], Any]] = [
        partial(library.mw_gemm_then, threads, M, K, a.data_ptr(), *strides_a, ctypes.byref(side), None)
        for side in sides]
    if program is not None and product.behind is not None:
        runs = timed_runs(library, program, product.behind, threads, M, K, (a.data_ptr(), *strides_a),
                          [(side, method >= INSIDE) for side, method in zip(sides, methods, strict=True)])
    return dict(zip(methods, fastest(runs, before=make_cold, long_s=_LONG_S), strict=True))
