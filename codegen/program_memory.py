"""Where a program's tensors live: one arena for those that do not leave the call, planned once.

A tensor's *root* is the allocation (or input, or operator result) whose memory it shares. An allocation whose root is
not reachable from the outputs gets a place in the arena from its `Alloc` to its last use; two places overlap in memory
only when their lives do not. With constant sizes, offsets are packed first-fit, largest first; with symbolic sizes,
tensors share *slots*, and a slot is as large as the largest of them, computed on entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..runtime.program import (
    Alloc,
    Attention,
    Call,
    Epilogue,
    Gemm,
    Gemms,
    Launch,
    Program,
    Step,
    TensorSpec,
    View,
    defines,
    reads,
    tensors_in,
)
from .expr import Expr, as_expr, atom, const, parse_expr, product
from .schema import aliased_arguments

ALIGN = 64  # bytes: a cache line, and the widest vector
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
            "uint8": 1, "bool": 1}
_TYPICAL = 128  # stands for a symbol when the planner must compare two symbolic sizes


def size_expr(value: str | int) -> Expr:
    """A `Size` as an expression."""
    return parse_expr(value) if isinstance(value, str) else const(value)


def size_text(size: Expr) -> str | int:
    """An expression as a `Size`: inverse of `size_expr`."""
    return size.value if size.is_const else str(size)


def nbytes(spec: TensorSpec) -> Expr:
    """Bytes from the first to behind the last element, rounded up to `ALIGN`."""
    sizes, strides = [size_expr(s) for s in spec.shape], [size_expr(s) for s in spec.strides]
    if all(e.is_const for e in (*sizes, *strides)):
        if any(e.value == 0 for e in sizes):
            return const(ALIGN)
        last = sum((n.value - 1) * s.value for n, s in zip(sizes, strides, strict=True))
        return const(-(-(last + 1) * ITEMSIZE[spec.dtype] // ALIGN) * ALIGN)
    return product(sizes) * ITEMSIZE[spec.dtype] + ALIGN  # a symbolic allocation is dense; one line of slack


def roots(program: Program) -> dict[str, str]:
    """Every tensor's root."""
    root = {i.name: i.name for i in program.inputs}
    for step in program.steps:
        if isinstance(step, View):
            root[step.spec.name] = root[step.base]
        elif isinstance(step, Call):
            shared = aliased_arguments(step)
            for out, argument in zip(step.outs, shared, strict=True):
                if out is not None:
                    root[out] = root[argument] if argument else out
        else:
            for name in defines(step):
                root[name] = name
    return root


def last_uses(program: Program, root: Mapping[str, str]) -> dict[str, int]:
    """For every root, the index of the last step that touches it; outputs live to the end."""
    last: dict[str, int] = {}
    for i, step in enumerate(program.steps):
        for name in (*reads(step), *writes(step), *defines(step)):
            last[root[name]] = i
    for name in tensors_in([o if isinstance(o, dict) else {"tensor": o} for o in program.outputs if o is not None]):
        last[root[name]] = len(program.steps)
    return last


def writes(step: Step) -> tuple[str, ...]:
    """Tensors a step writes into."""
    if isinstance(step, Launch):
        return step.outputs
    if isinstance(step, Attention):
        return (step.out,) if step.logsumexp is None else (step.out, step.logsumexp)
    if isinstance(step, Gemms):
        return tuple(p.out for p in step.products)
    if isinstance(step, Epilogue):
        return (step.product.out, *step.launch.outputs)
    return (step.out,) if isinstance(step, Gemm) else ()


@dataclass(frozen=True)
class Arena:
    """`offsets`: bytes from the arena's start for every tensor in it; `total` bytes altogether."""

    offsets: dict[str, Expr]
    total: Expr


def plan_arena(program: Program) -> Arena:
    """Places for all allocations that do not escape."""
    root = roots(program)
    last = last_uses(program, root)
    lives: list[tuple[str, Expr, int, int]] = []
    for i, step in enumerate(program.steps):
        if isinstance(step, Alloc) and not step.escapes and last[step.spec.name] < len(program.steps):
            lives.append((step.spec.name, nbytes(step.spec), i, last[step.spec.name]))
    if all(size.is_const for _, size, _, _ in lives):
        return _pack([(name, size.value, start, end) for name, size, start, end in lives])
    return _slots(lives)


def _pack(lives: list[tuple[str, int, int, int]]) -> Arena:
    """First fit, largest first."""
    placed: list[tuple[int, int, int, int]] = []  # offset, size, start, end
    offsets: dict[str, Expr] = {}
    for name, size, start, end in sorted(lives, key=lambda t: -t[1]):
        at = 0
        for other, length, s, e in sorted(placed):
            if s <= end and start <= e and at < other + length and other < at + size:
                at = other + length
        placed.append((at, size, start, end))
        offsets[name] = const(at)
    return Arena(offsets, const(max((at + size for at, size, _, _ in placed), default=0)))


@dataclass
class _Slot:
    sizes: list[Expr]
    free_at: int


def _slots(lives: list[tuple[str, Expr, int, int]]) -> Arena:
    slots: list[_Slot] = []
    chosen: dict[str, int] = {}
    for name, size, start, end in lives:
        free = [k for k, slot in enumerate(slots) if slot.free_at < start]
        best = min(free, key=lambda k: _misfit(slots[k].sizes, size), default=None)
        if best is None:
            slots.append(_Slot([], -1))
            best = len(slots) - 1
        if size not in slots[best].sizes:
            slots[best].sizes.append(size)
        slots[best].free_at = end
        chosen[name] = best
    starts, at = [], as_expr(0)
    for slot in slots:
        starts.append(at)
        at = at + _largest(slot.sizes)
    return Arena({name: starts[k] for name, k in chosen.items()}, at)


def _misfit(have: list[Expr], wanted: Expr) -> tuple[bool, int]:
    typical = dict.fromkeys(frozenset().union(wanted.symbols(), *(e.symbols() for e in have)), _TYPICAL)
    return wanted not in have, abs(max(e.evaluate(typical) for e in have) - wanted.evaluate(typical))


def _largest(sizes: list[Expr]) -> Expr:
    """The maximum, rounded up to `ALIGN`."""
    out = sizes[0]
    for size in sizes[1:]:
        out = atom("max", out, size)
    return atom("floordiv", out + (ALIGN - 1), ALIGN) * ALIGN
