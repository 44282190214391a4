"""Collectives: closed forms, group layouts equal to enumeration, monotone in links, bytes, groups and sharing."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost_model.cluster import Cluster, ClusterError, LinkLevel
from meshwright.cost_model.collectives import (
    ALL_REDUCE,
    COLLECTIVES,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    broadcast_s,
    point_to_point_s,
    reduce_scatter_s,
    ring_bandwidth_bytes_per_s,
    ring_bytes_per_rank,
)
from meshwright.cost_model.group import Group

MESHES = [{"tp": 2, "cp": 2, "dp": 8}, {"tp": 8, "dp": 2, "pp": 2}, {"tp": 4, "dp": 3, "pp": 4}, {"tp": 3, "dp": 16},
          {"tp": 1, "dp": 32}, {"tp": 4, "dp": 8}, {"tp": 2, "cp": 3, "dp": 8}, {"tp": 16, "dp": 3},
          {"tp": 5, "cp": 6, "dp": 4}, {"tp": 7, "cp": 2, "dp": 4}, {"tp": 3, "cp": 11, "dp": 8}]


def members_of(sizes: dict[str, int], order: tuple[str, ...], axis: tuple[str, ...]) -> list[list[int]]:
    """Every group, rank by rank."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place in itertools.product(*(range(sizes[a]) for a in reversed(order))):
        at = dict(zip(reversed(order), place, strict=True))
        rank = sum(at[a] * math.prod(sizes[b] for b in order[:i]) for i, a in enumerate(order))
        groups.setdefault(tuple(at[a] for a in order if a not in axis), []).append(rank)
    return list(groups.values())


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_layout_equals_enumeration(sizes: dict[str, int], count: int) -> None:
    gpus = math.prod(sizes.values())
    for order in itertools.permutations(sizes):
        for axis in itertools.combinations(sizes, count):
            check_layout(Cluster.parse(f"{gpus // 8}x8 a100-80"), sizes, order, axis)


