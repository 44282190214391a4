"""Module-level passes and registered passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compiler import measure
from meshwright.passes import Candidate, Predicted, Refused

pytestmark = pytest.mark.usefixtures("eager_engine")


class Scaled(nn.Module):
    """Shares a linear layer's Parameters, times `factor`."""

    def __init__(self, linear: nn.Linear, factor: float, *, share: bool = True) -> None:
        super().__init__()
        self.weight = linear.weight if share else nn.Parameter(linear.weight.detach().clone())
        self.bias = linear.bias
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * self.factor


@dataclass(frozen=True)
class Replace:
    factor: float = 1.0
    share: bool = True
    name: ClassVar[str] = "replace"
    lossless: ClassVar[bool] = True
    level: ClassVar[str] = "module"

    def find(self, target: nn.Module, context) -> list:
        found = [Candidate(n, Scaled(m, self.factor, share=self.share), Predicted(1e-6, 0.0))
                 for n, m in target.named_modules() if isinstance(m, nn.Linear)]
        return [*found, Refused("not a linear layer", "1")]


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Timing, "faster", property(lambda self: True))


def compiled(each: Replace, **options) -> tuple[nn.Module, nn.Module]:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8)
    fast = mw.compile(model, x, passes=[each], **options)
    torch.testing.assert_close(fast(x), model(x))
    assert isinstance(model[0], nn.Linear), "the original must not be touched"
    return model, fast


def test_submodules_are_replaced_on_a_copy_that_shares_parameters() -> None:
    model, fast = compiled(Replace())
    assert isinstance(fast[0], Scaled) and fast[0].weight is model[0].weight
    assert list(fast.state_dict()) == list(model.state_dict())
    entry = fast.report.passes["replace"]
    assert (entry.matched, entry.rewritten, len(entry.refused)) == (2, 2, 1)
    fast(torch.randn(3, 8)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize(("each", "reason"), [
    (Replace(factor=1.01), "wrong: output 0"),
    (Replace(share=False), "must keep the same Parameter objects"),
])
def test_wrong_ones_are_dropped(each: Replace, reason: str) -> None:
    _, fast = compiled(each)
    assert isinstance(fast[0], nn.Linear)
    assert all(reason in n.reason for n in fast.report.passes["replace"].dropped)


def test_a_pattern_keeps_a_pass_away() -> None:
    _, fast = compiled(Replace(), disable="replace:0")
    assert isinstance(fast[0], nn.Linear) and isinstance(fast[2], Scaled)


def test_without_example_inputs_nothing_is_replaced() -> None:
    fast = mw.compile(nn.Sequential(nn.Linear(2, 2)), passes=[Replace()])
    assert isinstance(fast[0], nn.Linear)
    assert "needs example_inputs" in fast.report.passes["replace"].refused[0].reason


@pytest.fixture
def registered() -> Iterator[None]:
    mw.passes.register_pass(Replace)
    yield
    mw.passes.unregister_pass("replace")


def test_a_registered_pass_runs_by_default_by_name_and_not_when_disabled(registered: None) -> None:
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.randn(2, 2)
    assert isinstance(mw.compile(model, x)[0], Scaled)
    assert isinstance(mw.compile(model, x, passes=["replace"])[0], Scaled)
    assert isinstance(mw.compile(model, x, disable=["replace"])[0], nn.Linear)
    assert isinstance(mw.compile(model, x, passes=["fuse"])[0], nn.Linear)
    with pytest.raises(mw.MeshwrightError, match="a pass named 'replace' exists"):
        mw.passes.register_pass(Replace)


def test_aten_level_passes_are_refused() -> None:
    class Aten(Replace):
        level: ClassVar[str] = "aten"

    with pytest.raises(mw.MeshwrightError, match="level 'module' or 'graph'"):
        mw.passes.register_pass(Aten)


def test_the_how_to_page_works_as_written() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to-register-a-pass.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.square(torch.nn.functional.relu(x)) + torch.square(x)

    names = {"model": Net(), "x": torch.randn(64, 64), "__name__": "__main__"}
    try:
        exec(compile(code, "how-to-register-a-pass.md", "exec"), names)  # our own page, not input
        entry = names["fast"].report.passes["relu-squared"]
        assert (entry.matched, entry.rewritten) == (1, 1), entry
        assert [n.reason for n in entry.refused] == ["a square of something other than relu"]
        torch.testing.assert_close(names["fast"](names["x"]), names["model"](names["x"]))
    finally:
        mw.passes.unregister_pass("relu-squared")
