"""The Triton printer: the shared cases in the interpreter, golden texts, and ahead-of-time compilation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch

from meshwright.codegen.aot import TARGETS, compile_ahead
from meshwright.codegen.ir import IRError, Kernel
from meshwright.codegen.ir_text import parse_kernel
from meshwright.codegen.triton import index_bound, print_kernel_triton, print_module
from meshwright.codegen.triton_axes import merge_axes
from meshwright.codegen.triton_build import configure, triton_kernel
from meshwright.codegen.triton_config import LIVE_PER_THREAD, launch_config
from meshwright.codegen.triton_ops import HELPERS
from meshwright.codegen.triton_schedule import form_of, live_elements
from meshwright.runtime.errors import CompileFailure, InvalidInputError, UnknownNameError
from meshwright.runtime.triton_launch import Launch, TritonKernel

from .cases import Case, all_cases, check

CASES = {c.name: c for c in all_cases()}


def run(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    triton_kernel(case.kernel)([*inputs, *outputs], case.sizes)


def small_blocks(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    """With the block sizes of a GPU launch (few elements per program), so that every mask matters."""
    from_table = configure(case.kernel)

    def at(sizes: tuple[int, ...], interpret: bool) -> Launch:
        return from_table(sizes, False)

    TritonKernel(case.kernel.name, print_module([case.kernel]), at)([*inputs, *outputs], case.sizes)


def wide_indices(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    from_table = configure(case.kernel)

    def at(sizes: tuple[int, ...], interpret: bool) -> Launch:
        return dataclasses.replace(from_table(sizes, interpret), wide_index=True)

    TritonKernel(case.kernel.name, print_module([case.kernel]), at)([*inputs, *outputs], case.sizes)


def tolerance(name: str) -> int:
    """In f64 the truth is eager itself, and a product in another order differs by more than 4 ulp."""
    return 16 if name.startswith("prod_f64") else 4


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_agrees_with_torch(name: str) -> None:
    check(CASES[name], run, tolerance(name))


# The interpreter takes its time per program, so only launches of few programs.
FEW_PROGRAMS = [n for n, c in CASES.items() if launch_config(c.kernel, c.sizes).grid <= 64]


@pytest.mark.parametrize("name", FEW_PROGRAMS[::5])
def test_launch_block_sizes_agree_with_torch(name: str) -> None:
    check(CASES[name], small_blocks, tolerance(name))


@pytest.mark.parametrize("name", list(CASES)[3::7])
def test_wide_indices_agree_with_torch(name: str) -> None:
    check(CASES[name], wide_indices, tolerance(name))


@pytest.mark.parametrize("name", ["softmax_7_128", "softmax_3_1000_symbolic", "rms_norm_bf16", "channel_sum",
                                  "embedding", "argmax_two_axes", "rope", "integer_atoms"])
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"triton/{name}.py", print_module([CASES[name].kernel]))


COLUMN = parse_kernel("""
kernel column_sum(s0, x: f32 -> y: f32)
  axes p0: 768, r0: s0 reduce
  %0: f32 = load x[768*r0 + p0]
  %1: f32 = reduce_sum %0
  store y[p0] = %1
""")
CONTIGUOUS = parse_kernel("""
kernel add(s0, x: bf16, y: bf16 -> z: bf16)
  axes p0: s0, p1: 12, p2: 64
  %0: bf16 = load x[768*p0 + 64*p1 + p2]
  %1: f32 = cast %0
  %2: bf16 = load y[768*p0 + 64*p1 + p2]
  %3: f32 = cast %2
  %4: f32 = add %1, %3
  %5: bf16 = cast %4
  store z[768*p0 + 64*p1 + p2] = %5
