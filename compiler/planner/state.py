"""A model's tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...runtime import torch_compat
from .meta_model import MetaModel


class State:
    """A model's parameters, buffers and inputs as fake tensors; a tied one is one tensor under several names.

    They say that they are on the CPU: on the meta device torch loses gradients (`nll_loss`'s, for one), with a warning.
    """

    def __init__(self, built: MetaModel) -> None:
        self.mode = torch_compat.fake_mode()
        parameters = dict(built.model.named_parameters(remove_duplicate=False))
        self._parameters = frozenset(parameters)
        self._made: dict[int, torch.Tensor] = {}  # by id; the originals stay alive in `built`
        self._originals = {**parameters, **dict(built.model.named_buffers(remove_duplicate=False))}
        self.fake = {name: self._as_fake(t) for name, t in self._originals.items()}
        self.args, self.kwargs = torch_compat.tree_map(self._as_fake, (built.args, built.kwargs))

    def _as_fake(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._made:
            with self.mode:
                made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            self._made[id(value)] = made.requires_grad_(value.requires_grad)
        return self._made[id(value)]

    def is_parameter(self, name: str) -> bool:
        return name in self._parameters

    def identity(self, name: str) -> int:
        """Equal for names of one tensor."""
        return id(self._originals[name])

    def weights(self) -> dict[int, torch.Tensor]:
        """The fake tensors by identity, for `exchanged`."""
        return {self.identity(name): tensor for name, tensor in self.fake.items()}


@contextlib.contextmanager
def exchanged(module: nn.Module, weights: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Within it, parameters and buffers of `module` are those of `weights`, by the identity of what they stand for.

    `torch.func.functional_call` goes by name, and leaves a module that has several names with the wrong weights.
    """
    before: list[tuple[Any, str, torch.Tensor]] = []
    for sub in module.modules():
        for table in (sub._parameters, sub._buffers):
            before += [(table, name, t) for name, t in table.items() if t is not None and id(t) in weights]
    try:
        for table, name, tensor in before:
            table[name] = weights[id(tensor)]
        yield
    finally:
        for table, name, tensor in before:
            table[name] = tensor
