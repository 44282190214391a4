"""The cost model's collectives against measured ones, fitted on one half of the points and tested on the other.

    python benchmarks/collectives_vs_measured.py            also writes benchmarks/results/collectives_vs_measured.json
    python benchmarks/collectives_vs_measured.py --quick    prints only

The measurements are the hardware profiles that Galvatron ships (PKU-DAIR/Hetu-Galvatron, revision cea12ff,
Apache-2.0; copies in tests/cost_model/data/galvatron/hardware): times of all-reduce and all-to-all over 2, 4 and 8
GPUs of one node by message size, and bus bandwidths over two nodes. The files name neither the GPUs nor the network,
so link speeds are fitted too and no preset is tested here, only the formulas. Fitted in a node: launch, α and
bandwidth of the link (three numbers, least squares of the relative error). Between nodes: the bandwidth of a NIC, and
how many a node has (1, 2, 4 or 8). Nothing is fitted on the all-to-all: it is a collective that the fit never saw.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import numpy as np  # noqa: E402

from benchmarks._harness import RESULTS, print_table  # noqa: E402
from meshwright.cost_model.cluster import Cluster, LinkLevel  # noqa: E402
from meshwright.cost_model.collectives import (  # noqa: E402
    COLLECTIVES,
    point_to_point_s,
    ring_bandwidth_bytes_per_s,
    ring_bytes_per_rank,
)
from meshwright.cost_model.group import Group  # noqa: E402

DATA = ROOT / "tests" / "cost_model" / "data" / "galvatron" / "hardware"
MIB = 2**20
MESSAGES_MB = tuple(2**i for i in range(11))
DEGREES = (2, 4, 8)
LARGE_BYTES = 2**40  # bus bandwidths are asymptotes: messages so large that latency vanishes


@dataclass(frozen=True)
class Point:
    """A measured collective in one node."""

    collective: str
    size: int
    message_mb: int
    seconds: float


@dataclass(frozen=True)
class Rate:
    """A measured bus bandwidth over two nodes of eight: all-reduce over `size` GPUs with `stride`, or a pipeline's
    neighbours."""

    collective: str
    size: int
    stride: int
    bytes_per_s: float


@dataclass(frozen=True)
class Score:
    """Relative errors (predicted / measured − 1) of the points that a fit did not see."""

    what: str
    fitted: int
    errors: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        sizes = sorted(abs(e) for e in self.errors)
        return {"what": self.what, "fitted_points": self.fitted, "tested_points": len(sizes),
                "median_error": statistics.median(sizes), "p90_error": float(np.quantile(sizes, 0.9)),
                "worst_error": sizes[-1], "mean_signed_error": statistics.fmean(self.errors)}


def measured_points() -> list[Point]:
    table = json.loads((DATA / "sp_time_1nodes_8gpus_per_node.json").read_text())
    return [Point(ours, n, mb, table[f"{theirs}_size_{n}_{mb}MB_time"] * 1e-3)
            for ours, theirs in (("all-reduce", "allreduce"), ("all-to-all", "all2all"))
            for n in DEGREES for mb in MESSAGES_MB]


def measured_rates() -> list[Rate]:
    """What crosses nodes. `consec_0`: the group's ranks are 16/size apart; their GB/s are MB per ms in its own use."""
    reduce = json.loads((DATA / "allreduce_bandwidth_2nodes_8gpus_per_node.json").read_text())
    send = json.loads((DATA / "p2p_bandwidth_2nodes_8gpus_per_node.json").read_text())
    found = [Rate("all-reduce", 16, 1, reduce["allreduce_size_16_consec_1"] * MIB * 1e3)]
    found += [Rate("all-reduce", n, 16 // n, reduce[f"allreduce_size_{n}_consec_0"] * MIB * 1e3) for n in DEGREES]
    return found + [Rate("point-to-point", n, 16 // n, send[f"pp_size_{n}"] * MIB * 1e3) for n in (2, 4, 8, 16)]


def predict_s(cluster: Cluster, point: Point) -> float:
    return COLLECTIVES[point.collective](cluster, Group.contiguous(cluster, point.size), point.message_mb * MIB)


def fit_node(points: Sequence[Point]) -> Cluster:
    """One node whose launch, α and bandwidth fit all-reduces best: a ring's time is linear in launch, α, 1/bandwidth.
    Numbers that would be negative are held at (nearly) zero."""
    rows = np.array([[1.0, 2 * (p.size - 1), ring_bytes_per_rank("all-reduce", p.size, p.message_mb * MIB)]
                     for p in points])
    seconds = np.array([p.seconds for p in points])
    free = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(rows[:, free] / seconds[:, None], np.ones(len(points)), rcond=None)[0]
        if (found > 0).all():
            break
        free.pop(int(found.argmin()))
    launch_s, alpha_s, per_byte_s = (max([*found[[i == j for j in free]], 1e-12]) for i in range(3))
    level = LinkLevel("fitted", float(alpha_s), float(1 / per_byte_s), 8)
    return replace(Cluster.parse("1x8 a100-80"), levels=(level,), collective_launch_s=float(launch_s))


def two_nodes(node: Cluster, nic_bytes_per_s: float, nics: int) -> Cluster:
    inner = node.levels[0]
    rate = min(nic_bytes_per_s, inner.bandwidth_bytes_per_s)
    return replace(node, nodes=2, levels=(inner, LinkLevel("network", max(1e-5, inner.latency_s), rate, 16, nics)))


def predict_rate(cluster: Cluster, rate: Rate) -> float:
    order = ("below", "group", "above")
    sizes = dict(zip(order, (rate.stride, rate.size, 16 // rate.stride // rate.size), strict=True))
    group = Group.of(cluster, sizes, order, "group")
    if rate.collective == "all-reduce":
        return ring_bandwidth_bytes_per_s(cluster, group)
    return LARGE_BYTES / point_to_point_s(cluster, group, LARGE_BYTES)


def fit_network(node: Cluster, rates: Sequence[Rate]) -> tuple[Cluster, float]:
    """Two nodes with the NIC count and bandwidth of the least mean error on `rates`, and that error. The bandwidth is
    searched on a grid of 1 %."""
    grid = [1e9 * 1.01**i for i in range(500)]
    tried = [two_nodes(node, rate, nics) for nics in (1, 2, 4, 8) for rate in grid]
    scored = [(statistics.fmean(abs(predict_rate(c, r) / r.bytes_per_s - 1) for r in rates), i)
              for i, c in enumerate(tried)]
    error, best = min(scored)
    return tried[best], error


def score(what: str, fit: Sequence[Point], test: Sequence[Point]) -> Score:
    cluster = fit_node(fit)
    return Score(what, len(fit), tuple(predict_s(cluster, p) / p.seconds - 1 for p in test))


def node_scores() -> list[Score]:
    points = measured_points()
    reduce = [p for p in points if p.collective == "all-reduce"]
    half = [p for p in reduce if MESSAGES_MB.index(p.message_mb) % 2 == 0]
    rest = [p for p in reduce if p not in half]
    unseen = [p for p in points if p.collective == "all-to-all"]
    large: Callable[[Point], bool] = lambda p: p.message_mb >= 16  # noqa: E731
    return [score("all-reduce, the other half of the message sizes", half, rest),
            score("the same, messages of at least 16 MiB", half, [p for p in rest if large(p)]),
            *(score(f"all-reduce over {n} GPUs, fitted on the other group sizes",
                    [p for p in reduce if p.size != n], [p for p in reduce if p.size == n]) for n in DEGREES),
            score("all-to-all, never fitted", half, unseen),
            score("the same, messages of at least 16 MiB", half, [p for p in unseen if large(p)])]


def network_scores() -> tuple[list[Score], Cluster]:
    node = fit_node([p for p in measured_points() if p.collective == "all-reduce"])
    rates = measured_rates()
    half, rest = rates[::2], rates[1::2]
    found = []
    for fit, test in ((half, rest), (rest, half)):
        cluster, _ = fit_network(node, fit)
        errors = tuple(predict_rate(cluster, r) / r.bytes_per_s - 1 for r in test)
        names = ", ".join(f"{r.collective} {r.size}" for r in test)
        found.append(Score(f"two nodes: bandwidth of {names}", len(fit), errors))
    return found, fit_network(node, rates)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="print only")
    quick = parser.parse_args().quick
    between, network = network_scores()
    scores = [s.as_dict() for s in (*node_scores(), *between)]
    print_table("relative error of points that the fit did not see", ["points", "fitted", "tested", "median", "90 %",
                                                                     "worst", "mean signed"],
                [[s["what"], s["fitted_points"], s["tested_points"], *(f"{s[k]:.1%}" for k in (
                    "median_error", "p90_error", "worst_error", "mean_signed_error"))] for s in scores])
    rows = [{"collective": r.collective, "size": r.size, "stride": r.stride, "measured_bytes_per_s": r.bytes_per_s,
             "predicted_bytes_per_s": predict_rate(network, r)} for r in measured_rates()]
    print_table("two nodes, fitted on all eight points, GB/s",
                ["collective", "GPUs", "stride", "measured", "predicted"],
                [[r["collective"], r["size"], r["stride"], r["measured_bytes_per_s"] / 1e9,
                  r["predicted_bytes_per_s"] / 1e9] for r in rows])
    inner, nic = network.levels
    fitted = {"launch_s": network.collective_launch_s, "alpha_s": inner.latency_s,
              "bandwidth_bytes_per_s": inner.bandwidth_bytes_per_s, "nics_per_node": nic.nics_per_node,
              "nic_bandwidth_bytes_per_s": nic.bandwidth_bytes_per_s}
    print("fitted on all points:", json.dumps(fitted))
    if not quick:
        path = RESULTS / "collectives_vs_measured.json"
        path.write_text(json.dumps({"benchmark": "collectives_vs_measured", "scores": scores, "fitted_on_all": fitted,
                                    "two_nodes_fitted_on_all": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
