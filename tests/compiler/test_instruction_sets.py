"""Models on the instruction sets of lesser machines: what CI's own processor would otherwise never run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from meshwright.runtime.errors import InvalidInputError
from meshwright.runtime.isa import choose_isa, cpu_features

PROGRAM = """
import torch
from torch import nn
import meshwright as mw
from meshwright.runtime.isa import current_isa

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
                                  nn.ReLU())
        self.qkv, self.norm = nn.Linear(32, 96), nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = self.norm(x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x)).mean(1).sin()).log_softmax(-1)

torch.manual_seed(0)
model, x = Model(), torch.randn(2, 3, 28, 28)
fast = mw.compile(model, x)
for _ in range(2):
    got, wanted = fast(x), model(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for mine, eager in zip(*(torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (got, wanted)),
                           strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-3, atol=1e-3)
model.eval(), fast.eval()
with torch.no_grad():
    for _ in range(2):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
assert fast.report.kernels and all(g.state == "ready" for g in fast.report.graphs)
print(current_isa().name)
"""


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_a_model_compiles_and_trains(isa: str) -> None:
    """In a process of its own: the host runtime is loaded once, for one instruction set."""
    try:
        choose_isa(isa, platform.machine().lower(), cpu_features())
    except InvalidInputError:
        pytest.skip(f"this machine has no {isa}")
    run = subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, "MESHWRIGHT_ISA": isa}, timeout=500,
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [isa]
