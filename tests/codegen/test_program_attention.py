"""Attention steps: the template against ATen and float64, when the rewrite fires, both ways of a program, artifacts."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import meshwright as mw
from meshwright.codegen import program_cpp_attention, timings
from meshwright.codegen.program_attention import FLASH, lower_attention
from meshwright.codegen.program_cpp import print_program_cpp
from meshwright.codegen.program_cpp_attention import MeasuredAttention, call_attention, pays
from meshwright.codegen.program_cpp_run import compile_program, host_library
from meshwright.codegen.program_memory import last_uses, plan_arena, roots
from meshwright.codegen.program_python import load_program_python
from meshwright.codegen.schema import Unsupported
from meshwright.codegen.timings import Timings
from meshwright.compiler.artifact_verify import verify_program
from meshwright.compiler.tolerance import difference
from meshwright.runtime.errors import ArtifactError
from meshwright.runtime.program import Alloc, Attention, Call, Program, Symbol, TensorSpec
from meshwright.runtime.program_json import program_from_json, program_to_json

INF = math.inf


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, head: int) -> list[torch.Tensor]:
    """q, k, v as a model has them: [B, L, H, D] in memory."""
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, n, h, head).transpose(1, 2) for h, n in sizes]


def reference(q, k, v, mask=None, *, causal=False, scale=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in float64; rows that see nothing are 0."""
    q, k, v = q.double(), *(t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -INF)
    blind = (scores == -INF).all(-1)
    shares = torch.softmax(scores, -1).masked_fill(blind.unsqueeze(-1), 0)
    return shares @ v, torch.logsumexp(scores, -1).masked_fill(blind, 0)


def own(q, k, v, mask=None, *, causal=False, scale=None, threads=1) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, head = q.shape
    out = torch.full((batch, queries, heads, head), torch.nan).transpose(1, 2)
    sums = torch.full((batch, queries, heads), torch.nan).transpose(1, 2)
    call_attention(host_library(), threads, q, k, v, mask, out, sums, scale=scale, causal=causal)
    return out, sums


def aten(q, k, v, mask=None, *, causal=False, scale=None) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask,
                                                                       scale=scale)
    return found[0], found[1]


def assert_lossless(q, k, v, mask=None, *, causal=False, scale=None, threads=1) -> None:
    options = {"causal": causal, "scale": scale}
    got = own(q, k, v, mask, threads=threads, **options)
    eager, exact = aten(q, k, v, mask, **options), reference(q, k, v, mask, **options)
    assert difference("output", got[0], eager[0], exact[0]) is None
    # A relative error of the sum is an absolute one of its logarithm: a row of ones sets the scale to at least 1.
    sums = [torch.cat([t.reshape(-1), t.new_ones(1)]) for t in (got[1], eager[1], exact[1])]
    assert difference("logsumexp", *sums) is None


SHAPES = [
    (1, 12, 12, 128, 128, 64), (4, 12, 12, 24, 24, 32), (1, 2, 2, 197, 197, 64), (1, 8, 4, 128, 128, 64),
    (2, 3, 1, 65, 130, 80), (1, 2, 2, 1, 300, 64), (1, 2, 2, 3, 129, 64), (1, 2, 2, 4, 257, 128), (1, 1, 1, 1, 1, 1),
    (1, 2, 2, 7, 5, 17), (1, 2, 1, 300, 40, 256), (2, 2, 2, 33, 1000, 16), (1, 4, 2, 2, 19, 8), (1, 1, 1, 70, 700, 200),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, causal):
    torch.manual_seed(0)
    assert_lossless(*tensors(*shape), causal=causal)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_threads_give_the_same_bits(threads, heads):
    torch.manual_seed(0)
    q, k, v = tensors(1, heads, heads, 150, 150, 48)
    for causal in (False, True):
        expected = own(q, k, v, causal=causal)
        for got, want in zip(own(q, k, v, causal=causal, threads=threads), expected, strict=True):
            assert torch.equal(got, want)


