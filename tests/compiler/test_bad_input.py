"""Mistakes are one clear MeshwrightError each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compiler.backend import meshwright as backend

pytestmark = pytest.mark.usefixtures("eager_engine")


@dataclass
class Unhashable:
    sizes: list[int] = field(default_factory=list)
    name: ClassVar[str] = "unhashable"
    lossless: ClassVar[bool] = True
    level: ClassVar[str] = "graph"

    def find(self, target, context):
        return []


@pytest.mark.parametrize(("call", "message"), [
    (lambda: mw.compile(lambda x: x), r"a function; expected a torch\.nn\.Module"),
    (lambda: mw.compile(nn.Linear), r"a type; expected a torch\.nn\.Module.*Call the class first"),
    (lambda: mw.compile(torch.jit.script(nn.Linear(2, 2))), "expected a torch.nn.Module in Python.*that was scripted"),
    (lambda: mw.compile(nn.Linear(2, 2), passes=["fuze"]), "unknown pass 'fuze'.*did you mean 'fuse'"),
    (lambda: mw.compile(nn.Linear(2, 2), disable="fuss"), "unknown pass 'fuss'.*'fuse'"),
    (lambda: mw.compile(nn.Linear(2, 2), mode="maxx"), "unknown mode 'maxx'.*'max'"),
    (lambda: mw.compile(nn.Linear(2, 2), options={"mod": "max"}), "unknown option 'mod'.*'mode'"),
    (lambda: mw.compile(nn.Linear(2, 2), options=["max"]), "options of type list"),
    (lambda: mw.compile(nn.Linear(2, 2), options={1: 2}), "unknown option '1'"),
    (lambda: mw.compile(nn.Linear(2, 2), options={"target": "gpu"}), "unknown target 'gpu'; expected one of cpu, cuda"),
    (lambda: mw.compile(nn.Linear(2, 2), options={"extra": {"fuze": {}}}), "unknown pass 'fuze'.*did you mean 'fuse'"),
    (lambda: mw.compile(nn.Linear(2, 2), disable=3), "disable=3; expected pass names"),
    (lambda: mw.compile(nn.Linear(2, 2), time_limit_s=-1), "time_limit_s=-1.*positive"),
    (lambda: mw.compile(nn.Linear(2, 2), passes=[3]), "3 in passes; expected a pass name or a Pass"),
    (lambda: mw.compile(nn.Linear(2, 2), passes=[Unhashable()]), "not hashable"),
    (lambda: mw.compile(nn.Linear(2, 2), 3), "example_inputs of type int"),
    (lambda: mw.compile(nn.Linear(2, 2), {"y": torch.zeros(2)}), r"do not fit Linear.forward.*\(input\)"),
    (lambda: mw.compile(nn.Linear(2, 2), torch.zeros(3, 5)), "Linear fails on these example_inputs, also without"),
    (lambda: mw.compile(nn.Linear(2, 2), torch.zeros(3, 2).long()), "Linear fails on these example_inputs"),
])
def test_one_sentence(call, message: str) -> None:
    with pytest.raises(mw.MeshwrightError, match=message):
        call()


def test_a_quantized_model_is_refused() -> None:
    quantized = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    with pytest.raises(mw.MeshwrightError, match="already quantized.*torch.ao Linear"):
        mw.compile(nn.Sequential(quantized))
    model = nn.Module()
    model.register_buffer("weight", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    with pytest.raises(mw.MeshwrightError, match="'weight' is a quantized Tensor"):
        mw.compile(model)
    loaded = nn.Linear(2, 2)
    loaded.is_quantized = True  # what transformers writes on a model that it loaded quantized, with whichever tool
    with pytest.raises(mw.MeshwrightError, match="already quantized: transformers loaded it with"):
        mw.compile(nn.Sequential(loaded))


def test_backend_options_are_checked_too() -> None:
    gm = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(mw.MeshwrightError, match="unknown option"):
        backend(gm, [torch.ones(2)], options={"pases": ["fuse"]})
    with pytest.raises(mw.MeshwrightError, match="unknown pass 'fuze'.*did you mean 'fuse'"):
        backend(gm, [torch.ones(2)], options={"passes": ["fuze"]})
    assert torch.compile(nn.ReLU(), backend="meshwright", options={"passes": ["fuse"]})(torch.ones(2)).sum() == 2


def test_registering_needs_a_pass_and_a_free_name() -> None:
    with pytest.raises(mw.MeshwrightError, match="expected a Pass"):
        mw.passes.register_pass(lambda: 3)
    with pytest.raises(mw.MeshwrightError, match="no registered pass|unknown registered pass"):
        mw.passes.unregister_pass("nothing")
