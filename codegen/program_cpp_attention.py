"""Attention in the C++ program: the template, or ATen's operator where that measures faster on this machine.

Both ways are printed. Which one runs is decided once per shape and number of threads, before the first result (so
results do not depend on when); see `timings`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..runtime.locks import ForkSafeLock
from ..runtime.program import Attention, Size, TensorSpec
from .expr import Expr
from .program_attention import FLASH, why_not
from .program_cpp_calls import c_float
from .program_cpp_tensors import Tensors, ints
from .program_memory import size_expr
from .schema import Unsupported, operator_of
from .templates.cpu_attention import SOURCE
from .timings import HOST_FLOATS, METHODS, TYPICAL, Timings, fastest

MAX_THREADS = 64  # columns of the table of choices; more threads share the last one
_SMALL = 1 << 20  # attentions of fewer multiplications are not measured: the template saves the operator's overhead
_LARGE = 1 << 30  # the batch of larger ones is cut for the timing
_LONG_S = 0.05  # after two runs this long, two are enough

_BOTH_WAYS = r"""
// 1 where ATen's attention measured faster: a row for every attention of the program, by number of threads.
extern "C" __attribute__((visibility("default"))) uint8_t attention_choice[%d][%d] = {};
// ATen's own operator on the same memory. The strides are those of `mw_attention`.
static void library_attention(int threads, Ints sizes, Ints strides, Ptr q, Ptr k, Ptr v, Ptr mask, Ptr out, Ptr lse,
                              double scale, bool causal) {
  const int64_t *n = sizes.begin(), *s = strides.begin();
  if (n[4] == 0) return attention(threads, sizes, strides, q, k, v, mask, out, lse, scale, causal);  // a trap in ATen
  const Handle query(wrap(q, {n[0], n[1], n[3], n[5]}, {s[0], s[1], s[2], 1}, 6));
  const Handle key(wrap(k, {n[0], n[2], n[4], n[5]}, {s[3], s[4], s[5], 1}, 6));
  const Handle value(wrap(v, {n[0], n[2], n[4], n[5]}, {s[6], s[7], s[8], 1}, 6));
  Handle added;
  if (mask.p) added = Handle(wrap(mask, {n[0], n[1], n[3], n[4]}, {s[9], s[10], s[11], s[12]}, 6));
  Value stack[7] = {::tensor(query.h), ::tensor(key.h), ::tensor(value.h), ::v(0.0), flag(causal),
                    mask.p ? some(::tensor(added.h)) : none, some(::v(scale))};
  dispatch("aten::_scaled_dot_product_flash_attention_for_cpu", "", stack);
  const Handle result((void*)stack[0]), sums((void*)stack[1]);
  expect(result.h, {n[0], n[1], n[3], n[5]}, {s[13], s[14], s[15], 1}, "attention");
  std::memcpy(out.p, data_of(result.h).p, n[0] * n[1] * n[3] * n[5] * sizeof(float));
  if (!lse.p) return;
  expect(sums.h, {n[0], n[1], n[3]}, {s[16], s[17], s[18]}, "logsumexp");
  std::memcpy(lse.p, data_of(sums.h).p, n[0] * n[1] * n[3] * sizeof(float));
}
"""


@dataclass(frozen=True)
class MeasuredAttention:
    """What the time of an attention depends on. `mask`: "" for none, "keys" for one row for all queries, "full"."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head: int
    causal: bool
    mask: str

    @property
    def work(self) -> int:
        """Multiplications of both products (a causal one needs about half of them)."""
        return 2 * self.batch * self.heads * self.queries * self.keys * self.head


def print_attention(step: Attention, tensors: Tensors, attentions: list[MeasuredAttention]) -> None:
    """One attention, both ways. Raises `Unsupported` for what the template does not take."""
    names = [n for n in (step.q, step.k, step.v, step.mask, step.out, step.logsumexp) if n is not None]
    specs = {n: tensors.spec(n) for n in names}
    reason = why_not(step, specs)
    if reason is not None:
        raise Unsupported(f"attention with {reason}", step)
    q, k, out = specs[step.q], specs[step.k], specs[step.out]
    sizes = [q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]]
    mask = _mask_strides(specs[step.mask]) if step.mask is not None else [0] * 4
    sums = list(specs[step.logsumexp].strides) if step.logsumexp is not None else [0] * 3
    strides = [*(s for t in (q, k, specs[step.v]) for s in t.strides[:3]), *mask, *out.strides[:3], *sums]
    row = len(attentions)
    attentions.append(_measured(sizes, step, mask))
    optional = [tensors.address(n) if n is not None else "Ptr{}" for n in (step.mask, step.logsumexp)]
    q_at, k_at, v_at, out_at = (tensors.address(n) for n in (step.q, step.k, step.v, step.out))
    addresses = ", ".join([q_at, k_at, v_at, optional[0], out_at, optional[1]])
    arguments = (f"{ints(sizes)}, {ints(strides)},\n            {addresses}, {c_float(step.scale)}, "
                 f"{'true' if step.causal else 'false'}")
    tensors.lines += [f"if (attention_choice[{row}][min(threads, {MAX_THREADS}) - 1])",
                      f"  library_attention(threads, {arguments});", "else", f"  attention(threads, {arguments});"]


