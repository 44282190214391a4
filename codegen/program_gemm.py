"""Rewrites of programs: fp32 matrix products become `Gemm` steps on memory of the arena, neighbours become `Gemms`.

mm, bmm, addmm and baddbmm with unit factors, on CPU, in float32. Legal because a `Gemm` computes the same sums (in
another order, as every BLAS does); everything else stays an operator call. Products of one tensor with several weights
(query, key and value; gate and up) are done in one step: the left side is prepared once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..runtime.program import Alloc, Call, Gemm, Gemms, Program, Step, TensorSpec, View, defines, reads
from .program_calls import disturbed, lower_calls
from .program_memory import roots, size_expr, writes
from .schema import bind

_PRODUCTS = {  # operator -> whether it adds a bias
    "aten.mm.default": False, "aten.bmm.default": False, "aten.addmm.default": True, "aten.baddbmm.default": True,
}
MAX_SHARED = 4  # results of one step are alive at once: every decoder layer multiplies one encoder output


def lower_products(program: Program) -> Program:
    """`program` with its products as `Gemm` steps where the template takes them."""
    return lower_calls(program, _lower)


def _lower(call: Call, specs: Mapping[str, TensorSpec]) -> list[Step] | None:
    if call.op not in _PRODUCTS or not call.specs or call.specs[0] is None or call.outs[0] is None:
        return None
    values = [value for _, value in bind(call)]
    out, has_bias = call.specs[0], _PRODUCTS[call.op]
    names = [v["tensor"] for v in values[: 3 if has_bias else 2]]
    if has_bias and any(scalar != 1 for scalar in values[3:]):
        return None
    operands = [specs.get(n) for n in names]
    if any(s is None or s.dtype != "float32" for s in (*operands, out)) or not _rows_contiguous(out):
        return None
    if has_bias and not _bias_fits(operands[0], out):
        return None
    gemm = Gemm(out.name, names[-2], names[-1], names[0] if has_bias else None)
    return [Alloc(out), gemm]


def _rows_contiguous(spec: TensorSpec) -> bool:
    return size_expr(spec.strides[-1]) == 1


def _bias_fits(bias: TensorSpec | None, out: TensorSpec) -> bool:
    if bias is None or not bias.shape or len(bias.shape) > len(out.shape):
        return False
    return size_expr(bias.strides[-1]) == 1 and size_expr(bias.shape[-1]) == size_expr(out.shape[-1])


def share_inputs(program: Program) -> Program:
    """`program` with products of the same left side as `Gemms` of at most `MAX_SHARED`, at the place of the first.

    A later product may move there when its other operands are views of the program's inputs and nothing in between
    writes into any of them.
    """
    inputs = {i.name for i in program.inputs if isinstance(i, TensorSpec)}
    views = {s.spec.name: s for s in program.steps if isinstance(s, View)}
    groups: dict[str, list[int]] = {}  # left side -> the steps that multiply it
    for i, step in enumerate(program.steps):
        if isinstance(step, Gemm) and all(_base(n, views) in inputs for n in reads(step)[1:]):
            groups.setdefault(step.a, []).append(i)
    root = roots(program)
    taken: dict[int, int] = {}  # a product's step -> the step of its group's first
    for found in groups.values():
        kept = [i for i in found
                if not disturbed(program.steps[found[0]:i], {root[n] for n in reads(program.steps[i])}, root)]
        for k in range(0, len(kept) - 1, MAX_SHARED):
            taken.update((i, kept[k]) for i in kept[k : k + MAX_SHARED])
    return replace(program, steps=tuple(_regrouped(program.steps, taken, views))) if taken else program


def _base(name: str, views: dict[str, View]) -> str:
    while name in views:
        name = views[name].base
    return name


def _regrouped(steps: Sequence[Step], taken: dict[int, int], views: dict[str, View]) -> list[Step]:
    members: dict[int, list[int]] = {}
    for i, first in taken.items():
        members.setdefault(first, []).append(i)
    home = {name: i for i, s in enumerate(steps) if isinstance(s, (Alloc, View)) for name in defines(s)}
    out: list[Step] = []
    moved: set[int] = set()
    for i, step in enumerate(steps):
        if i in members:
            for name in dict.fromkeys(n for k in sorted(members[i]) for n in _needs(steps[k], views)):
                if home[name] > i and home[name] not in moved:
                    moved.add(home[name])
                    out.append(steps[home[name]])
            out.append(Gemms(tuple(g for k in sorted(members[i]) if isinstance(g := steps[k], Gemm))))
        elif i not in taken and i not in moved:
            out.append(step)
    return out


def _needs(step: Step, views: dict[str, View]) -> list[str]:
    """The views and the allocation that a product stands on, bases first."""
    found: list[str] = []
    for name in reads(step)[1:]:
        chain = []
        while name in views:
            chain.append(name)
            name = views[name].base
        found += reversed(chain)
    return [*found, *writes(step)]
