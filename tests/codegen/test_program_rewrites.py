"""Candidates of CUDA programs: what is found, what is not, and that the rewritten program gives the same results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from meshwright.codegen.ir_text import parse_kernel
from meshwright.codegen.program_facts import ProgramFacts, alone, rewritten
from meshwright.codegen.program_python import load_program_python
from meshwright.codegen.program_rewrites import MAX_STACKED, Rewrite, find_rewrites
from meshwright.codegen.templates.triton_gemm import gemm_kernel, tiles_for
from meshwright.codegen.triton_build import triton_kernels
from meshwright.runtime.program import Alloc, Call, Launch, Program, Release, Step, Symbol, TensorSpec, View

# in0: the product [rows, 8], in1: something of its shape
SWIGLU = """kernel swiglu(s0, in0: f32, in1: f32 -> out0: f32)
  axes p0: 8*s0
  %0: f32 = load in0[p0]
  %1: f32 = sigmoid %0
  %2: f32 = mul %0, %1
  %3: f32 = load in1[p0]
  %4: f32 = mul %2, %3
  store out0[p0] = %4
"""
SOFTMAX_SUM = """kernel total(s0, in0: f32 -> out0: f32)
  axes p0: s0, r0: 8 reduce
  %0: f32 = load in0[8*p0 + r0]
  %1: f32 = reduce_sum %0
  store out0[p0] = %1
