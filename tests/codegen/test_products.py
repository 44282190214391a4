"""Matrix products of the host runtime: every method against float64, on values and strides that are hard for it.

Where the machine has no AMX, split products are done by the library, and the same tests hold.
"""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.codegen.affine import ONE, ZERO
from meshwright.codegen.program_cpp_gemm import Product, Weight
from meshwright.codegen.program_cpp_packing import ProductMethods, may_split, pack
from meshwright.codegen.program_cpp_run import compile_program, host_library
from meshwright.codegen.program_gemm import lower_products, share_inputs
from meshwright.codegen.templates.cpu_gemm import FP32, SPLIT, SPLIT_NOW
from meshwright.codegen.timings import Timings
from meshwright.compiler.artifact_verify import verify_program
from meshwright.runtime.errors import ArtifactError
from meshwright.runtime.program import Alloc, Call, Conv, Gemm, Gemms, Launch, Program, TensorSpec, View

EPS = torch.finfo(torch.float32).eps
WAYS = ("library", "fp32", "split", "split now")


def laid_out(x: torch.Tensor, by_rows: bool) -> torch.Tensor:
    """The same matrix with contiguous rows or columns."""
    return x.contiguous() if by_rows else x.t().contiguous().t()


def strides(x: torch.Tensor) -> tuple[int, int]:
    """Strides as a program writes them: torch is free in those of dimensions of size 1."""
    rows, columns = x.shape
    return (columns, 1) if x.is_contiguous() and (rows > 1 or x.stride(1) == 1) else (1, rows)


def multiply(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, way: str, threads: int = 1) -> torch.Tensor:
    """a [M, K] @ b [K, N] + bias ([N] or [M, N]) into the left part of a wider result, whose rest must stay."""
    library = host_library()
    (M, K), N = a.shape, b.shape[1]
    strides_a, strides_b = strides(a), strides(b)
    how, copy = None, None
    if way == "split now":
        how = SPLIT_NOW
    elif way != "library":
        method = SPLIT if way == "split" and library.mw_split_ready() else FP32
        copy = pack(library, Weight(0, 0, K, N, *strides_b), b, method)
        how = copy.data_ptr()
    out = torch.full((M, N + 3), 7.0)
    step = bias.stride(0) if bias is not None and bias.dim() == 2 else 0
    library.mw_gemm(threads, 1, M, N, K, a.data_ptr(), 0, *strides_a, b.data_ptr(), 0, *strides_b,
                    bias.data_ptr() if bias is not None else None, 0, step, out.data_ptr(), 0, N + 3, how)
    assert (out[:, N:] == 7.0).all()
    return out[:, :N]


def allowed(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, exact: torch.Tensor) -> float:
    """The house rule: twice eager's own error and 4 ulp of the scale."""
    eager = a @ b if bias is None else a @ b + bias
    # One element may cancel, and eager be exact there by luck: the scale is at least what such sums have on average.
    typical = float(a.double().norm() * b.double().norm()) / math.sqrt(a.shape[0] * b.shape[1] * a.shape[1])
    scale = max(float(exact.abs().max()), typical)
    return 2 * float((eager.double() - exact).abs().max()) + 4 * EPS * scale


SIZES = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 48, 100, 197, 300, 530])
DEPTHS = st.sampled_from([1, 2, 31, 32, 33, 95, 97, 400, 800])


@settings(max_examples=80, deadline=None)
@given(M=SIZES, N=SIZES, K=DEPTHS, a_rows=st.booleans(), b_rows=st.booleans(), bias=st.sampled_from([0, 1, 2]),
       way=st.sampled_from(["split", "split now"]), threads=st.sampled_from([1, 2, 3]),
       scale=st.sampled_from([1.0, 1e-20, 1e-35, 1e20]), seed=st.integers(0, 1 << 20))
def test_split_products_are_as_accurate_as_eager(M, N, K, a_rows, b_rows, bias, way, threads, scale, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    a, b = laid_out(random(M, K) * scale, a_rows), laid_out(random(K, N), b_rows)
    added = {0: None, 1: random(N) * scale, 2: random(M, N) * scale}[bias]
    exact = a.double() @ b.double() + (0 if added is None else added.double())
    found = multiply(a, b, added, way, threads)
    assert float((found.double() - exact).abs().max()) <= allowed(a, b, added, exact)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 1e-42, 2e-39, 0.0])
