"""A rewrite of programs: ATen's fp32 flash attention for the CPU becomes `Attention` steps on memory of the arena.

Legal because an `Attention` is the operator's own definition (scale, causal, additive mask, rows that see nothing), its
sums taken in another order. Dropout, other types, heads above `MAX_HEAD` and strided last dimensions stay operator
calls, and so does the backward, which reads the sums that a step writes where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..runtime.program import Alloc, Attention, Call, Json, Program, Size, Step, TensorSpec
from .program_calls import lower_calls
from .program_memory import size_expr
from .schema import bind

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
MAX_HEAD = 256  # a row of queries and of results of this length still fits the kernel's first-level working set


def lower_attention(program: Program) -> Program:
    """`program` with its attentions as `Attention` steps where the template takes them."""
    return lower_calls(program, _lower)


def _lower(call: Call, specs: Mapping[str, TensorSpec]) -> list[Step] | None:
    if call.op != FLASH or len(call.specs) != 2:
        return None
    given = {argument.name: value for argument, value in bind(call)}
    out, sums = call.specs
    if out is None or out.device != "cpu":
        return None
    scale = _scale(given["scale"], out)
    if given["dropout_p"] != 0 or scale is None:
        return None
    mask = given["attn_mask"]["tensor"] if given["attn_mask"] is not None else None
    q, k, v = (given[n]["tensor"] for n in ("query", "key", "value"))
    step = Attention(out.name, q, k, v, scale, mask, given["is_causal"], sums.name if sums is not None else None)
    if why_not(step, specs) is not None:
        return None
    return [Alloc(out), *([Alloc(sums)] if sums is not None else []), step]


def _scale(given: Json, out: TensorSpec) -> float | None:
    """The factor of the scores; None for one that is no plain number."""
    head = size_expr(out.shape[-1])
    if given is None:
        return 1 / math.sqrt(head.value) if head.is_const and head.value > 0 else None
    return float(given) if type(given) in (int, float) else None


def why_not(step: Attention, specs: Mapping[str, TensorSpec]) -> str | None:
    """Why the template does not compute this step on tensors of these specs, or None when it does."""
    names = (step.q, step.k, step.v, step.out)
    tensors = [specs.get(n) for n in (*names, *([step.mask] if step.mask else []))]
    if any(t is None or t.dtype != "float32" for t in tensors):
        return "a tensor that is not known to be float32"
    q, k, v, out = (specs[n] for n in names)
    if any(len(t.shape) != 4 or size_expr(t.strides[-1]) != 1 for t in (q, k, v, out)):
        return "another rank than 4, or a strided last dimension"
    head, heads, kv_heads = (size_expr(s) for s in (q.shape[3], q.shape[1], k.shape[1]))
    if not (head.is_const and heads.is_const and kv_heads.is_const) or not 0 < head.value <= MAX_HEAD:
        return f"a head of {head}"
    if kv_heads.value < 1 or heads.value % kv_heads.value:
        return f"{heads} heads of queries for {kv_heads} of keys"
    if not _same(k.shape, v.shape) or not _same(q.shape, out.shape) or not _same(
            (q.shape[0], q.shape[3]), (k.shape[0], k.shape[3])):
        return "sizes that do not belong together"
    if step.mask is not None and not _broadcasts(specs[step.mask].shape, (*q.shape[:3], k.shape[2])):
        return "a mask of another shape"
    sums = specs.get(step.logsumexp) if step.logsumexp is not None else None
    if sums is not None and (sums.dtype != "float32" or not _same(sums.shape, q.shape[:3])):
        return "sums of another type or shape"
    return None


def _same(a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
    return len(a) == len(b) and all(size_expr(x) == size_expr(y) for x, y in zip(a, b, strict=True))


def _broadcasts(mask: tuple[Size, ...], scores: tuple[Size, ...]) -> bool:
    """True when every size of the mask is the scores' own or 1."""
    wanted = scores[len(scores) - len(mask):] if len(mask) in (2, 4) else ()
    return len(wanted) == len(mask) and all(
        size_expr(m) == 1 or size_expr(m) == size_expr(s) for m, s in zip(mask, wanted, strict=True))
