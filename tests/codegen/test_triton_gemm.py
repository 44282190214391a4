"""The GEMM template with an epilogue: interpreted against float64, and compiled ahead of time for three targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.codegen.aot import TARGETS, AotReport, compile_gemms_ahead
from meshwright.codegen.expr import const, parse_expr, var
from meshwright.codegen.ir_text import parse_kernel, print_kernel
from meshwright.codegen.templates.triton_gemm import (
    FLOAT_TILES,
    HALF_TILES,
    TF32_TILES,
    GemmKernel,
    Tile,
    gemm_kernel,
    gemm_launch,
    print_gemm,
    tiles_for,
)
from meshwright.codegen.triton import module_of
from meshwright.codegen.triton_config import INDEX_LIMIT
from meshwright.codegen.triton_epilogue import Bias, CannotFuse, as_epilogue
from meshwright.runtime.triton_launch import Launch, TritonKernel

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# How a flat kernel computes %7 from the product %1 (f32); in1 is read as %3.
BODIES = {
    "identity": "  %7: f32 = neg %1\n",
    "gelu": "  %2: f32 = const 0.7071067811865476\n  %4: f32 = mul %1, %2\n  %5: f32 = erf %4\n"
            "  %6: f32 = const 1.0\n  %8: f32 = add %5, %6\n  %9: f32 = const 0.5\n  %10: f32 = mul %1, %9\n"
            "  %7: f32 = mul %10, %8\n",
    "silu_up": "  %2: {t} = load in1[{p}]\n  %3: f32 = cast %2\n  %4: f32 = sigmoid %3\n  %5: f32 = mul %3, %4\n"
               "  %7: f32 = mul %5, %1\n",
    "residual": "  %2: {t} = load in1[{p}]\n  %3: f32 = cast %2\n  %7: f32 = add %1, %3\n",
}
MEANING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "identity": lambda p, other: -p,
    "gelu": lambda p, other: torch.nn.functional.gelu(p),
    "silu_up": lambda p, other: torch.nn.functional.silu(other) * p,
    "residual": lambda p, other: p + other,
}


def kernel_text(body: str, dtype: str, axes: str, place: str, out: str | None = None) -> str:
    other = f", in1: {dtype}" if "in1" in BODIES[body] else ""
    return (f"kernel k(in0: {dtype}{other} -> out0: {dtype})\n  axes {axes}\n  %0: {dtype} = load in0[{place}]\n"
            f"  %1: f32 = cast %0\n{BODIES[body].format(t=dtype, p=place)}  %11: {dtype} = cast %7\n"
            f"  store out0[{out or place}] = %11\n")


def gemm(text: str, dtype: str, M: int, N: int, K: int, a_rows: bool = True, b_rows: bool = True,
         bias: bool = False, rows: str | None = None) -> GemmKernel:
    """`rows`: the number of rows in symbols (default: the constant M)."""
    kernel = parse_kernel(text)
    height = parse_expr(rows) if rows else const(M)
    epilogue = as_epilogue(kernel, {"in0"}, {s: var(s) for s in kernel.sizes}, height, const(N),
                           Bias(dtype, const(0), const(1)) if bias else None)
    a = (const(K), const(1)) if a_rows else (const(1), height)
    b = (const(N), const(1)) if b_rows else (const(1), const(K))
    return GemmKernel("gemm_k", dtype, height, const(N), const(K), a, b, epilogue)


def laid_out(x: torch.Tensor, by_rows: bool) -> torch.Tensor:
    return x.contiguous() if by_rows else x.t().contiguous().t()


def tile_of(kernel: GemmKernel, tile: Tile) -> TritonKernel:
    """With the tile of a GPU launch, so that every mask matters."""
    def at(sizes: tuple[int, ...], interpret: bool) -> Launch:
        return gemm_launch(kernel, tile, dict(zip(kernel.sizes, sizes, strict=True)))

    return TritonKernel(kernel.name, module_of([print_gemm(kernel)]), at)


def allowed(eager: torch.Tensor, exact: torch.Tensor) -> float:
    """The house rule: twice eager's own error and 4 ulp of the scale."""
    return 2 * float((eager.double() - exact).abs().max()) + 4 * torch.finfo(eager.dtype).eps * float(exact.abs().max())