@pytest.mark.parametrize("side", ["a", "b"])
def test_values_outside_the_range_of_bf16_tiles(way: str, value: float, side: str):
    """Infinities and NaN land where eager puts them; rows that are subnormal all over keep their digits."""
    torch.manual_seed(0)
    a, b = torch.randn(40, 96), torch.randn(96, 48)
    if side == "a":
        a[3] = value
    else:
        b[:, 5] = value
    found, expected = multiply(a, b, None, way), a @ b
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    line, truth = (found[3], expected[3]) if side == "a" else (found[:, 5], expected[:, 5])
    allowance = max(abs(value) * 1e-2, 1e-43) if abs(value) < 1e-30 else 1e-5
    torch.testing.assert_close(line, truth, rtol=1e-4, atol=allowance, equal_nan=True)


@pytest.mark.skipif(not host_library().mw_split_ready(), reason="this machine has no AMX tiles")
def test_the_sum_of_small_products_is_not_lost():
    """Half of a sequential sum's error: the small parts are summed before they meet the large ones."""
    torch.manual_seed(1)
    a, b = torch.randn(128, 768), torch.randn(768, 256) * 0.02
    exact = a.double() @ b.double()
    ours = (multiply(a, b, None, "split").double() - exact).square().mean().sqrt()
    eager = ((a @ b).double() - exact).square().mean().sqrt()
    assert ours < 0.75 * eager


def test_methods_can_be_forbidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MESHWRIGHT_SPLIT_PRODUCTS", "0")
    assert not may_split(host_library())
    methods = ProductMethods([Product(256, 512, 512, True, True, None)], host_library(), Timings())
    assert methods.addresses([], 1)[0].how is None


def test_a_small_product_needs_no_timing():
    given = [Product(4, 8, 16, True, True, None), Product(4, 8, 16, True, True, Weight(0, 0, 8, 16, 16, 1))]
    methods = ProductMethods(given, host_library(), Timings())
    now, packed = methods.addresses([torch.ones(8, 16)], 1)
    assert now.how is None and packed.how


# -- products of one tensor -----------------------------------------------------------------------
def spec(name: str, *shape: int, strides: tuple[int, ...] | None = None, static: bool = False) -> TensorSpec:
    if strides is None:
        strides = tuple(torch.empty(shape, device="meta").stride())
    return TensorSpec(name, "float32", shape, strides, static=static)


def call(out: str, bias: str, a: str, weight: str, rows: int = 24) -> list:
    """addmm with the transposed view of `weight`."""
    view = View(spec(f"{weight}_t", 32, 48, strides=(1, 32)), weight)
    operands = tuple({"tensor": n} for n in (bias, a, f"{weight}_t"))
    return [view, Call("aten.addmm.default", operands, {}, (out,), (spec(out, rows, 48),))]


NEGATE = """kernel negate(in0: f32 -> out0: f32)
  axes p0: 1152
  %0: f32 = load in0[p0]
  %1: f32 = neg %0
  store out0[p0] = %1
"""


def attention_inputs(between: tuple = ()) -> Program:
    """query, key and value of one x, something between them, and a product of something else."""
    weights = [spec(n, 48, 32, static=True) for n in ("wq", "wk", "wv")]
    biases = [spec(n, 48, static=True) for n in ("bq", "bk", "bv")]
    steps = (*call("q", "bq", "x", "wq"), Alloc(spec("nq", 24, 48)), Launch("negate", ("q",), ("nq",)), *between,
             *call("k", "bk", "x", "wk"), *call("v", "bv", "x", "wv"))
    return Program("qkv", (spec("x", 24, 32), *weights, *biases), (), steps, ("nq", "k", "v"), {"negate": NEGATE})


def test_products_of_one_tensor_become_one_step():
    shared = share_inputs(lower_products(attention_inputs()))
    groups = [s for s in shared.steps if isinstance(s, Gemms)]
    assert [p.out for p in groups[0].products] == ["q", "k", "v"] and len(groups) == 1
    assert not any(isinstance(s, Gemm) for s in shared.steps)


