"""PEFT adapters in and around a compiled model: only their matrices train, and their gradients are eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw

from ..architectures.compare import EVERY_KERNEL, assert_close, run
from ..architectures.zoo import BY_NAME

peft = pytest.importorskip("peft")

ENTRIES: dict[str, Callable[[nn.Module], Any]] = {
    "backend": lambda m: torch.compile(m, backend="meshwright", options=EVERY_KERNEL),
    "compile": lambda m: mw.compile(m, options=EVERY_KERNEL),
    "compile with an example": lambda m: mw.compile(m, BY_NAME["llama"].inputs(), options=EVERY_KERNEL),
}


def adapted() -> nn.Module:
    base = BY_NAME["llama"].build()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.train()


@pytest.mark.parametrize("entry", ENTRIES)
def test_lora_adapters_train_and_the_base_does_not(entry: str) -> None:
    model, inputs = adapted(), BY_NAME["llama"].inputs()
    wide = copy.deepcopy(model).double()
    truth, eager = run(wide, wide, inputs), run(model, model, inputs)
    compiled = ENTRIES[entry](model)
    run(compiled, model, inputs)
    got = run(compiled, model, inputs)
    assert got.gradients and all("lora" in n for n in got.gradients)
    assert got.gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert_close(got, eager, truth)


def test_a_disabled_adapter_is_off_in_the_compiled_model() -> None:
    model, inputs = adapted(), BY_NAME["llama"].inputs()
    compiled = mw.compile(model)
    run(compiled, model, inputs)
    with torch.no_grad(), model.disable_adapter():
        without = model(**inputs).logits
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).logits, without, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(compiled(**inputs).logits, without, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_inside_an_adapter() -> None:
    base, inputs = BY_NAME["llama"].build().eval(), BY_NAME["llama"].inputs()
    compiled = peft.get_peft_model(mw.compile(base), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).logits, base(**inputs).logits, rtol=1e-4, atol=1e-5)
