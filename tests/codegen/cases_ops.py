"""Cases for every element operation, every dtype, every cast."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .cases import TORCH, Case, bools, floats, ints, pairs, special

FLOAT_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    name: getattr(torch, name) for name in (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan",
        "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid", "floor",
        "ceil", "round", "trunc", "neg", "abs", "sign")}
FLOAT_BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "max": torch.maximum, "min": torch.minimum,
    "pow": torch.pow, "atan2": torch.atan2, "copysign": torch.copysign, "hypot": torch.hypot, "mod": torch.remainder,
    "fmod": torch.fmod, "floordiv": torch.floor_divide,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}
INT_BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "max": torch.maximum, "min": torch.minimum,
    "mod": torch.remainder, "fmod": torch.fmod, "floordiv": torch.floor_divide,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "and": torch.bitwise_and,
    "or": torch.bitwise_or, "xor": torch.bitwise_xor, "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift, "ipow": torch.pow,
}
COMPARE = {"eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge}
DIVIDING = ("mod", "fmod", "floordiv", "truncdiv")


def unary(op: str, dtype: str, inputs: Callable[[], list[torch.Tensor]], reference: Callable[..., torch.Tensor],
          result: str | None = None) -> Case:
    """`y = op(x)` over a flat tensor of symbolic size."""
    n, result = inputs()[0].numel(), result or dtype
    text = f"""
    kernel {op}_{dtype}(s0, x: {dtype} -> y: {result})
      axes p0: s0
      %0: {dtype} = load x[p0]
      %1: {result} = {op} %0
      store y[p0] = %1
    """
    return Case(f"{op}_{dtype}", text, inputs, ((n,),), lambda x: [reference(x)], (n,), elementwise=True)


def binary(op: str, dtype: str, inputs: Callable[[], list[torch.Tensor]], reference: Callable[..., torch.Tensor],
           result: str | None = None) -> Case:
    """`y = op(a, b)` over flat tensors of symbolic size."""
    n, result = inputs()[0].numel(), result or dtype
    text = f"""
    kernel {op}_{dtype}(s0, a: {dtype}, b: {dtype} -> y: {result})
      axes p0: s0
      %0: {dtype} = load a[p0]
      %1: {dtype} = load b[p0]
      %2: {result} = {op} %0, %1
      store y[p0] = %2
    """
    return Case(f"{op}_{dtype}", text, inputs, ((n,),), lambda a, b: [reference(a, b)], (n,), elementwise=True)


def _trig(dtype: str) -> list[torch.Tensor]:
    x = special(dtype)
    return [torch.where((x.abs() > 1e9) & x.isfinite(), x.sign() * 1e9, x)]


def _float_cases(dtype: str) -> list[Case]:
    out = [unary(op, dtype, (lambda: _trig(dtype)) if op in ("sin", "cos", "tan") else lambda: [special(dtype)], fn)
           for op, fn in FLOAT_UNARY.items()]
    out += [unary("isnan", dtype, lambda: [special(dtype)], torch.isnan, "b1"),
            unary("isinf", dtype, lambda: [special(dtype)], torch.isinf, "b1")]
    out += [binary(op, dtype, lambda op=op: pairs(dtype) if op not in DIVIDING else _quotients(dtype), fn)
            for op, fn in FLOAT_BINARY.items()]
    return out + [binary(op, dtype, lambda: pairs(dtype), fn, "b1") for op, fn in COMPARE.items()]


def _quotients(dtype: str) -> list[torch.Tensor]:
    """Exactly representable operands: a rounded quotient on the wrong side of an integer would be no error."""
    a = ints(2001, low=-4000, high=4000, seed=3).to(TORCH[dtype]) / 8
    b = ints(2001, low=-80, high=80, seed=4).to(TORCH[dtype]) / 8
    b[:4] = torch.tensor([math.inf, -math.inf, 0.0, math.nan], dtype=b.dtype)
    return [a, b]


def _int_operands(op: str, dtype: str) -> list[torch.Tensor]:
    if op == "ipow":
        return [ints(777, dtype=dtype, low=-9, high=9), ints(777, dtype=dtype, low=0, high=8, seed=1)]
    if op in ("shl", "shr"):
        return [ints(777, dtype=dtype, low=-(2**31), high=2**31), ints(777, dtype=dtype, low=-2, high=70, seed=1)]
    a = ints(777, dtype=dtype, low=-(2**31), high=2**31)
    limit = 9 if op in DIVIDING else 2**31
    b = ints(777, dtype=dtype, low=-limit, high=limit, seed=1)
    if op in DIVIDING:
        b[b == 0] = 7
    return [a, b]


def _int_cases(dtype: str) -> list[Case]:
    out = [binary(op, dtype, lambda op=op: _int_operands(op, dtype), fn) for op, fn in INT_BINARY.items()]
    out += [binary(op, dtype, lambda: [ints(999, dtype=dtype, low=-3, high=3, seed=s) for s in (0, 1)], fn, "b1")
            for op, fn in COMPARE.items()]
    out += [unary(op, dtype, lambda: [ints(555, dtype=dtype)], fn)
            for op, fn in {"neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "not": torch.bitwise_not}.items()]
    return out


def _bool_cases() -> list[Case]:
    def both() -> list[torch.Tensor]:
        return [bools(301), bools(301, seed=1)]

    table = {"and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor, "eq": torch.eq, "ne": torch.ne}
    return [binary(op, "b1", both, fn) for op, fn in table.items()] + [
        unary("not", "b1", lambda: [bools(301)], torch.logical_not)]


def _cast_source(source: str, target: str) -> list[torch.Tensor]:
    if source == "b1":
        return [bools(301)]
    if source in ("f64", "f32", "f16", "bf16"):
        if target in ("f64", "f32", "f16", "bf16", "b1"):
            return [special(source)]
        return [floats(501, dtype=source, scale=40 if target != "u8" else 0) + (100.7 if target == "u8" else 0.0)]
    low = 0 if source == "u8" else -100
    return [ints(501, dtype=source, low=low, high=120)]


def _cast_case(source: str, target: str) -> Case:
    n = _cast_source(source, target)[0].numel()
    text = f"""
    kernel cast_{source}_{target}(s0, x: {source} -> y: {target})
      axes p0: s0
      %0: {source} = load x[p0]
      %1: {target} = cast %0
      store y[p0] = %1
    """
    return Case(f"cast_{source}_{target}", text, lambda: _cast_source(source, target), ((n,),),
                lambda x: [x.to(TORCH[target])], (n,), elementwise=True)


def _rounding_case(narrow: str) -> Case:
    """f32 → narrow → f32 inside a kernel rounds."""
    n = special().numel()
    text = f"""
    kernel round_{narrow}(s0, x: f32 -> y: f32)
      axes p0: s0
      %0: f32 = load x[p0]
      %1: {narrow} = cast %0
      %2: f32 = cast %1
      store y[p0] = %2
    """
    return Case(f"round_through_{narrow}", text, lambda: [special()], ((n,),),
                lambda x: [x.float().to(TORCH[narrow]).float()], (n,), elementwise=True)


def _where_case(dtype: str) -> Case:
    values = floats if dtype in ("f32", "f64") else ints
    text = f"""
    kernel where_{dtype}(c: b1, a: {dtype}, b: {dtype} -> y: {dtype})
      axes p0: 333
      %0: b1 = load c[p0]
      %1: {dtype} = load a[p0]
      %2: {dtype} = load b[p0]
      %3: {dtype} = where %0, %1, %2
      store y[p0] = %3
    """
    return Case(f"where_{dtype}", text,
                lambda: [bools(333), values(333, dtype=dtype, seed=1), values(333, dtype=dtype, seed=2)], ((333,),),
                lambda c, a, b: [torch.where(c, a, b)], elementwise=True)


def _constant_case() -> Case:
    """Constants of all kinds, written without any load."""
    text = """
    kernel constants(s0 -> a: f32, b: f64, c: i32, d: i64, e: b1, f: f32)
      axes p0: s0
      %0: f32 = const 0.1
      %1: f64 = const -1e-300
      %2: i32 = const -2147483648
      %3: i64 = const -9223372036854775808
      %4: b1 = const true
      %5: f32 = const -inf
      store a[p0] = %0
      store b[p0] = %1
      store c[p0] = %2
      store d[p0] = %3
      store e[p0] = %4
      store f[p0] = %5
    """
    def reference() -> list[torch.Tensor]:
        return [torch.full((37,), 0.1), torch.full((37,), -1e-300, dtype=torch.float64),
                torch.full((37,), -(2**31), dtype=torch.int32), torch.full((37,), -(2**63)),
                torch.ones(37, dtype=torch.bool), torch.full((37,), -math.inf)]

    return Case("constants", text, list, ((37,),) * 6, reference, (37,), elementwise=True)


def _narrow_chain(narrow: str) -> Case:
    """The usual 16-bit kernel: load, compute in f32, store."""
    text = f"""
    kernel silu_mul_{narrow}(s0, a: {narrow}, b: {narrow} -> y: {narrow})
      axes p0: s0, p1: 65
      %0: {narrow} = load a[65*p0 + p1]
      %1: f32 = cast %0
      %2: f32 = sigmoid %1
      %3: f32 = mul %1, %2
      %4: {narrow} = load b[p1]
      %5: f32 = cast %4
      %6: f32 = mul %3, %5
      %7: {narrow} = cast %6
      store y[65*p0 + p1] = %7
    """
    return Case(f"silu_mul_{narrow}", text,
                lambda: [floats(7, 65, dtype=narrow, scale=3), floats(65, dtype=narrow, seed=1)],
                ((7, 65),), lambda a, b: [torch.nn.functional.silu(a) * b], (7,), elementwise=True)


def cases() -> list[Case]:
    out = [*_float_cases("f32"), *_float_cases("f64"), *_int_cases("i32"), *_int_cases("i64"), *_bool_cases()]
    out += [_cast_case(s, t) for s in TORCH for t in TORCH if s != t]
    out += [_rounding_case("bf16"), _rounding_case("f16"), _constant_case()]
    out += [_narrow_chain("bf16"), _narrow_chain("f16")]
    return out + [_where_case(d) for d in ("f32", "f64", "i32", "i64")]
