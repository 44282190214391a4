"""A compilation for CUDA on a stand-in for the device: CPU tensors, interpreted kernels, planted times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compiler import acceptance, aten, program_builder
from meshwright.runtime import cache, packing
from meshwright.runtime.cuda_graphs import CudaGraphApi
from meshwright.runtime.device_clock import CudaClock

from ..runtime.test_cuda_graphs import RecordedGraphs


class Block(nn.Module):
    """An MLP with GELU, twice, and three products of one tensor before it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x) for part in self.parts)
        x = (q.softmax(-1) + k.softmax(-1)) * v.softmax(-1)
        for layer in self.layers:
            x = x + layer(x).softmax(-1)
        return x


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Programs say "cuda"; the times of methods by name, taken in order: the library, then others."""
    real = program_builder.tensor_spec
    times = {"library": 3e-5, "other": 1e-5}

    def seconds(self: CudaClock, runs: Sequence[Callable[[], Any]], where: torch.device) -> list[float]:
        for run in runs:
            run()
        return [times["library"], *[times["other"]] * (len(runs) - 1)]

    graphs = RecordedGraphs()
    for name, value in (("identity", lambda self, where: ("stand-in",)), ("ready", lambda self, where: True),
                        ("free_bytes", lambda self, where: 1 << 30), ("seconds", seconds)):
        monkeypatch.setattr(CudaClock, name, value)
    for name in ("capture", "order", "mark"):
        monkeypatch.setattr(CudaGraphApi, name, staticmethod(getattr(graphs, name)))
    monkeypatch.setattr(program_builder, "tensor_spec", lambda name, value, **more: dataclasses.replace(
        real(name, value, **more), device="cuda"))
    monkeypatch.setattr(aten, "graph_device", lambda gm: "cuda")
    monkeypatch.setattr(acceptance.Acceptance, "_time", lambda self, *args: acceptance.Verdict(True))  # interpreted
    monkeypatch.setattr(cache, "get_json", lambda key: None)
    monkeypatch.setattr(cache, "put_json", lambda key, value: None)
    packing.clear()
    return times


def compiled(dynamic: bool = False, **options: Any) -> tuple[Any, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(4, 16)
    return mw.compile(model, (x,), dynamic=dynamic, options=options), model, x


def rows(fast: Any) -> dict[str, Any]:
    """The report's rows of products, by what they stand for."""
    return {c.region.split(" (")[0]: c for c in fast.report.passes["fuse"].candidates if "→" in c.region}


def agrees(fast: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_is_faster_is_used_and_reported(device: dict[str, float]) -> None:
    fast, model, x = compiled()
    agrees(fast, model, x)
    assert not fast.report.fall_backs
    found = rows(fast)
    (gelu,) = [c for name, c in found.items() if "gelu" in name or "erf" in name]
    assert (gelu.verdict, gelu.count) == ("kept", 2)
    assert (gelu.measured_before_s, gelu.measured_after_s) == (3e-5, 1e-5)
    assert found["3 x addmm of one tensor → baddbmm"].verdict == "kept"
    graph = next(g for g in fast.report.graphs if g.kind == "inference")
    assert "tile_dot_exact(a, b, acc)" in graph.source and "torch.ops.aten.baddbmm.default" in graph.source
    assert graph.timings and "tile_dot" not in str(graph.program)


def test_what_is_slower_is_dropped_and_reported(device: dict[str, float]) -> None:
    device["other"] = 5e-5
    fast, model, x = compiled()
    agrees(fast, model, x)
    assert {(c.verdict, c.reason) for c in rows(fast).values()} == {("dropped", "the library is as fast")}
    assert all(c.measured_after_s == 5e-5 for c in rows(fast).values())
    graph = next(g for g in fast.report.graphs if g.kind == "inference")
    assert "tile_dot" not in graph.source and "baddbmm" not in graph.source


def test_sizes_that_change_are_measured_per_power_of_two(device: dict[str, float]) -> None:
    fast, model, _ = compiled(dynamic=True)
    for count in (4, 7, 8, 5):
        agrees(fast, model, torch.randn(count, 16))
    gelus = [c for c in fast.report.passes["fuse"].candidates if "→" in c.region and "gelu" in c.region]
    assert len(gelus) == 2 and all(c.verdict == "kept" for c in gelus)


def test_kernels_that_reduce_are_refused_with_a_reason(device: dict[str, float]) -> None:
    fast, _, _ = compiled()
    assert any(n.reason == "the kernel reduces" and "addmm → " in n.where for n in fast.report.passes["fuse"].refused)


def test_nothing_is_measured_against_the_users_will(device: dict[str, float]) -> None:
    fast, model, x = compiled(measure=False)
    agrees(fast, model, x)
    assert {(c.verdict, c.reason) for c in rows(fast).values()} == {("dropped", "nothing may be measured")}


def test_without_fusion_products_are_left_alone(device: dict[str, float]) -> None:
    fast, model, x = compiled(disable="fuse")
    agrees(fast, model, x)
    assert "fuse" not in fast.report.passes or not rows(fast)