def test_a_step_takes_few_of_many_products():
    """The encoder output of a translator is multiplied in every decoder layer: not all results can be alive at once."""
    names = [f"w{i}" for i in range(9)]
    steps = tuple(s for n in names for s in call(f"y{n}", "b", "x", n))
    inputs = (spec("x", 24, 32), spec("b", 48, static=True), *(spec(n, 48, 32, static=True) for n in names))
    program = Program("decoder", inputs, (), steps, tuple(f"y{n}" for n in names), {})
    shared = share_inputs(lower_products(program))
    assert [len(s.products) for s in shared.steps if isinstance(s, Gemms)] == [4, 4]
    assert [s.out for s in shared.steps if isinstance(s, Gemm)] == ["yw8"]


def test_a_write_in_between_keeps_products_apart():
    fill = Call("aten.fill_.Scalar", ({"tensor": "x"}, 2.0), {}, (None,), (None,))
    shared = share_inputs(lower_products(attention_inputs((fill,))))
    assert [[p.out for p in s.products] for s in shared.steps if isinstance(s, Gemms)] == []
    assert [s.out for s in shared.steps if isinstance(s, Gemm)] == ["q", "k", "v"]


@pytest.mark.parametrize("between", [(), (Call("aten.fill_.Scalar", ({"tensor": "x"}, 2.0), {}, (None,), (None,)),)])
def test_shared_products_agree_with_torch(between: tuple):
    torch.manual_seed(2)
    x, *weights = torch.randn(24, 32), *(torch.randn(48, 32) for _ in range(3))
    biases = [torch.randn(48) for _ in range(3)]
    program = compile_program(attention_inputs(between))
    for _ in range(2):
        given_x = x.clone()
        negated, k, v = program([given_x, *weights, *biases])
        later = torch.full_like(x, 2.0) if between else x
        wanted = [-(x @ weights[0].T + biases[0]), later @ weights[1].T + biases[1], later @ weights[2].T + biases[2]]
        for found, expected in zip((negated, k, v), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_large_shared_products_use_one_split_of_the_left_side():
    """Sizes at which methods are measured: whichever wins, three results come from one step."""
    torch.manual_seed(3)
    model = torch.nn.ModuleList(torch.nn.Linear(256, n) for n in (256, 96, 320))
    x = torch.randn(130, 256)
    import meshwright as mw

    class Three(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.relu(part(x)) for part in self.parts]

    three = Three().eval()
    fast = mw.compile(three, (x,))
    with torch.no_grad():
        for _ in range(3):
            for found, expected in zip(fast(x), three(x), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_addresses_keep_what_they_point_to():
    """One thread's call may still read a packed copy that another thread's call has replaced."""
    weight = torch.ones(8, 16)
    methods = ProductMethods([Product(4, 8, 16, True, True, Weight(0, 0, 8, 16, 16, 1))], host_library(), Timings())
    addresses = methods.addresses([weight], 1)
    alive = weakref.ref(addresses.found.copies[0])
    weight.add_(1)
    later = methods.addresses([weight], 1)
    assert later[0].how != addresses[0].how and alive() is not None
    del addresses
    gc.collect()
    assert alive() is None


def test_graphs_of_one_model_share_a_packed_weight():
    """Prefill and decoding are two graphs, which may see the weight at different positions."""
    weight, other = torch.ones(8, 16), torch.ones(1)
    found = (Product(4, 8, 16, True, True, Weight(at, 0, 8, 16, 16, 1)) for at in (0, 1))
    first, second = (ProductMethods([product], host_library(), Timings()) for product in found)
    assert first.addresses([weight], 1)[0].how == second.addresses([other, weight], 1)[0].how is not None


def test_a_strangers_step_of_products_is_verified():
    shared = share_inputs(lower_products(attention_inputs()))
    verify_program(shared)
    foreign = Gemms((Gemm("nowhere", "x", "wq"), Gemm("q", "x", "wk")))
    for steps in ((foreign,), (Gemms(()),)):
        with pytest.raises(ArtifactError, match="product"):
            verify_program(Program("p", shared.inputs, (), steps, ()))


def test_a_strangers_convolution_is_verified():
    conv = Conv(spec("y", 1, 8, 4, 4), "x", "nowhere", None, (1, 1), (1, 1), (1, 1), 1, ONE, ZERO)
    with pytest.raises(ArtifactError, match="convolution"):
        verify_program(Program("p", (spec("x", 1, 8, 4, 4),), (), (conv,), ()))
