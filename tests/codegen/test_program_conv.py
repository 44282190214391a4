"""Convolutions with batch norm, ReLU and residual folded in: when it fires, when it must not, and the numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meshwright.codegen.program_conv import fuse_convolutions
from meshwright.codegen.program_cpp_conv import can_convolve
from meshwright.codegen.program_cpp_run import compile_program
from meshwright.runtime.program import Alloc, Call, Conv, Launch, Program, TensorSpec

if not can_convolve():
    pytest.skip("this torch has no oneDNN", allow_module_level=True)

NORM_RELU = """kernel bn(in0: f32, in1: f32, in2: f32, in3: f32, in4: f32 -> out0: f32)
  axes p0: 2, p1: 8, p2: 36
  %0: f32 = load in0[288*p0 + 36*p1 + p2]
  %1: f32 = load in1[p1]
  %2: f32 = sub %0, %1
  %3: f32 = load in2[p1]
  %4: f32 = const 1e-05
  %5: f32 = add %3, %4
  %6: f32 = rsqrt %5
  %7: f32 = mul %2, %6
  %8: f32 = load in3[p1]
  %9: f32 = mul %7, %8
  %10: f32 = load in4[p1]
  %11: f32 = add %9, %10
  %12: f32 = const 0.0
  %13: f32 = max %11, %12
  store out0[288*p0 + 36*p1 + p2] = %13
"""
ADD = """kernel add(in0: f32, in1: f32 -> out0: f32)
  axes p0: 2, p1: 8, p2: 36
  %0: f32 = load in0[288*p0 + 36*p1 + p2]
  %1: f32 = load in1[288*p0 + 36*p1 + p2]
  %2: f32 = add %0, %1
  store out0[288*p0 + 36*p1 + p2] = %2
"""
SIGMOID = """kernel gate(in0: f32 -> out0: f32)
  axes p0: 576
  %0: f32 = load in0[p0]
  %1: f32 = sigmoid %0
  store out0[p0] = %1
"""


def spec(name: str, *shape: int, static: bool = False) -> TensorSpec:
    return TensorSpec(name, "float32", shape, torch.empty(shape).stride(), static=static)


def conv(out: str, x: str, weight: str) -> Call:
    args = ({"tensor": x}, {"tensor": weight}, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return Call("aten.convolution.default", args, {}, (out,), (spec(out, 2, 8, 6, 6),))


def block(*, inference: bool = True, outputs: tuple[str, ...] = ("z", "g")) -> Program:
    """x -> conv -> bn+relu (y) -> conv -> + y (z); g = sigmoid(y)."""
    channels = tuple(spec(n, 8, static=True) for n in ("mean", "var", "gamma", "beta"))
    return Program(
        "block", (spec("x", 2, 8, 6, 6), spec("w1", 8, 8, 3, 3, static=True), *channels,
                  spec("w2", 8, 8, 3, 3, static=True)), (),
        (conv("c1", "x", "w1"), Alloc(spec("y", 2, 8, 6, 6)),
         Launch("bn", ("c1", "mean", "var", "gamma", "beta"), ("y",)),
         conv("c2", "y", "w2"), Alloc(spec("z", 2, 8, 6, 6), True), Launch("add", ("c2", "y"), ("z",)),
         Alloc(spec("g", 2, 8, 6, 6), True), Launch("gate", ("y",), ("g",))),
        outputs, {"bn": NORM_RELU, "add": ADD, "gate": SIGMOID}, inference)


def block_inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.randn(8), torch.rand(8) + 0.5, torch.randn(8),
            torch.randn(8), torch.randn(8, 8, 3, 3)]


def reference(x, w1, mean, var, gamma, beta, w2) -> list[torch.Tensor]:
    y = torch.relu(F.batch_norm(F.conv2d(x, w1, padding=1), mean, var, gamma, beta, eps=1e-5))
    return [F.conv2d(y, w2, padding=1) + y, torch.sigmoid(y)]


def check(program, inputs) -> None:
    for got, wanted in zip(program(inputs), reference(*inputs), strict=True):
        assert got.stride() == wanted.stride()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_norm_relu_and_residual_fold_into_the_convolutions():
    convs = [s for s in fuse_convolutions(block()).steps if isinstance(s, Conv)]
    assert [(c.relu, c.other is not None) for c in convs] == [(True, False), (False, True)]
    check(compile_program(block()), block_inputs())


def test_changed_statistics_and_weights_are_seen():
    program, inputs = compile_program(block()), block_inputs()
    check(program, inputs)
    for k in (2, 4, 1):
        inputs[k].mul_(1.5)
        check(program, inputs)
    inputs[3] = torch.rand(8) + 1.0
    check(program, inputs)


def test_any_number_of_threads():
    program, inputs, before = compile_program(block()), block_inputs(), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            check(program, inputs)
    finally:
        torch.set_num_threads(before)


def test_training_and_shared_results_do_not_fold():
    assert not any(isinstance(s, Conv) for s in fuse_convolutions(block(inference=False)).steps)
    shared = fuse_convolutions(block(outputs=("z", "g", "c1")))
    assert [c.relu for c in shared.steps if isinstance(c, Conv)] == [False, False]
    inputs = block_inputs()
    z, g, c1 = compile_program(block(outputs=("z", "g", "c1")))(inputs)
    torch.testing.assert_close(c1, F.conv2d(inputs[0], inputs[1], padding=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z, reference(*inputs)[0], rtol=1e-4, atol=1e-4)