SIZES = st.sampled_from([1, 2, 15, 16, 17, 33, 63, 64, 65, 100])


@settings(max_examples=60, deadline=None)
@given(M=SIZES, N=SIZES, K=st.sampled_from([1, 3, 16, 31, 64, 65, 130]), a_rows=st.booleans(), b_rows=st.booleans(),
       bias=st.booleans(), body=st.sampled_from(sorted(BODIES)), dtype=st.sampled_from(sorted(DTYPES)),
       small=st.booleans(), seed=st.integers(0, 1 << 20))
def test_a_product_with_an_epilogue_agrees_with_float64(M, N, K, a_rows, b_rows, bias, body, dtype, small, seed):
    generator, kind = torch.Generator().manual_seed(seed), DTYPES[dtype]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    a, b, other = laid_out(random(M, K), a_rows), laid_out(random(K, N), b_rows), random(M, N)
    added = random(N) if bias else torch.zeros(N, dtype=kind)
    made = gemm(kernel_text(body, dtype, f"p0: {M * N}", "p0"), dtype, M, N, K, a_rows, b_rows, bias)
    out = torch.full((M, N), float("nan"), dtype=kind)
    buffers = [a, b, *([added] if bias else []), *([other] if "in1" in BODIES[body] else []), out]
    kernel = tile_of(made, Tile(16, 32, 32, 1, 1)) if small else gemm_kernel(made, HALF_TILES[0])
    kernel(buffers, [])
    exact = MEANING[body](a.double() @ b.double() + added.double(), other.double())
    eager = MEANING[body](torch.addmm(added, a, b), other)
    assert float((out.double() - exact).abs().max()) <= allowed(eager, exact)


@pytest.mark.parametrize("columns", [64, 70])
def test_programs_cover_every_tile_once(columns: int) -> None:
    """More bands than GROUP, the last one lower."""
    M, N, K = 16 * 11, columns, 32
    made = gemm(kernel_text("residual", "f32", f"p0: {M * N}", "p0"), "f32", M, N, K)
    a, b, other, out = torch.randn(M, K), torch.randn(K, N), torch.randn(M, N), torch.full((M, N), float("nan"))
    tile_of(made, Tile(16, 16, 32, 1, 1))([a, b, other, out], [])
    torch.testing.assert_close(out, a @ b + other, rtol=1e-5, atol=1e-5)