def print_choices(attentions: Sequence[MeasuredAttention]) -> str:
    """What a program with attentions needs at its top."""
    return _BOTH_WAYS % (len(attentions), MAX_THREADS) if attentions else ""


def _mask_strides(mask: TensorSpec) -> list[Size]:
    """Strides over [batch, head, query, key], 0 where the mask is broadcast."""
    missing = 4 - len(mask.shape)
    return [0] * missing + [0 if size_expr(n) == 1 else s for n, s in zip(mask.shape, mask.strides, strict=True)]


def _measured(sizes: Sequence[Size], step: Attention, mask: Sequence[Size]) -> MeasuredAttention:
    batch, heads, kv_heads, queries, keys, head = (_typical(size_expr(s)) for s in sizes)
    kind = "" if step.mask is None else "keys" if mask[2] == 0 else "full"
    return MeasuredAttention(batch, heads, kv_heads, queries, keys, head, step.causal, kind)


def _typical(size: Expr) -> int:
    return max(1, size.evaluate(dict.fromkeys(size.symbols(), TYPICAL)))


class AttentionChoices:
    """Fills a program's `attention_choice`, one number of threads at a time."""

    def __init__(self, attentions: Sequence[MeasuredAttention], program: ctypes.CDLL, host: ctypes.PyDLL,
                 timings: Timings) -> None:
        self._attentions, self._host, self._timings = list(attentions), host, timings
        self._table = ((ctypes.c_uint8 * MAX_THREADS) * len(attentions)).in_dll(program, "attention_choice")
        self._settled: set[int] = set()
        self._guard = ForkSafeLock()

    def settle(self, threads: int) -> None:
        """Decide for `threads` threads, unless that was done."""
        column = min(threads, MAX_THREADS) - 1
        if column in self._settled:
            return
        with self._guard:  # two at once would spoil each other's timings
            if column in self._settled:
                return
            for row, attention in enumerate(self._attentions):
                self._table[row][column] = not pays(self._host, attention, threads, self._timings)
            self._settled.add(column)


def pays(host: ctypes.PyDLL, attention: MeasuredAttention, threads: int, timings: Timings) -> bool:
    """True where the template is at least as fast as ATen's operator; measured once per machine (see `timings`)."""
    if attention.work < _SMALL:
        return True
    known = timings.seconds("attention", SOURCE, f"{asdict(attention)} {threads}", METHODS,
                            lambda: dict(zip(METHODS, measure(host, attention, threads), strict=True)))
    return known["own"] <= known["library"]


def measure(host: ctypes.PyDLL, a: MeasuredAttention, threads: int) -> tuple[float, float]:
    """Seconds of the template and of ATen's operator: the fastest of interleaved runs."""
    batch = max(1, min(a.batch, a.batch * _LARGE // max(1, a.work)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        q, k, v = (torch.randn(batch, length, heads, a.head, **HOST_FLOATS).transpose(1, 2)
                   for length, heads in ((a.queries, a.heads), (a.keys, a.kv_heads), (a.keys, a.kv_heads)))
        rows = a.queries if a.mask == "full" else 1
        mask = torch.zeros(batch, 1, rows, a.keys, **HOST_FLOATS) if a.mask else None
        out = torch.empty(batch, a.queries, a.heads, a.head, **HOST_FLOATS).transpose(1, 2)
        flash = operator_of(FLASH)
        runs: list[Callable[[], Any]] = [
            lambda: call_attention(host, threads, q, k, v, mask, out, causal=a.causal),
            lambda: flash(q, k, v, 0.0, a.causal, attn_mask=mask),
        ]
        own_s, library_s = fastest(runs, long_s=_LONG_S)
    return own_s, library_s


def call_attention(host: ctypes.PyDLL, threads: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                   mask: torch.Tensor | None, out: torch.Tensor, sums: torch.Tensor | None = None, *,
                   scale: float | None = None, causal: bool = False) -> None:
    """The template on tensors: q, out [B, H, L, D], k, v [B, H', S, D], `mask` broadcasts to [B, H, L, S], all fp32
    with a contiguous last dimension; `sums` [B, H, L]."""
    batch, heads, queries, head = q.shape
    steps = [0] * 4
    if mask is not None:
        shape = [1] * (4 - mask.dim()) + list(mask.shape)
        steps = [0 if n == 1 else s for n, s in zip(shape, [0] * (4 - mask.dim()) + list(mask.stride()), strict=True)]
    strides = [*(s for t in (q, k, v) for s in t.stride()[:3]), *steps, *out.stride()[:3],
               *(sums.stride() if sums is not None else (0, 0, 0))]
    sizes = [batch, heads, k.shape[1], queries, k.shape[2], head]
    host.mw_attention(threads, (ctypes.c_int64 * 6)(*sizes), (ctypes.c_int64 * 19)(*strides), q.data_ptr(),
                      k.data_ptr(), v.data_ptr(), mask.data_ptr() if mask is not None else None, out.data_ptr(),
                      sums.data_ptr() if sums is not None else None, head ** -0.5 if scale is None else scale,
                      int(causal))
