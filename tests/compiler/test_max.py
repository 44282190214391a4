"""mode="max": Inductor competes, the faster stays, and the default mode never loads it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compiler import candidates, measure

pytestmark = pytest.mark.usefixtures("eager_engine")


@pytest.mark.parametrize("wins", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_the_faster_stays(monkeypatch: pytest.MonkeyPatch, wins: bool, train: bool) -> None:
    monkeypatch.setattr(measure.Timing, "faster", property(lambda self: wins))
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)).train(train), torch.randn(4, 8)
    fast = mw.compile(model, x, options={"mode": "max"})
    [row] = fast.report.passes["inductor"].candidates
    assert row.verdict == ("kept" if wins else "dropped")
    assert row.measured_before_s > 0 and row.measured_after_s > 0
    assert {g.chosen for g in fast.report.graphs} == {"inductor" if wins else "meshwright"}
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(fast(x), model(x))
    if train:
        parameters = list(model.parameters())
        torch.testing.assert_close(torch.autograd.grad(fast(x).sum(), parameters),
                                   torch.autograd.grad(model(x).sum(), parameters))


def test_buffers_are_timed_with_their_packed_copies_kept() -> None:
    with torch.inference_mode():
        copies = candidates._copies([torch.ones(3), nn.Parameter(torch.ones(3), requires_grad=False), 7])
    assert not copies[0].is_inference() and copies[2] == 7


def test_the_default_mode_never_imports_the_inductor_compiler() -> None:
    code = ("import sys, torch, meshwright as mw\n"
            "def loaded(*names):\n    return [n for n in names if f'torch._inductor.{n}' in sys.modules]\n"
            "m = torch.nn.Linear(4, 4)\n"
            "with torch.no_grad():\n    mw.compile(m.eval(), torch.randn(2, 4))(torch.randn(3, 4))\n"
            "assert not loaded('compile_fx', 'graph', 'scheduler', 'lowering'), loaded('scheduler')\n"
            "mw.compile(m.train(), torch.randn(2, 4))(torch.randn(3, 4)).sum().backward()\n"
            # torch's own partitioner imports Inductor's pattern matcher, and that its lowerings and scheduler
            "assert not loaded('compile_fx', 'graph')\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