def test_rows_of_symbolic_number() -> None:
    text = kernel_text("gelu", "f32", "p0: 20*s0", "p0").replace("k(in0", "k(s0, in0")
    made = gemm(text, "f32", 0, 10, 24, rows="2*s0")
    for rows in (1, 7, 40):
        a, b, out = torch.randn(2 * rows, 24), torch.randn(24, 10), torch.full((2 * rows, 10), float("nan"))
        gemm_kernel(made, FLOAT_TILES[0])([a, b, out], [rows])
        torch.testing.assert_close(out, torch.nn.functional.gelu(a @ b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("axes", "place", "out", "shape"), [
    ("p0: 6, p1: 8", "8*p0 + p1", "6*p1 + p0", "transposed"),
    ("p0: 2, p1: 3, p2: 8", "24*p0 + 8*p1 + p2", "8*p0 + 16*p1 + p2", "rows in another order"),
    ("p0: 6, p1: 2, p2: 4", "8*p0 + 4*p1 + p2", "24*p1 + 4*p0 + p2", "heads outside"),
    ("p1: 2, p0: 6, p2: 4", "8*p0 + 4*p1 + p2", "24*p1 + 4*p0 + p2", "axes in another order"),
    ("p0: 12, p1: 4", "4*p0 + p1", "4*p0 + p1", "an axis across rows"),
    ("p0: 3, p1: 4, p2: 4", "16*p0 + 4*p1 + p2", "4*p0 + 12*p1 + p2", "an axis across rows, outside another"),
])
def test_every_order_of_the_products_elements(axes: str, place: str, out: str, shape: str) -> None:
    text = kernel_text("identity", "f32", axes, place, out)
    made = gemm(text, "f32", 6, 8, 16)
    a, b, found = torch.randn(6, 16), torch.randn(16, 8), torch.full((48,), float("nan"))
    gemm_kernel(made, FLOAT_TILES[0])([a, b, found], [])
    from meshwright.codegen.triton_build import triton_kernel

    expected = torch.full((48,), float("nan"))
    triton_kernel(parse_kernel(text))([a @ b, expected], [])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_epilogue_reads_as_ir() -> None:
    epilogue = as_epilogue(parse_kernel(kernel_text("residual", "bf16", "p0: 48", "p0")), {"in0"}, {}, const(6),
                           const(8), Bias("bf16", const(0), const(1)))
    text = print_kernel(epilogue)
    assert text == ("kernel k(acc: f32, bias: bf16, in0: bf16 -> out0: bf16)\n  axes m: 6, n: 8 reduce\n"
                    "  %acc: f32 = load acc[8*m + n]\n  %bias: bf16 = load bias[n]\n  %wide: f32 = cast %bias\n"
                    "  %product: f32 = add %acc, %wide\n  %2: bf16 = load in0[8*m + n]\n  %3: f32 = cast %2\n"
                    "  %7: f32 = add %product, %3\n  %11: bf16 = cast %7\n  store out0[8*m + n] = %11\n")
    assert parse_kernel(text) == epilogue


def test_a_product_that_is_stored_as_it_is_is_rounded_once() -> None:
    text = "kernel k(in0: bf16 -> out0: bf16)\n  axes p0: 48\n  %0: bf16 = load in0[p0]\n  store out0[p0] = %0\n"
    a, b, out = torch.randn(6, 16).bfloat16(), torch.randn(16, 8).bfloat16(), torch.zeros(6, 8).bfloat16()
    gemm_kernel(gemm(text, "bf16", 6, 8, 16), HALF_TILES[0])([a, b, out], [])
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())


