"""A residual network through `meshwright.compile`: one graph for every batch and image size, convolutions only."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.codegen.program_cpp_conv import can_convolve
from meshwright.codegen.program_cpp_run import CompiledProgram
from meshwright.runtime.program import Call, Conv, Launch

pytestmark = pytest.mark.skipif(not can_convolve(), reason="this torch has no oneDNN")
SIZES = [(2, 64, 96), (3, 80, 48), (5, 100, 132)]  # batch, height, width


def normed(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    norm = nn.BatchNorm2d(out)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), norm)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(normed(channels, out // 4, 1), nn.ReLU(), normed(out // 4, out // 4, 3, stride),
                                  nn.ReLU(), normed(out // 4, out, 1))
        self.shortcut = normed(channels, out, 1, stride) if channels != out or stride != 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Residual(nn.Module):
    """Stem with max pool, three bottlenecks (one of them with an identity), mean over the image, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(normed(3, 16, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Bottleneck(16, 32, 1), Bottleneck(32, 32, 1), Bottleneck(32, 64, 2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[int, CompiledProgram]:
    """Every compiled program that ran, by identity."""
    ran: dict[int, CompiledProgram] = {}
    call = CompiledProgram.__call__

    def watched(self: CompiledProgram, inputs):
        ran[id(self)] = self
        return call(self, inputs)

    monkeypatch.setattr(CompiledProgram, "__call__", watched)
    return ran


def test_a_residual_network_is_folded_once_for_all_sizes(programs: dict[int, CompiledProgram]) -> None:
    model = Residual().eval()
    fast = mw.compile(model, torch.randn(2, 3, 64, 96))
    count = len(fast.report.graphs)
    with torch.no_grad():
        for batch, height, width in (*SIZES, *reversed(SIZES)):
            x = torch.randn(batch, 3, height, width)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(fast.report.graphs) == count == 1
    (program,) = programs.values()
    steps = program.program.steps
    assert sum(isinstance(s, Conv) for s in steps) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    # what is left: the last sum and mean are one kernel, which reads its two summands contiguous
    operators = Counter(s.op for s in steps if isinstance(s, Call))
    assert operators == {"aten.max_pool2d_with_indices.default": 1, "aten.clone.default": 2}
    assert sum(isinstance(s, Launch) for s in steps) == 1


class Stages(nn.Module):
    """Convolutions and ReLU without batch norm, with pooling that halves the image (VGG)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 16, 24)
        self.features = nn.Sequential(*[layer for n, m in zip(widths[:-1], widths[1:], strict=True) for layer in (
            nn.Conv2d(n, m, 3, padding=1), nn.ReLU(), nn.Conv2d(m, m, 3, padding=1), nn.ReLU(inplace=True),
            nn.MaxPool2d(2))])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize("dynamic", [True, False])
def test_convolutions_without_batch_norm_take_their_relu(programs: dict[int, CompiledProgram], dynamic: bool) -> None:
    model = Stages().eval()
    with torch.no_grad():
        fast = mw.compile(model, torch.randn(2, 3, 64, 96), dynamic=dynamic)
        for batch, height, width in ((2, 64, 96), *(((3, 50, 46), (1, 8, 9), (2, 64, 96)) if dynamic else ())):
            x = torch.randn(batch, 3, height, width)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    for program in programs.values():
        steps = program.program.steps
        assert [s.relu for s in steps if isinstance(s, Conv)] == [True] * 6
        assert not any(isinstance(s, Launch) and "relu" in s.kernel for s in steps)
        # between the stages everything stays channels last: one copy, before the mean
        assert sum(s.op == "aten.clone.default" for s in steps if isinstance(s, Call)) == 1
    assert programs
