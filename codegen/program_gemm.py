"""A rewrite of programs: fp32 matrix products become `Gemm` steps on memory of the arena.

mm, bmm, addmm and baddbmm with unit factors, on CPU, in float32. Legal because a `Gemm` computes the same sums (in
another order, as every BLAS does); everything else stays an operator call.
"""

from __future__ import annotations

from dataclasses import replace

from ..runtime.program import Alloc, Call, Gemm, Program, Step, TensorSpec, View
from .program_memory import size_expr
from .schema import bind

_PRODUCTS = {  # operator -> whether it adds a bias
    "aten.mm.default": False, "aten.bmm.default": False, "aten.addmm.default": True, "aten.baddbmm.default": True,
}


def lower_products(program: Program) -> Program:
    """`program` with its products as `Gemm` steps where the template takes them."""
    specs = {i.name: i for i in program.inputs if isinstance(i, TensorSpec)}
    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step, (Alloc, View)):
            specs[step.spec.name] = step.spec
        if isinstance(step, Call):
            specs.update((s.name, s) for s in step.specs if s is not None)
            lowered = _lower(step, specs)
            if lowered is not None:
                steps += lowered
                continue
        steps.append(step)
    return replace(program, steps=tuple(steps))


def _lower(call: Call, specs: dict[str, TensorSpec]) -> list[Step] | None:
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