MASKS = [(1, 1, 1, 90), (2, 1, 1, 90), (2, 1, 70, 90), (1, 3, 70, 90), (2, 3, 70, 90), (70, 90), (1, 90), (1, 1, 70, 1),
         (2, 3, 1, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(shape, causal):
    torch.manual_seed(0)
    assert_lossless(*tensors(2, 3, 3, 70, 90, 64), torch.randn(shape), causal=causal)


def test_masks_of_other_strides():
    torch.manual_seed(0)
    q, k, v = tensors(2, 3, 3, 70, 90, 64)
    assert_lossless(q, k, v, torch.randn(2, 1, 90, 70).transpose(2, 3))
    assert_lossless(q, k, v, torch.randn(2, 1, 1, 180)[..., ::2])
    assert_lossless(q, k, v, torch.randn(2, 1, 1, 90).expand(2, 3, 70, 90))
    assert_lossless(q, k, v, torch.randn(2, 1, 70, 1).expand(2, 3, 70, 90))


@pytest.mark.parametrize("queries", [1, 65])
@pytest.mark.parametrize("head", [64, 40])
def test_a_single_query(queries, head):
    """A decoding step; and the last row of a longer sequence, which is computed the same way."""
    torch.manual_seed(0)
    q, k, v = tensors(2, 4, 2, queries, 333, head)
    assert_lossless(q, k, v)
    assert_lossless(q, k, v, causal=True)
    assert_lossless(q, k, v, torch.randn(2, 1, 1, 333).masked_fill(torch.rand(2, 1, 1, 333) < 0.9, -INF))
    assert_lossless(q, k, v, torch.randn(1, 4, queries, 1), causal=True)
    assert_lossless(q, k, v, torch.full((1, 1, queries, 333), -INF))


def block_masks(queries: int, keys: int) -> list[torch.Tensor]:
    """What models add: causal, padding, a window, and holes of one tile."""
    i, j = torch.arange(queries).unsqueeze(1), torch.arange(keys)
    hidden = [j > i, j >= 70, (j > i) | (j < i - 40), (i // 16 + j // 16) % 2 == 0, (j > 130) & (i < 50)]
    return [torch.zeros(1, 1, queries, keys).masked_fill(h, -INF) for h in hidden]


@pytest.mark.parametrize("queries, keys", [(150, 150), (33, 300), (64, 40)])
def test_keys_that_a_mask_hides_are_skipped(queries, keys):
    torch.manual_seed(0)
    q, k, v = tensors(1, 2, 1, queries, keys, 64)
    for mask in block_masks(queries, keys):
        assert_lossless(q, k, v, mask)
        assert_lossless(q, k, v, mask + 0.5)
        assert_lossless(q, k, v, mask, causal=True)


@pytest.mark.parametrize("queries", [2, 70])
def test_rows_that_see_nothing_are_zero(queries):
    torch.manual_seed(0)
    q, k, v = tensors(1, 2, 2, queries, 300, 64)
    mask = torch.zeros(1, 1, queries, 300)
    mask[:, :, 1] = -INF  # nothing at all
    mask[:, :, 0, :200] = -INF  # nothing in the first blocks of keys
    out, sums = own(q, k, v, mask)
    assert (out[:, :, 1] == 0).all() and (sums[:, :, 1] == 0).all()
    assert_lossless(q, k, v, mask)
    assert_lossless(q, k, v, torch.full((1, 1, 1, 300), -INF))
    assert_lossless(q, k, v, torch.full((1, 1, 1, 300), torch.finfo(torch.float32).min))


def test_not_a_number_stays_in_its_row():
    torch.manual_seed(0)
    q, k, v = tensors(1, 2, 2, 70, 90, 64)
    q[0, 1, 5, 3] = torch.nan
    q[0, 0, 6, 3] = INF
    for got, eager in zip(own(q, k, v), aten(q, k, v), strict=True):
        assert torch.equal(got.isnan(), eager.isnan())


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_flat_and_peaked_softmax(factor):
    torch.manual_seed(0)
    q, k, v = tensors(1, 2, 2, 100, 400, 64)
    assert_lossless(q * factor, k, v)
    assert_lossless(q, k, v, scale=-factor)


@pytest.mark.parametrize("shape", [(0, 2, 2, 4, 4, 8), (1, 2, 2, 0, 4, 8), (1, 2, 2, 4, 0, 8), (1, 2, 2, 70, 0, 8)])
def test_zero_sizes(shape):
    q, k, v = tensors(*shape)
    for causal in (False, True):
        out, sums = own(q, k, v, causal=causal)
        assert (out == 0).all() and (sums == 0).all()


def layouts(t: torch.Tensor, which: int) -> torch.Tensor:
    """The same values in another layout with a contiguous last dimension."""
    if which == 0:
        return t.contiguous()
    if which == 1:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if which == 2:  # a part of a fused projection
        return torch.cat([t, t.new_zeros(*t.shape[:-1], 5)], -1)[..., :t.shape[-1]]
    return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batch=st.integers(1, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 3), queries=st.integers(1, 140),
       keys=st.integers(1, 280), head=st.integers(1, 140), causal=st.booleans(), mask=st.integers(0, 4),
       layout=st.tuples(*[st.integers(0, 3)] * 3), threads=st.integers(1, 2), seed=st.integers(0, 1000))
def test_any_shape_layout_and_mask(batch, kv_heads, group, queries, keys, head, causal, mask, layout, threads, seed):
    torch.manual_seed(seed)
    heads = kv_heads * group
    q, k, v = map(layouts, tensors(batch, heads, kv_heads, queries, keys, head), layout)
    shape = [None, (batch, 1, 1, keys), (batch, heads, queries, keys), (queries, keys), (1, heads, queries, 1)][mask]
    added = torch.randn(shape) if shape else None
    if added is not None and seed % 2:
        added = added.masked_fill(torch.rand(shape) < 0.4, -INF)
    assert_lossless(q, k, v, added, causal=causal, threads=threads)


# -- programs -------------------------------------------------------------------------------------
def rows_of(*shape: int | str) -> tuple:
    """Strides of [B, H, L, D] that is [B, L, H, D] in memory."""
    _, h, n, d = shape
    return (f"{h * d}*{n}" if isinstance(n, str) else h * n * d, d, h * d, 1)


def program(queries: int | str = 70, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, head: int = 32,
            mask: bool = True, sums: bool = True, causal: bool = True, scale: float | None = 0.25,
            dropout: float = 0.0, symbols: tuple = ()) -> Program:
    """out, logsumexp = attention(q, k, v) with as many keys as queries."""
    def spec(name: str, h: int) -> TensorSpec:
        shape = (batch, h, queries, head)
        return TensorSpec(name, "float32", shape, rows_of(*shape))

    inputs = [spec("q", heads), spec("k", kv_heads), spec("v", kv_heads)]
    kwargs: dict = {"scale": scale}
    if mask:
        inputs.append(TensorSpec("mask", "float32", (batch, 1, 1, queries), (queries, queries, queries, 1)))
        kwargs["attn_mask"] = {"tensor": "mask"}
    out = spec("out", heads)
    n = f"{heads}*{queries}" if isinstance(queries, str) else heads * queries
    found = TensorSpec("sums", "float32", (batch, heads, queries), (n, 1, heads)) if sums else None
    call = Call(FLASH, ({"tensor": "q"}, {"tensor": "k"}, {"tensor": "v"}, dropout, causal), kwargs,
                ("out", "sums" if sums else None), (out, found))
    outputs = ("out", "sums") if sums else ("out",)
    return Program("attention", tuple(inputs), symbols, (call,), outputs)


def program_inputs(queries: int = 70, *, mask: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(queries)
    return [*tensors(2, 4, 2, queries, queries, 32), *([torch.randn(2, 1, 1, queries)] if mask else [])]


def check(found: list, inputs: list[torch.Tensor]) -> None:
    mask = inputs[3] if len(inputs) > 3 else None
    expected = reference(*inputs[:3], mask, causal=True, scale=0.25)
    for got, want in zip(found, expected, strict=False):
        torch.testing.assert_close(got, want.float(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_a_program_gives_the_same_both_ways(library, mask, monkeypatch):
    monkeypatch.setattr(program_cpp_attention, "pays", lambda *_: not library)
    compiled = compile_program(program(mask=mask))
    assert any(isinstance(s, Attention) for s in compiled.program.steps)
    inputs = program_inputs(mask=mask)
    for _ in range(2):
        found = compiled(inputs)
        check(found, inputs)
        assert found[0].stride() == (70 * 128, 32, 128, 1) and found[1].stride() == (280, 1, 4)


@pytest.mark.parametrize("library", [False, True])
def test_symbolic_sizes(library, monkeypatch):
    monkeypatch.setattr(program_cpp_attention, "pays", lambda *_: not library)
    compiled = compile_program(program("s0", symbols=(Symbol("s0", tensor="q", dim=2),)))
    for queries in (70, 3, 1, 200, 0):
        inputs = program_inputs(queries)
        check(compiled(inputs), inputs)


def test_unused_sums_are_not_made():
    lowered = lower_attention(program(sums=False))
    alloc, step = lowered.steps
    assert isinstance(alloc, Alloc) and isinstance(step, Attention) and step.logsumexp is None
    inputs = program_inputs()
    check(compile_program(program(sums=False))(inputs), inputs)


def test_the_default_scale_belongs_to_the_head():
    (step,) = [s for s in lower_attention(program(scale=None, head=64)).steps if isinstance(s, Attention)]
    assert step.scale == 0.125


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"head": 257}, {"kv_heads": 3}], ids=str)
def test_what_stays_an_operator_call(options):
    given = program(**options)
    assert lower_attention(given) == given


def test_a_strided_head_stays_an_operator_call():
    given = program()
    q = given.inputs[0]
    strided = TensorSpec("q", q.dtype, q.shape, (q.strides[0], q.strides[1], 1, 70), q.device)
    other = Program(given.name, (strided, *given.inputs[1:]), (), given.steps, given.outputs)
    assert lower_attention(other) == other


def test_the_arena_keeps_both_results_alive():
    lowered = lower_attention(program())
    last = last_uses(lowered, roots(lowered))
    assert last["out"] == last["sums"] == len(lowered.steps)
    hidden = Program(lowered.name, lowered.inputs, (), lowered.steps, ())
    assert set(plan_arena(hidden).offsets) == {"out", "sums"}


def test_python_runs_the_same_step():
    inputs = program_inputs()
    call = load_program_python(lower_attention(program()), {})
    check(call(inputs), inputs)


def test_the_step_as_json_is_verified():
    lowered = lower_attention(program())
    again = program_from_json(program_to_json(lowered))
    assert again == lowered
    verify_program(again)
    unknown = Attention("nowhere", "q", "k", "v", 1.0)
    with pytest.raises(ArtifactError, match="not defined"):
        verify_program(Program("p", lowered.inputs, (), (unknown,), ()))


def test_sizes_that_do_not_belong_together_are_not_printed():
    lowered = lower_attention(program())
    short = TensorSpec("k", "float32", (2, 2, 9, 32), rows_of(2, 2, 9, 32))
    with pytest.raises(Unsupported, match="belong together"):
        print_program_cpp(Program("p", (lowered.inputs[0], short, *lowered.inputs[2:]), (), lowered.steps, ("out",)))


def test_the_choice_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(program_cpp_attention, "measure", lambda *a: calls.append(a) or (2.0, 1.0))
    store: dict = {}
    monkeypatch.setattr(timings.cache, "get_json", store.get)
    monkeypatch.setattr(timings.cache, "put_json", store.__setitem__)
    large = MeasuredAttention(1, 4, 4, 512, 512, 64, False, "")
    assert not pays(host_library(), large, 1, Timings()) and not pays(host_library(), large, 1, Timings())
    assert len(calls) == 1
    pays(host_library(), large, 2, Timings())
    assert len(calls) == 2
    small = MeasuredAttention(1, 1, 1, 8, 8, 8, False, "")
    assert pays(host_library(), small, 1, Timings()) and len(calls) == 2


def test_both_ways_are_timed():
    attention = MeasuredAttention(2, 2, 1, 70, 70, 32, True, "full")
    assert min(program_cpp_attention.measure(host_library(), attention, 1)) > 0


def test_two_threads_at_once():
    compiled = compile_program(program())
    inputs = program_inputs()
    expected = compiled(inputs)
    wrong = []

    def work() -> None:
        for _ in range(20):
            if not all(map(torch.equal, compiled(inputs), expected)):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


# -- models ---------------------------------------------------------------------------------------
class Attend(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(32, 96), nn.Linear(32, 32), causal

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, keep, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def steps_of(model: nn.Module) -> list:
    return [s for g in model.report.graphs for s in lower_attention(g.program).steps if isinstance(s, Attention)]


@pytest.mark.parametrize("causal", [False, True])
def test_a_compiled_model_uses_the_step_and_agrees(causal):
    torch.manual_seed(0)
    model = Attend(causal).eval()
    x = torch.randn(2, 9, 32)
    keep = None if causal else torch.rand(2, 1, 9, 9) > 0.2
    with torch.no_grad():
        fast = mw.compile(model, (x, keep))
        assert len(steps_of(fast)) == 1
        for n in (9, 17):
            x = torch.randn(2, n, 32)
            keep = None if causal else torch.rand(2, 1, n, n) > 0.2
            torch.testing.assert_close(fast(x, keep), model(x, keep), rtol=1e-4, atol=1e-5)


def test_gradients_come_through_the_operators_backward():
    torch.manual_seed(0)
    model = Attend(causal=True)
    x = torch.randn(2, 9, 32)
    fast = mw.compile(model, (x,))
    for _ in range(2):
        grads = []
        for m in (model, fast):
            model.zero_grad()
            m(x).square().sum().backward()
            grads.append(model.qkv.weight.grad.clone())
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    assert any(s.logsumexp is not None for s in steps_of(fast))


def test_an_artifact_is_bit_equal(tmp_path: Path):
    torch.manual_seed(0)
    model, x = Attend().eval(), torch.randn(2, 9, 32)
    with torch.no_grad():
        fast = mw.compile(model, (x,))
        fast(x)
        fast.save(tmp_path / "model")
        assert torch.equal(mw.load(tmp_path / "model")(x), fast(x))
