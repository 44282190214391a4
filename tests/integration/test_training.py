"""Training features around a compiled model: each gives eager's losses and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw

from ..architectures.compare import EVERY_KERNEL, assert_close, run, widened
from ..architectures.zoo import BY_NAME

Wrap = Callable[[nn.Module], Any]
ENTRIES: dict[str, Wrap] = {
    "backend": lambda m: torch.compile(m, backend="meshwright", options=EVERY_KERNEL),
    "compile": lambda m: mw.compile(m, options=EVERY_KERNEL),
}


class Block(nn.Module):
    """A residual MLP whose inside is checkpointed."""

    def __init__(self, width: int = 24, recompute: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.recompute, self.dropout = recompute, dropout

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.down(F.gelu(self.up(self.norm(x)))), self.dropout, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x))


def stack(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(**options), Block(**options), nn.Linear(24, 5))


def batch(seed: int = 0, rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ENTRIES)
def wrap(request: pytest.FixtureRequest) -> Wrap:
    return ENTRIES[request.param]


def test_gradient_checkpointing_inside_the_model(wrap: Wrap) -> None:
    model, x = stack(recompute=True), {"input": batch()}
    wide = copy.deepcopy(model).double()
    truth, eager = run(wide, wide, widened(x)), run(model, model, x)
    compiled = wrap(model)
    run(compiled, model, x)
    assert_close(run(compiled, model, x), eager, truth)


def test_gradient_checkpointing_of_transformers() -> None:
    model = BY_NAME["llama"].build()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = BY_NAME["llama"].inputs()
    wide = copy.deepcopy(model).double()
    truth, eager = run(wide, wide, inputs), run(model, model, inputs)
    compiled = ENTRIES["backend"](model)
    run(compiled, model, inputs)
    assert_close(run(compiled, model, inputs), eager, truth)


def test_gradient_accumulation(wrap: Wrap) -> None:
    """Three backward passes add up in `.grad` as they do in eager."""
    model = stack()
    compiled = wrap(model)

    def accumulate(call: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        for seed in range(3):
            call(batch(seed)).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = accumulate(model)
    accumulate(compiled)
    for got, want in zip(accumulate(compiled), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_training_steps_follow_eager(wrap: Wrap) -> None:
    """Five SGD steps with momentum: the same losses, parameters shared with the original model."""
    losses = []
    for compile_it in (False, True):
        model = stack()
        call = wrap(model) if compile_it else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        found = []
        for seed in range(5):
            optimizer.zero_grad()
            loss = call(batch(seed)).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][-1] != losses[1][0]


def test_dropout_equals_eager_bit_for_bit(wrap: Wrap) -> None:
    """Random numbers are ATen's: the same seed drops the same elements."""
    model = stack(dropout=0.4)
    compiled = wrap(model)
    for _ in range(3):
        torch.manual_seed(7)
        wanted = model(batch())
        torch.manual_seed(7)
        got = compiled(batch())
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_train_and_eval_switch(wrap: Wrap) -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    reference, compiled = copy.deepcopy(model), None
    compiled = wrap(model)
    for step, training in enumerate((True, True, False, True, False, False)):
        reference.train(training)
        (compiled if hasattr(compiled, "train") else model).train(training)
        torch.manual_seed(step)
        wanted = reference(batch(step))
        torch.manual_seed(step)
        torch.testing.assert_close(compiled(batch(step)), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean)
    assert model[1].num_batches_tracked == reference[1].num_batches_tracked == 3


def test_autocast_bf16(wrap: Wrap) -> None:
    model = stack()
    compiled = wrap(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = model(batch())
        compiled(batch())
        got = compiled(batch())
    assert got.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(compiled(batch()), model(batch()), rtol=1e-4, atol=1e-5)  # and outside of it fp32 again


def test_inference_mode_then_training(wrap: Wrap) -> None:
    model = stack()
    compiled = wrap(model)
    wanted = model(batch())
    for _ in range(2):
        with torch.inference_mode():
            got = compiled(batch())
        assert got.is_inference()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        got = compiled(batch())
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layer_compile() -> None:
    """`layer.compile(backend="meshwright")` on single layers of a model."""
    model, x = stack(), {"input": batch()}
    wide = copy.deepcopy(model).double()
    truth, eager = run(wide, wide, widened(x)), run(model, model, x)
    for layer in model:
        layer.compile(backend="meshwright", options=EVERY_KERNEL)
    run(model, model, x)
    assert_close(run(model, model, x), eager, truth)


def test_new_batch_sizes_reuse_the_program(wrap: Wrap) -> None:
    """Symbolic batch: sizes other than 0 and 1 agree with eager whatever was compiled first."""
    model = stack().eval()
    compiled = wrap(model)
    with torch.no_grad():
        for rows in (6, 3, 17, 2, 1, 6):
            torch.testing.assert_close(compiled(batch(0, rows)), model(batch(0, rows)), rtol=1e-4, atol=1e-5)


def test_a_loss_computed_by_the_model() -> None:
    """GPT-2 with labels: the loss is part of the graph, and the output keeps its class."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(0, 64, (2, 8))
    compiled = mw.compile(model, {"input_ids": ids, "labels": ids})
    wanted = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    for _ in range(2):
        out = compiled(input_ids=ids, labels=ids)
        assert type(out).__name__ == "CausalLMOutputWithCrossAttentions"
        got = torch.autograd.grad(out.loss, list(model.parameters()))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
