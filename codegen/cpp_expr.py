"""Expressions in C++: dtype names, literals, index arithmetic and the element operations of the kernel IR."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence

from .expr import Expr, split_atom
from .ir import Scalar

MEMORY_TYPE = {
    "f64": "double", "f32": "float", "f16": "mw_f16", "bf16": "mw_bf16", "i64": "int64_t", "i32": "int32_t",
    "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t", "b1": "uint8_t",
}
VALUE_TYPE = MEMORY_TYPE | {"b1": "bool"}

_KEYWORDS = frozenset(
    "alignas and asm auto bool break case catch char class const continue default delete do double else enum "
    "explicit export extern false float for friend goto if inline int long mutable namespace new not operator or "
    "private protected public register return short signed sizeof static struct switch template this throw true "
    "try typedef typename union unsigned using virtual void volatile while xor "
    # names the printer itself uses
    "at bad_index begin end i item items lane0 lanes share team threads tile buffers sizes omp NAN INFINITY".split()
)
_GENERATED = re.compile(r"v\d+(_|$)|mw_|MW_|.*_(lo|hi)$|__")
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
          "ge": ">=", "and": "&", "or": "|", "xor": "^"}


def c_name(name: str) -> str:
    """A C++ identifier for a buffer, axis, size or SSA value (`%7` becomes `v7`)."""
    if name.startswith("%"):
        return "v" + name[1:]
    return name + "_" if name in _KEYWORDS or _GENERATED.match(name) else name


def c_index(expr: Expr) -> str:
    """An integer expression as int64 arithmetic; `floordiv` and `mod` round like Python's."""
    return expr.render(_index_name)


def _index_name(name: str) -> str:
    call = split_atom(name)
    if call is None:
        return c_name(name)
    return f"mw_{call[0]}({', '.join(f'int64_t({c_index(a)})' for a in call[1])})"


def c_literal(value: Scalar, dtype: str) -> str:
    """A constant of compute type `dtype` (f32, f64, i32, i64, b1)."""
    if dtype == "b1":
        return "true" if value else "false"
    if dtype in ("f32", "f64"):
        return _float_literal(float(value), dtype)
    number = int(value)
    if dtype == "i64":
        return f"INT64_C({number})" if number > -(2**63) else "INT64_MIN"
    return f"{number}" if number > -(2**31) else "INT32_MIN"


def _float_literal(value: float, dtype: str) -> str:
    if math.isnan(value):
        return "NAN" if dtype == "f32" else "double(NAN)"
    if dtype == "f32" and not math.isinf(value):
        value = _round_to_f32(value)
    if math.isinf(value):
        text = "INFINITY" if dtype == "f32" else "double(INFINITY)"
        return text if value > 0 else "-" + text
    if dtype == "f64":
        return repr(value)
    text = next(t for d in range(1, 10) if _round_to_f32(float(t := f"{value:.{d}g}")) == value)
    return text + ("f" if any(c in text for c in ".e") else ".f")


def _round_to_f32(value: float) -> float:
    """The nearest f32, or an infinity where a double lies beyond the f32 range."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def c_op(op: str, dtype: str, args: Sequence[str], arg_dtypes: Sequence[str]) -> str:
    """The C++ expression of `Op(dtype, op, args)`; `args` are printed operands."""
    if op == "cast":
        return c_cast(args[0], arg_dtypes[0], dtype)
    if op == "where":
        return f"{args[0]} ? {args[1]} : {args[2]}"
    if op in _INFIX:
        return f"{args[0]} {_INFIX[op]} {args[1]}"
    if op == "neg":
        return f"-({args[0]})"
    if op == "not":
        return f"!{args[0]}" if dtype == "b1" else f"~{args[0]}"
    if op == "expect":
        return f"mw_expect({args[0]}, bad_index)"
    if op == "isnan":
        return f"{args[0]} != {args[0]}"
    return f"mw_{op}({', '.join(args)})"


def c_cast(value: str, source: str, target: str) -> str:
    """Convert between any two dtypes; bf16 and f16 go through f32, as in torch."""
    if source == target:
        return value
    if source in ("bf16", "f16"):
        return c_cast(f"mw_{source}_to_f32({value})", "f32", target)
    if target in ("bf16", "f16"):
        return f"mw_f32_to_{target}({c_cast(value, source, 'f32')})"
    if target == "b1":
        return f"{value} != 0"
    if source == "b1":
        return f"{value} ? {VALUE_TYPE[target]}(1) : {VALUE_TYPE[target]}(0)"  # vectorises where a conversion does not
    if target in ("i8", "i16", "u8") and source in ("f32", "f64"):
        # Out of range, torch's own conversion goes through a wider integer and keeps the low bits.
        return f"{VALUE_TYPE[target]}(int32_t({value}))"
    return f"{VALUE_TYPE[target]}({value})"
