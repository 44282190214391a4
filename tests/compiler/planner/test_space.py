"""The strategy space: what divides, what is refused and with which words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.compiler.planner.space import Group, Layout, Pins, Space, divisors
from meshwright.cost_model.cluster import Cluster
from meshwright.cost_model.model import Boundary, LayerKind, Saved
from meshwright.cost_model.strategy import ORDER
from meshwright.runtime.errors import InvalidInputError, UnknownNameError

LAYER = LayerKind("Block", (), (), (), (), {"none": Saved(10), "selective": Saved(5), "full": Saved(1)},
                  (Boundary("x", "chain", "bfloat16", (1, 4096, 1536), 1),), heads=12, kv_heads=6, ffn=6144)
EXPERTS = replace(LAYER, name="Experts", experts=48, top_k=4, expert_ffn=768)
HEAD = replace(LAYER, name="head", heads=None, kv_heads=None, ffn=None, vocabulary=50000)


def space(cluster: str = "3x8 h100-sxm", batch: int = 48, seq: int = 4096, kinds: tuple[LayerKind, ...] = (LAYER, HEAD),
          order: tuple[int, ...] = (0,) * 12 + (1,), **pins: object) -> Space:
    return Space(kinds, order, seq, Cluster.parse(cluster), batch, Pins(**pins))  # type: ignore[arg-type]


def test_degrees_that_are_no_powers_of_two() -> None:
    one = space(seq=3 * 2048)
    found = [o for m in divisors(48) for o in one.layouts(24, m)]
    assert {o.tp for o in found} == {1, 2, 3, 6}
    assert all(o.tp * o.cp * o.dp == 24 and 48 % o.dp == 0 for o in found)
    assert Layout(3, 1, "ring", 8) in found and Layout(6, 1, "ring", 4) in found


def test_refusals_have_reasons() -> None:
    one = space()
    assert one.refusal(LAYER, 4, 1, "ring") == "tp 4 does not divide 6 KV heads of Block"
    assert one.refusal(LAYER, 5, 1, "ring") == "tp 5 does not divide 12 heads of Block"
    assert "does not divide the sequence" in str(one.refusal(LAYER, 3, 1, "ring"))
    assert "2 · 3 equal chunks" in str(replace(one, seq=9 * 1024 + 3).refusal(replace(LAYER, ffn=None), 1, 3, "ring"))
    assert "Ulysses" in str(replace(one, seq=8 * 4096).refusal(LAYER, 2, 8, "ulysses"))
    assert one.refusal(HEAD, 4, 1, "ring") is None  # a vocabulary is padded
    list(one.groups())
    reasons = {(left.axis, left.value): left.reason for left in one.left}
    assert "KV heads" in reasons["tp", "4"]
    assert any(axis == "pp" and "13 layers for 24 stages" in reason for (axis, _), reason in reasons.items())


def test_what_is_never_searched_is_named_with_a_reason() -> None:
    one = space("4x8 h100-sxm", batch=64, kinds=(EXPERTS, HEAD))
    for group in one.groups():
        for layout in one.layouts(32 // group.p, group.m):
            for kind in one.kinds:
                for ep, etp in one.families(kind, layout):
                    list(one.strategies(kind, layout, ep, etp))
    named = {(left.axis, left.value) for left in one.left}
    assert named >= {("rank order", "all others"), ("zero", "hsdp over other sizes"), ("recompute", "min-cut")}
    assert all(left.reason for left in one.left)


def test_every_group_uses_all_gpus_and_divides_the_batch() -> None:
    one = space()
    groups = list(one.groups())
    assert {g.p for g in groups} == {1, 2, 3, 4, 6, 8, 12}
    for group in groups:
        for layout in one.layouts(24 // group.p, group.m):
            assert layout.tp * layout.cp * layout.dp * group.p == 24
            assert 48 % (group.m * layout.dp) == 0


def test_context_parallelism_only_where_samples_run_out() -> None:
    one = space("1x8 h100-sxm", batch=4)
    for m in (1, 2, 4):
        for layout in one.layouts(8, m):
            assert layout.cp == 1 or all(4 % (m * layout.dp * q) for q in (2,) if layout.cp % q == 0)
    assert any("samples enough" in left.reason for left in one.left)


def test_experts_divide_and_etp_follows_tp() -> None:
    one = space(kinds=(EXPERTS, HEAD))
    found = set(one.families(EXPERTS, Layout(2, 1, "ring", 12)))
    assert {ep for ep, etp in found if etp == 1} == {1, 2, 3, 4, 6, 8, 12, 24}
    assert {etp for _, etp in found} == {1}  # ep could always be twice as much instead
    assert any(left.axis == "etp" and "moves fewer rows" in left.reason for left in one.left)
    pinned = space(kinds=(EXPERTS, HEAD), etp=2)
    assert {etp for _, etp in pinned.families(EXPERTS, Layout(2, 1, "ring", 12))} == {2}
    assert list(one.families(LAYER, Layout(2, 1, "ring", 12))) == [(1, 1)]
    assert list(one.families(LAYER, Layout(4, 1, "ring", 6))) == []


def test_hsdp_shards_within_a_node() -> None:
    one = space("4x8 h100-sxm", batch=64)
    shards = {(s.zero, s.shard) for s in one.strategies(LAYER, Layout(2, 1, "ring", 16), 1, 1)}
    assert shards == {(0, 0), *((z, n) for z in (1, 2, 3) for n in (0, 4))}  # within a node, repeated across, or not
    banned = space("4x8 h100-sxm", batch=64, banned=frozenset({"hsdp"}))
    assert {s.shard for s in banned.strategies(LAYER, Layout(2, 1, "ring", 16), 1, 1)} == {0}


def test_interleaving_needs_micro_batches_and_even_parts() -> None:
    one = space("1x8 h100-sxm", batch=64, order=(0,) * 15 + (1,))
    assert ("interleaved", 2) in set(one.schedules(Group(4, 8, ORDER)))
    assert all(v == 1 for _, v in one.schedules(Group(4, 2, ORDER)))
    assert any("4 stages do not divide 2 micro-batches" in left.reason for left in one.left)
    assert ("interleaved", 3) not in set(one.schedules(Group(4, 8, ORDER)))
    assert any(left.axis == "interleave" and "differ by a layer" in left.reason for left in one.left)


def test_cuts_are_lifted_by_pins() -> None:
    """Tensor parallelism between nodes, and micro-batches that are no power of two, are searched when asked for."""
    free, wide = space("2x4 h100-sxm", batch=48, seq=8192), space("2x4 h100-sxm", batch=48, seq=8192, micro_batch=3)
    assert all(48 // (m * o.dp) in (1, 2, 4, 8, 16) for m in divisors(48) for o in free.layouts(8, m))
    assert {48 // (m * o.dp) for m in divisors(48) for o in wide.layouts(8, m)} == {3}
    kinds = (replace(LAYER, heads=16, kv_heads=8, ffn=4096), HEAD)
    near, far = (space("2x4 h100-sxm", 64, 8192, kinds, **pins) for pins in ({}, {"tp": 8}))
    assert {o.tp for m in divisors(64) for o in near.layouts(8, m)} == {1, 2, 4}
    assert any(left.axis == "tp" and "would leave the 4 GPUs" in left.reason for left in near.left)
    assert {o.tp for m in divisors(64) for o in far.layouts(8, m)} == {8}


def test_pins_leave_one_value() -> None:
    one = space("1x8 h100-sxm", batch=64, tp=2, pp=2, zero=1, recompute="full", schedule="1f1b", micro_batches=8)
    groups = list(one.groups())
    assert {(g.p, g.m) for g in groups} == {(2, 8)}
    assert {o.tp for g in groups for o in one.layouts(4, g.m)} == {2}
    assert {s for g in groups for s in one.schedules(g)} == {("1f1b", 1)}
    assert {(s.zero, s.recompute) for s in one.strategies(LAYER, Layout(2, 1, "ring", 2), 1, 1)} == {(1, "full")}


@pytest.mark.parametrize(("pins", "message"), [
    ({"tp": 0}, "tp 0"), ({"zero": 4}, "ZeRO stage 4"), ({"recompute": "fulll"}, "did you mean 'full'"),
    ({"schedule": "1f2b"}, "did you mean '1f1b'"), ({"banned": frozenset({"hsdpp"})}, "did you mean 'hsdp'")])
def test_bad_pins_are_one_line(pins: dict[str, object], message: str) -> None:
    with pytest.raises((InvalidInputError, UnknownNameError)) as caught:
        Pins(**pins)  # type: ignore[arg-type]
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_divisors() -> None:
    assert divisors(36) == (1, 2, 3, 4, 6, 9, 12, 18, 36) and divisors(1) == (1,)