""")


def test_contiguous_axes_become_one_without_division() -> None:
    text = print_kernel_triton(CONTIGUOUS)
    assert len(merge_axes(CONTIGUOUS).axes) == 1
    assert "//" not in text and "%" not in text and "tl.load(x_ptr + x, mask=xmask" in text


def test_permuted_axes_stay_apart() -> None:
    text = str(CONTIGUOUS).replace("store z[768*p0 + 64*p1 + p2]", "store z[768*p0 + 12*p2 + p1]")
    assert len(merge_axes(parse_kernel(text)).axes) == 3


@pytest.mark.parametrize(("row", "form"), [("768", "persistent"), ("4096", "persistent"), ("5000", "looped"),
                                           ("s0", "looped")])
def test_row_size_decides_the_form(row: str, form: str) -> None:
    text = f"kernel k(s0, x: f32 -> y: f32)\n axes p0: s0, r0: {row} reduce\n %0: f32 = load x[{row}*p0 + r0]\n" \
           " %1: f32 = reduce_sum %0\n store y[p0] = %1\n"
    assert form_of(parse_kernel(text)) == form


def test_column_reductions_are_wide_along_memory() -> None:
    launch = launch_config(COLUMN, [4096])
    assert launch.constants["XBLOCK"] >= 32 and launch.constants["RBLOCK"] > 1


def test_what_lives_at_once_decides_the_block() -> None:
    """Ten rows that are all read before the first is used need smaller blocks than one row."""
    def column(count: int) -> Kernel:
        loads = [f" %{i}: f32 = load x{i}[256*r0 + p0]" for i in range(count)]
        adds = [f" %{count + i}: f32 = mul %{count + i - 1 if i else 0}, %{count - 1 - i}" for i in range(count)]
        inputs = ", ".join(f"x{i}: f32" for i in range(count))
        head = [f"kernel k(s0, {inputs} -> y: f32)", " axes p0: 256, r0: s0 reduce"]
        return parse_kernel("\n".join([*head, *loads, *adds, f" %r: f32 = reduce_sum %{2 * count - 1}",
                                       " store y[p0] = %r"]))

    def elements(kernel: Kernel) -> int:
        launch = launch_config(kernel, [4096])
        return launch.constants["XBLOCK"] * launch.constants["RBLOCK"] // (32 * launch.num_warps)

    assert live_elements(column(1)) < live_elements(column(10)) == 12
    assert elements(column(10)) * 12 <= LIVE_PER_THREAD * 2 and elements(column(10)) < elements(column(1))


@pytest.mark.parametrize(("rows", "wide"), [(1000, False), (2**31 // 768 - 5000, False), (2**31 // 768 + 1, True)])
def test_indices_are_64_bit_exactly_when_they_may_overflow(rows: int, wide: bool) -> None:
    assert index_bound(CONTIGUOUS, {"s0": rows}) >= 768 * (rows - 1)
    assert launch_config(CONTIGUOUS, [rows]).wide_index is wide


def test_an_output_may_reuse_an_inputs_memory_in_a_looped_kernel() -> None:
    """The residual is stored before the second pass reads the row again."""
    kernel = parse_kernel("""
kernel k(s0, s1, x: f32 -> h: f32, y: f32)
  axes p0: s0, r0: s1 reduce
  %0: f32 = load x[s1*p0 + r0]
  %1: f32 = add %0, %0
  store h[s1*p0 + r0] = %1
  %2: f32 = reduce_sum %1
  %3: f32 = sub %1, %2
  store y[s1*p0 + r0] = %3
""")
    x = torch.randn(3, 700)
    expected = 2 * x, 2 * x - (2 * x).sum(1, keepdim=True)
    y = torch.empty(3, 700)
    triton_kernel(kernel)([x, x, y], [3, 700])
    assert torch.equal(x, expected[0])
    torch.testing.assert_close(y, expected[1], rtol=1e-5, atol=1e-4)


def test_helpers_do_what_their_numpy_stand_ins_do() -> None:
    """Interpreted modules replace these helpers; here they are interpreted as printed, on a small block."""
    from triton.runtime.interpreter import InterpretedFunction

    from meshwright.runtime.triton_launch import load_module

    kernel = CASES["softmax_7_128"].kernel
    source = print_module([kernel]) + "".join(HELPERS[h] for h in ("row_prod", "product_of", "row_min", "min_of")
                                              if f"def {h}" not in print_module([kernel]))
    source += """

@triton.jit
def probe(x_ptr, sum_ptr, max_ptr, min_ptr, prod_ptr):
    r = tl.arange(0, 8)[None, :]
    row = tl.arange(0, 2)[:, None]
    v = tl.load(x_ptr + row * 8 + r)
    tl.store(max_ptr + row, row_max(v))
    tl.store(min_ptr + row, row_min(v))
    tl.store(prod_ptr + row, row_prod(v))
