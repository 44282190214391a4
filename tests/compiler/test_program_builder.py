"""Whole graphs as programs: what must not fall back to running node by node, and which steps a graph becomes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from meshwright.compiler.backend import recent_reports
from meshwright.compiler.program_builder import tensor_spec
from meshwright.compiler.report import Report
from meshwright.runtime.program import Call, Program
from meshwright.runtime.torch_compat import fake_mode


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_STRICT", "1")
    torch._dynamo.reset()


def programs(report: Report) -> list[Program]:
    """The programs of every graph of a report, after checking that each graph has one."""
    assert not [n for n in report.notes if "node by node" in n.reason]
    assert all(g.program is not None for g in report.graphs)
    return [g.program for g in report.graphs]


def test_batch_norm_trains_over_open_sizes_as_a_program() -> None:
    """Its running variance is scaled by n/(n - 1), a float that depends on sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="meshwright", dynamic=True, fullgraph=True)
    for batch, side in ((2, 6), (2, 6), (3, 9), (5, 7), (2, 6)):
        x = torch.randn(batch, 3, side, side)
        (compiled(x) * x.sum()).square().mean().backward()
        (reference(x) * x.sum()).square().mean().backward()
        for mine, its in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)
    for mine, its in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-4)
    assert len(programs(recent_reports()[-1])) == 2


def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k, v = x.split(8, -1)
    return q @ k.transpose(-1, -2) @ v, k.sin()


def split_with_sizes(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k, v = x.split([4, 12, 8], -1)
    return q @ q.transpose(-1, -2), k @ k.transpose(-1, -2), v + 1


def chunk(x: torch.Tensor) -> torch.Tensor:
    q, k, v = x.chunk(3, -1)
    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])


def unbind(x: torch.Tensor) -> torch.Tensor:
    q, k, v = x.unflatten(-1, (3, 8)).unbind(2)
    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("parts", [split, split_with_sizes, chunk, unbind])
def test_the_parts_of_a_tensor_are_views(parts: Callable[..., Any], dynamic: bool) -> None:
    """Kernels and products read them in place: no ATen call makes their handles."""
    def product(x: torch.Tensor, w: torch.Tensor) -> Any:
        return parts(x @ w)

    x, w = torch.randn(2, 5, 16), torch.randn(16, 24)
    compiled = torch.compile(product, backend="meshwright", dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        compiled(x, w)
        torch.testing.assert_close(compiled(x, w), product(x, w), rtol=1e-4, atol=1e-5)
    (program,) = programs(recent_reports()[-1])
    called = [s.op for s in program.steps if isinstance(s, Call)]
    assert not [op for op in called if any(word in op for word in ("split", "chunk", "unbind", "clone"))]


def test_a_device_is_right_while_another_trace_runs_a_fake_kernel() -> None:
    """Programs are built beside the main thread, which may be tracing under the same mode. Then every tensor of it says
    "meta"; memory that a program allocated there had no address, and kernels wrote to address 0."""
    mode = fake_mode()
    with mode:
        x = torch.empty(2, 3)
    mode.in_kernel_invocation = True
    try:
        assert x.device.type == "meta"  # what the trace's own kernels see
        assert tensor_spec("x", x).device == "cpu"
    finally:
        mode.in_kernel_invocation = False
