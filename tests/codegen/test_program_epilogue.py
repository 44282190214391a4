"""Element-wise kernels inside of the products they follow: the same bits as behind them, and the cases left alone."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import meshwright as mw
from meshwright.codegen import program_cpp_packing
from meshwright.codegen.cpp import compile_kernels
from meshwright.codegen.ir_text import parse_kernel
from meshwright.codegen.program_cpp_epilogue import EpilogueStruct, ProductStruct
from meshwright.codegen.program_cpp_gemm import Weight
from meshwright.codegen.program_cpp_packing import INSIDE, ProductMethods, measure, pack
from meshwright.codegen.program_cpp_run import CompiledProgram, compile_program, host_library
from meshwright.codegen.program_epilogue import block_kernel, fuse_epilogues
from meshwright.codegen.program_gemm import lower_products
from meshwright.codegen.program_python import load_program_python
from meshwright.codegen.schema import Unsupported
from meshwright.codegen.templates.cpu_gemm import FP32, LIBRARY, SPLIT
from meshwright.codegen.timings import Timings
from meshwright.compiler.artifact_verify import verify_program
from meshwright.runtime.errors import ArtifactError, InvalidInputError
from meshwright.runtime.program import (
    Alloc,
    Call,
    Epilogue,
    Gemm,
    Launch,
    Program,
    Release,
    Step,
    Symbol,
    TensorSpec,
    View,
)
from meshwright.runtime.settings import settings as read_settings

EPS = torch.finfo(torch.float32).eps
HAS_TILES = bool(host_library().mw_split_ready())

# Each reads the product as in0 (`residual`: as in1) and, where it names one, the operand OPERANDS says.
GELU_ERF = """%1: f32 = const 0.7071067811865476
  %2: f32 = mul %0, %1
  %3: f32 = erf %2
  %4: f32 = const 1.0
  %5: f32 = add %3, %4
  %6: f32 = const 0.5
  %7: f32 = mul %0, %6
  %8: f32 = mul %7, %5"""
GELU_TANH = """%1: f32 = const 0.044715
  %2: f32 = mul %0, %0
  %3: f32 = mul %2, %0
  %4: f32 = mul %3, %1
  %5: f32 = add %0, %4
  %9: f32 = const 0.7978845608028654
  %10: f32 = mul %5, %9
  %11: f32 = tanh %10
  %12: f32 = const 1.0
  %13: f32 = add %11, %12
  %14: f32 = const 0.5
  %15: f32 = mul %0, %14
  %8: f32 = mul %15, %13"""
FLAT = """kernel {name}(s0, in0: f32{more} -> out0: f32)
  axes p0: {N}*s0
  %0: f32 = load in0[p0]
  {body}
  store out0[p0] = %8
"""
BY_ROWS = """kernel {name}(s0, in0: f32, in1: f32 -> out0: f32)
  axes p0: s0, p1: {N}
  %0: f32 = load in0[{N}*p0 + p1]
  %1: f32 = load in1[{at}]
  %8: f32 = mul %0, %1
  store out0[{N}*p0 + p1] = %8