@pytest.mark.parametrize(("change", "reason"), [
    (("axes p0: 48", "axes p0: 6, r0: 8 reduce", "[p0]", "[8*p0 + r0]"), "reduces"),
    (("= load in0[p0]", "= load in0[p0 + 1]"), "walks over something else"),
    (("= load in0[p0]", "= load in0[2*p0]"), "another order"),
    (("axes p0: 48", "axes p0: 24"), "walks over something else"),
    (("axes p0: 48", "axes p0: 16, p1: 3", "[p0]", "[3*p0 + p1]"), "ends inside a row"),
    (("= load in0[p0]", "= load in0[floordiv(p0, 2)]"), "computes where"),
    (("%1: f32 = cast %0", "%1: f32 = cast %0\n  %20: f32 = load in0[47 - p0]"), "several places"),
])
def test_what_is_no_epilogue(change: tuple[str, ...], reason: str) -> None:
    text = kernel_text("identity", "f32", "p0: 48", "p0")
    for old, new in zip(change[::2], change[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(CannotFuse, match=reason):
        as_epilogue(parse_kernel(text), {"in0"}, {}, const(6), const(8))


def test_indices_are_64_bit_where_an_operand_is_large() -> None:
    made = gemm(kernel_text("gelu", "bf16", "p0: 64*s0", "p0").replace("k(in0", "k(s0, in0"), "bf16", 0, 64, 4096,
                rows="s0")
    limit = INDEX_LIMIT // 4096
    assert not gemm_launch(made, HALF_TILES[0], {"s0": limit - 2}).wide_index
    assert gemm_launch(made, HALF_TILES[0], {"s0": limit + 1}).wide_index


@pytest.mark.parametrize(("rows", "tallest"), [(1, 16), (16, 16), (40, 64), (1000, 128)])
def test_tiles_are_not_mostly_padding(rows: int, tallest: int) -> None:
    made = gemm(kernel_text("gelu", "bf16", "p0: 64*s0", "p0").replace("k(in0", "k(s0, in0"), "bf16", 0, 64, 64,
                rows="s0")
    assert max(t.rows for t in tiles_for(made, {"s0": rows})) == tallest


def test_an_epilogue_that_holds_much_at_once_gets_smaller_tiles() -> None:
    """Six values per element, as in the gradient of a gated MLP, spill in 128 x 128."""
    loads = "".join(f"  %{20 + i}: f32 = load in1[p0 + {i}]\n" for i in range(5))
    uses = "".join(f"  %{30 + i}: f32 = mul %{29 + i if i else 1}, %{24 - i}\n" for i in range(5))
    text = kernel_text("residual", "f32", "p0: 786432", "p0").replace("  %7:", f"{loads}{uses}  %7:").replace(
        "add %1", "add %34")
    made = gemm(text, "f32", 1024, 768, 64)
    assert max(t.rows * t.columns // t.warps for t in tiles_for(replace(made, dtype="bf16"), {})) == 64 * 64 // 4
    light = gemm(kernel_text("gelu", "f32", "p0: 786432", "p0"), "f32", 1024, 768, 64)
    assert tiles_for(replace(light, dtype="bf16"), {}) == HALF_TILES


# -- ahead of time ----------------------------------------------------------------------------------
INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}


def compiled(target: str, dtype: str, tiles: tuple[Tile, ...], body: str, b_rows: bool) -> list[AotReport]:
    M, N, K = 1024, 768, 512
    made = gemm(kernel_text(body, dtype, f"p0: {M * N}", "p0"), dtype, M, N, K, True, b_rows, True)
    return compile_gemms_ahead([(made, t) for t in tiles], target)


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_use_tensor_cores_without_spills(target: str) -> None:
    """Row-major weights with two operands in the epilogue, transposed ones with the longest epilogue."""
    for body, b_rows in (("silu_up", True), ("gelu", False)):
        for report, tile in zip(compiled(target, "bf16", HALF_TILES, body, b_rows), HALF_TILES, strict=True):
            assert report.fits and report.spills == 0, (report.kernel, tile, report.spills, report.shared_bytes)
            few = tile.rows < 64 and target == "sm_90"  # Hopper's own instruction takes 64 rows
            assert INSTRUCTION["sm_80" if few else target] in report.assembly


@pytest.mark.parametrize("target", TARGETS)
def test_fp32_tiles_compile_without_spills(target: str) -> None:
    for report in compiled(target, "f32", FLOAT_TILES, "gelu", False):
        assert report.fits and report.spills == 0, (report.kernel, report.spills)


def test_tf32_uses_tensor_cores_and_exact_fp32_does_not() -> None:
    made = gemm(kernel_text("gelu", "f32", "p0: 786432", "p0"), "f32", 1024, 768, 512)
    (exact,) = compile_gemms_ahead([(made, FLOAT_TILES[1])], "sm_80")
    assert "mma.sync" not in exact.assembly and exact.spills == 0
    for target in ("sm_80", "sm_90"):
        for found in compile_gemms_ahead([(replace(made, precision="tf32"), tile) for tile in TF32_TILES], target):
            assert ".tf32" in found.assembly and found.fits and found.spills == 0, (target, found.spills)


def test_the_interpreters_product_is_the_printed_one() -> None:
    """Interpreted modules replace `tile_dot*` for the sake of bf16; here fp32 goes through `tl.dot` as printed."""
    from triton.runtime.interpreter import InterpretedFunction

    from meshwright.runtime.triton_launch import load_module

    made = gemm(kernel_text("residual", "f32", "p0: 420", "p0"), "f32", 20, 21, 40)
    jitted = load_module(module_of([print_gemm(made.renamed("as_printed"))]))
    for name, value in list(vars(jitted).items()):
        if hasattr(value, "fn") and getattr(value.fn, "__module__", None) == jitted.__name__:
            setattr(jitted, name, InterpretedFunction(value.fn))
    a, b, other, out = torch.randn(20, 40), torch.randn(40, 21), torch.randn(20, 21), torch.full((20, 21), float("nan"))
    import triton.language as tl

    jitted.as_printed[(4,)](a, b, other, out, XBLOCK=16, RBLOCK=16, KBLOCK=16, GROUP=8, INDEX=tl.int32)
    torch.testing.assert_close(out, a @ b + other, rtol=1e-5, atol=1e-5)
