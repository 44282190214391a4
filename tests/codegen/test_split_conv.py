"""The convolution on AMX tiles against float64: strides, paddings, dilations, residual and ReLU, odd sizes, threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import meshwright as mw
from meshwright.codegen import program_cpp_conv_methods as methods
from meshwright.codegen.program_cpp_conv import PackedConv
from meshwright.codegen.program_cpp_run import host_library
from meshwright.codegen.timings import Timings
from meshwright.runtime.program import Conv, TensorSpec

EPS = torch.finfo(torch.float32).eps
needs_tiles = pytest.mark.skipif(not host_library().mw_split_ready(), reason="this machine has no AMX tiles")
Pair = tuple[int, int]


def last(x: torch.Tensor) -> torch.Tensor:
    """Channels last, also where sizes of 1 leave torch a choice of strides."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def wanted(stride: Pair, padding: Pair, dilation: Pair, relu: bool) -> PackedConv:
    spec = TensorSpec("y", "float32", (1, 1, 1, 1), (1, 1, 1, 1))
    step = Conv(spec, "x", "w", "b", stride, padding, dilation, 1, (), (), relu=relu)
    return PackedConv((0, 1), step, (1, 1, 1, 1))


def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, other: torch.Tensor | None, conv: PackedConv,
        threads: int, like: torch.Tensor) -> torch.Tensor | None:
    """The template's result, None where it declines."""
    out = last(torch.full_like(like, 9.0))
    packed = methods.split_weight(host_library(), w)
    done = methods.call_conv(host_library(), threads, last(x), packed, tuple(w.shape), conv, b, out,
                             last(other) if other is not None else None)
    return out if done else None


def pairs(*values: int) -> st.SearchStrategy[Pair]:
    return st.tuples(st.sampled_from(values), st.sampled_from(values))


@needs_tiles
@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 3), channels=st.sampled_from([3, 16, 32, 40, 64]), out=st.sampled_from([8, 32, 33, 96]),
       size=pairs(1, 5, 7, 14, 19, 33), kernel=pairs(1, 2, 3, 5), stride=pairs(1, 2, 3), padding=pairs(0, 1, 2),
       dilation=pairs(1, 2), residual=st.booleans(), relu=st.booleans(), threads=st.integers(1, 3),
       seed=st.integers(0, 1 << 20))
def test_agrees_with_float64(batch, channels, out, size, kernel, stride, padding, dilation, residual, relu, threads,
                             seed):
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    torch.manual_seed(seed)
    x, w, b = torch.randn(batch, channels, *size), torch.randn(out, channels, *kernel), torch.randn(out)
    exact = F.conv2d(x.double(), w.double(), b.double(), stride, padding, dilation)
    eager = F.conv2d(x, w, b, stride, padding, dilation)
    other = torch.randn(eager.shape) if residual else None

    def finish(y: torch.Tensor) -> torch.Tensor:
        y = y if other is None else y + other
        return y.relu() if relu else y

    found = run(x, w, b, other, wanted(stride, padding, dilation, relu), threads, eager)
    assert found is not None
    error = float((found.double() - finish(exact)).abs().max())
    assert error <= 2 * float((finish(eager).double() - finish(exact)).abs().max()) + 4 * EPS * float(exact.abs().max())


@needs_tiles
@pytest.mark.parametrize(("width", "kernel", "stride", "padding"), [(1, 3, 3, 1), (2, 4, 4, 1), (1, 5, 5, 2)])
def test_a_phase_of_the_stride_that_holds_only_padding(width: int, kernel: int, stride: int, padding: int):
    """Right of a narrow image there is padding, not the next row's first pixel (nor what lies behind the tensor)."""
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 32, 9, width), torch.randn(16, 32, kernel, kernel), torch.randn(16)
    conv = wanted((stride, stride), (padding, padding), (1, 1), False)
    expected = F.conv2d(x, w, b, stride, padding)
    torch.testing.assert_close(run(x, w, b, None, conv, 1, expected), expected, rtol=1e-4, atol=1e-4)


@needs_tiles
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-42])
def test_declines_values_outside_of_its_range(value: float):
    torch.manual_seed(0)
    x, w, b = torch.randn(1, 32, 6, 6), torch.randn(16, 32, 3, 3), torch.zeros(16)
    x[:, :, 2, 2] = value
    assert run(x, w, b, None, wanted((1, 1), (1, 1), (1, 1), False), 1, torch.empty(1, 16, 6, 6)) is None


class Block(nn.Module):
    """Convolutions with batch norm, a strided one, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(32, 48, 3, 2, 1), nn.Conv2d(48, 48, 1, bias=False)
        self.norm = nn.BatchNorm2d(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return torch.relu(self.norm(self.second(x)) + x)


@pytest.mark.parametrize("forced", [True, False])
def test_a_model_with_either_method(forced: bool, monkeypatch: pytest.MonkeyPatch):
    """Whichever is chosen, and where an infinity makes the template decline, the model's results stay."""
    monkeypatch.setattr(methods, "pays", lambda *_: forced and bool(host_library().mw_split_ready()))
    torch.manual_seed(0)
    model = Block().eval()
    model.norm.running_var.uniform_(0.5, 2.0)
    x = last(torch.randn(2, 32, 9, 11))
    fast = torch.compile(model, backend="meshwright")
    with torch.no_grad():
        for value in (None, None, float("inf")):
            if value is not None:
                x[0, 3, 4, 5] = value
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_forbidden_by_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MESHWRIGHT_SPLIT_PRODUCTS", "0")
    weight, bias = torch.randn(32, 32, 1, 1), torch.randn(32)
    assert not methods.pays(host_library(), wanted((1, 1), (0, 0), (1, 1), False), [weight, bias], (1, 32, 56, 56), 1,
                            Timings())


def test_mw_compile_of_a_block():
    torch.manual_seed(1)
    model, x = Block().eval(), torch.randn(1, 32, 16, 16)
    fast = mw.compile(model, (x,))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


@needs_tiles
def test_a_weight_out_of_range_does_not_look_fast(monkeypatch: pytest.MonkeyPatch):
    """What is timed is a convolution, not the template declining it."""
    weight, shift, done = torch.full((16, 32, 3, 3), 1e-42), torch.zeros(16), []
    real = methods.call_conv
    monkeypatch.setattr(methods, "call_conv", lambda *given: done.append(real(*given)) or done[-1])
    methods.measure(host_library(), wanted((1, 1), (1, 1), (1, 1), False), weight, shift, (1, 32, 8, 8), 1)
    assert done[0] is False and len(done) > 1 and all(done[1:])
