"""Packed convolution weights of a program by the sizes it is called with.

oneDNN chooses a weight's layout by the input's size and the number of threads, and reorders a weight of another layout
in every call, which may take longer than the convolution (measured: 89 ms before one of 0.9 ms). So a program packs for
the sizes of its first call, and for others when they come a second time: sizes that never come back are run as they
are. Sizes that oneDNN gives one layout, as most are, share one copy.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..runtime.locks import ForkSafeLock
from ..runtime.packing import PackedWeights
from ..runtime.program import Program, SymbolInput
from .expr import Expr
from .program_cpp_conv import PackedConv

MAX_SIZES = 4  # sets of sizes with packed weights, per number of threads
MAX_SEEN = 16  # sets of sizes that are remembered for having been seen once
Values = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SizeSet:
    """Input sizes (NCHW) of all convolutions of one program, and the weights packed for them."""

    sizes: tuple[Values, ...]
    weights: PackedWeights

    def inputs(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Weight and bias of every convolution, in order."""
        return list(itertools.chain.from_iterable(self.weights.lookup(tensors).made(tensors)))


class ConvSizes:
    """Which `SizeSet` a call uses."""

    def __init__(self, program: Program, convs: Sequence[PackedConv]) -> None:
        self._convs = list(convs)
        wanted = frozenset[str]().union(*(e.symbols() for c in convs for e in c.input_size))
        self._symbols = [(s.name, *_place(program, s.name)) for s in program.symbols if s.name in wanted]
        self._sets: dict[int, OrderedDict[Values, SizeSet]] = {}
        self._seen: OrderedDict[tuple[int, Values], None] = OrderedDict()
        self._guard = ForkSafeLock()

    def settle(self, tensors: Sequence[torch.Tensor], integers: Sequence[int], threads: int) -> SizeSet:
        """The set for these inputs, or the latest one while their sizes may not come again. `threads` is torch's
        current number."""
        values = tuple(integers[at] if dim is None else tensors[at].shape[dim] for _, at, dim in self._symbols)
        with self._guard:
            sets = self._sets.setdefault(threads, OrderedDict())
            if values in sets:
                sets.move_to_end(values)
            elif sets and not self._comes_again((threads, values)):
                return next(reversed(sets.values()))
            else:
                sets[values] = self._packed_for(values, tensors, threads)
                if len(sets) > MAX_SIZES:
                    sets.popitem(last=False)
            return sets[values]

    def _comes_again(self, key: tuple[int, Values]) -> bool:
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return False

    def _packed_for(self, values: Values, tensors: Sequence[torch.Tensor], threads: int) -> SizeSet:
        bound = dict(zip((name for name, *_ in self._symbols), values, strict=True))
        known: dict[Expr, int] = {}
        sizes = tuple(tuple(_evaluate(e, bound, known) for e in c.input_size) for c in self._convs)
        layout_of = functools.cache(_layout)
        wanted = []
        for conv, size in zip(self._convs, sizes, strict=True):
            s, shape = conv.step, tuple(tensors[conv.positions[0]].shape)
            where = (s.stride, s.padding, s.dilation, s.groups)
            # constant sizes have one layout per number of threads: not worth a reorder to learn which
            layout: Hashable = layout_of(shape, size, *where) if self._symbols else (threads, size, *where)
            wanted.append((conv.positions, ("conv", *conv.fold, layout), functools.partial(conv.pack, size)))
        return SizeSet(sizes, PackedWeights(wanted))


def _place(program: Program, symbol: str) -> tuple[int, int | None]:
    """(position among the integer inputs, None) or (position among the tensor inputs, dimension)."""
    found = next(s for s in program.symbols if s.name == symbol)
    integers = [i for i, item in enumerate(program.inputs) if isinstance(item, SymbolInput)]
    if found.argument is not None:
        return integers.index(found.argument), None
    names = [i.name for i in program.inputs if not isinstance(i, SymbolInput)]
    return names.index(str(found.tensor)), found.dim


def _evaluate(size: Expr, bound: Mapping[str, int], known: dict[Expr, int]) -> int:
    if size not in known:
        known[size] = size.evaluate(bound)
    return known[size]


def _layout(shape: Values, size: Values, stride: Values, padding: Values, dilation: Values, groups: int) -> bytes:
    """oneDNN's description of the memory in which it wants a weight of `shape` for inputs of `size`."""
    made = torch.ops.mkldnn._reorder_convolution_weight(
        torch.empty(shape, dtype=torch.float32, device="cpu"), list(padding), list(stride), list(dilation), groups,
        list(size))
    described: torch.Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(made)
    return described.numpy().tobytes()
