"""Models that no table can know are planned: from a module of one's own, with FLOPs as torch counts them, and with most
parameters frozen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

import meshwright as mw
from meshwright.compiler.planner.plan_model import Planner, Request

from .unseen import Frobnicator, tokens

SIZES = {"depth": 4, "width": 128, "heads": 8, "groups": 4, "inner": 256, "rows": 512, "fused": False}
CODE = '''
import torch
from torch import nn
from {package} import Frobnicator, tokens

SIZES = {sizes}

class Zorp(Frobnicator):
    pass

def make(seq, micro_batch):
    return Zorp(**SIZES), tokens(micro_batch, seq, SIZES["rows"])

class Patched(nn.Module):
    """A frozen product beside two small trained ones."""

    def __init__(self, whole):
        super().__init__()
        self.whole = whole.requires_grad_(False)
        self.down = nn.Linear(whole.in_features, 4, bias=False)
        self.up = nn.Linear(4, whole.out_features, bias=False)

    def forward(self, x):
        return self.whole(x) + self.up(self.down(x))

def adapted(seq, micro_batch):
    model, example = make(seq, micro_batch)
    model.requires_grad_(False)
    for layer in model.stack:
        layer.one, layer.back = Patched(layer.one), Patched(layer.back)
    return model, example

def frozen(seq, micro_batch):
    model, example = make(seq, micro_batch)
    return model.requires_grad_(False), example
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that makes such models."""
    (tmp_path / "zorps.py").write_text(CODE.format(package=Frobnicator.__module__, sizes=SIZES))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "zorps"
    sys.modules.pop("zorps", None)


def test_an_unseen_model_is_planned_with_the_flops_that_torch_counts(module: str) -> None:
    found = mw.plan(f"{module}:make", "1x4 h100-sxm", seq=64, global_batch=16, tp=2, pp=1)
    assert found.predicted.fits and found.mesh.gpus == 4 and "stack.3" in found.model.layers
    counter = FlopCounterMode(display=False)
    with counter:
        Frobnicator(**SIZES)(*tokens(1, 64, SIZES["rows"]))["loss"].backward()
    described = Planner(Request(f"{module}:make", "1x4 h100-sxm", 64, 16)).model.one
    kinds = [described.kinds[k] for k in described.order]
    assert sum(k.flops_forward + k.flops_backward for k in kinds) == counter.get_total_flops()


def test_adapters_beside_frozen_weights_are_planned(module: str) -> None:
    """LoRA by the model's own hand: only the adapters have gradients and optimizer states."""
    whole, adapted = (mw.plan(f"{module}:{name}", "1x4 h100-sxm", seq=64, global_batch=16, tp=1, pp=1, zero=0)
                      for name in ("make", "adapted"))
    memory, small = whole.predicted.stages[0].memory_bytes, adapted.predicted.stages[0].memory_bytes
    trained = SIZES["depth"] * 4 * 2 * (SIZES["width"] + SIZES["inner"])
    assert small["gradients"] == 4 * trained and small["optimizer"] == 12 * trained
    assert memory["gradients"] == 4 * whole.model.parameters > 20 * small["gradients"]
    assert small["weights"] == 2 * adapted.model.parameters > memory["weights"]
    assert adapted.predicted.step_time_ns < whole.predicted.step_time_ns


def test_a_model_without_anything_to_train_is_refused_by_name(module: str) -> None:
    with pytest.raises(mw.MeshwrightError, match="zorps:frozen has no trainable parameters.*inference"):
        mw.plan(f"{module}:frozen", "1x4 h100-sxm", seq=64, global_batch=16)
