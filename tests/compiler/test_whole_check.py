"""The last comparison: a program that is wired wrongly is caught; rounding and chaos are not mistaken for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from meshwright.compiler import aten
from meshwright.compiler.backend import compile_graph
from meshwright.compiler.report import Report
from meshwright.compiler.settings import resolve
from meshwright.compiler.whole_check import WrongResult, compare_whole, off
from meshwright.runtime.errors import MeshwrightWarning


def test_the_share_of_elements_that_are_off():
    x = torch.linspace(-1, 1, 100)
    assert off(x.clone(), x) == off(x + 1e-4, x) == 0.0
    assert off(torch.where(x > 0.5, x + 1, x), x) == 0.25
    assert off(x.double(), x) == off(x[:50], x) == 1.0
    assert off(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert off(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0])) == 0.0
    assert off(torch.tensor([0.0, float("nan")]), torch.tensor([float("nan"), 1.0])) == 1.0
    assert off(None, None) == off(torch.empty(0), torch.empty(0)) == 0.0


def test_chaos_is_no_mistake_but_a_wrong_result_is():
    x = torch.randn(1000)

    def chaotic(given: Sequence[Any]) -> list[torch.Tensor]:
        return [torch.sin(given[0] * 1e9)]

    compare_whole(chaotic([x * (1 + 2e-7)]), chaotic([x]), chaotic, [x])
    with pytest.raises(WrongResult, match="output 0"):
        compare_whole([x * 2], [x], lambda given: [given[0]], [x])


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(16, 32), nn.Linear(32, 8), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.second(self.dropout(torch.relu(self.first(x)))), -1)


def compiled(model: nn.Module, strict: bool) -> tuple[Any, Report]:
    torch.compiler.reset()
    report, settings = Report(), resolve({"strict": strict})
    return torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, settings, report)), report


@pytest.fixture
def wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every region is right, and the program swaps rows."""
    true_build = aten.build_program

    def swapped(*args: Any) -> Any:
        built = true_build(*args)
        return replace(built, run=lambda inputs: [o.flip(0) if isinstance(o, torch.Tensor) else o
                                                  for o in built.run(inputs)])

    monkeypatch.setattr(aten, "build_program", swapped)


def test_a_wrong_program_runs_eagerly_and_says_so(wrong_products: None):
    model, x = Model().eval(), torch.randn(6, 16)
    fast, report = compiled(model, strict=False)
    with torch.no_grad():
        with pytest.warns(MeshwrightWarning, match="every region passed"):
            first = fast(x)
        for found in (first, fast(x)):
            torch.testing.assert_close(found, model(x))
    assert report.graphs[0].state == "fallen back"


def test_a_wrong_program_is_an_error_when_strict(wrong_products: None):
    fast, _ = compiled(Model().eval(), strict=True)
    with torch.no_grad():
        for _ in range(2):  # also for a caller that caught the first
            with pytest.raises(WrongResult):
                fast(torch.randn(6, 16))


def test_what_was_not_compared_is_reported():
    fast, report = compiled(Model(0.5).train(), strict=True)
    fast(torch.randn(6, 16)).sum().backward()
    assert any("random numbers" in note.reason for note in report.notes)
