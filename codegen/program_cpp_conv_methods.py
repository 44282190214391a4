"""How each convolution of a program is done: by oneDNN, or by the template on AMX tiles where that measures faster.

Measured once per shape and number of threads, before the first result, on the real weight; remembered on disk like the
methods of products (program_cpp_packing).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..runtime.locks import ForkSafeLock
from ..runtime.packing import Found, PackedWeights
from .program_cpp_conv import PackedConv
from .program_cpp_conv_sizes import SizeSet
from .program_cpp_gemm import Weight
from .program_cpp_packing import may_split, pack
from .templates.cpu_gemm import SOURCE, SPLIT
from .timings import HOST_FLOATS, METHODS, Timings, fastest

MIN_CHANNELS = 16  # a tap's channels are padded to 32
_CHANNELS = 32


class ConvMethods:
    """The split weights of one program's convolutions, in the order of `frame->convolutions`."""

    def __init__(self, convs: Sequence[PackedConv], library: ctypes.PyDLL, timings: Timings) -> None:
        self._convs, self._library, self._timings = list(convs), library, timings
        self._guard = ForkSafeLock()
        self._chosen: WeakKeyDictionary[SizeSet, tuple[list[int], PackedWeights]] = WeakKeyDictionary()
        self._last: tuple[Found, Any] | None = None

    def addresses(self, inputs: Sequence[torch.Tensor], threads: int, sizes: SizeSet) -> Any:
        """An array of packed weights, null where oneDNN is the choice."""
        with self._guard:  # two at once would spoil each other's timings
            slots, packed = self._chosen.get(sizes) or self._choose(inputs, threads, sizes)
        found, last = packed.lookup(inputs), self._last
        if last is not None and last[0] is found:
            return last[1]
        array: Any = (ctypes.c_void_p * len(self._convs))()
        for slot, copy in zip(slots, found.copies, strict=True):
            array[slot] = copy.data_ptr() if copy is not None else None
        array.found = found  # keeps the copies, as for products
        self._last = found, array
        return array

    def _choose(self, inputs: Sequence[torch.Tensor], threads: int, sizes: SizeSet) -> tuple[list[int], PackedWeights]:
        slots = [k for k, (conv, size) in enumerate(zip(self._convs, sizes.sizes, strict=True))
                 if pays(self._library, conv, inputs, size, threads, self._timings)]
        packed = PackedWeights([(c.positions, ("split", *c.fold), self._packer(c))
                                for c in (self._convs[k] for k in slots)])
        self._chosen[sizes] = slots, packed
        return slots, packed

    def _packer(self, conv: PackedConv) -> Any:
        return lambda *sources: split_weight(self._library, conv.folded(*sources)[0])


def split_weight(library: ctypes.PyDLL, weight: torch.Tensor) -> torch.Tensor:
    """A convolution's weight [O, C, R, S] as the split right side [R * S * C, O] of a product, C padded to 32."""
    out, channels, height, width = weight.shape
    padded = torch.zeros(out, height, width, -(-channels // _CHANNELS) * _CHANNELS, **HOST_FLOATS)
    padded[..., :channels] = weight.permute(0, 2, 3, 1)
    K = height * width * padded.shape[3]
    return pack(library, Weight(0, 0, K, out, 1, K), padded, SPLIT)


def pays(library: ctypes.PyDLL, conv: PackedConv, inputs: Sequence[torch.Tensor], size: Sequence[int],
         threads: int, timings: Timings) -> bool:
    """True where the template measures faster than oneDNN."""
    if conv.step.groups != 1 or not conv.channels_last or size[1] < MIN_CHANNELS or not may_split(library):
        return False
    step, shape = conv.step, tuple(inputs[conv.positions[0]].shape)

    def take() -> dict[str, float]:
        folded, shift = conv.folded(*(inputs[p] for p in conv.positions))
        return dict(zip(METHODS, measure(library, conv, folded, shift, size, threads), strict=True))

    known = timings.seconds("convolution", SOURCE,
                            f"{tuple(size)} {shape} {step.stride} {step.padding} {step.dilation} {threads}", METHODS,
                            take)
    return known["own"] < known["library"]


def measure(library: ctypes.PyDLL, conv: PackedConv, weight: torch.Tensor, shift: torch.Tensor, size: Sequence[int],
            threads: int) -> tuple[float, float]:
    """Seconds of the template and of oneDNN on an input of `size` (NCHW): the fastest of interleaved runs."""
    step = conv.step
    where = [list(v) for v in (step.padding, step.stride, step.dilation)]
    x = torch.ones(*size, **HOST_FLOATS).contiguous(memory_format=torch.channels_last)
    ours = split_weight(library, weight)
    theirs = conv.reordered(weight, size)
    library_run = torch.ops.mkldnn._convolution_pointwise
    out = library_run(x, theirs, shift, *where, 1, "none", [], None)
    if not call_conv(library, threads, x, ours, tuple(weight.shape), conv, shift, out):
        ours = split_weight(library, torch.ones_like(weight))  # the time is the shape's, other weights may be in range
    runs: list[Callable[[], Any]] = [
        lambda: call_conv(library, threads, x, ours, tuple(weight.shape), conv, shift, out),
        lambda: library_run(x, theirs, shift, *where, 1, "none", [], None),
    ]
    reads = ((ours.data_ptr(), ours.numel()),
             (int(torch.ops.mkldnn.data_ptr(theirs)), int(torch.ops.mkldnn._nbytes(theirs))))
    own_s, library_s = fastest(runs, before=lambda i: library.mw_evict(*reads[i]), turns=5)
    return own_s, library_s


def call_conv(library: ctypes.PyDLL, threads: int, x: torch.Tensor, packed: torch.Tensor, shape: Sequence[int],
              conv: PackedConv, shift: torch.Tensor, out: torch.Tensor, other: torch.Tensor | None = None) -> bool:
    """The template on channels-last tensors; `shape` is the weight's [O, C, R, S]. False when it could not do it."""
    step = conv.step
    numbers = [*x.shape, shape[0], *out.shape[2:], *shape[2:], *step.stride, *step.padding, *step.dilation,
               int(step.relu)]
    return bool(library.mw_conv(threads, (ctypes.c_int64 * len(numbers))(*numbers), x.data_ptr(), packed.data_ptr(),
                                shift.data_ptr(), other.data_ptr() if other is not None else None, out.data_ptr()))
