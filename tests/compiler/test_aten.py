"""Whole graphs through `torch.compile`: the compiled call (the second one) against eager."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
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


@pytest.fixture
def sizes_from_data() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def test_kernels_over_sizes_known_only_inside_the_graph(sizes_from_data: None) -> None:
    def positive(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = x[x > 0]
        return kept * 2, (kept + 1).softmax(0), torch.cat([kept, kept]) * 3
    x = torch.randn(16)
    torch.testing.assert_close(second_call(positive, x), positive(x))


def test_a_spliced_graph_draws_its_random_numbers_in_order(sizes_from_data: None) -> None:
    def noisy(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, first, second = x.sin(), torch.rand_like(x), torch.rand_like(x)
        return a, first, x.cos() * second, x.nonzero() * 2
    compiled = torch.compile(noisy, backend="meshwright", fullgraph=True)
    x = torch.randn(16)
    for _ in range(2):
        torch.manual_seed(0)
        found = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, noisy(x))