"""
    jitted = load_module(source)
    for name, value in list(vars(jitted).items()):
        if hasattr(value, "fn") and getattr(value.fn, "__module__", None) == jitted.__name__:
            setattr(jitted, name, InterpretedFunction(value.fn))
    x = torch.randn(2, 8)
    x[1, 3] = float("nan")
    outs = [torch.empty(2) for _ in range(4)]
    jitted.probe[(1,)](x, *outs)
    for out, expected in zip(outs[1:], (x.amax(1), x.amin(1), x.prod(1)), strict=True):
        torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("bad", ["x, y=1", "lambda", "a.b", "x)"])
def test_names_that_are_no_identifiers_are_refused(bad: str) -> None:
    kernel = CASES["embedding"].kernel
    with pytest.raises(IRError, match="no name"):
        print_kernel_triton(dataclasses.replace(kernel, name=bad))
    with pytest.raises(IRError, match="no name"):
        print_kernel_triton(dataclasses.replace(kernel, sizes=(bad,)))


def test_buffers_on_two_devices_are_refused() -> None:
    case = CASES["embedding"]
    buffers = [*case.inputs(), *case.new_outputs()]
    buffers[0] = torch.empty(buffers[0].shape, device="meta")
    with pytest.raises(InvalidInputError, match="one device"):
        triton_kernel(case.kernel)(buffers, case.sizes)


AOT_SAMPLE = ("softmax_7_128", "softmax_3_1000_symbolic", "layer_norm_768", "rms_norm_bf16", "cross_entropy", "rope",
              "embedding", "channel_sum", "argmax_two_axes", "silu_mul_f16", "integer_atoms")


def compiled_clean(kernels: list[Kernel], target: str) -> None:
    for report in compile_ahead(kernels, target):
        assert report.fits and report.spills == 0 and 0 < report.registers <= 255, report
        assert report.binary and report.assembly


@pytest.mark.parametrize("target", TARGETS)
def test_cases_compile_ahead_of_time_without_spills(target: str) -> None:
    """A sample; with MESHWRIGHT_TEST_SCALE=full every case."""
    names = list(CASES) if os.environ.get("MESHWRIGHT_TEST_SCALE") == "full" else AOT_SAMPLE
    compiled_clean([CASES[n].kernel for n in names], target)


def test_vector_loads_are_16_bytes_wide() -> None:
    (report,) = compile_ahead(CONTIGUOUS, "sm_90")
    assert "ld.global.v4.b32" in report.assembly


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="sm_90"):
        compile_ahead(CONTIGUOUS, "sm90")


def test_what_triton_rejects_is_named() -> None:
    kernel = dataclasses.replace(CONTIGUOUS, name="broken")
    from meshwright.codegen import aot

    job = aot.make_job(kernel, TARGETS["sm_90"], {})
    job["source"] = job["source"].replace("tl.load", "tl.no_such_function")
    (result,) = aot.run_jobs([job])
    with pytest.raises(CompileFailure, match="broken"):
        aot._report(kernel.name, result, job)


def test_numpy_is_quiet_about_padding_lanes() -> None:
    with np.errstate(all="raise"):
        check(CASES["layer_norm_33"], run)


def test_a_scalar_guard_becomes_a_block() -> None:
    """A gather with a 0-d index: the mask varies along nothing, Triton wants a block."""
    kernel = parse_kernel("""kernel pick(i: i64, w: f32 -> y: f32)
  axes p0: 8
  %0: i64 = load i[0]
  %1: i64 = const 5
  %2: b1 = lt %0, %1
  %3: f32 = load w[8*%0 + p0] if %2 else 0
  store y[p0] = %3
""")
    w, y = torch.randn(5, 8), torch.empty(8)
    triton_kernel(kernel)([torch.tensor(2), w, y], [])
    assert torch.equal(y, w[2])


def test_an_index_computed_from_scalars_becomes_a_block() -> None:
    """A gather by a 0-d index that met a constant: a block of one element by then, not a scalar."""
    kernel = parse_kernel("""kernel pick(i: i64, w: f32 -> y: f32)
  axes
  %0: i64 = load i[0]
  %1: i64 = const 2
  %2: b1 = lt %0, %1
  %3: i64 = where %2, %0, %1
  %4: f32 = load w[%3] if %2 else 0
  store y[0] = %4
""")
    w, y = torch.randn(5), torch.empty(())
    triton_kernel(kernel)([torch.tensor(1), w, y], [])
    assert torch.equal(y, w[1])
    compiled_clean([kernel], "sm_90")
