"""Element-wise ATen operators: each is a few IR operations at one index.

A lowering receives the builder, the node and the index of the element wanted, and returns its value. Arithmetic
happens in the compute dtype of the node's own result (torch has already decided type promotion); comparisons promote
their operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ...runtime.torch_compat import device_of
from ..expr import Expr
from ..ir import COMPUTE_FLOATS
from .builder import TABLES, KernelBuilder, Value, compute_dtype
from .shapes import IR_DTYPES, CannotLower

aten = torch.ops.aten
Idx = tuple[Expr, ...]
Body = Callable[..., Value]


def result_dtype(node: fx.Node) -> str:
    return compute_dtype(IR_DTYPES[node.meta["val"].dtype])


def common_dtype(args: Sequence[Any]) -> torch.dtype:
    """What torch promotes the operands of a comparison to."""
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    if any(isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) for v in values):
        values = [0 if isinstance(v, torch.SymInt) else 0.0 if isinstance(v, torch.SymFloat) else v for v in values]
    dtype = torch.result_type(values[0], values[1]) if len(values) == 2 else values[0].dtype
    if dtype not in IR_DTYPES:
        raise CannotLower(f"dtype {dtype}")
    return dtype


def operand_dtype(args: Sequence[Any]) -> str:
    """Compute dtype of a comparison's operands under torch's promotion rules."""
    return compute_dtype(IR_DTYPES[common_dtype(args)])


def check_scalars(args: Sequence[Any], dtype: torch.dtype) -> None:
    """Refuse integer scalars that `dtype`, the operands' common dtype, does not hold: ATen wraps or refuses them, by
    operator, while we compute in a wider dtype. Sums and products need no check: they wrap the same way."""
    if dtype.is_floating_point or dtype == torch.bool:
        return
    limits = torch.iinfo(dtype)
    for a in args:
        if isinstance(a, int) and not limits.min <= a <= limits.max:
            raise CannotLower(f"scalar {a} outside of {str(dtype).removeprefix('torch.')}")
        if isinstance(a, fx.Node) and isinstance(a.meta["val"], torch.SymInt) and limits.bits < 32:
            raise CannotLower(f"size {a.name} may be outside of {str(dtype).removeprefix('torch.')}")


def register(*targets: Any) -> Callable[[Body], Body]:
    """Register `body(b, node, index)` as the lowering of `targets`."""
    def put(body: Body) -> Body:
        for t in targets:
            TABLES.compute[t] = body
        return body
    return put


WRAPS = ("mul", "and", "or", "xor", "not", "neg", "abs")


def _elementwise(op: str, count: int, dtype_of: Callable[[fx.Node], str]) -> Body:
    def lower(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
        dtype = dtype_of(node)
        if op not in WRAPS:
            check_scalars(node.args[:count], node.meta["val"].dtype)
        args = [b.operand(a, index, dtype) for a in node.args[:count]]
        return _arith(b, op, dtype, args)
    return lower


_BOOL_FORM = {"add": "or", "mul": "and", "max": "or", "min": "and"}


def _arith(b: KernelBuilder, op: str, dtype: str, args: Sequence[Value]) -> Value:
    if dtype == "b1" and op not in ("and", "or", "xor", "not"):
        if op not in _BOOL_FORM:
            raise CannotLower(f"{op} on bool")
        op = _BOOL_FORM[op]
    return b.op(op, dtype, *args)


FLOAT_UNARY = {
    "exp": aten.exp, "exp2": aten.exp2, "expm1": aten.expm1, "log": aten.log, "log2": aten.log2, "log10": aten.log10,
    "log1p": aten.log1p, "sqrt": aten.sqrt, "rsqrt": aten.rsqrt, "reciprocal": aten.reciprocal, "sin": aten.sin,
    "cos": aten.cos, "tan": aten.tan, "asin": aten.asin, "acos": aten.acos, "atan": aten.atan, "sinh": aten.sinh,
    "cosh": aten.cosh, "tanh": aten.tanh, "asinh": aten.asinh, "acosh": aten.acosh, "atanh": aten.atanh,
    "erf": aten.erf, "erfc": aten.erfc, "sigmoid": aten.sigmoid,
}
for _ir, _packet in FLOAT_UNARY.items():
    register(_packet.default)(_elementwise(_ir, 1, result_dtype))
for _ir, _packet in {"neg": aten.neg, "abs": aten.abs, "sign": aten.sign}.items():
    register(_packet.default)(_elementwise(_ir, 1, result_dtype))
register(aten.sgn.default)(_elementwise("sign", 1, result_dtype))
for _ir, _targets in {
    "max": [aten.maximum.default], "min": [aten.minimum.default], "mul": [aten.mul.Tensor, aten.mul.Scalar],
    "div": [aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor], "mod": [aten.remainder.Tensor,
                                                                               aten.remainder.Scalar],
    "fmod": [aten.fmod.Tensor, aten.fmod.Scalar], "atan2": [aten.atan2.default], "copysign": [aten.copysign.Tensor],
    "hypot": [aten.hypot.default],
}.items():
    register(*_targets)(_elementwise(_ir, 2, result_dtype))


def _rounding(op: str) -> Body:
    def lower(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
        dtype = result_dtype(node)
        x = b.operand(node.args[0], index, dtype)
        return b.op(op, dtype, x) if dtype in COMPUTE_FLOATS else x
    return lower


for _ir in ("floor", "ceil", "trunc", "round"):
    register(getattr(aten, _ir).default)(_rounding(_ir))


def _scaled(op: str, reverse: bool = False) -> Body:
    """add/sub/rsub with their `alpha`."""
    def lower(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
        dtype = result_dtype(node)
        x, y = (b.operand(a, index, dtype) for a in node.args[:2])
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if reverse:
            x, y = y, x
        if alpha != 1:
            scale = b.operand(alpha, index, dtype)
            y = b.op("mul", dtype, y, scale)
        return _arith(b, op, dtype, [x, y])
    return lower


register(aten.add.Tensor, aten.add.Scalar)(_scaled("add"))
register(aten.sub.Tensor, aten.sub.Scalar)(_scaled("sub"))
register(aten.rsub.Tensor, aten.rsub.Scalar)(_scaled("sub", reverse=True))


def _compare(op: str) -> Body:
    def lower(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
        dtype = operand_dtype(node.args[:2])
        check_scalars(node.args[:2], common_dtype(node.args[:2]))
        if dtype == "b1" and op not in ("eq", "ne"):
            dtype = "i32"
        return b.op(op, "b1", *[b.operand(a, index, dtype) for a in node.args[:2]])
    return lower


for _ir in ("eq", "ne", "lt", "le", "gt", "ge"):
    _packet = getattr(aten, _ir)
    register(_packet.Tensor, _packet.Scalar)(_compare(_ir))


def _logical(op: str) -> Body:
    def lower(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
        args = [b.operand(a, index, operand_dtype([a])) for a in node.args]
        return b.op(op, "b1", *[b.cast(a, "b1") for a in args])
    return lower


for _ir in ("and", "or", "xor", "not"):
    register(getattr(aten, f"logical_{_ir}").default)(_logical(_ir))
    _packet = getattr(aten, f"bitwise_{_ir}")
    for _name in _packet.overloads():
        if _name in ("default", "Tensor", "Scalar"):
            register(getattr(_packet, _name))(_elementwise(_ir, 1 if _ir == "not" else 2, result_dtype))


def _float_test(op: str) -> Body:
    def lower(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
        dtype = operand_dtype(node.args[:1])
        if dtype not in COMPUTE_FLOATS:
            return b.const(False, "b1")
        return b.op(op, "b1", b.operand(node.args[0], index, dtype))
    return lower


register(aten.isnan.default)(_float_test("isnan"))
register(aten.isinf.default)(_float_test("isinf"))


@register(aten.isfinite.default)
def _isfinite(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = operand_dtype(node.args[:1])
    if dtype not in COMPUTE_FLOATS:
        return b.const(True, "b1")
    x = b.operand(node.args[0], index, dtype)
    return b.op("not", "b1", b.op("or", "b1", b.op("isnan", "b1", x), b.op("isinf", "b1", x)))


@register(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    check_scalars(node.args[:2], node.meta["val"].dtype)
    x, y = (b.operand(a, index, dtype) for a in node.args[:2])
    mode = node.kwargs.get("rounding_mode")
    if mode is None:
        return b.op("div", dtype, x, y)
    if mode == "floor":
        return b.op("floordiv", dtype, x, y)
    if dtype in COMPUTE_FLOATS:
        return b.op("trunc", dtype, b.op("div", dtype, x, y))
    return b.op("truncdiv", dtype, x, y)


@register(aten.floor_divide.default)
def _floor_divide(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    check_scalars(node.args[:2], node.meta["val"].dtype)
    return b.op("floordiv", dtype, *[b.operand(a, index, dtype) for a in node.args[:2]])


@register(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    condition = b.cast(b.operand(node.args[0], index, operand_dtype(node.args[:1])), "b1")
    return b.op("where", dtype, condition, *[b.operand(a, index, dtype) for a in node.args[1:3]])


@register(aten.clamp.default, aten.clamp.Tensor)
def _clamp(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    check_scalars((low, high), node.meta["val"].dtype)
    x = b.operand(node.args[0], index, dtype)
    if low is not None:
        x = b.op("max", dtype, x, b.operand(low, index, dtype))
    return x if high is None else b.op("min", dtype, x, b.operand(high, index, dtype))


@register(aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp_min(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    check_scalars(node.args[:2], node.meta["val"].dtype)
    return b.op("max", dtype, *[b.operand(a, index, dtype) for a in node.args[:2]])


@register(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    check_scalars(node.args[:2], node.meta["val"].dtype)
    return b.op("min", dtype, *[b.operand(a, index, dtype) for a in node.args[:2]])


@register(aten.hardtanh.default)
def _hardtanh(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    low = node.args[1] if len(node.args) > 1 else -1.0
    high = node.args[2] if len(node.args) > 2 else 1.0
    check_scalars((low, high), node.meta["val"].dtype)
    x = b.op("max", dtype, b.operand(node.args[0], index, dtype), b.operand(low, index, dtype))
    return b.op("min", dtype, x, b.operand(high, index, dtype))


@register(aten.relu.default)
def _relu(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    return b.op("max", dtype, b.operand(node.args[0], index, dtype), b.const(0, dtype))


@register(aten.leaky_relu.default)
def _leaky_relu(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    x = b.operand(node.args[0], index, dtype)
    slope = b.const(float(node.args[1]) if len(node.args) > 1 else 0.01, dtype)  # type: ignore[arg-type]
    return b.op("where", dtype, b.op("gt", "b1", x, b.const(0, dtype)), x, b.op("mul", dtype, x, slope))


@register(aten.gelu.default)
def _gelu(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    """x·Φ(x), or its tanh approximation (Hendrycks & Gimpel, arXiv:1606.08415)."""
    dtype = result_dtype(node)
    x = b.operand(node.args[0], index, dtype)
    half = b.op("mul", dtype, x, b.const(0.5, dtype))
    if node.kwargs.get("approximate", "none") == "tanh":
        cube = b.op("mul", dtype, b.op("mul", dtype, x, x), x)
        inner = b.op("add", dtype, x, b.op("mul", dtype, cube, b.const(0.044715, dtype)))
        curve = b.op("tanh", dtype, b.op("mul", dtype, inner, b.const(math.sqrt(2 / math.pi), dtype)))
    else:
        curve = b.op("erf", dtype, b.op("mul", dtype, x, b.const(math.sqrt(0.5), dtype)))
    return b.op("mul", dtype, half, b.op("add", dtype, curve, b.const(1.0, dtype)))


@register(aten.silu.default)
def _silu(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    x = b.operand(node.args[0], index, dtype)
    return b.op("mul", dtype, x, b.op("sigmoid", dtype, x))


@register(aten.elu.default)
def _elu(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    alpha, scale, input_scale = (float(node.args[i]) if len(node.args) > i else 1.0 for i in (1, 2, 3))  # type: ignore
    x = b.operand(node.args[0], index, dtype)
    negative = b.op("expm1", dtype, b.op("mul", dtype, x, b.const(input_scale, dtype)))
    negative = b.op("mul", dtype, negative, b.const(alpha * scale, dtype))
    positive = b.op("mul", dtype, x, b.const(scale, dtype))
    return b.op("where", dtype, b.op("gt", "b1", x, b.const(0, dtype)), positive, negative)


_POWERS: dict[float, Callable[[KernelBuilder, str, Value], Value]] = {
    0.5: lambda b, t, x: b.op("sqrt", t, x),
    -0.5: lambda b, t, x: b.op("rsqrt", t, x),
    1.0: lambda b, t, x: x,
    -1.0: lambda b, t, x: b.op("reciprocal", t, x),
    2.0: lambda b, t, x: b.op("mul", t, x, x),
    3.0: lambda b, t, x: b.op("mul", t, b.op("mul", t, x, x), x),
}


@register(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _pow(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    base, exponent = node.args[:2]
    check_scalars((base, exponent), node.meta["val"].dtype)
    if isinstance(exponent, (int, float)) and float(exponent) in _POWERS:
        if dtype in COMPUTE_FLOATS or exponent in (1, 2, 3):
            return _POWERS[float(exponent)](b, dtype, b.operand(base, index, dtype))
    if dtype in COMPUTE_FLOATS:
        return b.op("pow", dtype, b.operand(base, index, dtype), b.operand(exponent, index, dtype))
    if isinstance(exponent, int) and exponent >= 0:
        return b.op("ipow", dtype, b.operand(base, index, dtype), b.const(exponent, dtype))
    raise CannotLower("integer power with an exponent that may be negative")


@register(aten._to_copy.default, torch.ops.prims.convert_element_type.default)
def _to_copy(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    """A dtype conversion. Going to a narrow dtype rounds, as the user asked."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if device_of(source.meta["val"]) != device_of(node.meta["val"]):
        raise CannotLower("copy between devices")
    wanted = IR_DTYPES[node.meta["val"].dtype]
    value = b.operand(source, index, IR_DTYPES[source.meta["val"].dtype])
    return b.cast(b.cast(value, wanted), compute_dtype(wanted))


@register(aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default)
def _clone(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    return b.operand(node.args[0], index, result_dtype(node))


@register(aten.addcmul.default, aten.addcdiv.default)
def _addc(b: KernelBuilder, node: fx.Node, index: Idx) -> Value:
    dtype = result_dtype(node)
    x, y, z = (b.operand(a, index, dtype) for a in node.args[:3])
    joined = b.op("mul" if node.target is aten.addcmul.default else "div", dtype, y, z)
    scale = node.kwargs.get("value", 1)
    if scale != 1:
        joined = b.op("mul", dtype, joined, b.operand(scale, index, dtype))
    return b.op("add", dtype, x, joined)
