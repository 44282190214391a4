"""Convolutions with batch norm, ReLU and residual folded in: when it fires, when it must not, and the numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meshwright.codegen import program_cpp_conv_sizes as conv_sizes
from meshwright.codegen.program_conv import fuse_convolutions
from meshwright.codegen.program_cpp_conv import can_convolve
from meshwright.codegen.program_cpp_run import compile_program
from meshwright.codegen.program_memory import size_expr, size_text
from meshwright.runtime import packing
from meshwright.runtime.program import Alloc, Call, Conv, Launch, Program, Size, Symbol, SymbolInput, TensorSpec

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


RELU = """kernel relu(in0: f32 -> out0: f32)
  axes p0: 576
  %0: f32 = load in0[p0]
  %1: f32 = const 0.0
  %2: f32 = max %0, %1
  store out0[p0] = %2
"""
ADD_RELU = """kernel add_relu(in0: f32, in1: f32 -> out0: f32)
  axes p0: 576
  %0: f32 = load in0[p0]
  %1: f32 = load in1[p0]
  %2: f32 = add %0, %1
  %3: f32 = const 0.0
  %4: f32 = max %2, %3
  store out0[p0] = %4
"""


def plain(*residual: int) -> Program:
    """x -> conv -> relu (y) -> conv, + r of shape `residual`, relu (z). No batch norm: the kernels have one axis."""
    return Program(
        "plain", (spec("x", 2, 8, 6, 6), spec("w1", 8, 8, 3, 3, static=True), spec("w2", 8, 8, 3, 3, static=True),
                  spec("r", *residual)), (),
        (conv("c1", "x", "w1"), Alloc(spec("y", 2, 8, 6, 6)), Launch("relu", ("c1",), ("y",)), conv("c2", "y", "w2"),
         Alloc(spec("z", 2, 8, 6, 6), True), Launch("add_relu", ("c2", "r"), ("z",))),
        ("z",), {"relu": RELU, "add_relu": ADD_RELU})


@pytest.mark.parametrize(("residual", "folded"), [
    ((2, 8, 6, 6), [(True, False), (True, True)]),
    ((2, 8, 4, 9), [(True, False), (False, False)]),  # as many elements, read one after the other: not its shape
    ((2, 288), [(True, False), (False, False)]),
])
def test_relu_and_residual_fold_without_a_batch_norm(residual: tuple[int, ...], folded: list[tuple[bool, bool]]):
    program = plain(*residual)
    steps = fuse_convolutions(program).steps
    assert [(c.relu, c.other is not None) for c in steps if isinstance(c, Conv)] == folded
    torch.manual_seed(0)
    x, w1, w2, r = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.randn(8, 8, 3, 3), torch.randn(*residual)
    y = torch.relu(F.conv2d(x, w1, padding=1))
    wanted = torch.relu(F.conv2d(y, w2, padding=1) + r.reshape(y.shape))
    torch.testing.assert_close(compile_program(program)([x, w1, w2, r])[0], wanted, rtol=1e-4, atol=1e-4)


# -- symbolic sizes ---------------------------------------------------------------------------------
SYMBOLIC_HEAD = ("(n, h, w, ", "8*h*w*p0 + h*w*p1 + p2", "axes p0: n, p1: 8, p2: h*w")
SIZES = [(2, 6, 6), (3, 6, 6), (2, 9, 5), (1, 1, 7), (5, 32, 30)]


def symbolic(kernel: str) -> str:
    """A kernel of this file over batch `n` and image `h` x `w`."""
    head, index, axes = SYMBOLIC_HEAD
    return (kernel.replace("(in0", head + "in0", 1).replace("288*p0 + 36*p1 + p2", index)
            .replace("axes p0: 2, p1: 8, p2: 36", axes).replace("axes p0: 576", "axes p0: 8*n*h*w"))


def dense(name: str, *shape: Size) -> TensorSpec:
    strides, step = [], size_expr(1)
    for size in reversed(shape):
        strides.append(size_text(step))
        step = step * size_expr(size)
    return TensorSpec(name, "float32", shape, tuple(reversed(strides)))


def symbolic_block() -> Program:
    """`block`, then a max pool (p) of the sum: batch and width are dimensions of x, the height is an integer input."""
    image = ("s0", 8, "s7", "s1")
    half = ("s0", 8, "floordiv(s7 - 1, 2) + 1", "floordiv(s1 - 1, 2) + 1")
    fixed = block()
    steps: list[object] = []
    for step in fixed.steps:
        match step:
            case Alloc():
                steps.append(Alloc(dense(step.spec.name, *image), step.escapes))
            case Launch():
                steps.append(Launch(step.kernel, step.inputs, step.outputs, ("s0", "s7", "s1")))
            case Call():
                steps.append(Call(step.op, step.args, {}, step.outs, (dense(str(step.outs[0]), *image),)))
    pool = Call("aten.max_pool2d_with_indices.default", ({"tensor": "z"}, [3, 3], [2, 2], [1, 1]), {}, ("p", None),
                (dense("p", *half), None))
    return Program("block", (SymbolInput("height"), dense("x", *image), *fixed.inputs[1:]),
                   (Symbol("s0", tensor="x"), Symbol("s1", tensor="x", dim=3), Symbol("s7", argument=0)),
                   (*steps, pool), ("g", "p"), {k: symbolic(v) for k, v in fixed.kernels.items()})


def check_symbolic(program, size, weights) -> None:
    x = torch.randn(size[0], 8, *size[1:])
    z, g = reference(x, *weights)
    got = program([size[1], x, *weights])
    for have, wanted in zip(got, (g, F.max_pool2d(z, 3, 2, 1)), strict=True):
        assert have.stride() == wanted.stride()
        torch.testing.assert_close(have, wanted, rtol=1e-4, atol=1e-4)


def test_symbolic_sizes_fold_as_constant_ones_do():
    steps = fuse_convolutions(symbolic_block()).steps
    assert [(c.relu, c.other is not None) for c in steps if isinstance(c, Conv)] == [(True, False), (False, True)]
    assert [s.kernel for s in steps if isinstance(s, Launch)] == ["gate"]
    pool = next(s for s in steps if isinstance(s, Call) and s.op == "aten.max_pool2d_with_indices.default")
    assert pool.args[0] == {"tensor": "z__last"}


def test_symbolic_sizes_run_at_any_size():
    program, weights = compile_program(symbolic_block()), block_inputs()[1:]
    for size in (*SIZES, *SIZES, *reversed(SIZES)):
        check_symbolic(program, size, weights)
    weights[2].mul_(2.0)
    check_symbolic(program, SIZES[0], weights)


def test_sizes_are_packed_for_when_they_come_again():
    program, weights = compile_program(symbolic_block()), block_inputs()[1:]
    sizes = program._conv_sizes
    assert sizes is not None

    def sets_after(size) -> list[tuple[int, ...]]:
        check_symbolic(program, size, weights)
        return list(sizes._sets[torch.get_num_threads()])

    for size in SIZES:
        assert len(sets_after(size)) == 1  # of the first call
    batch, height, width = SIZES[0]
    for size in SIZES[1:]:
        last = sets_after(size)
    assert len(last) == conv_sizes.MAX_SIZES and (batch, width, height) not in last  # the least recently used


def test_sizes_of_one_layout_share_a_copy(monkeypatch):
    packing.clear()
    program, weights = compile_program(symbolic_block()), block_inputs()[1:]
    for layouts in (1, 2):
        monkeypatch.setattr(conv_sizes, "_layout", lambda *_, layouts=layouts: bytes([layouts]))
        for size in SIZES[2 * layouts - 2: 2 * layouts]:
            check_symbolic(program, size, weights)
            check_symbolic(program, size, weights)
        owned = packing._owners[id(weights[0])].copies
        assert sum(key[0] == "conv" for key in owned) == layouts


def test_a_weight_packed_for_other_sizes_still_fits():
    """oneDNN wants other layouts of this weight for these sizes and threads, on most processors."""
    x = dense("x", "s0", 2048, "s1", "s1")
    args = ({"tensor": "x"}, {"tensor": "w"}, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    step = Call("aten.convolution.default", args, {}, ("y",), (dense("y", "s0", 512, "s1", "s1"),))
    program = compile_program(Program("one", (x, spec("w", 512, 2048, 1, 1, static=True)),
                                      (Symbol("s0", tensor="x"), Symbol("s1", tensor="x", dim=2)), (step,), ("y",)))
    weight, before = torch.randn(512, 2048, 1, 1) / 45, torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for size in (7, 9, 9, 21, 7):
            image = torch.randn(1, 2048, size, size)
            torch.testing.assert_close(program([image, weight])[0], F.conv2d(image, weight), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_a_kernel_along_other_axes_does_not_fold():
    """Statistics along the height: dense and affine too, only the extents tell."""
    program = symbolic_block()
    turned = {**program.kernels, "bn": program.kernels["bn"].replace("p1: 8, p2: h*w", "p1: h, p2: 8*w")
              .replace("8*h*w*p0 + h*w*p1 + p2", "8*h*w*p0 + 8*w*p1 + p2")}
    steps = fuse_convolutions(Program(program.name, program.inputs, program.symbols, program.steps, program.outputs,
                                      turned)).steps
    assert [s.kernel for s in steps if isinstance(s, Launch)] == ["bn", "gate"]


def test_symbolic_channels_are_left_to_aten():
    program = symbolic_block()
    steps = [Call(s.op, s.args, {}, s.outs, (dense(str(s.outs[0]), "s0", "s7", "s7", "s1"),))
             if isinstance(s, Call) and s.op == "aten.convolution.default" else s for s in program.steps]
    left = Program(program.name, program.inputs, program.symbols, tuple(steps), program.outputs, program.kernels)
    assert fuse_convolutions(left) == left
