"""The C++ printer: every case against torch, goldens, memory shared in place, threads, vectorised loops."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from meshwright.codegen.cpp import (
    COMPILE_FLAGS,
    CompiledCppKernel,
    compile_kernels,
    print_kernel_cpp,
    print_translation_unit,
    work_items,
    work_per_item,
)
from meshwright.codegen.ir import IRError
from meshwright.codegen.ir_text import parse_kernel
from meshwright.runtime.toolchain import BASE_FLAGS, toolchain

from ..differential import KernelGraph, compile_graphs, difference, trace
from .cases import Case, all_cases, check, floats

CASES = {c.name: c for c in all_cases()}
GOLDEN = ("softmax_7_128", "layer_norm_768", "rms_norm_bf16", "sum_f32_columns_row", "embedding", "pad",
          "cross_entropy", "argmax_two_axes", "many_axes_3_4_5_6")
HOT = ("erf_f32", "tanh_f32", "sigmoid_f32", "exp_f32", "log_f32", "silu_mul_bf16", "silu_mul_f16", "softmax_7_128",
       "causal_softmax", "layer_norm_768", "rms_norm_f32", "rms_norm_bf16", "cross_entropy", "where_f32",
       "cast_b1_f32", "lt_f32", "and_b1", "sum_f32_columns_row", "sum_f32_rows_row",
       "max_f32_rows_row", "any_b1_rows_row", "rope", "concatenate", "sin_f32", "cos_f32", "pow_f32")
HOT_AVX512 = ("cast_i64_f32", "cast_f32_i64")  # AVX2 has no 64-bit conversions


@pytest.fixture(scope="module")
def compiled() -> dict[str, CompiledCppKernel]:
    """All cases in a few translation units: minutes would go by one compiler run per case."""
    kernels = compile_kernels([c.kernel.renamed(f"case_{i}") for i, c in enumerate(CASES.values())])
    return {name: kernels[f"case_{i}"] for i, name in enumerate(CASES)}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_case_agrees_with_torch(name: str, compiled: dict[str, CompiledCppKernel]) -> None:
    def run(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        compiled[case.name]([*inputs, *outputs], case.sizes)

    check(CASES[name], run)


@pytest.mark.parametrize("name", GOLDEN)
def test_printed_kernel_is_the_golden_one(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"cpp/{name}.cpp", f"{print_kernel_cpp(CASES[name].kernel)}")


@pytest.mark.parametrize("name", ["exp_f32", "softmax_7_128", "softmax_3_1000_symbolic", "softmax_middle",
                                  "rms_norm_bf16"])
def test_output_may_take_the_memory_of_its_input(name: str, compiled: dict[str, CompiledCppKernel]) -> None:
    case = CASES[name]
    inputs, expected = case.inputs(), case.new_outputs()
    compiled[name]([*inputs, *expected], case.sizes)
    shared = case.inputs()
    compiled[name]([*shared, shared[0]], case.sizes)
    assert torch.equal(shared[0].flatten(), expected[0].flatten()) or torch.equal(
        shared[0].flatten().nan_to_num(7), expected[0].flatten().nan_to_num(7))


def test_every_output_of_a_layer_norm_may_take_memory_of_an_input(compiled: dict[str, CompiledCppKernel]) -> None:
    case = CASES["layer_norm_768"]
    x, r, w, b = case.inputs()
    h, y, mean, rstd = case.new_outputs()
    compiled[case.name]([x, r, w, b, h, y, mean, rstd], case.sizes)
    compiled[case.name]([x, r, w, b, x, r, torch.empty(6), torch.empty(6)], case.sizes)
    assert torch.equal(x, h) and torch.equal(r, y)


@pytest.mark.parametrize("name", ["softmax_2_20000", "sum_f32_columns_long", "sum_f32_rows_long", "cross_entropy",
                                  "long_rows"])
def test_thread_count_does_not_change_bits(name: str, compiled: dict[str, CompiledCppKernel],
                                           two_threads: None) -> None:
    case = CASES[name]
    inputs, one, two = case.inputs(), case.new_outputs(), case.new_outputs()
    compiled[name]([*inputs, *two], case.sizes)
    torch.set_num_threads(1)
    compiled[name]([*inputs, *one], case.sizes)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_more_threads_than_items(compiled: dict[str, CompiledCppKernel], two_threads: None) -> None:
    torch.set_num_threads(5)
    case = CASES["softmax_2_20000"]
    inputs, outputs = case.inputs(), case.new_outputs()
    compiled[case.name]([*inputs, *outputs], case.sizes)
    torch.testing.assert_close(outputs[0], inputs[0].softmax(-1))


@pytest.mark.parametrize(("name", "items", "work"), [
    ("exp_f32", "s0", "12"), ("softmax_7_128", "s0", "2432"), ("broadcast", "s0", "6*s1"), ("scalar", "1", "12"),
    ("long_rows", "10", "16384"), ("max_pool", "30", "480")])
def test_work_items(name: str, items: str, work: str) -> None:
    kernel = CASES[name].kernel
    assert (str(work_items(kernel)), str(work_per_item(kernel))) == (items, work)


def test_hot_loops_are_vectorised(tmp_path: Path) -> None:
    """GCC itself says which loops it vectorised; every loop under `omp simd` of the hot kernels must be among them."""
    tools = toolchain()
    if tools.compiler.kind != "gcc" or tools.isa.name == "scalar":
        pytest.skip(f"{tools.compiler.kind} on {tools.isa.name} has no such report")
    names = HOT + (HOT_AVX512 if tools.isa.name == "avx512" else ())
    text = print_translation_unit([CASES[name].kernel for name in names])
    (tmp_path / "hot.cpp").write_text(text)
    command = [*tools.compiler.command, *BASE_FLAGS, *tools.isa.flags, *COMPILE_FLAGS, "-fopenmp", "-fopt-info-vec",
               "-c", "hot.cpp", "-o", "hot.o"]
    report = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, timeout=300).stderr
    done = {int(n) for n in re.findall(r"hot\.cpp:(\d+):\d+: optimized: loop vectorized", report)}
    lines = text.splitlines()
    left = [loop for n, loop in _simd_loops(lines) if done.isdisjoint(range(n, n + len(loop)))]
    assert done and not left, left


def _simd_loops(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Every loop under a pragma, with the number of its first line (from 1)."""
    for at, line in enumerate(lines):
        if "#pragma omp simd" in line:
            end = lines.index(line.partition("#")[0] + "}", at)
            yield at + 1, lines[at:end]


