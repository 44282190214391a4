"""Example inputs as users give them → positional and keyword arguments of `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..runtime.errors import InvalidInputError


@dataclass(frozen=True)
class Example:
    """One call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def read_example(model: nn.Module, example_inputs: Any) -> Example | None:
    """`example_inputs` as one call: a tensor, a tuple or list (positional), a mapping (by keyword), or None.

    Raises `InvalidInputError` when it is none of these or does not fit the signature of `forward`.
    """
    if example_inputs is None:
        return None
    if isinstance(example_inputs, torch.Tensor):
        example = Example((example_inputs,), {})
    elif isinstance(example_inputs, Mapping):
        example = Example((), dict(example_inputs))
    elif isinstance(example_inputs, (tuple, list)):
        example = Example(tuple(example_inputs), {})
    else:
        raise InvalidInputError(f"example_inputs of type {type(example_inputs).__name__}",
                                expected="a tensor, a tuple of positional or a dict of keyword arguments")
    _check_signature(model, example)
    return example


def _check_signature(model: nn.Module, example: Example) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*example.args, **example.kwargs)
    except TypeError as error:
        names = ", ".join(p for p in signature.parameters)
        raise InvalidInputError(f"example_inputs do not fit {type(model).__name__}.forward: {error}",
                                expected=f"arguments for ({names})") from None