"""


def spec(name: str, *shape: int | str, static: bool = False, strides: tuple[int | str, ...] | None = None,
         dtype: str = "float32") -> TensorSpec:
    made = strides if strides is not None else ((shape[1], 1) if len(shape) == 2 else (1,))
    return TensorSpec(name, dtype, shape, made, "cuda", static)


def product(out: str, a: str, b: str, bias: str | None = None, rows: int | str = "s0") -> Call:
    names = [n for n in (bias, a, b) if n is not None]
    op = "aten.mm.default" if bias is None else "aten.addmm.default"
    return Call(op, tuple({"tensor": n} for n in names), {}, (out,), (spec(out, rows, 8),))


def swiglu(between: Sequence[Step] = (), outputs: tuple[Any, ...] = ("y",), kernel: str = SWIGLU,
           inference: bool = True) -> Program:
    """y = silu(x @ g + c) * (x @ u + d), both weights transposed views of [8, 5] matrices."""
    steps: list[Step] = [
        View(spec("gt", 5, 8, strides=(1, 5)), "g"), product("gate", "x", "gt", "c"), Release(("gt",)),
        View(spec("ut", 5, 8, strides=(1, 5)), "u"), product("up", "x", "ut", "d"), Release(("ut",)),
        *between,
        Alloc(spec("y", "s0", 8), escapes=True),
        Launch("swiglu", ("gate", "up"), ("y",), ("s0",)), Release(("gate", "up")),
    ]
    inputs = (spec("x", "s0", 5), spec("g", 8, 5, static=True), spec("u", 8, 5, static=True),
              spec("c", 8, static=True), spec("d", 8, static=True))
    return Program("swiglu", inputs, (Symbol("s0", tensor="x"),), tuple(steps), outputs, {"swiglu": kernel}, inference)


def values(rows: int = 6) -> list[torch.Tensor]:
    torch.manual_seed(rows)
    return [torch.randn(*shape) for shape in ((rows, 5), (8, 5), (8, 5), (8,), (8,))]


def expected(x: torch.Tensor, g: torch.Tensor, u: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x @ g.T + c) * (x @ u.T + d)


def epilogues(program: Program) -> list[Rewrite]:
    return [r for r in find_rewrites(program)[0] if r.gemm is not None]


def stacks(program: Program) -> list[Rewrite]:
    return [r for r in find_rewrites(program)[0] if r.stacks]


def run(program: Program, chosen: Sequence[Rewrite], inputs: Sequence[torch.Tensor]) -> list[Any]:
    """The program with these rewrites, its kernels and templates interpreted."""
    made = [s for r in chosen for s in r.stacks]
    written = rewritten(program, {i for r in chosen for i in r.replaced}, {r.at: r.steps for r in chosen},
                        [s.spec for s in made])
    kernels: dict[str, Any] = dict(triton_kernels({n: parse_kernel(t) for n, t in program.kernels.items()}))
    for r in chosen:
        if r.gemm is not None:
            kernels[r.gemm.name] = gemm_kernel(r.gemm, tiles_for(r.gemm, dict.fromkeys(r.gemm.sizes, 1))[0])
    copies = [s.pack(*(inputs[k] for k in s.sources)) for s in made]
    return load_program_python(written, kernels)([*inputs, *copies])


@pytest.mark.parametrize("rows", [1, 6, 33])
def test_the_last_product_takes_the_kernel_over(rows: int) -> None:
    (found,) = epilogues(swiglu())
    assert found.what == "addmm → swiglu" and found.results == ("y",)
    (step,) = found.steps
    assert isinstance(step, Launch) and step.inputs == ("x", "ut", "d", "gate") and step.sizes == ("s0",)
    torch.testing.assert_close(run(swiglu(), [found], values(rows))[0], expected(*values(rows)))


def test_the_product_is_gone_and_its_operands_live_as_long_as_they_are_read() -> None:
    (found,) = epilogues(swiglu())
    written = rewritten(swiglu(), set(found.replaced), {found.at: found.steps})
    assert [s.outs for s in written.steps if isinstance(s, Call)] == [("gate",)]
    launch = next(i for i, s in enumerate(written.steps) if isinstance(s, Launch))
    releases = [(i, n) for i, s in enumerate(written.steps) if isinstance(s, Release) for n in s.names]
    assert {n: i > launch for i, n in releases} == {"gt": False, "ut": True, "gate": True}


WRITE = Call("aten.fill_.Scalar", ({"tensor": "d"}, 2.0), {}, (None,), (None,))


def look(at: str, out: str) -> Call:
    """Something else that reads a product."""
    return Call("aten.sum.default", ({"tensor": at},), {}, (out,), (TensorSpec(out, "float32", (), (), "cuda"),))


@pytest.mark.parametrize(("program", "reason"), [
    (swiglu(between=(WRITE,)), "writes into the product's operands"),
    (swiglu(kernel=SWIGLU.replace("in1[p0]", "in1[8*s0 - p0 - 1]")), "another order"),
    (dataclasses.replace(swiglu(), kernels={"swiglu": SOFTMAX_SUM},
                         steps=(product("up", "x", "ut"), Alloc(spec("y", "s0")),
                                Launch("swiglu", ("up",), ("y",), ("s0",)))), "reduces"),
])
def test_what_is_refused_says_why(program: Program, reason: str) -> None:
    if "reduces" in reason:
        program = dataclasses.replace(program, steps=(View(spec("ut", 5, 8, strides=(1, 5)), "u"), *program.steps))
    found, refused = find_rewrites(program)
    assert not [r for r in found if r.gemm is not None]
    assert [r.what for r in refused] == [f"{'mm' if 'reduces' in reason else 'addmm'} → swiglu"]
    assert reason in refused[0].reason


@pytest.mark.parametrize("program", [
    swiglu(outputs=("y", "up", "gate")),
    swiglu(between=(look("up", "s"), look("gate", "t")), outputs=("y", "s", "t")),
])
def test_a_product_that_somebody_else_reads_stays(program: Program) -> None:
    found, refused = find_rewrites(program)
    assert not [r for r in found if r.gemm is not None] and not refused


def test_another_product_takes_over_where_the_last_is_read_elsewhere() -> None:
    (found,) = epilogues(swiglu(outputs=("y", "up")))
    assert found.steps[0].inputs == ("x", "gt", "c", "up")  # type: ignore[union-attr]
    y, up = run(swiglu(outputs=("y", "up")), [found], values())
    x, _, u, _, d = values()
    torch.testing.assert_close(y, expected(*values()))
    torch.testing.assert_close(up, x @ u.T + d)


@pytest.mark.parametrize("change", [
    {"dtype": "float64"}, {"args": ({"tensor": "d"}, {"tensor": "x"}, {"tensor": "ut"}), "kwargs": {"beta": 2}},
])
def test_products_that_the_template_does_not_take(change: dict[str, Any]) -> None:
    def changed(s: Step) -> Step:
        if not isinstance(s, Call):
            return s
        if "dtype" in change:
            return dataclasses.replace(s, specs=(dataclasses.replace(s.specs[0], dtype=change["dtype"]),))
        return dataclasses.replace(s, **change)

    program = dataclasses.replace(swiglu(), steps=tuple(map(changed, swiglu().steps)))
    assert find_rewrites(program) == ([], [])


def test_equal_work_has_one_key_and_one_kernel() -> None:
    first, second = swiglu(), swiglu()
    rename = {n: f"{n}2" for n in ("gt", "ut", "gate", "up", "y")}
    steps = tuple(_renamed(s, rename) for s in second.steps)
    program = dataclasses.replace(first, steps=(*first.steps, *steps), outputs=("y", "y2"))
    one, two = epilogues(program)
    assert one.key == two.key and one.gemm == two.gemm
    for y in run(program, [one, two], values()):
        torch.testing.assert_close(y, expected(*values()))


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """The same step over other tensors."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _renamed(getattr(value, f.name), names)
                                             for f in dataclasses.fields(value) if f.name != "kind"})
    if isinstance(value, tuple):
        return tuple(_renamed(v, names) for v in value)
    if isinstance(value, dict):
        return {k: _renamed(v, names) for k, v in value.items()}
    return names.get(value, value) if isinstance(value, str) else value


