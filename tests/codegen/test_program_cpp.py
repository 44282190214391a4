"""Programs printed as C++ equal the same steps in torch: views, symbols, several outputs, errors, threads."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref

import pytest
import torch

from meshwright.codegen.cpp import compile_kernels
from meshwright.codegen.ir_text import parse_kernel
from meshwright.codegen.program_cpp import print_program_cpp
from meshwright.codegen.program_cpp_run import CompiledProgram, compile_program, release_arenas
from meshwright.codegen.schema import Unsupported
from meshwright.runtime import packing
from meshwright.runtime.program import (
    Alloc,
    Call,
    Launch,
    Program,
    Release,
    Symbol,
    SymbolInput,
    TensorSpec,
    View,
)

RELU = """kernel relu(s0, in0: f32 -> out0: f32)
  axes p0: s0
  %0: f32 = load in0[p0]
  %1: f32 = const 0.0
  %2: f32 = max %0, %1
  store out0[p0] = %2
"""
NORM = """kernel norm(s0, in0: f32, in1: f32 -> out0: f32)
  axes p0: s0, r0: 32 reduce
  %0: f32 = load in0[32*p0 + r0]
  %1: f32 = mul %0, %0
  %2: f32 = reduce_sum %1
  %3: f32 = const 0.03125
  %4: f32 = mul %2, %3
  %5: f32 = const 1e-06
  %6: f32 = add %4, %5
  %7: f32 = rsqrt %6
  %8: f32 = mul %0, %7
  %9: f32 = load in1[r0]
  %10: f32 = mul %8, %9
  store out0[32*p0 + r0] = %10
"""


def f32(name: str, shape: tuple, strides: tuple | None = None, static: bool = False) -> TensorSpec:
    if strides is None:
        strides, step = [], 1
        for n in reversed(shape):
            strides.insert(0, step)
            step = f"{n}*{step}" if isinstance(n, str) or isinstance(step, str) else n * step
        strides = tuple(strides)
    return TensorSpec(name, "float32", shape, strides, static=static)


def tensor(name: str) -> dict:
    return {"tensor": name}


def addmm(out: TensorSpec, bias: str, a: str, b: str) -> Call:
    return Call("aten.addmm.default", (tensor(bias), tensor(a), tensor(b)), {}, (out.name,), (out,))


def mlp(rows: int | str = 10, *, symbols: tuple = (), extra: tuple = ()) -> Program:
    """addmm -> relu -> addmm -> norm, weights transposed by views."""
    hidden = 48
    size = f"{hidden}*{rows}" if isinstance(rows, str) else hidden * rows
    return Program(
        "mlp",
        inputs=(*extra, f32("x", (rows, 32)), f32("w1", (hidden, 32), static=True), f32("b1", (hidden,), static=True),
                f32("w2", (32, hidden), static=True), f32("b2", (32,), static=True), f32("g", (32,), static=True)),
        symbols=symbols,
        steps=(
            View(f32("w1t", (32, hidden), (1, 32)), "w1"),
            addmm(f32("h", (rows, hidden)), "b1", "x", "w1t"),
            Alloc(f32("a", (rows, hidden))),
            Launch("relu", ("h",), ("a",), (size,)),
            Release(("h",)),
            View(f32("w2t", (hidden, 32), (1, hidden)), "w2"),
            addmm(f32("y", (rows, 32)), "b2", "a", "w2t"),
            Alloc(f32("out", (rows, 32)), escapes=True),
            Launch("norm", ("y", "g"), ("out",), (rows,)),
        ),
        outputs=("out",),
        kernels={"relu": RELU, "norm": NORM},
    )


def mlp_inputs(rows: int = 10) -> list[torch.Tensor]:
    torch.manual_seed(rows)
    shapes = [(rows, 32), (48, 32), (48,), (32, 48), (32,), (32,)]
    return [torch.randn(s) for s in shapes]


def mlp_reference(x, w1, b1, w2, b2, g):
    y = torch.relu(x @ w1.T + b1) @ w2.T + b2
    return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6) * g


def test_products_and_kernels_agree_with_torch():
    program = compile_program(mlp())
    inputs = mlp_inputs()
    for _ in range(3):
        (out,) = program(inputs)
        torch.testing.assert_close(out, mlp_reference(*inputs), rtol=1e-5, atol=1e-5)


def linked(program: Program) -> CompiledProgram:
    kernels = [parse_kernel(text).renamed(name) for name, text in program.kernels.items()]
    return compile_program(program, lambda: compile_kernels(kernels))


def test_kernels_may_be_compiled_on_their_own():
    program = linked(mlp())
    assert "void relu(" not in program.source and "static Rows relu_rows, norm_rows;" in program.source
    inputs = mlp_inputs()
    torch.testing.assert_close(program(inputs)[0], mlp_reference(*inputs), rtol=1e-5, atol=1e-5)
    assert torch.equal(program(inputs)[0], compile_program(mlp())(inputs)[0])


def test_programs_of_one_text_keep_their_own_kernels():
    """Same names, same steps, another body: a library that both shared would run one's kernels for the other."""
    first = linked(mlp())
    second = linked(dataclasses.replace(mlp(), kernels={"relu": RELU.replace("max %0", "min %0"), "norm": NORM}))
    x, w1, b1, w2, b2, g = inputs = mlp_inputs()
    y = (x @ w1.T + b1).clamp(max=0) @ w2.T + b2
    other = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6) * g
    for _ in range(2):
        torch.testing.assert_close(first(inputs)[0], mlp_reference(*inputs), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second(inputs)[0], other, rtol=1e-5, atol=1e-5)


