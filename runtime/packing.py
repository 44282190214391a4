"""Packed copies of weights, looked up at call time and never stale.

A compiled graph must not hold on to weights: Dynamo reuses one graph for a deep copy of the model and after a Parameter
was replaced. So a packed copy belongs to the tensor *object* (a weak reference), its data pointer and its version
counter; any mismatch packs again. When the parameter dies, its copies are freed. A tensor that keeps changing between
calls is no longer packed, and neither is one without a version counter (made under `inference_mode`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .locks import ForkSafeLock

MIN_USES = 3  # a copy that served fewer calls before its weight changed did not pay
MAX_WASTED = 4  # after so many such copies the weight is left alone

Pack = Callable[..., Any]


@dataclass
class _Copy:
    """`data` as `pack` made it from tensors of these identities, versions and addresses (`state`)."""

    data: Any = None
    state: tuple[tuple[int, int, int], ...] = ()
    others: tuple[weakref.ref[torch.Tensor], ...] = ()
    uses: int = 0
    wasted: int = 0


@dataclass
class _Owner:
    """All packed copies of one tensor object."""

    ref: weakref.ref[torch.Tensor]
    copies: dict[Hashable, _Copy] = field(default_factory=dict)


_owners: dict[int, _Owner] = {}
_guard = ForkSafeLock()
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
    tensors = [t for c in copies for t in (c if isinstance(c, tuple) else (c,))]
    return sum(t.numel() * t.element_size() for t in tensors)


def refresh(tensors: Sequence[torch.Tensor]) -> None:
    """Drop the copies of these tensors: for edits through `.data`, which no version counter sees."""
    wanted = {id(t) for t in tensors}
    with _guard:
        owners = [key for key, owner in _owners.items() if key in wanted
                  or any(identity in wanted for c in owner.copies.values() for identity, _, _ in c.state)]
    for key in owners:
        _drop(key)


def packed(sources: Sequence[torch.Tensor], variant: Hashable, pack: Pack) -> Any:
    """The copy called `variant` of the first source, made by `pack(*sources)` when none fits; None where none should
    be kept (the sources keep changing, or have no version counter)."""
    global _generation
    if any(t.is_inference() for t in sources):
        return None
    state = tuple((id(t), t._version, t.data_ptr()) for t in sources)
    with _guard:
        owner = _owner_of(sources[0])
        copy = owner.copies.setdefault(variant, _Copy())
        if copy.data is not None and (copy.state != state or any(r() is None for r in copy.others)):
            _generation += 1
            copy.wasted += copy.uses < MIN_USES
            copy.data = None
        if copy.wasted > MAX_WASTED:
            return None
        if copy.data is None:
            copy.data, copy.uses, copy.state = pack(*sources), 0, state
            copy.others = tuple(weakref.ref(t, _expire) for t in sources[1:])
        copy.uses += 1
        return copy.data


def _expire(_: object) -> None:
    """A further source died: callers' shortcuts must look again."""
    global _generation
    with _guard:
        _generation += 1


def _owner_of(tensor: torch.Tensor) -> _Owner:
    key = id(tensor)
    owner = _owners.get(key)
    if owner is None or owner.ref() is not tensor:
        owner = _owners[key] = _Owner(weakref.ref(tensor, lambda _: _drop(key)))
    return owner


@dataclass
class Found:
    """What one lookup found, valid while nothing changed; `copies` holds None where nothing is kept."""

    generation: int
    identities: list[int]
    versions: list[int]
    pointers: list[int]
    copies: list[Any]
    wanted: list[tuple[tuple[int, ...], Hashable, Pack]]

    def made(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """The copies, made for this call only where none is kept."""
        return [c if c is not None else pack(*[inputs[p] for p in positions])
                for c, (positions, _, pack) in zip(self.copies, self.wanted, strict=True)]


class PackedWeights:
    """The packed weights of one program: `wanted` gives (positions of the sources among the inputs, variant, pack)."""

    def __init__(self, wanted: Sequence[tuple[tuple[int, ...], Hashable, Pack]]) -> None:
        self.wanted = list(wanted)
        self._positions = list(dict.fromkeys(p for positions, _, _ in wanted for p in positions))
        self._last: Found | None = None

    def lookup(self, inputs: Sequence[torch.Tensor]) -> Found:
        """The packed copies, checked against the tensors in `inputs`."""
        weights = [inputs[p] for p in self._positions]
        last = self._last
        if last is not None and last.generation == _generation and last.identities == list(map(id, weights)):
            try:
                if last.versions == [w._version for w in weights] and last.pointers == [w.data_ptr() for w in weights]:
                    return last
            except RuntimeError:  # a tensor made under inference_mode has no version
                pass
        return self._slow(inputs, weights)

    def prepare(self, inputs: Sequence[torch.Tensor], stop: Callable[[], bool]) -> None:
        """Make the copies now, until `stop()`, each with `alone=True`: beside other work, teams of threads wait for one
        another."""
        for positions, variant, pack in self.wanted:
            if stop():
                return
            packed([inputs[p] for p in positions], variant, partial(pack, alone=True))

    def _slow(self, inputs: Sequence[torch.Tensor], weights: list[torch.Tensor]) -> Found:
        copies = [packed([inputs[p] for p in positions], variant, pack) for positions, variant, pack in self.wanted]
        versions = [-1 if w.is_inference() else w._version for w in weights]
        pointers = [w.data_ptr() for w in weights]
        self._last = Found(_generation, list(map(id, weights)), versions, pointers, copies, self.wanted)
        return self._last
