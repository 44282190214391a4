"""Packed copies of weights, looked up at call time and never stale.

A compiled graph must not hold on to weights: Dynamo reuses one graph for a deep copy of the model and after a Parameter
was replaced. So a packed copy belongs to the tensor *object* (a weak reference), its data pointer and its version
counter; any mismatch packs again. When the parameter dies, its copies are freed. A tensor that keeps changing between
calls is no longer packed, and neither is one without a version counter (made under `inference_mode`).
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

MIN_USES = 3  # a copy that served fewer calls before its weight changed did not pay
MAX_WASTED = 4  # after so many such copies the weight is left alone

Pack = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class _Copy:
    data: torch.Tensor | None = None
    pointer: int = 0
    version: int = -1
    uses: int = 0
    wasted: int = 0


@dataclass
class _Owner:
    """All packed copies of one tensor object."""

    ref: weakref.ref[torch.Tensor]
    copies: dict[Hashable, _Copy] = field(default_factory=dict)


_owners: dict[int, _Owner] = {}
_guard = threading.RLock()
_generation = 0  # grows when a copy is dropped, so that callers' shortcuts expire


def generation() -> int:
    """A number that changes whenever a packed copy was dropped or replaced."""
    return _generation


def _drop(key: int) -> None:
    global _generation
    with _guard:
        _generation += 1
        _owners.pop(key, None)


def clear() -> int:
    """Forget every packed copy (they are made again when needed). Gives the bytes released."""
    global _generation
    with _guard:
        _generation += 1
        copies = [c.data for o in _owners.values() for c in o.copies.values() if c.data is not None]
        _owners.clear()
    return sum(c.numel() * c.element_size() for c in copies)


def refresh(tensors: Sequence[torch.Tensor]) -> None:
    """Drop the copies of these tensors: for edits through `.data`, which no version counter sees."""
    for t in tensors:
        _drop(id(t))


def packed(weight: torch.Tensor, variant: Hashable, pack: Pack) -> torch.Tensor | None:
    """The packed copy of `weight` called `variant`, made by `pack` when there is none; None when it should not be packed."""
    global _generation
    if weight.is_inference():
        return None
    with _guard:
        owner = _owners.get(id(weight))
        if owner is None or owner.ref() is not weight:
            key = id(weight)
            owner = _owners[key] = _Owner(weakref.ref(weight, lambda _: _drop(key)))
        copy = owner.copies.setdefault(variant, _Copy())
        if copy.data is not None and (copy.version, copy.pointer) != (weight._version, weight.data_ptr()):
            _generation += 1
            copy.wasted += copy.uses < MIN_USES
            copy.data = None
        if copy.wasted > MAX_WASTED:
            return None
        if copy.data is None:
            copy.data, copy.uses = pack(weight), 0
            copy.version, copy.pointer = weight._version, weight.data_ptr()
        copy.uses += 1
        return copy.data


@dataclass(frozen=True)
class _Shortcut:
    """The pointers of the last call, valid while nothing changed. `keep` holds the copies alive."""

    generation: int
    identities: list[int]
    versions: list[int]
    pointers: list[int]
    array: ctypes.Array[ctypes.c_void_p]
    keep: list[torch.Tensor | None]


class PackedWeights:
    """The packed weights of one program: `wanted` pairs an input position with (variant, pack function)."""

    def __init__(self, wanted: Sequence[tuple[int, Hashable, Pack]]) -> None:
        self.wanted = list(wanted)
        self._positions = [p for p, _, _ in wanted]
        self._last: _Shortcut | None = None

    def lookup(self, inputs: Sequence[torch.Tensor]) -> _Shortcut:
        """Addresses of the packed copies (0 where there is none), checked against the weights in `inputs`."""
        weights = [inputs[p] for p in self._positions]
        last = self._last
        if last is not None and last.generation == _generation and last.identities == list(map(id, weights)):
            try:
                if last.versions == [w._version for w in weights] and last.pointers == [w.data_ptr() for w in weights]:
                    return last
            except RuntimeError:  # a tensor made under inference_mode has no version
                pass
        return self._slow(weights)

    def _slow(self, weights: list[torch.Tensor]) -> _Shortcut:
        copies = [packed(w, variant, pack) for w, (_, variant, pack) in zip(weights, self.wanted, strict=True)]
        array = (ctypes.c_void_p * max(1, len(copies)))(*[c.data_ptr() if c is not None else None for c in copies])
        versions = [-1 if w.is_inference() else w._version for w in weights]
        found = _Shortcut(_generation, list(map(id, weights)), versions, [w.data_ptr() for w in weights], array, copies)
        self._last = found
        return found