def test_symbol_from_a_dimension():
    program = compile_program(mlp("s0", symbols=(Symbol("s0", tensor="x", dim=0),)))
    for rows in (1, 7, 130, 0):
        inputs = mlp_inputs(rows)
        torch.testing.assert_close(program(inputs)[0], mlp_reference(*inputs), rtol=1e-5, atol=1e-5)


def test_symbol_from_an_argument_and_integer_output():
    base = mlp("s0", symbols=(Symbol("s0", argument=0),), extra=(SymbolInput("s0"),))
    program = compile_program(Program(**{**vars(base), "outputs": ({"size": "2*s0 + 1"}, "out", None)}))
    inputs = mlp_inputs(6)
    number, out, nothing = program([6, *inputs])
    assert (number, nothing) == (13, None)
    torch.testing.assert_close(out, mlp_reference(*inputs), rtol=1e-5, atol=1e-5)


def test_changed_and_replaced_weights_are_seen():
    program = compile_program(mlp())
    inputs = mlp_inputs()
    program(inputs)
    with torch.no_grad():
        inputs[1].mul_(2)
    torch.testing.assert_close(program(inputs)[0], mlp_reference(*inputs), rtol=1e-5, atol=1e-5)
    inputs[3] = torch.randn(32, 48)
    torch.testing.assert_close(program(inputs)[0], mlp_reference(*inputs), rtol=1e-5, atol=1e-5)
    inputs[3].data.mul_(3)
    packing.refresh([inputs[3]])
    torch.testing.assert_close(program(inputs)[0], mlp_reference(*inputs), rtol=1e-5, atol=1e-5)


def test_a_weight_that_changes_every_call_is_right_and_no_longer_packed():
    program = compile_program(mlp())
    inputs = mlp_inputs()
    for _ in range(8):
        with torch.no_grad():
            inputs[1].add_(0.1)
        torch.testing.assert_close(program(inputs)[0], mlp_reference(*inputs), rtol=1e-4, atol=1e-4)


def test_packed_copies_die_with_their_weight():
    packing.clear()
    program = compile_program(mlp())
    inputs = mlp_inputs()
    program(inputs)
    ref = weakref.ref(inputs[1])
    inputs.clear()
    gc.collect()
    assert ref() is None
    assert packing.clear() == 0


def test_tensors_made_under_inference_mode():
    program = compile_program(mlp())
    with torch.inference_mode():
        inputs = mlp_inputs()
        torch.testing.assert_close(program(inputs)[0], mlp_reference(*inputs), rtol=1e-5, atol=1e-5)


def operators() -> Program:
    """Operators of every argument kind, several results, an input returned as a view."""
    i64 = TensorSpec("index", "int64", (4,), (1,))
    return Program(
        "operators",
        inputs=(f32("x", (6, 8)), i64),
        symbols=(),
        steps=(
            Call("aten.index_select.default", (tensor("x"), 0, tensor("index")), {}, ("picked",),
                 (f32("picked", (4, 8)),)),
            Call("aten.topk.default", (tensor("picked"), 3), {}, ("top", None), (f32("top", (4, 3)), None)),
            Call("aten.cat.default", ([tensor("top"), tensor("picked")], 1), {}, ("both",), (f32("both", (4, 11)),)),
            Call("aten.index.Tensor", (tensor("x"), [None, tensor("index")]), {}, ("columns",),
                 (f32("columns", (6, 4)),)),
            Call("aten.split.Tensor", (tensor("x"), 3), {}, ("low", "high"),
                 (f32("low", (3, 8)), f32("high", (3, 8)))),
            Call("aten.ones.default", ([5],), {"dtype": {"dtype": "float64"}, "device": {"device": "cpu"},
                                              "pin_memory": False}, ("n",), (TensorSpec("n", "float64", (5,), (1,)),)),
            View(f32("inside", (4, 6), (8, 1)), "x", 9),
            View(f32("corner", (2, 3), (8, 1)), "inside", 8),
        ),
        outputs=("both", "columns", "high", "n", "corner", "x"),
    )


