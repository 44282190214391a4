"""A compiled module is the model: class, Parameters, hooks, state, gradients, copies."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw

pytestmark = pytest.mark.usefixtures("eager_engine")


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.25))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        out = self.head(self.body(x))
        return {"logits": out if scale is None else out * scale}


def make(train: bool = False) -> tuple[Net, torch.Tensor]:
    return Net().train(train), torch.randn(6, 8)


def graphs(model: nn.Module) -> int:
    return len([g for g in model.report.graphs if g.kind in ("forward", "inference")])


def test_it_is_an_instance_of_the_class_with_the_same_signature() -> None:
    model, x = make()
    fast = mw.compile(model, x)
    assert isinstance(fast, Net)
    assert type(fast) is not Net and type(fast).__name__ == "Net"
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert mw.compile(model).__class__ is fast.__class__


def test_parameters_are_shared_and_keys_kept() -> None:
    model, x = make()
    fast = mw.compile(model, x)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        before = fast(x)["logits"]
        fast.load_state_dict(Net().state_dict())
        assert not torch.equal(fast(x)["logits"], before)
        torch.testing.assert_close(fast(x), model(x))


def test_an_optimizer_made_before_trains_it() -> None:
    model, x = make(train=True)
    twin = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=1e-1, momentum=0.9) for m in (model, twin))
    fast = mw.compile(model, x)
    for _ in range(3):
        for m, o in ((fast, optimizer), (twin, other)):
            torch.manual_seed(7)
            o.zero_grad()
            m(x)["logits"].square().mean().backward()
            o.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_gradients_accumulate_on_the_original_parameters() -> None:
    model, x = make(train=True)
    fast = mw.compile(model, x)
    torch.manual_seed(1)
    fast(x)["logits"].sum().backward()
    once = model.head.weight.grad.clone()
    torch.manual_seed(1)
    fast(x)["logits"].sum().backward()
    torch.testing.assert_close(model.head.weight.grad, 2 * once)


def test_compiling_leaves_no_trace() -> None:
    model, x = make(train=True)
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    state = torch.get_rng_state()
    mw.compile(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_equals_eager_bit_for_bit() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Dropout(0.1)), torch.randn(6, 8)
    fast = mw.compile(model, x)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), expected)


def test_train_and_eval_switch() -> None:
    model, x = make()
    fast = mw.compile(model, x)
    fast.train()
    assert model.body.training
    torch.manual_seed(0)
    a = fast(x)["logits"]
    fast.eval()
    b = fast(x)["logits"]
    assert not torch.equal(a, b)
    model.eval()
    torch.testing.assert_close(b, model(x)["logits"])


def test_hooks_run_inside_and_outside() -> None:
    model, x = make()
    seen: list[str] = []
    model.register_forward_hook(lambda m, a, o: seen.append("root"))
    model.head.register_forward_pre_hook(lambda m, a: (a[0] * 0,))
    fast = mw.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x)["logits"], model.head.bias.expand(6, 4))
    assert seen == ["root"]


def test_deepcopy_is_independent() -> None:
    model, x = make()
    fast = mw.compile(model, x)
    twin = copy.deepcopy(fast)
    assert isinstance(twin, Net) and twin.head.weight is not fast.head.weight
    with torch.no_grad():
        twin.head.weight.zero_()
        torch.testing.assert_close(twin(x)["logits"], twin.head.bias.expand(6, 4))
        torch.testing.assert_close(fast(x), model(x))
    assert twin.report is not fast.report


def test_pickling_is_refused_with_a_sentence() -> None:
    model, x = make()
    with pytest.raises(mw.MeshwrightError, match=r"pickling a compiled Net.*save\(directory\)"):
        pickle.dumps(mw.compile(model, x))


def test_new_sizes_compile_nothing() -> None:
    model, x = make()
    fast = mw.compile(model, x)
    count = graphs(fast)
    with torch.no_grad():
        for n in (2, 3, 17, 64):
            y = torch.randn(n, 8)
            torch.testing.assert_close(fast(y), model(y))
        assert graphs(fast) == count
        fast(torch.randn(1, 8))
        assert graphs(fast) == count + 1


def test_the_backend_recompiles_once_for_dynamic_sizes() -> None:
    from meshwright.compiler.backend import recent_reports

    model, _ = make()
    fast = torch.compile(model, backend="meshwright")
    start = len(recent_reports())
    with torch.no_grad():
        for n in (5, 6, 7, 8):
            y = torch.randn(n, 8)
            torch.testing.assert_close(fast(y), model(y))
    assert len(recent_reports()) - start <= 2


def test_autocast_and_inference_mode() -> None:
    model, x = make()
    fast = mw.compile(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = fast(x)["logits"]
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, model(x)["logits"])
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))


def test_gradient_checkpointing_inside() -> None:
    class Checkpointed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    model = Checkpointed().train()
    x = torch.randn(6, 8)
    fast = mw.compile(model, x)
    torch.manual_seed(5)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    torch.manual_seed(5)
    got = torch.autograd.grad(fast(x).sum(), list(model.parameters()))
    torch.testing.assert_close(got, expected)


def test_a_single_layer_compiles_in_place() -> None:
    model, x = make()
    expected = model(x)
    model.body.compile(backend="meshwright")
    torch.testing.assert_close(model(x), expected)


def test_keyword_and_mapping_examples() -> None:
    model, x = make()
    fast = mw.compile(model, {"x": x, "scale": torch.tensor(2.0)})
    with torch.no_grad():
        torch.testing.assert_close(fast(x=x, scale=torch.tensor(3.0)), model(x, torch.tensor(3.0)))


def test_compiling_twice_starts_from_the_model() -> None:
    model, x = make()
    again = mw.compile(mw.compile(model, x), x)
    assert isinstance(again, Net)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))


def test_attributes_named_like_ours_are_kept() -> None:
    class Reporter(Net):
        def report(self) -> str:
            return "mine"

    fast = mw.compile(Reporter().eval(), torch.randn(3, 8))
    assert fast.report() == "mine"
    assert fast.meshwright.report.graphs


def test_an_instance_level_forward_is_compiled() -> None:
    model, x = make()
    original = model.forward
    model.forward = lambda x: {"logits": original(x)["logits"] + 1}
    fast = mw.compile(model, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x)["logits"], original(x)["logits"] + 1)
