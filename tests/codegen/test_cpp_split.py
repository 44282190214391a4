"""One long row on several threads: right, the same bits for every number of threads, and only where it is long."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from meshwright.codegen.cpp import CompiledCppKernel, compile_kernels, print_kernel_cpp
from meshwright.codegen.cpp_plan import LONG_ROW
from meshwright.codegen.cpp_split import MAX_CHUNKS
from meshwright.codegen.ir_text import parse_kernel

from .cases import TORCH, Case, check, floats
from .cases_rows import softmax_case

LENGTHS = (LONG_ROW, LONG_ROW + 1, 300001, MAX_CHUNKS * 128 * 40 + 127)


def whole(op: str, size: int, dtype: str = "f32", poison: float | None = None, static: bool = False) -> Case:
    """Reduce everything, and scale what comes out."""
    name = f"whole_{op}_{dtype}_{size}{'_static' if static else ''}{'' if poison is None else f'_{poison}'}"
    text = f"""
    kernel {name}({'' if static else 's0, '}x: {dtype} -> y: {dtype})
      axes r0: {size if static else 's0'} reduce
      %0: {dtype} = load x[r0]
      %1: {dtype} = reduce_{op} %0
      store y[0] = %1
    """

    def inputs() -> list[torch.Tensor]:
        x = floats(size)
        if op == "prod":
            x = 1 + 1e-3 * x
        if poison is not None:
            x[size - 2] = poison
        return [x > 2.5 if dtype == "b1" else (x * 100).to(TORCH[dtype]) if dtype == "i64" else x.to(TORCH[dtype])]

    table = {"sum": torch.sum, "prod": torch.prod, "max": torch.amax, "min": torch.amin, "any": torch.any,
             "all": torch.all}
    return Case(name, text, inputs, ((1,),), lambda x: [table[op](x).reshape(1).to(x.dtype)],
                () if static else (size,))


def strided(rows: int) -> Case:
    """Two reduce axes that can't be merged: the outer one is cut."""
    text = f"""
    kernel strided_{rows}(x: f32 -> y: f32, z: f32)
      axes r0: {rows} reduce, r1: 30 reduce
      %0: f32 = load x[37*r0 + r1]
      %1: f32 = reduce_sum %0
      %2: f32 = sub %0, %1
      %3: f32 = reduce_max %2
      store y[0] = %1
      store z[0] = %3
    """
    return Case(f"strided_{rows}", text, lambda: [floats(rows, 37)], ((1,), (1,)),
                lambda x: [x[:, :30].sum().reshape(1), (x[:, :30] - x[:, :30].sum()).amax().reshape(1)])


def normalised(size: int) -> Case:
    """Two sweeps, the second with stores of every element: softmax without parallel axes."""
    text = f"""
    kernel whole_softmax_{size}(x: f32 -> y: f32)
      axes r0: {size} reduce
      %0: f32 = load x[r0]
      %1: f32 = reduce_max %0
      %2: f32 = sub %0, %1
      %3: f32 = exp %2
      %4: f32 = reduce_sum %3
      %5: f32 = div %3, %4
      store y[r0] = %5
    """
    return Case(f"whole_softmax_{size}", text, lambda: [floats(size, scale=4)], ((size,),), lambda x: [x.softmax(-1)])


CASES = {c.name: c for c in [
    *(whole(op, size) for op in ("sum", "prod", "max", "min") for size in LENGTHS),
    *(whole(op, 300001, "i64") for op in ("sum", "max", "min")), *(whole(op, 300001, "b1") for op in ("any", "all")),
    *(whole("max", 300001, poison=p) for p in (math.nan, math.inf)), whole("min", 300001, poison=math.nan),
    *(whole("sum", n) for n in (0, 1, 5, LONG_ROW - 1)), whole("sum", 300001, static=True),
    whole("sum", 300001, "f64"), strided(9001), strided(2200), normalised(100003),
]}


@pytest.fixture(scope="module")
def compiled() -> dict[str, CompiledCppKernel]:
    kernels = compile_kernels([c.kernel.renamed(f"case_{i}") for i, c in enumerate(CASES.values())])
    return {name: kernels[f"case_{i}"] for i, name in enumerate(CASES)}


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_threads_gives_the_same_right_bits(name: str, compiled: dict[str, CompiledCppKernel],
                                                           any_threads: None) -> None:
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)

        def run(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
            compiled[case.name]([*inputs, *outputs], case.sizes)
            found.append([o.clone() for o in outputs])

        check(CASES[name], run)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("case", [whole("sum", LONG_ROW, static=True), whole("max", 10), strided(9001),
                                  normalised(LONG_ROW)], ids=lambda c: c.name)
def test_a_row_that_may_be_long_is_cut(case: Case) -> None:
    assert "#pragma omp parallel for" in print_kernel_cpp(case.kernel)


@pytest.mark.parametrize("case", [whole("sum", LONG_ROW - 1, static=True), softmax_case(7, 1 << 17), strided(2000)],
                         ids=lambda c: c.name)
def test_short_rows_and_many_rows_are_not_cut(case: Case) -> None:
    assert "#pragma omp parallel" not in print_kernel_cpp(case.kernel)


def test_positions_are_not_cut() -> None:
    kernel = parse_kernel("kernel first(s0, x: f32 -> y: i64)\n axes r0: s0 reduce\n %0: f32 = load x[r0]\n"
                          " %1: i64 = reduce_argmax %0\n store y[0] = %1")
    assert "#pragma omp parallel" not in print_kernel_cpp(kernel)