"""
SILU_MUL = "%1: f32 = sigmoid %0\n  %2: f32 = mul %0, %1\n  %3: f32 = load in1[p0]\n  %8: f32 = mul %2, %3"
ADD = "%1: f32 = load in1[p0]\n  %8: f32 = add %0, %1"
KINDS = ("gelu", "gelu_tanh", "silu_mul", "residual", "by_column", "by_row")
OPERANDS = {"silu_mul": "full", "residual": "full", "by_column": "columns", "by_row": "rows"}


def text(kind: str, N: int) -> str:
    match kind:
        case "gelu":
            return FLAT.format(name=kind, N=N, more="", body=GELU_ERF)
        case "gelu_tanh":
            return FLAT.format(name=kind, N=N, more="", body=GELU_TANH)
        case "silu_mul":
            return FLAT.format(name=kind, N=N, more=", in1: f32", body=SILU_MUL)
        case "residual":
            return FLAT.format(name=kind, N=N, more=", in1: f32", body=ADD)
        case "by_column":
            return BY_ROWS.format(name=kind, N=N, at="p1")
    return BY_ROWS.format(name=kind, N=N, at="p0")


def eager(kind: str, product: torch.Tensor, operand: torch.Tensor | None) -> torch.Tensor:
    match kind:
        case "gelu":
            return F.gelu(product)
        case "gelu_tanh":
            return F.gelu(product, approximate="tanh")
    assert operand is not None
    return {"silu_mul": lambda: F.silu(product) * operand, "residual": lambda: operand + product,
            "by_column": lambda: product * operand, "by_row": lambda: product * operand[:, None]}[kind]()


def spec(name: str, *shape: int | str, dtype: str = "float32", static: bool = False) -> TensorSpec:
    strides: list[int | str] = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, size if strides[0] == 1 else f"{size}*{strides[0]}")
    return TensorSpec(name, dtype, shape, tuple(strides), static=static)


def steps_of(kind: str, K: int, N: int, bias: bool) -> list[Step]:
    """One product of x [s0, K] with `w` [N, K], transposed, and the kernel behind it."""
    y, z, w = f"{kind}_y", f"{kind}_z", f"{kind}_w"
    names = (["b"] if bias else []) + ["x", w]
    op = "aten.addmm.default" if bias else "aten.mm.default"
    call = Call(op, tuple({"tensor": n} for n in names), {}, (y,), (spec(y, "s0", N),))
    operand = (OPERANDS[kind],) if kind in OPERANDS else ()
    inputs = (*operand, y) if kind == "residual" else (y, *operand)
    return [View(TensorSpec(w, "float32", (K, N), (1, K)), "w"), call, Release((w,)), Alloc(spec(z, "s0", N)),
            Launch(kind, inputs, (z,), ("s0",)), Release((y,))]


def program(K: int = 33, N: int = 48, bias: bool = True, static: bool = True, kinds: tuple[str, ...] = KINDS,
            ) -> Program:
    """All kinds, as ATen calls and launches. Static: w may be kept packed."""
    inputs = (spec("x", "s0", K), spec("w", N, K, static=static), spec("b", N), spec("full", "s0", N),
              spec("columns", N), spec("rows", "s0"))
    steps = [s for kind in kinds for s in steps_of(kind, K, N, bias)]
    kernels = {kind: text(kind, N).replace("in0[p0]", "in9[p0]").replace("in1[p0]", "in0[p0]").replace(
        "in9[p0]", "in1[p0]") if kind == "residual" else text(kind, N) for kind in kinds}
    return Program("p", inputs, (Symbol("s0", tensor="x"),), tuple(steps), tuple(f"{k}_z" for k in kinds), kernels)


def inputs_of(M: int, K: int, N: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((M, K), (N, K), (N,), (M, N), (N,), (M,))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@lru_cache(maxsize=64)
def compiled(K: int, N: int, bias: bool, static: bool, method: int) -> CompiledProgram:
    return compile_program(program(K, N, bias, static))


def run(method: int, inputs: list[torch.Tensor], bias: bool = True, static: bool = True) -> list[torch.Tensor]:
    """All kinds, every product by `method`."""
    K, N = inputs[0].shape[1], inputs[1].shape[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProductMethods, "_allowed", lambda self, product, methods: [method])
        return compiled(K, N, bias, static, method)(inputs)


def own_methods(static: bool) -> list[int]:
    """What the template can do here: a weight packed in fp32, and bf16 parts where there are tiles."""
    return [FP32] * static + [SPLIT] * HAS_TILES


# -- numbers --------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(M=st.integers(1, 300), shape=st.sampled_from([(33, 48), (97, 67), (801, 35)]), bias=st.booleans(),
       static=st.booleans(), way=st.sampled_from([FP32, SPLIT]), count=st.sampled_from([1, 2]),
       seed=st.integers(0, 1 << 20))
def test_epilogues_agree_with_eager(M, shape, bias, static, way, count, seed):
    """Against float64 by the house rule, and against the kernel behind the product bit by bit.

    The packed fp32 product adds K terms in one row, where eager's may keep many sums: its error has the bound
    K * eps / 2 * |x| @ |w| (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), which the kernels scale by
    their operand and a slope of at most 1.13.
    """
    (K, N), methods = shape, own_methods(static)
    if not methods:
        return
    method = way if way in methods else methods[0]
    inputs, before = inputs_of(M, K, N, seed), torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found, behind = (run(m, inputs, bias, static) for m in (method + INSIDE, method))
    finally:
        torch.set_num_threads(before)
    for kind, inside, outside in zip(KINDS, found, behind, strict=True):
        x, w, b, *rest = inputs
        operand = dict(zip(("full", "columns", "rows"), rest, strict=True)).get(OPERANDS.get(kind, ""))
        plain = eager(kind, F.linear(x, w, b if bias else None), operand)
        exact = eager(kind, F.linear(x.double(), w.double(), b.double() if bias else None),
                      operand.double() if operand is not None else None)
        allowed = 2 * float((plain.double() - exact).abs().max()) + 4 * EPS * float(exact.abs().max())
        if method == FP32:
            slope = 1.13 * float(operand.abs().max()) if kind not in ("residual",) and operand is not None else 1.13
            allowed += slope * K * EPS / 2 * float((x.abs() @ w.abs().T).max())
        assert float((inside.double() - exact).abs().max()) <= allowed, kind
        assert torch.equal(inside, outside), kind


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="another instruction set of x86")
@pytest.mark.parametrize("wish", [{"MESHWRIGHT_ISA": "avx2"}, {"MESHWRIGHT_ISA": "scalar"}])
def test_epilogues_agree_with_eager_without_tiles(wish: dict[str, str]):
    code = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "with_eager and not tiles"]
    done = subprocess.run(code, env=os.environ | wish, cwd=Path(__file__).parents[2], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, 1e-42])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_values_that_do_not_split_get_their_epilogue_too(value, static, count, threads):
    """Rows far down leave the range: blocks above them are finished by then, and done again."""
    inputs = inputs_of(300, 97, 67)
    inputs[0][290] = value
    threads(count)
    found = run(SPLIT + INSIDE, inputs, static=static)
    library = run(LIBRARY, inputs, static=static)
    for kind, inside, expected in zip(KINDS, found, library, strict=True):
        torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4, equal_nan=True, msg=kind)
        assert torch.equal(inside[290].isfinite(), expected[290].isfinite()), kind


@pytest.mark.parametrize("M", [0, 1])
def test_no_rows_and_one_row(M):
    for method in own_methods(True):
        inputs = inputs_of(M, 33, 48)
        for inside, behind in zip(run(method + INSIDE, inputs), run(method, inputs), strict=True):
            assert inside.shape == (M, 48) and torch.equal(inside, behind)


def test_nothing_to_sum():
    """K of 0: the product is its bias, and the template has no block to finish."""
    inputs = inputs_of(5, 0, 48)
    found = run(FP32 + INSIDE, inputs)
    torch.testing.assert_close(found[0], F.gelu(inputs[2]).expand(5, 48))


def test_python_runs_both_parts_one_after_the_other():
    lowered = fuse_epilogues(lower_products(program(kinds=("residual",))))
    assert [type(s) for s in lowered.steps if isinstance(s, (Gemm, Epilogue))] == [Epilogue]

    def add(buffers, sizes):
        torch.add(buffers[0], buffers[1], out=buffers[2])

    x, w, b, full, *rest = inputs_of(5, 33, 48)
    found = load_program_python(lowered, {"residual": add})([x, w, b, full, *rest])[0]
    torch.testing.assert_close(found, full + F.linear(x, w, b))


def test_the_template_says_whether_it_took_the_kernel_along():
    """And then leaves the room for the product alone, where one block of k is all there is."""
    M, K, N = 40, 33, 48
    library, block = host_library(), block_kernel(
        parse_kernel(text("gelu", N)), Launch("gelu", ("y",), ("z",), (M,)), 0, spec("y", M, N)).kernel
    x, w = torch.randn(M, K), torch.randn(N, K)
    z, expected = torch.empty(M, N), F.gelu(x @ w.T)
    epilogue = EpilogueStruct(compile_kernels([block])[block.name].rows)
    epilogue.tensors[1] = z.data_ptr()
    for method in (LIBRARY, *own_methods(True)):
        y, copy = torch.full((M, N), 7.0), pack(library, Weight(0, 0, K, N, 1, K), w, method or FP32)
        how = copy.data_ptr() if method != LIBRARY else None
        side = ProductStruct(N, w.data_ptr(), 1, K, None, 0, y.data_ptr(), N, how)
        for given_to, taken in ((ctypes.byref(epilogue), method != LIBRARY), (None, False)):
            z.zero_()
            assert bool(library.mw_gemm_then(1, M, K, x.data_ptr(), K, 1, ctypes.byref(side), given_to)) == taken
            torch.testing.assert_close(y, torch.full((M, N), 7.0) if taken else x @ w.T)
            torch.testing.assert_close(z, expected if taken else torch.zeros(M, N))


# -- which method -----------------------------------------------------------------------------------
def chosen(monkeypatch: pytest.MonkeyPatch, wish: str, K: int = 33, N: int = 48) -> set[str]:
    monkeypatch.setenv("MESHWRIGHT_EPILOGUES", wish)
    fresh = compile_program(program(K, N, kinds=("gelu",)))
    fresh(inputs_of(40, K, N))
    return {b.method for b in fresh.behind_products}


def test_epilogues_can_be_forced_and_forbidden(monkeypatch: pytest.MonkeyPatch):
    assert chosen(monkeypatch, "always") == {"fp32, kernel inside"}
    assert chosen(monkeypatch, "never") <= {"fp32", "library"}
    assert chosen(monkeypatch, "measured") <= {"fp32", "library"}  # too small to be measured
    monkeypatch.setenv("MESHWRIGHT_EPILOGUES", "often")
    with pytest.raises(InvalidInputError, match="MESHWRIGHT_EPILOGUES='often'.*measured, always, never"):
        read_settings()


def test_split_products_can_be_forbidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MESHWRIGHT_SPLIT_PRODUCTS", "0")
    assert {m for m in chosen(monkeypatch, "always", 256, 256) if "fp32" not in m} == set()


@pytest.mark.parametrize("faster", ["kernel inside", "fp32", "library"])
def test_the_fastest_way_is_taken(faster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """By times that stand for a machine: with 128 rows (the symbol's typical size), and with few of them."""
    names = program_cpp_packing._NAMES
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(program_cpp_packing, "measure",
                        lambda *given: {m: 1.0 if names[m].endswith(faster) else 2.0 for m in given[5]})
    found = chosen(monkeypatch, "measured", 1024, 1030)
    assert found and all(name.endswith(faster) for name in found)


def test_every_way_is_timed():
    fresh = compile_program(program(64, 80, kinds=("by_row", "silu_mul")))
    assert fresh._products is not None
    for product in fresh._products._products:
        methods = (LIBRARY, FP32, FP32 + INSIDE)
        seconds = measure(host_library(), product, torch.ones(80, 64), (40, 64, 80), 1, methods, fresh._library)
        assert set(seconds) == set(methods) and min(seconds.values()) > 0


class Widen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 256), nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def test_a_saved_model_keeps_its_epilogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The times travel with it, so it takes the same way and gives the same bits; the report names the way."""
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path / "one"))
    monkeypatch.setattr(program_cpp_packing, "measure",
                        lambda *given: {m: {FP32 + INSIDE: 1.0, FP32: 1.5}.get(m, 2.0) for m in given[5]})
    torch.manual_seed(0)
    model, x = Widen().eval(), torch.randn(2, 64, 256)
    fast = mw.compile(model, (x,))
    with torch.no_grad():
        expected = fast(x)
    used = fast.report.graphs[0].behind_products
    assert "fp32, kernel inside" in {b.method for b in used}
    assert "kernel inside: 1 s" in str(fast.report) and "kernel inside" in json.dumps(fast.report.as_dict())
    fast.save(tmp_path / "model")
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path / "two"))
    monkeypatch.setattr(program_cpp_packing, "measure", pytest.fail)
    loaded = mw.load(tmp_path / "model")
    assert torch.equal(loaded(x), expected)
    assert loaded._run.behind_products == used
    monkeypatch.setenv("MESHWRIGHT_EPILOGUES", "never")
    assert torch.equal(mw.load(tmp_path / "model")(x), expected)


# -- what becomes an epilogue ------------------------------------------------------------------------
def joined(p: Program) -> list[Epilogue]:
    return [s for s in fuse_epilogues(lower_products(p)).steps if isinstance(s, Epilogue)]


def edited(kind: str, *, steps: Callable[[list[Step]], list[Step]] = lambda s: s, kernel: Callable[[str], str] =
           lambda t: t, outputs: tuple[str, ...] | None = None) -> Program:
    p = program(kinds=(kind,))
    return replace(p, steps=tuple(steps(list(p.steps))), kernels={kind: kernel(p.kernels[kind])},
                   outputs=outputs or p.outputs)


def swap(old: object, new: object) -> Callable[[list[Step]], list[Step]]:
    return lambda steps: [new if s == old else s for s in steps]  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_becomes_an_epilogue(kind: str):
    p = program(kinds=(kind,))
    lowered = fuse_epilogues(lower_products(p))
    epilogue, = joined(p)
    assert epilogue.launch in p.steps and lowered.kernels == p.kernels
    last = lowered.steps.index(epilogue)
    assert all(isinstance(s, (Alloc, View)) for s in lowered.steps[:last])
    assert [s.names for s in lowered.steps[last:] if isinstance(s, Release)] == [(f"{kind}_w",), (f"{kind}_y",)]


def test_the_kernel_of_a_block():
    launch = Launch("by_row", ("y", "rows"), ("z",), ("s0",))
    found = block_kernel(parse_kernel(text("by_row", 48)), launch, 0, spec("y", "s0", 48))
    head, _, body = str(found.kernel).partition("\n")
    assert head == "kernel by_row_block_48(step, row, rows, column, columns, in0: f32, in1: f32 -> out0: f32)"
    assert body == """\
  axes p0: rows, p1: columns
  %0: f32 = load in0[p0*step + p1]
  %1: f32 = load in1[p0 + row]
  %8: f32 = mul %0, %1
  store out0[column + 48*p0 + p1 + 48*row] = %8
