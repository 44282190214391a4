"""A model's tensors without data."""

from __future__ import annotations

from typing import Any

import torch

from ...runtime import torch_compat
from .meta_model import MetaModel


class State:
    """A model's parameters, buffers and inputs as fake tensors; a tied one is one tensor under several names.

    They say that they are on the CPU: on the meta device torch loses gradients (of `nll_loss`, for one), with a warning.
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
