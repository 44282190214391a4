"""Cases for reductions: every operation along rows and columns, several sweeps, unusual sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .cases import Case, bools, floats, ints

SHAPES = {"row": (5, 129), "long": (2, 9001), "one": (1, 1), "empty_rows": (0, 7), "tall": (300, 3)}
FLOAT_REDUCE: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "sum": lambda x, d: x.sum(d), "prod": lambda x, d: x.prod(d), "max": lambda x, d: x.amax(d),
    "min": lambda x, d: x.amin(d), "argmax": lambda x, d: x.argmax(d), "argmin": lambda x, d: x.argmin(d),
}


def _values(shape: tuple[int, int], dtype: str, op: str, poison: bool) -> torch.Tensor:
    if dtype == "b1":
        return bools(*shape)
    if dtype in ("i32", "i64"):
        return ints(*shape, dtype=dtype, low=-3 if op == "prod" else -1000, high=3 if op == "prod" else 1000)
    x = floats(*shape, dtype=dtype)
    if op == "prod":
        x = 1 + 0.01 * x
    if op.startswith("arg"):
        x = (x * 4).round()  # ties: the first position wins
    if poison and x.numel() > 300:
        x[1, -3] = math.nan
        x[1, 5 % x.shape[1]] = math.nan
        x[0, 1] = math.inf if op != "min" else -math.inf
    return x


def row_case(op: str, dtype: str, kind: str, columns: bool = False, poison: bool = False) -> Case:
    """Reduce `[M, N]` over its last axis (rows) or its first (columns), sizes symbolic."""
    shape = SHAPES[kind]
    result = "i64" if op.startswith("arg") else dtype
    axes, index, out, dim = (("p0: s1, r0: s0 reduce", "s1*r0 + p0", (shape[1],), 0) if columns
                             else ("p0: s0, r0: s1 reduce", "s1*p0 + r0", (shape[0],), 1))
    name = f"{op}_{dtype}_{'columns' if columns else 'rows'}_{kind}{'_nan' if poison else ''}"
    text = f"""
    kernel {name}(s0, s1, x: {dtype} -> y: {result})
      axes {axes}
      %0: {dtype} = load x[{index}]
      %1: {result} = reduce_{op} %0
      store y[p0] = %1
    """
    table = FLOAT_REDUCE | {"any": lambda x, d: x.any(d), "all": lambda x, d: x.all(d)}
    return Case(name, text, lambda: [_values(shape, dtype, op, poison)], (out,),
                lambda x: [table[op](x, dim).to(x.dtype if result == dtype else torch.int64)], shape)


def _reduction_cases() -> list[Case]:
    out = []
    for columns in (False, True):
        for op in FLOAT_REDUCE:
            out += [row_case(op, d, "row", columns) for d in ("f32", "f64", "i32", "i64")]
            out += [row_case(op, "f32", "long", columns), row_case(op, "f32", "tall", columns),
                    row_case(op, "f32", "one", columns), row_case(op, "f32", "row", columns, poison=True),
                    row_case(op, "f64", "row", columns, poison=True)]
        out += [row_case(op, "b1", kind, columns) for op in ("any", "all") for kind in ("row", "long", "tall")]
    return out + [row_case(op, "f32", "empty_rows") for op in FLOAT_REDUCE]


def _identity_case(columns: bool) -> Case:
    """An empty reduction gives the identity."""
    at = "r0" if columns else "s1*p0 + r0"
    index = f"{at} + p0" if columns else at
    name = f"identities_{'columns' if columns else 'rows'}"
    text = f"""
    kernel {name}(s1, x: f32, c: b1 -> a: f32, b: f32, d: f32, e: f32, f: b1, g: b1)
      axes p0: 5, r0: s1 reduce
      %0: f32 = load x[{index}]
      %1: b1 = load c[{index}]
      %2: f32 = reduce_sum %0
      %3: f32 = reduce_prod %0
      %4: f32 = reduce_max %0
      %5: f32 = reduce_min %0
      %6: b1 = reduce_any %1
      %7: b1 = reduce_all %1
      store a[p0] = %2
      store b[p0] = %3
      store d[p0] = %4
      store e[p0] = %5
      store f[p0] = %6
      store g[p0] = %7
    """
    def reference(x: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        one = torch.ones(5, dtype=x.dtype)
        return [one * 0, one, one * -math.inf, one * math.inf, one < 0, one > 0]

    return Case(name, text, lambda: [floats(0), bools(0)], ((5,),) * 6,
                reference, (0,))


def softmax_case(rows: int, size: int, static: bool = True) -> Case:
    n = str(size) if static else "s1"
    sizes = (rows,) if static else (rows, size)
    name = f"softmax_{rows}_{size}{'' if static else '_symbolic'}"
    text = f"""
    kernel {name}(s0{'' if static else ', s1'}, x: f32 -> y: f32)
      axes p0: s0, r0: {n} reduce
      %0: f32 = load x[{n}*p0 + r0]
      %1: f32 = reduce_max %0
      %2: f32 = sub %0, %1
      %3: f32 = exp %2
      %4: f32 = reduce_sum %3
      %5: f32 = div %3, %4
      store y[{n}*p0 + r0] = %5
    """
    return Case(name, text, lambda: [floats(rows, size, scale=4)], ((rows, size),), lambda x: [x.softmax(-1)], sizes)


def softmax_columns_case() -> Case:
    """Softmax over the middle axis: sweeps in column form."""
    text = """
    kernel softmax_middle(s0, x: f32 -> y: f32)
      axes p0: s0, p1: 200, r0: 19 reduce
      %0: f32 = load x[3800*p0 + p1 + 200*r0]
      %1: f32 = reduce_max %0
      %2: f32 = sub %0, %1
      %3: f32 = exp %2
      %4: f32 = reduce_sum %3
      %5: f32 = div %3, %4
      store y[3800*p0 + p1 + 200*r0] = %5
    """
    return Case("softmax_middle", text, lambda: [floats(3, 19, 200)], ((3, 19, 200),), lambda x: [x.softmax(1)], (3,))


def masked_softmax_case() -> Case:
    """Causal mask from index values, a row buffer in scratch memory (symbolic row size)."""
    text = """
    kernel causal_softmax(s0, s1, x: f32 -> y: f32)
      axes p0: s0, p1: s1, r0: s1 reduce
      %0: f32 = load x[s1*s1*p0 + s1*p1 + r0]
      %1: i64 = index r0 - p1
      %2: i64 = const 0
      %3: b1 = le %1, %2
      %4: f32 = const -inf
      %5: f32 = where %3, %0, %4
      %6: f32 = reduce_max %5
      %7: f32 = sub %5, %6
      %8: f32 = exp %7
      %9: f32 = reduce_sum %8
      %10: f32 = div %8, %9
      store y[s1*s1*p0 + s1*p1 + r0] = %10
    """
    def reference(x: torch.Tensor) -> list[torch.Tensor]:
        mask = torch.ones(33, 33, dtype=torch.bool).tril()
        return [x.masked_fill(~mask, -math.inf).softmax(-1)]

    return Case("causal_softmax", text, lambda: [floats(4, 33, 33)], ((4, 33, 33),), reference, (4, 33))


def layer_norm_case(size: int) -> Case:
    """Residual addition, mean, variance, scale and shift; stores at element and at row level."""
    text = f"""
    kernel layer_norm_{size}(s0, x: f32, r: f32, w: f32, b: f32 -> h: f32, y: f32, mean: f32, rstd: f32)
      axes p0: s0, r0: {size} reduce
      %0: f32 = load x[{size}*p0 + r0]
      %1: f32 = load r[{size}*p0 + r0]
      %2: f32 = add %0, %1
      %3: f32 = reduce_sum %2
      %4: f32 = const {float(size)}
      %5: f32 = div %3, %4
      %6: f32 = sub %2, %5
      %7: f32 = mul %6, %6
      %8: f32 = reduce_sum %7
      %9: f32 = div %8, %4
      %10: f32 = const 1e-05
      %11: f32 = add %9, %10
      %12: f32 = rsqrt %11
      %13: f32 = mul %6, %12
      %14: f32 = load w[r0]
      %15: f32 = mul %13, %14
      %16: f32 = load b[r0]
      %17: f32 = add %15, %16
      store h[{size}*p0 + r0] = %2
      store y[{size}*p0 + r0] = %17
      store mean[p0] = %5
      store rstd[p0] = %12
    """
    def reference(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        y, mean, rstd = torch.native_layer_norm(x + r, (size,), w, b, 1e-5)
        return [x + r, y, mean.flatten(), rstd.flatten()]

    return Case(f"layer_norm_{size}", text,
                lambda: [floats(6, size) + 3, floats(6, size, seed=1), floats(size, seed=2), floats(size, seed=3)],
                ((6, size), (6, size), (6,), (6,)), reference, (6,))


def rms_norm_case(dtype: str) -> Case:
    text = f"""
    kernel rms_norm_{dtype}(s0, x: {dtype}, w: {dtype} -> y: {dtype})
      axes p0: s0, r0: 515 reduce
      %0: {dtype} = load x[515*p0 + r0]
      %1: f32 = cast %0
      %2: f32 = mul %1, %1
      %3: f32 = reduce_sum %2
      %4: f32 = const 0.001941747572815534
      %5: f32 = mul %3, %4
      %6: f32 = const 1e-06
      %7: f32 = add %5, %6
      %8: f32 = rsqrt %7
      %9: f32 = mul %1, %8
      %10: {dtype} = load w[r0]
      %11: f32 = cast %10
      %12: f32 = mul %9, %11
      %13: {dtype} = cast %12
      store y[515*p0 + r0] = %13
    """
    return Case(f"rms_norm_{dtype}", text, lambda: [floats(4, 515, dtype=dtype), floats(515, dtype=dtype, seed=1)],
                ((4, 515),), lambda x, w: [torch.nn.functional.rms_norm(x, (515,), w, 1e-6)], (4,))


def cross_entropy_case() -> Case:
    """Log-sum-exp minus the logit picked by an index (a row-level gather)."""
    text = """
    kernel cross_entropy(s0, s1, x: f32, t: i64 -> y: f32)
      axes p0: s0, r0: s1 reduce
      %0: f32 = load x[s1*p0 + r0]
      %1: f32 = reduce_max %0
      %2: f32 = sub %0, %1
      %3: f32 = exp %2
      %4: f32 = reduce_sum %3
      %5: f32 = log %4
      %6: f32 = add %5, %1
      %7: i64 = load t[p0]
      %8: f32 = load x[s1*p0 + %7]
      %9: f32 = sub %6, %8
      store y[p0] = %9
    """
    return Case("cross_entropy", text, lambda: [floats(9, 1000, scale=3), ints(9, low=0, high=1000)], ((9,),),
                lambda x, t: [torch.nn.functional.cross_entropy(x, t, reduction="none")], (9, 1000))


def _two_axes_case(op: str) -> Case:
    """Reduce two axes that no index map allows to merge, positions in row-major order."""
    result = "i64" if op == "argmax" else "f32"
    text = f"""
    kernel {op}_two_axes(x: f32 -> y: {result})
      axes p0: 4, r0: 6 reduce, r1: 50 reduce
      %0: f32 = load x[50*p0 + 200*r0 + r1]
      %1: {result} = reduce_{op} %0
      store y[p0] = %1
    """
    def reference(x: torch.Tensor) -> list[torch.Tensor]:
        flat = x.transpose(0, 1).reshape(4, 300)
        return [flat.argmax(1) if op == "argmax" else flat.sum(1)]

    return Case(f"{op}_two_axes", text, lambda: [(floats(6, 4, 50) * 2).round()], ((4,),), reference)


def _batch_statistics_case() -> Case:
    """Mean over batch and space for each channel, the middle axis parallel."""
    text = """
    kernel channel_mean(s0, s1, x: f32 -> y: f32)
      axes p0: 5, r0: s0 reduce, r1: s1 reduce
      %0: f32 = load x[5*s1*r0 + s1*p0 + r1]
      %1: f32 = reduce_sum %0
      store y[p0] = %1
    """
    return Case("channel_sum", text, lambda: [floats(30, 5, 333)], ((5,),), lambda x: [x.sum((0, 2))], (30, 333))


def _pool_case() -> Case:
    """A 2x2 window: tiny reduce axes inside, unit stride outside."""
    text = """
    kernel pool(x: f32 -> y: f32)
      axes p0: 6, p1: 5, p2: 40, r0: 2 reduce, r1: 2 reduce
      %0: f32 = load x[800*p0 + 160*p1 + 80*r0 + 2*p2 + r1]
      %1: f32 = reduce_max %0
      store y[200*p0 + 40*p1 + p2] = %1
    """
    return Case("max_pool", text, lambda: [floats(6, 10, 80)], ((6, 5, 40),),
                lambda x: [torch.nn.functional.max_pool2d(x, 2)])


def _full_reduction_case(size: int, op: str) -> Case:
    text = f"""
    kernel full_{op}_{size}(s0, x: f32 -> y: f32)
      axes r0: s0 reduce
      %0: f32 = load x[r0]
      %1: f32 = reduce_{op} %0
      %2: f32 = const 0.5
      %3: f32 = mul %1, %2
      store y[0] = %3
    """
    return Case(f"full_{op}_{size}", text, lambda: [floats(size)], ((1,),),
                lambda x: [0.5 * (x.sum() if op == "sum" else x.amax()).reshape(1)], (size,))


def _broadcast_sum_case() -> Case:
    """A reduction of a value that does not vary over the reduce axis, and one of a constant."""
    text = """
    kernel broadcast_sum(s0, x: f32 -> y: f32, z: f32)
      axes p0: s0, r0: 70 reduce
      %0: f32 = load x[p0]
      %1: f32 = reduce_sum %0
      %2: f32 = const 2.0
      %3: f32 = reduce_sum %2
      store y[p0] = %1
      store z[p0] = %3
    """
    return Case("broadcast_sum", text, lambda: [floats(11)], ((11,), (11,)),
                lambda x: [x * 70, torch.full((11,), 140.0, dtype=x.dtype)], (11,))


def cases() -> list[Case]:
    out = _reduction_cases()
    out += [_identity_case(False), softmax_case(7, 128), softmax_case(3, 1000, static=False), softmax_case(2, 20000),
            softmax_case(0, 16), softmax_case(5, 1), softmax_columns_case(), masked_softmax_case(),
            layer_norm_case(768), layer_norm_case(33), rms_norm_case("f32"), rms_norm_case("bf16"),
            rms_norm_case("f16"), cross_entropy_case(), _two_axes_case("sum"), _two_axes_case("argmax"),
            _batch_statistics_case(), _pool_case(),
            _broadcast_sum_case()]
    return out + [_full_reduction_case(n, op) for n in (1, 1000, 300001) for op in ("sum", "max")]
