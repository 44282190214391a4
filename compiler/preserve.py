"""Running a user's model without leaving a trace: random number generators, buffers, attributes and example inputs are
as they were afterwards. Gradients never need restoring: we call `torch.autograd.grad`, which touches no `.grad`.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..runtime import torch_compat

_MISSING = object()


@contextmanager
def preserved(model: nn.Module | None = None) -> Iterator[None]:
    """Undo, at the end of the `with` body, what it did to random state and to the buffers and attributes of `model`."""
    undo_random = _random_state()
    undo_model = _model_state(model) if model is not None else None
    try:
        yield
    finally:
        undo_random()
        if undo_model is not None:
            undo_model()


def _random_state() -> Callable[[], None]:
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None

    def undo() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)

    return undo


def _model_state(model: nn.Module) -> Callable[[], None]:
    attributes = [(m, dict(m.__dict__), dict(m._buffers)) for m in model.modules()]
    values = [(b, b.detach().clone(), b._version) for b in model.buffers() if not b.is_meta]

    def undo() -> None:
        for module, before, buffers in attributes:
            _restore_dict(module.__dict__, before)
            _restore_dict(module._buffers, buffers)
        for buffer, value, version in values:
            if buffer._version != version or not _same_bits(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)

    return undo


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


def _restore_dict(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [k for k in now if k not in before]:
        del now[key]
    for key, value in before.items():
        if now.get(key, _MISSING) is not value:
            now[key] = value


def cloned(tree: Any) -> Any:
    """A copy of example inputs: tensors are cloned (layout and `requires_grad` kept), other objects deep-copied when
    they can be (key/value caches), else shared."""
    return torch_compat.tree_map(_clone_leaf, tree)


def _clone_leaf(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device, nn.Module)):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:
        return leaf