"""
    assert found.operands == ((1, 0, 0),)


LAUNCH = Launch("gelu", ("gelu_y",), ("gelu_z",), ("s0",))
RESIDUAL = Launch("residual", ("full", "residual_y"), ("residual_z",), ("s0",))
TWICE = Alloc(spec("again", "s0", 48)), Launch("gelu", ("gelu_y",), ("again",), ("s0",))
WRITE = Call("aten.fill_.Scalar", ({"tensor": "x"}, 2.0), {}, (None,), (None,))
LEFT_ALONE = {
    "the product is returned": edited("gelu", outputs=("gelu_y", "gelu_z")),
    "the product is read again": edited("gelu", steps=lambda s: [*s[:-1], *TWICE, s[-1]]),
    "something writes in between": edited("gelu", steps=lambda s: [*s[:3], WRITE, *s[3:]]),
    "the kernel writes its own operand": edited("residual", steps=swap(RESIDUAL, replace(RESIDUAL, outputs=("full",))),
                                                outputs=("full",)),
    "the kernel writes the product": edited("gelu", steps=swap(LAUNCH, replace(LAUNCH, outputs=("gelu_y",))),
                                            outputs=("gelu_y",)),
    "the kernel writes what the product reads": edited("gelu", steps=swap(LAUNCH, replace(LAUNCH, outputs=("x",))),
                                                       outputs=("x",)),
    "the kernel reads the product twice": edited("residual", steps=swap(
        RESIDUAL, replace(RESIDUAL, inputs=("residual_y", "residual_y")))),
    "the kernel reads an index of values": edited("residual", kernel=lambda t: t.replace(
        "%1: f32 = load in0[p0]", "%9: i64 = index p0\n  %1: f32 = load in0[%9]").replace(
        "%1: f32 = load in1[p0]", "%9: i64 = index p0\n  %1: f32 = load in1[%9]")),
    "the kernel computes with positions": edited("gelu", kernel=lambda t: t.replace(
        "%1: f32 = const 0.7071067811865476", "%20: i64 = index p0\n  %1: f32 = cast %20")),
    "the kernel reads the product backwards": edited("gelu", kernel=lambda t: t.replace(
        "load in0[p0]", "load in0[48*s0 - 1 - p0]")),
    "the kernel writes backwards": edited("gelu", kernel=lambda t: t.replace("out0[p0]", "out0[48*s0 - 1 - p0]")),
    "the kernel reads across rows": edited("by_row", kernel=lambda t: t.replace("in1[p0]", "in1[p0 + 2*p1]")),
    "the kernel reads modulo": edited("by_row", kernel=lambda t: t.replace("in1[p0]", "in1[floordiv(p0, 2)]")),
    "the kernel reads an operand in two ways": edited("by_row", kernel=lambda t: t.replace(
        "%8: f32 = mul %0, %1", "%2: f32 = load in1[p1]\n  %3: f32 = mul %1, %2\n  %8: f32 = mul %0, %3")),
    "the kernel reads where a mask says": edited("by_row", kernel=lambda t: t.replace(
        "%1: f32 = load in1[p0]", "%2: b1 = ge %0, %0\n  %1: f32 = load in1[p0] if %2 else 0.0")),
    "the kernel reduces": edited("by_row", kernel=lambda t: t.replace(f"p1: {48}", "p1: 48 reduce")),
    "the kernel casts": edited("gelu", steps=swap(Alloc(spec("gelu_z", "s0", 48)), Alloc(
        spec("gelu_z", "s0", 48, dtype="float64"))), kernel=lambda t: t.replace("out0: f32", "out0: f64").replace(
        "store out0[p0] = %8", "%9: f64 = cast %8\n  store out0[p0] = %9")),
    "the kernel is of another size": edited("gelu", kernel=lambda t: t.replace("axes p0: 48*s0", "axes p0: 47*s0")),
    "the kernel writes twice": edited("gelu", steps=lambda s: [Alloc(spec("more", "s0", 48)), *swap(
        LAUNCH, replace(LAUNCH, outputs=("gelu_z", "more")))(s)], kernel=lambda t: t.replace(
        "-> out0: f32", "-> out0: f32, out1: f32") + "  store out1[p0] = %0\n"),
    "the kernel uses a block's names": edited("gelu", kernel=lambda t: t.replace("s0", "step")),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_what_is_left_alone(why: str):
    p = LEFT_ALONE[why]
    for kernel in p.kernels.values():
        parse_kernel(kernel)
    assert joined(p) == []
    assert fuse_epilogues(lower_products(p)) == lower_products(p)


def test_a_part_of_the_product_is_left_alone():
    half = View(TensorSpec("half", "float32", ("s0", 48), (48, 1)), "gelu_y", 48)
    p = edited("gelu", steps=lambda s: [*s[:3], half, *swap(LAUNCH, replace(LAUNCH, inputs=("half",)))(s[3:])])
    assert joined(p) == []
    whole = replace(half, offset=0)
    assert joined(edited("gelu", steps=lambda s: [
        *s[:3], whole, *swap(LAUNCH, replace(LAUNCH, inputs=("half",)))(s[3:])]))


def test_many_products_are_left_alone():
    """A batch of products has no rows in one matrix."""
    inputs = (spec("x", 3, "s0", 33), spec("w", 3, 33, 48))
    call = Call("aten.bmm.default", ({"tensor": "x"}, {"tensor": "w"}), {}, ("y",), (spec("y", 3, "s0", 48),))
    steps = (call, Alloc(spec("z", 3, "s0", 48)), Launch("gelu", ("y",), ("z",), ("3*s0",)))
    p = Program("p", inputs, (Symbol("s0", tensor="x", dim=1),), steps, ("z",), {"gelu": text("gelu", 48)})
    assert joined(p) == []
    x, w = torch.randn(3, 5, 33), torch.randn(3, 33, 48)
    torch.testing.assert_close(compile_program(p)([x, w])[0], F.gelu(x @ w))


def test_narrow_products_go_to_the_library():
    inputs = inputs_of(7, 33, 8)
    found = compile_program(program(33, 8))
    for kind, z in zip(KINDS, found(inputs), strict=True):
        x, w, b, *rest = inputs
        operand = dict(zip(("full", "columns", "rows"), rest, strict=True)).get(OPERANDS.get(kind, ""))
        torch.testing.assert_close(z, eager(kind, F.linear(x, w, b), operand))
    assert found.behind_products == [] and "_block_" not in found.source


# -- files ----------------------------------------------------------------------------------------
def test_a_strangers_epilogue_is_verified():
    p = fuse_epilogues(lower_products(program(kinds=("gelu",))))
    verify_program(p)
    epilogue = next(s for s in p.steps if isinstance(s, Epilogue))
    foreign = (replace(epilogue, product=replace(epilogue.product, out="nowhere")),
               replace(epilogue, launch=replace(epilogue.launch, kernel="nowhere")))
    for step in foreign:
        with pytest.raises(ArtifactError, match="nowhere|not defined"):
            verify_program(replace(p, steps=tuple(step if s == epilogue else s for s in p.steps)))


def test_a_strangers_epilogue_of_an_unfit_kernel_is_not_printed():
    p = fuse_epilogues(lower_products(program(kinds=("gelu",))))
    kernel = p.kernels["gelu"].replace("load in0[p0]", "load in0[48*s0 - 1 - p0]")
    with pytest.raises(Unsupported, match="another order|not affine"):
        compile_program(replace(p, kernels={"gelu": kernel}))


def test_a_strangers_epilogue_without_its_product_is_not_printed():
    p = fuse_epilogues(lower_products(program(kinds=("gelu",))))
    launch = replace(LAUNCH, inputs=("full",))
    steps = tuple(replace(s, launch=launch) if isinstance(s, Epilogue) else s for s in p.steps)
    with pytest.raises(Unsupported, match="does not read"):
        compile_program(replace(p, steps=steps))


def test_methods_without_a_program_have_no_epilogue():
    fresh = compile_program(program(256, 256, kinds=("gelu",)))
    assert fresh._products is not None
    alone = ProductMethods(fresh._products._products, host_library(), Timings())
    assert all(m < INSIDE for p in alone._products for m in alone._allowed(p, [LIBRARY]))