def check_layout(cluster: Cluster, sizes: dict[str, int], order: tuple[str, ...], axis: tuple[str, ...]) -> None:
    groups = members_of(sizes, order, axis)
    try:
        group = Group.of(cluster, sizes, order, axis)
    except ClusterError as error:
        assert "lie unevenly" in str(error) and len(axis) > 1
        return
    assert {len(g) for g in groups} == {group.size}
    for i, level in enumerate(cluster.levels):
        counts = [Counter(rank // level.group_size for rank in g) for g in groups]
        assert max(map(len, counts)) == group.blocks[i]
        fewest = min(min(c.values()) for c in counts)
        leaving = Counter(block for c in counts if len(c) > 1 for block in c)
        if group.even:
            assert {n for c in counts for n in c.values()} == {group.members[i]}
            assert max(leaving.values(), default=group.concurrent[i]) == group.concurrent[i]
        else:
            assert group.members[i] <= fewest and max(leaving.values(), default=0) <= group.concurrent[i]


def test_ring_bytes() -> None:
    for n in (2, 3, 8, 1000):
        assert ring_bytes_per_rank("all-reduce", n, 1e6) == pytest.approx(2 * (n - 1) / n * 1e6)
        assert ring_bytes_per_rank("all-gather", n, 1e6) == pytest.approx((n - 1) / n * 1e6)
        assert ring_bytes_per_rank("reduce-scatter", n, 1e6) == ring_bytes_per_rank("all-gather", n, 1e6)
    with pytest.raises(ClusterError, match="no ring of this kind for 'all-to-all'; expected one of all-reduce"):
        ring_bytes_per_rank("all-to-all", 2, 1.0)


def test_closed_forms_inside_a_node() -> None:
    cluster = Cluster.parse("1x8 h100-sxm")
    group, n, size = Group.contiguous(cluster, 8), 8, 1e9
    alpha, rate, launch = 3.4e-6, 450e9 * 20.6 / 25, cluster.collective_launch_s
    assert all_reduce_s(cluster, group, size, "ring") == pytest.approx(launch + 14 * alpha + 2 * 7 / 8 * size / rate)
    assert all_reduce_s(cluster, group, size, "tree") == pytest.approx(launch + 6 * alpha + 2 * size / (0.92 * rate))
    assert all_reduce_s(cluster, group, size, "in-switch") == pytest.approx(25e-6 + 9 / 8 * size / (0.85 * rate))
    assert all_gather_s(cluster, group, size) == pytest.approx(launch + 7 * alpha + 7 / 8 * size / rate)
    assert reduce_scatter_s(cluster, group, size) == all_gather_s(cluster, group, size)
    assert all_to_all_s(cluster, group, size) == pytest.approx(launch + 7 * alpha + (n - 1) / n * size / rate)
    assert broadcast_s(cluster, group, size) == pytest.approx(launch + 7 * alpha + size / rate)
    assert point_to_point_s(cluster, group, size) == pytest.approx(launch + alpha + size / rate)


def test_closed_forms_over_three_levels() -> None:
    """Pods of 32 nodes: a data-parallel group with one rank in each of 64 nodes."""
    cluster = Cluster.parse("64x8 h100-sxm")
    group, size = Group.of(cluster, {"tp": 8, "dp": 64}, ("tp", "dp"), "dp"), 1e9
    nvlink, leaf, spine = cluster.levels
    launch, rate = cluster.collective_launch_s, 50e9 * 0.95
    assert (leaf.group_size, spine.group_size, group.blocks, group.concurrent) == (256, 512, (64, 2, 1), (8, 8, 8))
    steps = 62 * leaf.latency_s + spine.latency_s  # 63, as NCCL counts: pods − 1 of them between pods
    assert all_reduce_s(cluster, group, size, "ring") == pytest.approx(launch + 2 * (steps + 63 / 64 * size / rate))
    logarithmic = 5 * leaf.latency_s + spine.latency_s
    assert all_reduce_s(cluster, group, size, "tree") == pytest.approx(
        launch + 2 * logarithmic + 2 * size / (0.92 * rate))
    assert all_gather_s(cluster, group, size) == pytest.approx(launch + steps + 63 / 64 * size / rate)
    assert all_gather_s(cluster, group, 1e6) == pytest.approx(
        launch + logarithmic / 3.5 + 64 * 2.8e-6 + 63 / 64 * 1e6 / (0.75 * rate))
    assert all_to_all_s(cluster, group, size) == pytest.approx(
        launch + 31 * leaf.latency_s + 32 * spine.latency_s + 63 / 64 * size / rate)
    assert point_to_point_s(cluster, group, size) == pytest.approx(launch + spine.latency_s + size / rate)
    assert nvlink.latency_s < leaf.latency_s < spine.latency_s


def test_a_smaller_uplink_of_a_pod_is_the_bottleneck() -> None:
    cluster = Cluster.parse("64x8 h100-sxm")
    inner, leaf, spine = cluster.levels
    tapered = replace(cluster, levels=(inner, leaf, replace(spine, bandwidth_bytes_per_s=25e9)))
    groups = {name: Group.of(cluster, {"tp": 8, "dp": 32, "pp": 2}, ("tp", "dp", "pp"), name) for name in ("dp", "pp")}
    assert all_reduce_s(tapered, groups["dp"], 1e9) == all_reduce_s(cluster, groups["dp"], 1e9)  # stays in a pod
    assert point_to_point_s(tapered, groups["pp"], 1e10) > 1.9 * point_to_point_s(cluster, groups["pp"], 1e10)


def test_algorithms_follow_the_size() -> None:
    cluster = Cluster.parse("16x8 h100-sxm")
    group = Group.of(cluster, {"tp": 8, "dp": 16}, ("tp", "dp"), "dp")
    best = {size: min(ALL_REDUCE, key=lambda a: all_reduce_s(cluster, group, size, a)) for size in (1e4, 1e9)}
    assert best == {1e4: "tree", 1e9: "ring"}
    node = Group.contiguous(cluster, 8)
    assert min(ALL_REDUCE, key=lambda a: all_reduce_s(cluster, node, 1e9, a)) == "in-switch"


# NVIDIA/nccl issue 1455: eight H100 SXM, messages of 2 to 4 GB, GB/s of "bus bandwidth" (2(n-1)/n · size / time).
# Nothing was fitted on them. NCCL's ring reached 365 to 370 with 2 to 8 GPUs; 3 % covers that spread and the rounding.
@pytest.mark.parametrize(("gpus", "algorithm", "bus_gb_per_s"), [
    (2, "ring", 367.5), (4, "ring", 367.5), (8, "ring", 367.5),
    (5, "in-switch", 420), (6, "in-switch", 440), (7, "in-switch", 460), (8, "in-switch", 480)])
def test_all_reduce_against_measurements_on_h100(gpus: int, algorithm: str, bus_gb_per_s: float) -> None:
    cluster, size = Cluster.parse(f"1x{gpus} h100-sxm"), 4e9
    seconds = all_reduce_s(cluster, Group.contiguous(cluster, gpus), size, algorithm)
    assert 2 * (gpus - 1) / gpus * size / seconds == pytest.approx(bus_gb_per_s * 1e9, rel=0.03)


def alone(group: Group) -> Group:
    """The same group while no other one communicates."""
    return replace(group, concurrent=(1,) * len(group.concurrent))


def test_nics_are_used_by_members_and_shared_by_groups() -> None:
    cluster = Cluster.parse("4x8 h100-sxm")
    nic = cluster.levels[1].effective_bytes_per_s
    whole = Group.contiguous(cluster, 32)
    assert ring_bandwidth_bytes_per_s(cluster, whole) == pytest.approx(min(8 * nic, 450e9 * 20.6 / 25))
    data = Group.of(cluster, {"tp": 8, "dp": 4}, ("tp", "dp"), "dp")
    assert (data.members, data.blocks, data.concurrent) == ((1, 4), (4, 1), (8, 8))
    assert ring_bandwidth_bytes_per_s(cluster, data) == pytest.approx(nic)
    one_nic = replace(cluster, levels=(cluster.levels[0], replace(cluster.levels[1], nics_per_node=1)))
    assert ring_bandwidth_bytes_per_s(one_nic, data) == pytest.approx(nic / 8)
    assert ring_bandwidth_bytes_per_s(one_nic, alone(data)) == pytest.approx(nic)


def test_layout_of_a_large_cluster_is_immediate() -> None:
    cluster = Cluster.parse("12288x8 h100-sxm")
    group = Group.of(cluster, {"tp": 8, "dp": 768, "pp": 16}, ("tp", "dp", "pp"), "dp")
    assert (group.size, group.blocks, group.members) == (768, (768, 24, 1), (1, 32, 768))
    assert 0 < all_reduce_s(cluster, group, 1e9) < 1


def test_switches_that_do_not_add_up_and_uneven_groups() -> None:
    volta = Cluster.parse("6x8 v100")
    assert all_reduce_s(volta, Group.contiguous(volta, 8), 1e6, "in-switch") == math.inf
    cluster = Cluster.parse("6x8 h100-sxm")
    uneven = Group.of(cluster, {"tp": 4, "dp": 3, "pp": 4}, ("tp", "dp", "pp"), "dp")
    assert not uneven.even and all_reduce_s(cluster, uneven, 1e6, "in-switch") == math.inf
    assert all_reduce_s(cluster, uneven, 1e6) == min(all_reduce_s(cluster, uneven, 1e6, a) for a in ("ring", "tree"))


def test_switches_of_several_nodes() -> None:
    """The network carries every byte once each way between two nodes, twice between more; the slower part counts."""
    size = 4e9
    for nodes, crossings in ((2, 1), (4, 2)):
        cluster = Cluster.parse(f"{nodes}x8 h100-sxm")
        network = cluster.levels[1]
        inside_s, between_s = 9 / 8 * size / (0.85 * 450e9 * 20.6 / 25), crossings * size / (8 * 50e9 * 0.95)
        assert all_reduce_s(cluster, Group.contiguous(cluster, 8 * nodes), size, "in-switch") == pytest.approx(
            25e-6 + 2 * math.log2(nodes) * network.latency_s + max(inside_s, between_s))


def test_nothing_to_do_takes_no_time() -> None:
    cluster = Cluster.parse("1x1 h100-sxm")
    for seconds in COLLECTIVES.values():
        assert seconds(cluster, Group.contiguous(cluster, 1), 1e9) == 0.0
        assert seconds(Cluster.parse("1x8 v100"), Group.contiguous(Cluster.parse("1x8 v100"), 8), 0.0) == 0.0


@pytest.mark.parametrize(("call", "message"), [
    (lambda c: Group.of(c, {"tp": 3, "dp": 4}, ("tp", "dp"), "tp"), "has 12 ranks; expected the cluster's 16"),
    (lambda c: Group.of(c, {"tp": 4, "dp": 4}, ("tp", "dp"), "ep"), "unknown axis ep; expected one of tp, dp"),
    (lambda c: Group.of(c, {"tp": 4, "dp": 4}, ("tp",), "tp"), "expected each of tp, dp once"),
    (lambda c: Group.of(c, {"tp": 0, "dp": 4}, ("tp", "dp"), "tp"), "degree of tp is 0; expected a whole number"),
    (lambda c: Group.contiguous(c, 3), "groups of 3 GPUs; expected a divisor of the cluster's 16"),
    (lambda c: all_gather_s(c, Group.contiguous(c, 2), math.nan), "a collective of nan bytes"),
    (lambda c: all_reduce_s(c, Group.contiguous(c, 2), -1.0), "a collective of -1 bytes"),
    (lambda c: all_reduce_s(c, Group.contiguous(c, 2), 1.0, "star"), "unknown all-reduce algorithm 'star'"),
])
def test_mistakes(call, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        call(Cluster.parse("2x8 a100-80"))


# -- properties ------------------------------------------------------------------------------------
GPUS = 4
SPLITS = [(t, d, 16 // t // d) for t in (1, 2, 4, 8, 16) for d in (1, 2, 4, 8, 16) if 16 % (t * d) == 0]


@st.composite
def clusters(draw: st.DrawFn, *, switches_add: bool = True) -> Cluster:
    """Sixteen GPUs: nodes of four, leaves of two nodes, a spine; outer levels never faster."""
    rates = sorted(draw(st.lists(st.floats(1e8, 1e12), min_size=3, max_size=3)), reverse=True)
    alphas = sorted(draw(st.lists(st.floats(1e-7, 1e-4), min_size=3, max_size=3)))
    nics = draw(st.integers(1, 8))
    adds = draw(st.sampled_from([None, 0.5, 1.0])) if switches_add else None
    levels = tuple(LinkLevel(name, alpha, rate, size, None if i == 0 else nics,
                             in_switch_efficiency=adds if i == 0 else None) for i, (name, alpha, rate, size) in
                   enumerate(zip(("inner", "leaf", "spine"), alphas, rates, (GPUS, 2 * GPUS, 4 * GPUS), strict=True)))
    return replace(Cluster.parse("4x4 h100-sxm"), levels=levels)


groups = st.sampled_from(SPLITS)
names = st.sampled_from(sorted(COLLECTIVES))
sizes_bytes = st.floats(1.0, 1e11)
TOLERANCE = 1 + 1e-9


def group_in(cluster: Cluster, split: tuple[int, int, int]) -> Group:
    return Group.of(cluster, dict(zip(("a", "b", "c"), split, strict=True)), ("a", "b", "c"), "b")


@settings(max_examples=150, deadline=None)
@given(clusters(), groups, names, sizes_bytes, st.integers(0, 2), st.floats(1.0, 8.0), st.booleans())
def test_a_faster_link_never_makes_a_collective_slower(cluster, split, name, size, index, factor, alpha) -> None:
    group, level = group_in(cluster, split), cluster.levels[index]
    if alpha:
        better = [replace(v, latency_s=min(v.latency_s, level.latency_s / factor)) if i <= index else v
                  for i, v in enumerate(cluster.levels)]
    else:
        rate = level.bandwidth_bytes_per_s * factor
        better = [replace(v, bandwidth_bytes_per_s=max(v.bandwidth_bytes_per_s, rate)) if i <= index else v
                  for i, v in enumerate(cluster.levels)]
    faster = replace(cluster, levels=tuple(better))
    assert COLLECTIVES[name](faster, group, size) <= COLLECTIVES[name](cluster, group, size) * TOLERANCE


@settings(max_examples=150, deadline=None)
@given(clusters(), groups, names, sizes_bytes, st.floats(1.0, 100.0))
def test_more_bytes_are_never_faster(cluster, split, name, size, factor) -> None:
    group = group_in(cluster, split)
    assert COLLECTIVES[name](cluster, group, size) <= COLLECTIVES[name](cluster, group, size * factor) * TOLERANCE


@settings(max_examples=100, deadline=None)
@given(clusters(), st.sampled_from([2, 4]), names, sizes_bytes)
def test_a_group_inside_a_node_never_uses_the_network(cluster, n, name, size) -> None:
    group = Group.contiguous(cluster, n)
    inner, *outer = cluster.levels
    slow = replace(cluster, levels=(inner, *(replace(v, latency_s=1.0, bandwidth_bytes_per_s=1.0) for v in outer)))
    assert COLLECTIVES[name](cluster, group, size) == COLLECTIVES[name](slow, group, size)


@settings(max_examples=150, deadline=None)
@given(clusters(), groups, names, sizes_bytes)
def test_concurrent_groups_are_never_faster_than_one_alone(cluster, split, name, size) -> None:
    group = group_in(cluster, split)
    one = COLLECTIVES[name](cluster, alone(group), size)
    assert one <= COLLECTIVES[name](cluster, group, size) * TOLERANCE


@settings(max_examples=200, deadline=None)
@given(clusters(), st.sampled_from([2, 4, 8]), names, sizes_bytes)
def test_fewer_crossings_are_never_slower(cluster, n, name, size) -> None:
    """Groups of one size, from neighbours in a node to ranks as far apart as they can be."""
    times = [COLLECTIVES[name](cluster, group_in(cluster, (stride, n, 16 // stride // n)), size)
             for stride in (1, 2, 4, 8) if stride * n <= 16]
    assert all(a <= b * TOLERANCE for a, b in itertools.pairwise(times))


@settings(max_examples=150, deadline=None)
@given(clusters(switches_add=False), st.sampled_from([1, 2, 4, 8]), names, sizes_bytes)
def test_larger_groups_of_one_stride_are_never_faster(cluster, stride, name, size) -> None:
    """Not where switches add: the share of the sum that a member sends falls with the group."""
    nics = tuple(v if v.nics_per_node is None else replace(v, nics_per_node=GPUS) for v in cluster.levels)
    full = replace(cluster, levels=nics)
    times = [COLLECTIVES[name](full, group_in(full, (stride, n, 16 // stride // n)), size)
             for n in (1, 2, 4, 8, 16) if stride * n <= 16]
    assert all(a <= b * TOLERANCE for a, b in itertools.pairwise(times))
