"""The pipeline keeps what is right and faster, and drops everything else with its name and a reason."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compiler import measure, watch

from . import planted

pytestmark = pytest.mark.usefixtures("eager_engine")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.gelu(self.first(x))
        return torch.nn.functional.gelu(torch.relu(self.second(x)))


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replacement counts as faster."""
    monkeypatch.setattr(measure.Timing, "faster", property(lambda self: True))


def compiled(function, *, train: bool = False, **options):
    model = Net().train(train).requires_grad_(train)
    x = torch.randn(4, 8)
    out = mw.compile(model, x, passes=[planted.Planted(function)], options=options or None)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(out(x), model(x))
    return out


def test_a_right_pass_is_spliced_and_reported(untimed: None) -> None:
    entry = compiled(planted.right).report.passes["planted"]
    assert (entry.matched, entry.rewritten, entry.dropped) == (2, 2, [])
    assert [n.reason for n in entry.refused] == ["relu is left alone"]
    assert all(c.measured_before_s > 0 and c.measured_after_s > 0 for c in entry.candidates)


def test_the_replacement_really_runs(untimed: None) -> None:
    seen = []

    def right(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return torch.nn.functional.gelu(x)

    compiled(right)
    assert seen


@pytest.mark.parametrize(("function", "reason"), [
    (planted.wrong, "wrong: output 0"),
    (planted.wrong_for_large, "on large inputs"),
    (planted.crashing, "raised ZeroDivisionError: planted"),
    (planted.other_dtype, "dtype torch.float64, expected torch.float32"),
    (planted.mutating, "input 0 is left with other values"),
    (planted.two_outputs, "2 values, expected 1"),
])
def test_a_wrong_replacement_is_dropped_and_named(untimed: None, function, reason: str) -> None:
    entry = compiled(function).report.passes["planted"]
    assert entry.rewritten == 0
    assert len(entry.dropped) == 2
    assert all(reason in n.reason and "gelu" in n.where for n in entry.dropped), entry.dropped


def test_a_gradient_that_is_wrong_is_found_when_training(untimed: None) -> None:
    assert compiled(planted.wrong_gradient).report.passes["planted"].rewritten == 2
    torch.compiler.reset()
    entry = compiled(planted.wrong_gradient, train=True).report.passes["planted"]
    assert entry.rewritten == 0
    assert "wrong: gradient 0" in entry.dropped[0].reason


def test_a_slow_replacement_is_dropped() -> None:
    entry = compiled(planted.slow).report.passes["planted"]
    assert {n.reason for n in entry.dropped} == {"not faster"}
    row = entry.candidates[0]
    assert row.measured_after_s > row.measured_before_s


def test_a_hanging_replacement_is_given_up_on(untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HANG_LIMIT_S", 0.5)
    start = time.perf_counter()
    entry = compiled(planted.hanging).report.passes["planted"]
    assert time.perf_counter() - start < 20
    assert "still running after 0.5 s" in entry.dropped[0].reason


@pytest.mark.parametrize("how", ["raise", "hang"])
def test_a_broken_find_is_named(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HANG_LIMIT_S", 0.5)
    model, x = Net().eval(), torch.randn(2, 8)
    out = mw.compile(model, x, passes=[planted.BrokenFind(how)])
    [note] = out.report.passes["broken"].dropped
    assert note.reason.startswith("find failed: ")
    assert ("find is broken" if how == "raise" else "still running") in note.reason


def test_no_predicted_gain_is_not_even_checked() -> None:
    model, x = Net().eval(), torch.randn(2, 8)
    out = mw.compile(model, x, passes=[planted.Planted(planted.crashing, gain_s=0.0)])
    assert {n.reason for n in out.report.passes["planted"].dropped} == {"no gain predicted"}


def test_the_time_limit_skips_checks_and_says_so() -> None:
    model, x = Net().eval(), torch.randn(2, 8)
    out = mw.compile(model, x, passes=[planted.Planted(planted.hanging)], time_limit_s=0.7)
    assert "still running" in out.report.passes["planted"].dropped[0].reason or (
        "time limit" in out.report.passes["planted"].dropped[0].reason)
    torch.testing.assert_close(out(x), model(x))


def test_structurally_equal_regions_are_checked_once(untimed: None) -> None:
    calls = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.nn.functional.gelu(x)

    model, x = Net().eval(), torch.randn(2, 8)
    mw.compile(model, x, passes=[planted.Planted(counted, one_key=True)], options={"measure": False})
    once = len(calls)
    torch.compiler.reset()
    calls.clear()
    mw.compile(model, x, passes=[planted.Planted(counted, one_key=False)], options={"measure": False})
    assert len(calls) > once


def test_passes_can_be_disabled_for_modules(untimed: None) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Net(), Net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.encoder(x)[:, :8])

    out = mw.compile(Outer().eval(), torch.randn(2, 8), passes=[planted.Planted(planted.right)],
                     disable="planted:encoder*")
    entry = out.report.passes["planted"]
    assert entry.rewritten == 2
    assert [n.reason for n in entry.refused].count("disabled for this module") == 2


def test_dump_writes_every_step(untimed: None, tmp_path: Path) -> None:
    compiled(planted.right, dump_dir=str(tmp_path))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert any(n.endswith("-dynamo.txt") for n in names)
    assert any(n.endswith("-planted.txt") for n in names)
    assert "gelu" in next(tmp_path.glob("*-dynamo.txt")).read_text()


def test_random_state_buffers_and_gradients_are_left_alone(untimed: None) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.GELU())
    x = torch.randn(4, 8)
    model(x).sum().backward()
    state, grads = torch.get_rng_state(), [p.grad.clone() for p in model.parameters()]
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    mw.compile(model, x, passes=[planted.Planted(planted.right)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(b, buffers[k]) for k, b in model.named_buffers())