def test_a_store_may_follow_a_gather_through_a_constant_index() -> None:
    kernel = parse_kernel("""
    kernel constant_index(x: f32 -> y: f32)
      axes p0: 3
      %0: i64 = const 2
      %1: f32 = load x[%0 + p0]
      store y[p0] = %1
    """)
    x, y = floats(5), torch.empty(3)
    compile_kernels([kernel])["constant_index"]([x, y])
    assert torch.equal(y, x[2:])


def test_wrong_number_of_arguments_is_refused(compiled: dict[str, CompiledCppKernel]) -> None:
    with pytest.raises(ValueError, match="expected 2 buffers and 1 sizes, got 1 and 0"):
        compiled["exp_f32"]([floats(3)])


def test_bad_ir_is_refused() -> None:
    kernel = parse_kernel("kernel bad(x: f32 -> y: f32)\n axes p0: 3\n %0: f32 = load x[q]\n store y[p0] = %0")
    with pytest.raises(IRError, match="unknown axis or size 'q'"):
        print_kernel_cpp(kernel)


def test_no_kernels_need_no_compiler() -> None:
    assert compile_kernels([]) == {}


def test_a_bad_index_is_reported_after_the_rest_was_done() -> None:
    text = """kernel pick(in0: i64, in1: f32 -> out0: f32)
      axes p0: 1000
      %0: i64 = load in0[p0]
      %1: i64 = const 0
      %2: i64 = const 7
      %3: b1 = ge %0, %1
      %4: b1 = lt %0, %2
      %5: b1 = and %3, %4
      %6: b1 = expect %5
      %7: f32 = load in1[%0] if %6 else 0.0
      store out0[p0] = %7
    """
    kernel = parse_kernel(text)
    run = compile_kernels([kernel])["pick"]
    table, places, out = torch.randn(7), torch.arange(1000) % 7, torch.empty(1000)
    run([places, table, out])
    assert torch.equal(out, table[places])
    for wrong in (-1, 7, 2**40):
        places[500] = wrong
        with pytest.raises(IndexError, match="index out of range in pick"):
            run([places, table, out])
        assert out[500] == 0 and torch.equal(out[501:], table[places[501:]])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_stored_mean_that_cancels_is_as_exact_as_eagers(dynamic: bool) -> None:
    """The variance reads the mean in a later sweep, and it is a result, too: eager adds it in double."""
    x = torch.randn(4, 999, generator=torch.Generator().manual_seed(0)) * 100
    x -= x.mean(1, keepdim=True)
    graph = KernelGraph(trace(lambda x: torch.var_mean(x, 1), [x], dynamic))
    found = graph.run([x], compile_graphs([graph], "cpp"))
    for got, eager, truth in zip(found, torch.var_mean(x, 1), torch.var_mean(x.double(), 1), strict=True):
        assert difference(got, eager, truth) is None
