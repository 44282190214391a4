"""Programs printed as Python: the text, what it computes (kernels interpreted on CPU tensors), and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from meshwright.codegen.program_graphs import load_program_cuda, why_no_graph
from meshwright.codegen.program_python import load_program_python, print_program_python
from meshwright.runtime.cuda_graphs import GraphedProgram
from meshwright.runtime.errors import ArtifactError
from meshwright.runtime.program import Alloc, Call, Launch, Program, Release, Step, Symbol, TensorSpec, View

GELU = """
kernel gelu(s0, x: f32 -> y: f32)
  axes p0: s0, p1: 8
  %0: f32 = load x[8*p0 + p1]
  %1: f32 = const 0.7071067811865476
  %2: f32 = mul %0, %1
  %3: f32 = erf %2
  %4: f32 = const 1.0
  %5: f32 = add %3, %4
  %6: f32 = const 0.5
  %7: f32 = mul %0, %6
  %8: f32 = mul %7, %5
  store y[8*p0 + p1] = %8
"""


def spec(name: str, *shape: int | str, static: bool = False,
         strides: tuple[int | str, ...] | None = None) -> TensorSpec:
    made = strides if strides is not None else ((shape[1], 1) if len(shape) == 2 else (1,))
    return TensorSpec(name, "float32", shape, made, "cuda", static)


def mlp(rows: int | str = 4) -> Program:
    """y = gelu(x @ w + b), and its first column."""
    steps: tuple[Step, ...] = (
        Call("aten.addmm.default", ({"tensor": "b"}, {"tensor": "x"}, {"tensor": "w"}), {}, ("t0",),
             (spec("t0", rows, 8),)),
        Alloc(spec("y", rows, 8), escapes=True),
        Launch("gelu_0", ("t0",), ("y",), (rows,)),
        Release(("t0",)),
        View(spec("first", rows, strides=(8,)), "y", 0),
    )
    symbols = (Symbol("s0", tensor="x"),) if rows == "s0" else ()
    inputs = (spec("x", rows, 3), spec("w", 3, 8, static=True), spec("b", 8, static=True))
    return Program("mlp", inputs, symbols, steps, ("y", {"tensor": "first"}, None, {"size": rows}), {"gelu_0": GELU})


def expected(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(torch.addmm(b, x, w))


@pytest.mark.parametrize("rows", [4, "s0"])
def test_program_computes_what_it_says(rows: int | str) -> None:
    call = load_program_python(mlp(rows))
    for n in ([4] if rows == 4 else [4, 1, 9]):
        x, w, b = torch.randn(n, 3), torch.randn(3, 8), torch.randn(8)
        y, first, nothing, size = call([x, w, b])
        torch.testing.assert_close(y, expected(x, w, b))
        assert torch.equal(first, y[:, 0]) and first.data_ptr() == y.data_ptr()
        assert nothing is None and size == n


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("triton/program_mlp.py", print_program_python(mlp("s0")))


def test_kernels_of_the_caller_are_called_instead() -> None:
    seen: list[Any] = []

    def gelu(buffers: Any, sizes: Any) -> None:
        seen.append(list(sizes))
        buffers[1].copy_(torch.nn.functional.gelu(buffers[0]))

    program = mlp(4)
    assert "triton" not in print_program_python(program, kernels=False)
    x, w, b = torch.randn(4, 3), torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(load_program_python(program, {"gelu_0": gelu})([x, w, b])[0], expected(x, w, b))
    assert seen == [[4]]


def test_operators_with_several_results_and_odd_arguments() -> None:
    steps: tuple[Step, ...] = (
        Call("aten.split.Tensor", ({"tensor": "x"}, {"size": "floordiv(s0, 2)"}), {"dim": 0}, ("a", None)),
        Call("aten.max.dim", ({"tensor": "a"}, 1), {}, ("m", "at")),
        Call("aten.full.default", ([{"size": "2*s0 - 1"}], {"float": "-inf"}), {"dtype": {"dtype": "float64"}}, ("f",)),
        Call("aten.sum.default", ({"tensor": "x"},), {"dtype": {"dtype": "torch.float64"}}, ("s",)),
    )
    program = Program("several", (spec("x", "s0", 3),), (Symbol("s0", tensor="x"),), steps, ("m", "at", "f", "s"))
    x = torch.randn(6, 3)
    m, at, f, s = load_program_python(program)([x])
    assert torch.equal(m, x[:3].amax(1)) and torch.equal(at, x[:3].argmax(1))
    assert f.shape == (11,) and f.dtype == torch.float64 and bool((f == float("-inf")).all())
    assert s.dtype == torch.float64


BAD = "x; import os"


@pytest.mark.parametrize("change", [
    lambda p: dataclasses.replace(p, name='x"""\nimport os\n"""'),
    lambda p: dataclasses.replace(p, inputs=(spec(BAD, 4, 3),)),
    lambda p: dataclasses.replace(p, outputs=({"tensor": BAD},)),
    lambda p: dataclasses.replace(p, outputs=({"dtype": BAD},)),
    lambda p: dataclasses.replace(p, steps=(Launch("k([]) or print", (), ()),)),
    lambda p: dataclasses.replace(p, steps=(Call("aten.add.Tensor or print", (), {}, ("t0",)),)),
    lambda p: dataclasses.replace(p, steps=(Call("os.system", ("true",), {}, ("t0",)),)),
    lambda p: dataclasses.replace(p, steps=(Call("aten.add.Tensor", (), {BAD: 1}, ("t0",)),)),
    lambda p: dataclasses.replace(p, steps=(Call("aten.add.Tensor", (object(),), {}, ("t0",)),)),
    lambda p: dataclasses.replace(p, steps=(Alloc(dataclasses.replace(spec("t", 1, 1), dtype=BAD)),)),
])
def test_names_from_a_file_never_become_code(change: Callable[[Program], Program]) -> None:
    with pytest.raises(ArtifactError, match="expected"):
        print_program_python(change(mlp()))


def test_sizes_from_a_file_never_become_code() -> None:
    with pytest.raises(ValueError, match="not an integer expression"):
        print_program_python(dataclasses.replace(mlp(), steps=(Alloc(spec("t", "__import__('os')", 1)),)))


@pytest.mark.parametrize("rows", [4, "s0"])
def test_inference_programs_go_through_graphs(rows: int | str) -> None:
    assert why_no_graph(mlp(rows)) is None
    call = load_program_cuda(mlp(rows))
    assert isinstance(call, GraphedProgram)
    x, w, b = torch.randn(4, 3), torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(call([x, w, b])[0], expected(x, w, b))


def calling(op: str, *args: Any) -> Program:
    return dataclasses.replace(mlp(), steps=(Call(op, args, {}, ("d", "m")),))


X, B = {"tensor": "x"}, {"tensor": "b"}
CPU_INPUT = (TensorSpec("x", "float32", (4, 3), (3, 1), "cpu"), *mlp().inputs[1:])


@pytest.mark.parametrize(("program", "reason"), [
    (dataclasses.replace(mlp(), inference=False), "training"),
    (dataclasses.replace(mlp(), steps=(Launch("gelu_0", ("x",), ("x",), (4,)),)), "writes to an input"),
    (calling("aten.copy_.default", X, B), "writes to an input"),
    (dataclasses.replace(mlp(), steps=(View(spec("v", 4, 3), "x"), Launch("gelu_0", ("x",), ("v",), (4,)))),
     "writes to an input"),
    (calling("aten.native_dropout.default", X, 0.5, True), "nondeterministic"),
    (calling("aten.nonzero.default", X), "dynamic output"),
    (dataclasses.replace(mlp(), inputs=CPU_INPUT), "not on"),
])
def test_what_a_graph_may_not_hold(program: Program, reason: str) -> None:
    assert reason in (why_no_graph(program) or "")
    assert not isinstance(load_program_cuda(program), GraphedProgram)
