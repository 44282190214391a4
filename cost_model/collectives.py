"""Seconds of collectives: α–β times over a group's actual layout.

    time = launch + Σ over levels (steps at the level · α) + bytes / bandwidth of the slowest level

`size_bytes` is the whole tensor: what all-reduce and broadcast leave on every rank, all-gather gives to each,
reduce-scatter and all-to-all take from each. A collective takes the cheapest of these algorithms for its size:

| algorithm | steps | bytes a rank sends | source |
| --- | --- | --- | --- |
| ring all-reduce | 2(n−1) | 2(n−1)/n · size | [PY] |
| tree all-reduce | 2 log₂ n | 2 · size, at 92 % of the bandwidth | [SST], [NCCL] |
| all-reduce in the switch (NVLS) | 25 µs, then a tree between the switches | (n+1)/n · size | [NCCL] |
| ring all-gather, reduce-scatter | n−1 | (n−1)/n · size | [TRG] |
| logarithmic all-gather, reduce-scatter (PAT) | log₂ n / 3.5, and 2.8 µs for every rank | the same, at 75 % | [NCCL] |
| pairwise all-to-all | n−1 | (n−1)/n · size | [TRG] |
| pipelined broadcast along a ring | n−1 | size | [TRG] |

Rings take n−k of their steps inside k nodes, as NCCL counts them. Logarithms are not rounded and all levels have them,
so that of two groups of one size the one with fewer crossings is never slower; NCCL runs trees as chains inside a node
and PAT only with one rank a node, which costs some µs more. Reductions in network switches (SHARP) are not priced.

  [TRG]   Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19(1),
          2005.
  [PY]    Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69(2), 2009.
  [SST]   Sanders, Speck, Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel
          Computing 35(12), 2009: NCCL's double tree.
  [NCCL]  NCCL 2.30.7, src/graph/tuning.cc: steps and factors of each algorithm.

benchmarks/collectives_vs_measured.py prints the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .cluster import Cluster, ClusterError
from .group import Group

TREE_EFFICIENCY = 0.92  # [NCCL]: busBw * .92
PAT_EFFICIENCY = 0.75  # [NCCL]: busBw *= .75
PAT_STEP_FRACTION = 1 / 3.5  # [NCCL]: log2i(nNodes) * (interLat/3.5)
PAT_RANK_S = 2.8e-6  # [NCCL]: nRanks * 2.8
IN_SWITCH_S = 25e-6  # [NCCL]: hwLatencies of NVLS, the launch included


def all_reduce_s(cluster: Cluster, group: Group, size_bytes: float, algorithm: str | None = None) -> float:
    """Seconds of an all-reduce of `size_bytes`: of the cheapest algorithm, or of the one named (`ring`, `tree`,
    `in-switch`; the last is infinite where switches don't reduce or the group lies unevenly). Raises `ClusterError`."""
    if algorithm is not None and algorithm not in ALL_REDUCE:
        raise ClusterError(f"unknown all-reduce algorithm {algorithm!r}; expected one of {', '.join(ALL_REDUCE)}")
    chosen = list(ALL_REDUCE.values()) if algorithm is None else [ALL_REDUCE[algorithm]]
    return _timed(cluster, group, size_bytes, lambda: min(f(cluster, group, size_bytes) for f in chosen))


def all_gather_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    """Seconds until every rank has all `size_bytes`, of which it held 1/n. Raises `ClusterError`."""
    return _timed(cluster, group, size_bytes, lambda: _gather_s(cluster, group, size_bytes))


def reduce_scatter_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    """Seconds until every rank has its 1/n of the sum of `size_bytes`: an all-gather backwards."""
    return all_gather_s(cluster, group, size_bytes)


def all_to_all_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    """Seconds of an all-to-all in which every rank holds `size_bytes` and sends 1/n of it to each rank, in n−1 pairwise
    exchanges. Raises `ClusterError`."""
    def seconds() -> float:
        n = group.size
        transfer_s = (n - 1) / n * size_bytes / bandwidth_bytes_per_s(cluster, group, 0)  # all of it leaves the GPU
        for i in range(1, len(cluster.levels)):
            if group.crosses(i):
                inside = group.members[i - 1]
                leaving_bytes = inside * (n - inside) / n * size_bytes
                transfer_s = max(transfer_s, leaving_bytes / bandwidth_bytes_per_s(cluster, group, i))
        reached = (1, *group.members[:-1], n)  # ranks within reach without the links of a level, and with them
        latency_s = sum((reached[i + 1] - reached[i]) * level.latency_s for i, level in enumerate(cluster.levels))
        return latency_s + transfer_s

    return _timed(cluster, group, size_bytes, seconds)


def broadcast_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    """Seconds until every rank has the `size_bytes` of one: a pipeline along the ring, every byte over every edge."""
    return _timed(cluster, group, size_bytes,
                  lambda: _steps_s(cluster, group) + size_bytes / ring_bandwidth_bytes_per_s(cluster, group))


def point_to_point_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    """Seconds to send `size_bytes` from a rank to its neighbour in the group (a pipeline stage to the next one): of the
    slowest such pair, while the concurrent groups do the same."""
    def seconds() -> float:
        rates = [bandwidth_bytes_per_s(cluster, group, i, lanes=1) for i in _levels(cluster, group)]
        return cluster.levels[group.outermost].latency_s + size_bytes / min(rates)

    return _timed(cluster, group, size_bytes, seconds)


COLLECTIVES: dict[str, Callable[[Cluster, Group, float], float]] = {
    "all-reduce": all_reduce_s, "all-gather": all_gather_s, "reduce-scatter": reduce_scatter_s,
    "all-to-all": all_to_all_s, "broadcast": broadcast_s, "point-to-point": point_to_point_s}


def ring_bytes_per_rank(collective: str, size: int, size_bytes: float) -> float:
    """Bytes that each of `size` ranks sends in a ring: 2(n−1)/n of an all-reduce, (n−1)/n of an all-gather or
    reduce-scatter (Patarasuk and Yuan: without additions in the network none sends less). Raises `ClusterError` for
    other collectives."""
    rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
    if collective not in rounds:
        raise ClusterError(f"no ring of this kind for {collective!r}; expected one of {', '.join(rounds)}")
    return rounds[collective] * (size - 1) / size * size_bytes


def bandwidth_bytes_per_s(cluster: Cluster, group: Group, level: int, lanes: int | None = None) -> float:
    """What one group gets of the ports of `level` that leave one block of the level inside: `lanes` ports (default: one
    for each of its members there), and no more than its share of the block's ports among the concurrent groups."""
    port = cluster.levels[level].effective_bytes_per_s
    if level == 0:
        return port  # no other group of the mesh uses a GPU's own port at the same time
    wanted = group.members[level - 1] if lanes is None else lanes
    return port * min(wanted, cluster.ports(level) / group.concurrent[level - 1])


def ring_bandwidth_bytes_per_s(cluster: Cluster, group: Group) -> float:
    """The rate at which rings move bytes: the slowest level's. NCCL's channels leave a node by every member's port."""
    return min(bandwidth_bytes_per_s(cluster, group, i) for i in _levels(cluster, group))


def _levels(cluster: Cluster, group: Group) -> list[int]:
    """The levels that bytes of the group pass: a GPU's own port always, outer ones where it has to."""
    return [i for i in range(len(cluster.levels)) if i == 0 or group.crosses(i)]


def _timed(cluster: Cluster, group: Group, size_bytes: float, seconds: Callable[[], float]) -> float:
    if not (math.isfinite(size_bytes) and size_bytes >= 0):
        raise ClusterError(f"a collective of {size_bytes:g} bytes; expected a finite number of at least 0")
    return 0.0 if group.size == 1 or size_bytes == 0 else cluster.collective_launch_s + seconds()


def _steps_s(cluster: Cluster, group: Group) -> float:
    """α of one way round the ring. Edges of a level: blocks of the level inside minus blocks of the level."""
    touched = (group.size, *group.blocks)
    return sum((touched[i] - touched[i + 1]) * level.latency_s for i, level in enumerate(cluster.levels))


def _logarithmic_s(cluster: Cluster, group: Group) -> float:
    """α of log₂ steps through every level: those inside a block of a level join its parts."""
    touched = (group.size, *group.blocks)
    return sum(math.log2(touched[i] / touched[i + 1]) * level.latency_s for i, level in enumerate(cluster.levels))


def _gather_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    transfer_s = ring_bytes_per_rank("all-gather", group.size, size_bytes) / ring_bandwidth_bytes_per_s(cluster, group)
    pat_s = _logarithmic_s(cluster, group) * PAT_STEP_FRACTION + group.size * PAT_RANK_S
    return min(_steps_s(cluster, group) + transfer_s, pat_s + transfer_s / PAT_EFFICIENCY)


def _ring_all_reduce_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    moved_bytes = ring_bytes_per_rank("all-reduce", group.size, size_bytes)
    return 2 * _steps_s(cluster, group) + moved_bytes / ring_bandwidth_bytes_per_s(cluster, group)


def _tree_all_reduce_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    """Up and down the double tree, in which every byte is sent twice."""
    transfer_s = 2 * size_bytes / (ring_bandwidth_bytes_per_s(cluster, group) * TREE_EFFICIENCY)
    return 2 * _logarithmic_s(cluster, group) + transfer_s


def _in_switch_all_reduce_s(cluster: Cluster, group: Group, size_bytes: float) -> float:
    """The innermost switch adds up what it reads from all members and writes the sum to all of them (NVLS): a member
    sends its data and one part of the sum. A tree between several switches runs at the same time; between two, every
    byte crosses once in each direction, otherwise twice."""
    inner, *outer = cluster.levels
    members = group.members[0]
    if inner.in_switch_efficiency is None or members < 2 or not group.even:
        return math.inf
    rate = bandwidth_bytes_per_s(cluster, group, 0) * inner.in_switch_efficiency
    transfer_s, latency_s = (members + 1) / members * size_bytes / rate, IN_SWITCH_S - cluster.collective_launch_s
    between_bytes = size_bytes * min(2, group.blocks[0] - 1)
    for i, level in enumerate(outer, start=1):
        if group.crosses(i):
            latency_s += 2 * math.log2(group.blocks[i - 1] / group.blocks[i]) * level.latency_s
            transfer_s = max(transfer_s, between_bytes / bandwidth_bytes_per_s(cluster, group, i))
    return max(0.0, latency_s) + transfer_s


ALL_REDUCE: dict[str, Callable[[Cluster, Group, float], float]] = {
    "ring": _ring_all_reduce_s, "tree": _tree_all_reduce_s, "in-switch": _in_switch_all_reduce_s}