def test_memory_behind_results_that_share_it_is_kept():
    """`split` gives views of an arena tensor: its place must not be reused while they live."""
    program = Program(
        "shares", (f32("x", (4, 8)),), (),
        (Alloc(f32("a", (4, 8))), Launch("relu", ("x",), ("a",), (32,)),
         Call("aten.split.Tensor", (tensor("a"), 2), {}, ("p", "q"), (f32("p", (2, 8)), f32("q", (2, 8)))),
         Release(("a",)),
         Alloc(f32("b", (4, 8))), Launch("relu", ("b0",), ("b",), (32,)),
         Alloc(f32("out", (2, 8)), True), Launch("relu", ("q",), ("out",), (16,))),
        ("out",), {"relu": RELU})
    program = Program(**{**vars(program), "inputs": (*program.inputs, f32("b0", (4, 8)))})
    x = torch.randn(4, 8)
    assert torch.equal(compile_program(program)([x, torch.ones(4, 8)])[0], torch.relu(x[2:]))


def test_operators_through_the_dispatcher():
    x, index = torch.randn(6, 8), torch.tensor([3, 0, 5, 5])
    both, columns, high, n, corner, same = compile_program(operators())([x, index])
    picked = x.index_select(0, index)
    assert torch.equal(both, torch.cat([picked.topk(3).values, picked], 1))
    assert torch.equal(columns, x[:, index])
    assert torch.equal(high, x[3:])
    assert torch.equal(n, torch.ones(5, dtype=torch.float64))
    assert torch.equal(corner, x[2:4, 1:4]) and corner.data_ptr() == x[2, 1].data_ptr()
    assert same.data_ptr() == x.data_ptr()


def test_an_operators_error_keeps_its_message():
    program = compile_program(operators())
    with pytest.raises(RuntimeError, match="index"):
        program([torch.randn(6, 8), torch.tensor([3, 0, 99, 5])])
    program([torch.randn(6, 8), torch.tensor([3, 0, 1, 5])])


def test_no_autograd_graph_is_built():
    x = torch.randn(6, 8, requires_grad=True)
    both, *_ = compile_program(operators())([x, torch.tensor([1, 2, 3, 4])])
    assert not both.requires_grad and torch.is_grad_enabled()


def scalar_program(count: int | str = 2) -> Program:
    """`add.Scalar` has an argument type the C shim lacks: it runs in Python, between steps that do not."""
    call = Call("aten.add.Scalar", (tensor("a"), 1.5), {}, ("y",), (f32("y", (2,)),))
    grow = Call("aten.constant_pad_nd.default", (tensor("y"), [0, {"size": "s0"}], 7.0), {}, ("z",),
                (f32("z", ("s0 + 2",)),))
    return Program("scalar", (f32("x", (2,)), SymbolInput("n")), (Symbol("s0", argument=1),),
                   (Alloc(f32("a", (2,))), Launch("relu", ("x",), ("a",), (2,)), call, grow), ("z",), {"relu": RELU})


def test_an_operator_without_a_c_form_runs_in_python():
    program = compile_program(scalar_program())
    for n in (0, 3):
        (z,) = program([torch.tensor([-1.0, 2.0]), n])
        assert z.tolist() == [1.5, 3.5] + [7.0] * n


def test_an_error_in_python_reaches_the_caller():
    with pytest.raises(RuntimeError, match="negative"):
        compile_program(scalar_program())([torch.ones(2), -3])


def test_an_unknown_operator_is_refused_with_the_step():
    bad = Call("aten.no_such_thing.default", (tensor("x"),), {}, ("y",), (f32("y", (2,)),))
    with pytest.raises(Unsupported, match="no_such_thing"):
        print_program_cpp(Program("bad", (f32("x", (2,)),), (), (bad,), ("y",)))


def test_two_threads_at_once():
    program = compile_program(mlp())
    wrong: list[int] = []

    def work(seed: int) -> None:
        inputs = mlp_inputs()
        inputs[0] = torch.full((10, 32), float(seed + 1))
        expected = mlp_reference(*inputs)
        for _ in range(50):
            if not torch.allclose(program(inputs)[0], expected, rtol=1e-5, atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
    assert release_arenas() > 0


def test_results_do_not_depend_on_who_else_called():
    program = compile_program(mlp())
    inputs = mlp_inputs()
    first = program(inputs)[0].clone()
    program(mlp_inputs(10)[:1] + inputs[1:])
    assert torch.equal(program(inputs)[0], first)
