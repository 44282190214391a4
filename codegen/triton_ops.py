"""Each operation of the kernel IR as a Triton expression, and the small functions those expressions call.

Math goes through `libdevice`, which Triton maps to NVIDIA's or AMD's own library. Every function in `HELPERS` is
printed into the module that uses it, so a stored module can be read and run on its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .ir import Scalar

TRITON_DTYPES = {
    "f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16", "i64": "tl.int64",
    "i32": "tl.int32", "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8", "b1": "tl.int1",
}
SIGNATURE_DTYPES = {
    "f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "i64": "i64", "i32": "i32", "i16": "i16",
    "i8": "i8", "u8": "u8", "b1": "i1",
}
_FLOATS = ("f64", "f32", "f16", "bf16")
_NARROW_INTS = ("i16", "i8", "u8")

# Helper functions by name. Reductions keep the reduced direction with size 1, so a row-level value has shape
# [XBLOCK, 1]. `*_of` functions combine two values; NaN wins in max and min, as in PyTorch. The bf16 conversions have
# names because Triton's interpreter truncates in them, so an interpreted module puts exact ones in their place; so have
# the products of tiles, which it computes from the raw bits of bf16.
HELPERS: dict[str, str] = {
    "max_of": """
@triton.jit
def max_of(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "min_of": """
@triton.jit
def min_of(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "product_of": """
@triton.jit
def product_of(a, b):
    return a * b
""",
    "to_bf16": """
@triton.jit
def to_bf16(v):
    return v.to(tl.bfloat16)
""",
    "from_bf16": """
@triton.jit
def from_bf16(v):
    return v.to(tl.float32)
""",
    "tile_dot": """
@triton.jit
def tile_dot(a, b, acc):
    return tl.dot(a, b, acc)
""",
    "tile_dot_exact": """
@triton.jit
def tile_dot_exact(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")
""",
    "tile_dot_tf32": """
@triton.jit
def tile_dot_tf32(a, b, acc):
    return tl.dot(a, b, acc, input_precision="tf32")
""",
    "row_sum": """
@triton.jit
def row_sum(v):
    return tl.sum(v, 1)[:, None]
""",
    "row_prod": """
@triton.jit
def row_prod(v):
    return tl.reduce(v, 1, product_of)[:, None]
""",
    "row_max": """
@triton.jit
def row_max(v):
    return tl.reduce(v, 1, max_of)[:, None]
""",
    "row_min": """
@triton.jit
def row_min(v):
    return tl.reduce(v, 1, min_of)[:, None]
""",
    "floor_div": '''
@triton.jit
def floor_div(a, b):
    """Integer division that rounds down (`//` on Triton tensors rounds towards zero)."""
    return a // b - ((a % b != 0) & ((a < 0) != (b < 0))).to(tl.int32)
''',
    "floor_mod": '''
@triton.jit
def floor_mod(a, b):
    """Integer remainder with the sign of the divisor."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
''',
    "float_mod": '''
@triton.jit
def float_mod(a, b):
    """Floating-point remainder with the sign of the divisor."""
    rest = libdevice.fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
''',
    "float_floor_div": '''
@triton.jit
def float_floor_div(a, b):
    """The quotient rounded down, consistent with float_mod (a rounded a / b may be one too many)."""
    rest = libdevice.fmod(a, b)
    quotient = (a - rest) / b
    quotient = tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)
    floor = tl.floor(quotient)
    floor = tl.where(quotient - floor > 0.5, floor + 1, floor)
    floor = tl.where(quotient == 0, libdevice.copysign(floor * 0, a / b), floor)
    return tl.where(b == 0, a / b, floor)
''',
    "integer_power": '''
@triton.jit
def integer_power(a, b):
    """a ** b for b >= 0 by squaring, wrapping around on overflow."""
    base = a + b * 0
    left = b + a * 0
    out = base * 0 + 1
    for _ in range(63):
        out = tl.where(left % 2 == 1, out * base, out)
        base = base * base
        left = left // 2
    return out
''',
}
_NEEDS = {"row_prod": ("product_of",), "row_max": ("max_of",), "row_min": ("min_of",)}
_HELPER_ORDER = list(HELPERS)


def helpers_in(text: str) -> list[str]:
    """Names of the helpers a kernel text calls, those they call included, in printing order."""
    used = {name for name in re.findall(r"\b(\w+)\(", text) if name in HELPERS}
    for name in list(used):
        used.update(_NEEDS.get(name, ()))
    return [name for name in _HELPER_ORDER if name in used]


def literal(value: Scalar, dtype: str) -> str:
    """A Python literal of `value` for a constant of IR type `dtype`."""
    if dtype == "b1":
        return str(bool(value))
    if dtype not in _FLOATS:
        return str(int(value))
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        return f'float("{number}")'
    return repr(number)


def cast(text: str, source: str, target: str) -> str:
    """`text` of type `source` converted to `target`; 16-bit floats always pass through f32, as in PyTorch."""
    if source == target:
        return text
    if source == "bf16":
        text, source = f"from_bf16({text})", "f32"
    elif source == "f16":
        text, source = f"{text}.to(tl.float32)", "f32"
    if source == target:
        return text
    if target == "b1":
        return f"({text} != 0)"
    if target in ("bf16", "f16") and source != "f32":
        text = f"{text}.to(tl.float32)"
    if target == "bf16":
        return f"to_bf16({text})"
    if source in _FLOATS and target in _NARROW_INTS:  # wraps around like the CPU's conversion, never undefined
        text = f"{text}.to(tl.int64)"
    return f"{text}.to({TRITON_DTYPES[target]})"


def _divide(a: str, b: str, dtype: str) -> str:
    return f"tl.div_rn({a}, {b})" if dtype == "f32" else f"{a} / {b}"


_INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
INFIX_OPS = frozenset(("add", "sub", "mul", *_COMPARE))  # a constant operand may be printed as a literal in these
_LIBDEVICE = frozenset((
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "rsqrt", "sin", "cos", "tan", "asin", "acos", "atan",
    "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "trunc", "pow", "atan2", "copysign", "hypot"))

_Printer = Callable[[list[str], str], str]


def _is_float(dtype: str) -> bool:
    return dtype in _FLOATS


_UNARY: dict[str, _Printer] = {
    "neg": lambda a, t: f"-{a[0]}",
    "abs": lambda a, t: f"tl.abs({a[0]})",
    "sign": lambda a, t: f"({a[0]} > 0).to({TRITON_DTYPES[t]}) - ({a[0]} < 0).to({TRITON_DTYPES[t]})",
    "not": lambda a, t: f"({a[0]} == 0)" if t == "b1" else f"~{a[0]}",
    "sqrt": lambda a, t: f"tl.sqrt_rn({a[0]})" if t == "f32" else f"tl.sqrt({a[0]})",
    "reciprocal": lambda a, t: _divide("1.0", a[0], t),
    "sigmoid": lambda a, t: _divide("1.0", f"1.0 + libdevice.exp(-{a[0]})", t) if t == "f32"
    else f"1.0 / (1.0 + libdevice.exp(-{a[0]}))",
    "floor": lambda a, t: f"tl.floor({a[0]})",
    "ceil": lambda a, t: f"tl.ceil({a[0]})",
    "round": lambda a, t: f"libdevice.rint({a[0]})",
    "expect": lambda a, t: a[0],  # a GPU has no way to raise in the middle: the load's mask gives 0 there
    "isnan": lambda a, t: f"({a[0]} != {a[0]})",
    "isinf": lambda a, t: f'(tl.abs({a[0]}) == float("inf"))',
}
_BINARY: dict[str, _Printer] = {
    "div": lambda a, t: _divide(a[0], a[1], t),
    "max": lambda a, t: f"max_of({a[0]}, {a[1]})" if _is_float(t) else f"tl.maximum({a[0]}, {a[1]})",
    "min": lambda a, t: f"min_of({a[0]}, {a[1]})" if _is_float(t) else f"tl.minimum({a[0]}, {a[1]})",
    "mod": lambda a, t: f"{'float_mod' if _is_float(t) else 'floor_mod'}({a[0]}, {a[1]})",
    "fmod": lambda a, t: f"libdevice.fmod({a[0]}, {a[1]})" if _is_float(t) else f"{a[0]} % {a[1]}",
    "floordiv": lambda a, t: f"{'float_floor_div' if _is_float(t) else 'floor_div'}({a[0]}, {a[1]})",
    "truncdiv": lambda a, t: f"libdevice.trunc({_divide(a[0], a[1], t)})" if _is_float(t) else f"{a[0]} // {a[1]}",
    "ipow": lambda a, t: f"integer_power({a[0]}, {a[1]})",
}


def operation(op: str, args: list[str], arg_dtype: str) -> str:
    """The Triton expression of `op` on `args`, all of IR type `arg_dtype` (for `where`: of its last argument)."""
    if op == "where":
        return f"tl.where({args[0]}, {args[1]}, {args[2]})"
    if op in _INFIX:
        return f"{args[0]} {_INFIX[op]} {args[1]}"
    if op in _COMPARE:
        if arg_dtype == "b1" and op not in ("eq", "ne"):  # a true int1 would compare as -1
            args = [f"{a}.to(tl.int32)" for a in args]
        return f"({args[0]} {_COMPARE[op]} {args[1]})"
    if op in _LIBDEVICE:
        return f"libdevice.{op}({', '.join(args)})"
    return (_UNARY.get(op) or _BINARY[op])(args, arg_dtype)


def neutral(op: str, dtype: str) -> str:
    """The value that leaves reduction `op` over `dtype` unchanged, as a literal."""
    if op in ("sum", "any"):
        return literal(0, dtype)
    if op in ("prod", "all"):
        return literal(1, dtype)
    low = op in ("max", "argmax")
    if dtype in _FLOATS:
        return literal(float("-inf") if low else float("inf"), dtype)
    bits = 31 if dtype == "i32" else 63
    return str(-(2**bits) if low else 2**bits - 1)
