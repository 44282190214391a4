"""Whole graphs through `torch.compile`: the compiled call (the second one) against eager."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch


def second_call(function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """What the compiled graph gives: the first call is the eager run that accepts its kernels."""
    compiled = torch.compile(function, backend="meshwright", fullgraph=True)
    compiled(*inputs)
    return compiled(*inputs)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_STRICT", "1")
    torch._dynamo.reset()


def scatter_from_itself(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    y = x + 1
    return y.scatter_add(0, places, y)


def put_from_itself(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    y = x + 1
    return y.index_put((places,), y, accumulate=True)


@pytest.mark.parametrize("function", [scatter_from_itself, put_from_itself])
def test_a_scatter_of_a_tensor_into_itself_copies_it(function: Callable[..., torch.Tensor]) -> None:
    x, places = torch.randn(8), torch.tensor([3, 1, 1, 7, 0, 2, 2, 5])
    torch.testing.assert_close(second_call(function, x, places), function(x, places))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_process_can_compile() -> None:
    """The threads that compile stay behind in the parent."""
    x = torch.randn(8)
    second_call(lambda x: x.exp() + 1, x)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        right = torch.allclose(second_call(lambda x: (x.sin() + 3).exp(), x), (x.sin() + 3).exp())
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