# -- stacked weights --------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 6])
def test_products_of_one_tensor_become_one(rows: int) -> None:
    (found,) = stacks(swiglu())
    assert found.what == "2 x addmm of one tensor → baddbmm" and found.results == ("gate", "up")
    written = rewritten(swiglu(), set(found.replaced), {found.at: found.steps}, [s.spec for s in found.stacks])
    assert [s.op for s in written.steps if isinstance(s, Call)] == ["aten.baddbmm.default"]
    assert not any(isinstance(s, View) and s.base in ("g", "u") for s in written.steps)  # nobody reads the weights
    torch.testing.assert_close(run(swiglu(), [found], values(rows))[0], expected(*values(rows)))


def test_results_lie_where_they_lay() -> None:
    """What reads them sees the strides it was made for."""
    (found,) = stacks(swiglu())
    facts = ProgramFacts(swiglu())
    sub = alone(facts, found.steps, found.results, [s.spec for s in found.stacks])
    x, g, u, c, d = values()
    copies = [s.pack(*(values()[k] for k in s.sources)) for s in found.stacks]
    by_name = {"x": x, **{s.spec.name: c for s, c in zip(found.stacks, copies, strict=True)}}
    gate, up = load_program_python(sub)([*(by_name[i.name] for i in sub.inputs if isinstance(i, TensorSpec)), 6])
    assert gate.is_contiguous() and up.is_contiguous()
    assert up.untyped_storage().data_ptr() == gate.untyped_storage().data_ptr()
    torch.testing.assert_close([gate, up], [x @ g.T + c, x @ u.T + d])


def many(count: int, shapes: Sequence[int] | None = None) -> Program:
    """`count` products of x, with weights of 8 (or `shapes`) columns that lie row by row."""
    columns = shapes or [8] * count
    steps = tuple(Call("aten.mm.default", ({"tensor": "x"}, {"tensor": f"w{i}"}), {}, (f"p{i}",),
                       (spec(f"p{i}", 4, n),)) for i, n in enumerate(columns))
    ends = tuple(Call("aten.neg.default", ({"tensor": f"p{i}"},), {}, (f"y{i}",), (spec(f"y{i}", 4, n),))
                 for i, n in enumerate(columns))
    inputs = (spec("x", 4, 5), *(spec(f"w{i}", 5, n, static=True) for i, n in enumerate(columns)))
    return Program("many", inputs, (), (*steps, *ends), tuple(f"y{i}" for i in range(len(columns))), {})


def test_a_step_takes_few_of_many_products() -> None:
    found = stacks(many(2 * MAX_STACKED + 1))
    assert [len(r.results) for r in found] == [MAX_STACKED, MAX_STACKED]
    x, weights = torch.randn(4, 5), [torch.randn(5, 8) for _ in range(2 * MAX_STACKED + 1)]
    got = run(many(2 * MAX_STACKED + 1), found, [x, *weights])
    torch.testing.assert_close(got, [-(x @ w) for w in weights])


def test_only_weights_of_one_shape_are_stacked() -> None:
    (found,) = stacks(many(3, [8, 4, 8]))
    assert found.results == ("p0", "p2")
    inputs = [torch.randn(4, 5), *(torch.randn(5, n) for n in (8, 4, 8))]
    torch.testing.assert_close(run(many(3, [8, 4, 8]), [found], inputs), [-(inputs[0] @ w) for w in inputs[1:]])


@pytest.mark.parametrize("program", [
    dataclasses.replace(many(2), inference=False),
    dataclasses.replace(many(2), inputs=(spec("x", 4, 5), spec("w0", 5, 8), spec("w1", 5, 8, static=True))),
    dataclasses.replace(many(2), outputs=("p0", "y1")),
    dataclasses.replace(many(2), steps=(many(2).steps[0], Call("aten.fill_.Scalar", ({"tensor": "x"}, 2.0), {}, (None,),
                                                               (None,)), *many(2).steps[1:])),
])
def test_what_is_not_stacked(program: Program) -> None:
    """Training, a weight that is an argument, a result that leaves, a left side that changes in between."""
    assert stacks(program) == []


def test_a_stack_sees_parts_of_a_weight() -> None:
    """Query and key as two halves of one Parameter."""
    views = tuple(View(spec(f"half{i}", 5, 8, strides=(1, 5)), "w", 40 * i) for i in range(2))
    steps = (*views, *(product(f"p{i}", "x", f"half{i}", rows=4) for i in range(2)),
             *(Call("aten.neg.default", ({"tensor": f"p{i}"},), {}, (f"y{i}",), (spec(f"y{i}", 4, 8),))
               for i in range(2)))
    program = Program("halves", (spec("x", 4, 5), spec("w", 16, 5, static=True)), (), steps, ("y0", "y1"), {})
    (found,) = stacks(program)
    x, w = torch.randn(4, 5), torch.randn(16, 5)
    torch.testing.assert_close(run(program, [found], [x, w]), [-(x @ w[:8].T), -(x @ w[8:].T)])
