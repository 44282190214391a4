"""Kernels that are `sum of factor × tensor + shift` per channel, with an optional ReLU: batch norm, bias, residual.

    relu_out[n, c, h, w] = max(a[c]*x[n, c, h, w] + y[n, c, h, w] + b[c], 0)

`match_affine` reads such a form off a kernel's IR. Factors and shifts are trees over per-channel tensors:
`("tensor", buffer)`, `("const", number)`, or `(op, tree, tree…)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

from .expr import Expr, const, parse_expr, product, var
from .ir import Const, Kernel, Load, Op, Store

Tree = tuple[Any, ...]
ZERO: Tree = ("const", 0.0)
ONE: Tree = ("const", 1.0)
_AT_LEAST_1 = "max(1, "
_CHANNEL_OPS = ("add", "sub", "mul", "div", "sqrt", "rsqrt", "reciprocal")


@dataclass(frozen=True)
class Affine:
    """`terms`: full-size input buffer -> factor; `relu`: clamped at zero afterwards."""

    terms: dict[str, Tree]
    shift: Tree = ZERO
    relu: bool = False

    @property
    def per_channel(self) -> bool:
        """Whether it reads per-channel tensors, so that it matters which axis the channel is."""
        return any(tensors_of(tree) for tree in (*self.terms.values(), self.shift))


_Known = Union[Affine, Tree]


def match_affine(kernel: Kernel) -> Affine | None:
    """The form of a kernel with one float32 output, or None: over axes [batch,] channel, position, or over any axes
    where nothing is per channel (a ReLU alone). Extents may be symbolic; the caller compares them with the tensors."""
    if kernel.reduce or len(kernel.outputs) != 1:
        return None
    stores = [s for s in kernel.body if isinstance(s, Store)]
    if len(stores) != 1 or not _is_dense(kernel, stores[0].index):
        return None
    channel = var(kernel.parallel[-2].name) if len(kernel.parallel) in (2, 3) else None
    known: dict[str, _Known] = {}
    for stmt in kernel.body:
        match stmt:
            case Const(dst=dst, value=value, dtype="f32"):
                known[dst] = ("const", float(value))
            case Load(dst=dst, buffer=buffer, index=index, mask=None, dtype="f32"):
                if index == channel:
                    known[dst] = ("tensor", buffer)
                elif index == stores[0].index:
                    known[dst] = Affine({buffer: ONE})
            case Op(dst=dst, op=op, args=args):
                if all(a in known for a in args):
                    result = _combine(op, [known[a] for a in args])
                    if result is not None:
                        known[dst] = result
    found = known.get(stores[0].value)
    return found if isinstance(found, Affine) else None


def channel_extents(kernel: Kernel) -> tuple[Expr, Expr]:
    """Extents of the channel and the position axis of a kernel with a per-channel form, over the kernel's sizes."""
    return kernel.parallel[-2].size, kernel.parallel[-1].size


def nonempty(e: Expr) -> Expr:
    """`e` for sizes of at least 1: torch's strides step over max(1, n) of a size n."""
    found = const(0)
    for names, factor in e.terms:
        found = found + factor * product([parse_expr(n[len(_AT_LEAST_1):-1]) if n.startswith(_AT_LEAST_1) else var(n)
                                          for n in names])
    return found


def _is_dense(kernel: Kernel, index: Expr) -> bool:
    """Row-major over all parallel axes: the output's own order."""
    step, dense = const(1), const(0)
    for axis in reversed(kernel.parallel):
        dense = dense + var(axis.name) * step
        step = step * axis.size
    return nonempty(index) == dense


def _combine(op: str, args: list[_Known]) -> _Known | None:
    if not any(isinstance(a, Affine) for a in args):
        return (op, *args) if op in _CHANNEL_OPS else None
    if any(isinstance(a, Affine) and a.relu for a in args) or len(args) != 2:
        return None
    left, right = args
    if op == "max" and isinstance(left, Affine) and right == ZERO:
        return Affine(left.terms, left.shift, relu=True)
    if op in ("add", "sub"):
        return _sum(op, _as_affine(left), _as_affine(right))
    if op == "mul" and isinstance(right, Affine) and not isinstance(left, Affine):
        left, right = right, left
    if op in ("mul", "div") and isinstance(left, Affine) and not isinstance(right, Affine):
        return Affine({k: (op, v, right) for k, v in left.terms.items()}, (op, left.shift, right))
    return None


def _as_affine(value: _Known) -> Affine:
    return value if isinstance(value, Affine) else Affine({}, value)


def _sum(op: str, left: Affine, right: Affine) -> Affine | None:
    if left.terms.keys() & right.terms.keys():
        return None
    other = {k: v if op == "add" else ("sub", ZERO, v) for k, v in right.terms.items()}
    return Affine({**left.terms, **other}, (op, left.shift, right.shift))


def evaluate(tree: Tree, tensors: dict[str, Any]) -> Any:
    """A tree's value with per-channel `tensors` (torch tensors), computed in their own type."""
    if tree[0] == "const":
        return tree[1]
    if tree[0] == "tensor":
        return tensors[tree[1]]
    args = [evaluate(a, tensors) for a in tree[1:]]
    match tree[0]:
        case "add":
            return args[0] + args[1]
        case "sub":
            return args[0] - args[1]
        case "mul":
            return args[0] * args[1]
        case "div":
            return args[0] / args[1]
        case "sqrt":
            return args[0] ** 0.5
        case "rsqrt":
            return args[0] ** -0.5
        case "reciprocal":
            return 1.0 / args[0]
    raise ValueError(f"{tree[0]!r} is no operation of a channel tree")


def renamed(tree: Tree, names: dict[str, str]) -> Tree:
    """The tree with buffer names replaced."""
    if tree[0] == "const":
        return tree
    if tree[0] == "tensor":
        return ("tensor", names[tree[1]])
    return (tree[0], *[renamed(a, names) for a in tree[1:]])


def tensors_of(tree: Tree) -> list[str]:
    """The tensors a tree reads, in order of appearance, without repeats."""
    if tree[0] == "tensor":
        return [tree[1]]
    if tree[0] == "const":
        return []
    return list(dict.fromkeys(n for a in tree[1:] for n in tensors_of(a)))
