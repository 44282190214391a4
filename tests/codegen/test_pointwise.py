"""Element-wise lowerings: scalars that a narrow integer dtype does not hold."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ..differential import KernelGraph, compile_graphs, trace

OUT_OF_RANGE = [(torch.int8, 300), (torch.int8, -129), (torch.uint8, 256), (torch.uint8, -1), (torch.int16, 40000),
                (torch.int32, 1 << 40)]
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]
OTHERS: list[Callable[[torch.Tensor, int], torch.Tensor]] = [
    lambda x, k: x.clamp(max=k), lambda x, k: x.clamp(min=k), lambda x, k: x // k, lambda x, k: x % k,
    lambda x, k: torch.fmod(x, k), lambda x, k: torch.ops.aten.clamp_min(x, k),
    lambda x, k: torch.div(x, k, rounding_mode="trunc"),
]


def values(dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.tensor([info.min, info.min + 1, 0, 1, 43, 44, 45, info.max - 1, info.max], dtype=dtype)


def outcome(function: Callable[..., Any], x: torch.Tensor) -> Any:
    """What `function(x)` gives, or the type of what it raises."""
    try:
        return function(x)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(("dtype", "scalar"), OUT_OF_RANGE, ids=str)
@pytest.mark.parametrize("function", [*COMPARISONS, *OTHERS])
def test_scalars_out_of_range_are_eagers(function: Callable[..., Any], dtype: torch.dtype, scalar: int) -> None:
    """Whatever kernel there is, nothing checks it here: its result must be eager's."""
    x = values(dtype)
    wanted = outcome(lambda t: function(t, scalar), x)
    if isinstance(wanted, type):
        return  # eager refuses it, so no such graph runs
    graph = KernelGraph(trace(lambda t: (function(t, scalar),), [x]))
    kernels = compile_graphs([graph], "cpp")
    assert torch.equal(graph.run([x], kernels)[0], wanted)


@pytest.mark.parametrize("compare", COMPARISONS)
def test_a_comparison_out_of_range_says_why_it_has_no_kernel(compare: Callable[..., Any]) -> None:
    graph = KernelGraph(trace(lambda t: (compare(t, 300),), [values(torch.int8)]))
    assert not graph.groups and [u.reason for u in graph.uncovered] == ["scalar 300 outside of int8"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_scalars_in_range_have_a_kernel(dtype: torch.dtype) -> None:
    x = values(dtype)
    graph = KernelGraph(trace(lambda t: (t < 44, t.clamp(1, 45), t % 7), [x]))
    kernels = compile_graphs([graph], "cpp")
    assert graph.groups and not graph.uncovered
    for got, wanted in zip(graph.run([x], kernels), (x < 44, x.clamp(1, 45), x % 7), strict=True):
        assert torch.equal(got, wanted)
