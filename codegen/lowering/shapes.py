"""From torch's symbolic sizes to our integer expressions, and from fake tensors to shapes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..expr import Expr, atom, const, product, var

IR_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b1",
}
TORCH_DTYPES = {v: k for k, v in IR_DTYPES.items()}


class CannotLower(Exception):
    """This node or group can't become a kernel; the message is shown in the report."""


@dataclass(frozen=True)
class Shape:
    """A tensor as the code generator sees it: IR dtype, sizes and strides (elements)."""

    dtype: str
    sizes: tuple[Expr, ...]
    strides: tuple[Expr, ...]

    @property
    def numel(self) -> Expr:
        return product(self.sizes)


def from_sympy(e: Any) -> Expr:
    """A sympy integer expression (as found in SymInts) as an `Expr`. Raises `CannotLower` for functions we lack."""
    if e.is_Integer:
        return const(int(e))
    if e.is_Symbol:
        return var(str(e))
    if e.is_Add:
        out = const(0)
        for a in e.args:
            out = out + from_sympy(a)
        return out
    if e.is_Mul:
        return product(from_sympy(a) for a in e.args)
    if e.is_Pow and e.exp.is_Integer and int(e.exp) > 0:
        return product([from_sympy(e.base)] * int(e.exp))
    name = type(e).__name__
    known = {"FloorDiv": "floordiv", "CleanDiv": "floordiv", "PythonMod": "mod", "Mod": "mod", "Max": "max",
             "Min": "min"}
    if name in known and len(e.args) == 2:
        return atom(known[name], from_sympy(e.args[0]), from_sympy(e.args[1]))
    if name in ("Max", "Min"):
        left = from_sympy(e.args[0])
        for a in e.args[1:]:
            left = atom(known[name], left, from_sympy(a))
        return left
    raise CannotLower(f"size expression {e} uses {name}")


def size_expr(size: int | torch.SymInt | sympy.Expr) -> Expr:
    """A python int, SymInt or sympy expression as an `Expr`."""
    if isinstance(size, int):
        return const(size)
    if isinstance(size, torch.SymInt):
        return from_sympy(size.node.expr)
    if isinstance(size, sympy.Expr):
        return from_sympy(size)
    raise CannotLower(f"size {size!r} of type {type(size).__name__}")


def shape_of(value: Any) -> Shape:
    """Shape of a (fake) tensor. Raises `CannotLower` for sparse, quantized, complex or subclassed ones."""
    if not isinstance(value, torch.Tensor):
        raise CannotLower(f"value of type {type(value).__name__}")
    if value.dtype not in IR_DTYPES:
        raise CannotLower(f"dtype {value.dtype}")
    if value.layout != torch.strided:
        raise CannotLower(f"layout {value.layout}")
    return Shape(
        IR_DTYPES[value.dtype],
        tuple(size_expr(s) for s in value.shape),
        tuple(size_expr(s) for s in value.stride()),
    )


def contiguous_strides(sizes: Sequence[Expr]) -> tuple[Expr, ...]:
    """Row-major strides. A dimension of size 1 gets the stride it would have in a contiguous tensor."""
    out: list[Expr] = []
    step = const(1)
    for s in reversed(sizes):
        out.append(step)
        step = step * s
    return tuple(reversed(out))
