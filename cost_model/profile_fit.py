"""From measured points to the scalars of a profile: fitted through the very functions that the planner prices with, so
that their error beside each scalar is the planner's own.

Scalars minimise the mean of |log(predicted / measured)|, by a compass search in the logarithms: deterministic, no
derivatives, and one bad point moves nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .calibration import Calibration, Software, committed_software
from .cluster import Cluster
from .collectives import COLLECTIVES
from .group import Group
from .machine_profile import (
    Attention,
    AttentionPoint,
    CollectivePoint,
    Compute,
    Level,
    Link,
    OverlapPoint,
    ProductPoint,
    Products,
    ProfiledDevice,
    StreamPoint,
    Tables,
)
from .op_price import ELEMENT_BYTES, Rates
from .profile_use import no_faster_outside, planner_device
from .strategy import Training

BACKWARD_FLOPS = 2.5  # five products where the forward pass has two
START_STEP, LAST_STEP = 1.0, 1e-3  # of a logarithm
MOST_EVALUATIONS = 4000


def fitted_compute(device: ProfiledDevice, tables: Tables) -> tuple[Compute, ...]:
    """A column for every number of processes in the tables."""
    counts = sorted({p.processes for p in tables.products})
    return tuple(_compute(device, tables, count) for count in counts)


def _compute(device: ProfiledDevice, tables: Tables, processes: int) -> Compute:
    overheads = {p.what: p.seconds for p in tables.overheads if p.processes == processes}
    kernel_s, eager_op_s = overheads["kernel"], overheads["operator"]
    usual = Calibration(device.name, kernel_s=kernel_s)
    streams = [p for p in tables.streams if p.processes == processes]
    efficiency, memory_error = _memory(device, usual, streams)
    usual = replace(usual, memory_efficiency=efficiency)
    products, attention = {}, {}
    for dtype in dict.fromkeys(p.dtype for p in tables.products if p.processes == processes):
        own = [p for p in tables.products if p.processes == processes and p.dtype == dtype]
        products[dtype] = _products(Rates(planner_device(device), usual, Software(), Training(compute=dtype)), own)
        points = [p for p in tables.attention if p.processes == processes and p.dtype == dtype]
        if points:
            attention[dtype] = _attention(Rates(planner_device(device), usual, committed_software(),
                                                Training(compute=dtype)), points)
    return Compute(processes=processes, products=products, attention=attention, memory_efficiency=efficiency,
                   memory_median_error=memory_error, kernel_s=kernel_s, eager_op_s=eager_op_s)


def _memory(device: ProfiledDevice, usual: Calibration, points: Sequence[StreamPoint]) -> tuple[float, float]:
    """Efficiency of the usual mixture of operators over the device's bandwidth, and its median error."""
    bandwidth = device.memory_bandwidth_bytes_per_s
    shares = [p.moved_bytes / max(p.seconds - usual.kernel_s, p.seconds / 10) / bandwidth for p in points]
    efficiency = min(1.0, math.exp(statistics.fmean(map(math.log, shares))))
    predicted = [p.moved_bytes / (bandwidth * efficiency) + usual.kernel_s for p in points]
    return efficiency, median_error(predicted, [p.seconds for p in points])


def _products(rates: Rates, points: Sequence[ProductPoint]) -> Products:
    measured = [p.seconds for p in points]

    def predict(x: Sequence[float]) -> list[float]:
        own = replace(rates, calibration=replace(rates.calibration, gemm_efficiency=min(1.0, math.exp(x[0])),
                                                 gemm_depth_knee=math.exp(x[1]), gemm_area_knee=math.exp(x[2])))
        return [own.product_s(p.batch, p.m, p.k, p.n) for p in points]

    peak = rates.device.peak(rates.training.compute)
    best = max(2 * p.batch * p.m * p.k * p.n / p.seconds for p in points)
    starts = [(math.log(min(1.0, best / peak)), math.log(depth), math.log(area))
              for depth in (1, 30, 300) for area in (1e2, 1e4, 1e6)]
    x = minimise(lambda v: mean_log_error(predict(v), measured), starts)
    return Products(efficiency=min(1.0, math.exp(x[0])), depth_knee=min(1e6, math.exp(x[1])),
                    area_knee=min(1e12, math.exp(x[2])), median_error=median_error(predict(x), measured))


def _attention(rates: Rates, points: Sequence[AttentionPoint]) -> Attention:
    measured = [p.seconds for p in points]
    kernel = rates.software.attention_backwards.get(rates.training.attention_kernel, 1.0)

    def predict(x: Sequence[float]) -> list[float]:
        own = replace(rates, calibration=replace(rates.calibration, attention_efficiency=min(1.0, math.exp(x[0]))),
                      software=replace(rates.software, attention_backward=math.exp(x[1]) / kernel))
        return [attention_s(own, p) for p in points]

    starts = [(math.log(efficiency), 0.0) for efficiency in (0.05, 0.3, 0.8)]
    x = minimise(lambda v: mean_log_error(predict(v), measured), starts)
    return Attention(efficiency=min(1.0, math.exp(x[0])), backward=min(1e3, max(1e-3, math.exp(x[1]) / kernel)),
                     median_error=median_error(predict(x), measured))


def attention_s(rates: Rates, point: AttentionPoint) -> float:
    """The planner's seconds of that attention."""
    rows = point.batch * point.heads * point.seq
    flops = 4 * rows * point.seq * point.head_size * (BACKWARD_FLOPS if point.backward else 1)
    tensors = 8 if point.backward else 4  # q, k, v, out; backward also their gradients
    moved = tensors * rows * point.head_size * ELEMENT_BYTES[point.dtype]
    return rates.attention_s(rows * point.seq, point.head_size, flops, moved, backward=point.backward)


# -- links ----------------------------------------------------------------------------------------
def fitted_links(cluster: Cluster, points: Sequence[CollectivePoint]) -> tuple[float | None, tuple[Link, ...]]:
    """Seconds of a collective's launch, and the levels measured. `cluster`: nodes and ranks of the measurement; its own
    links stand in for what was not measured. Inner links first: what crosses nodes also passes them."""
    found: list[Link] = []
    launch_s: float | None = None
    for level in ("inner", "network"):
        own = [p for p in points if p.level == level]
        if not own:
            continue
        cluster, launch_s, link = _link(cluster, level, own, launch_s)  # type: ignore[arg-type]
        found.append(link)
    return launch_s, tuple(found)


def _link(cluster: Cluster, level: Level, points: Sequence[CollectivePoint],
          launch_s: float | None) -> tuple[Cluster, float, Link]:
    measured, index = [p.seconds for p in points], min(level == "network", len(cluster.levels) - 1)

    def changed(x: Sequence[float]) -> Cluster:
        latency_s, rate = math.exp(x[0]), math.exp(x[1])
        levels = list(cluster.levels)
        levels[index] = replace(levels[index], latency_s=latency_s, bandwidth_bytes_per_s=rate, efficiency=1.0)
        return replace(cluster, levels=no_faster_outside(levels),
                       collective_launch_s=math.exp(x[2]) if launch_s is None else launch_s)

    def predict(x: Sequence[float]) -> list[float]:
        own = changed(x)
        return [collective_s(own, p) for p in points]

    fastest = min(measured)
    rate = max(p.size_bytes / p.seconds for p in points)
    starts = [(math.log(fastest * share), math.log(rate * more), math.log(fastest * (1.01 - share)))
              for share in (0.1, 0.5, 0.9) for more in (0.5, 1.5)]
    x = minimise(lambda v: mean_log_error(predict(v), measured), [s if launch_s is None else s[:2] for s in starts])
    own = changed(x)
    reached = own.levels[index]
    return own, own.collective_launch_s, Link(
        level=level, ranks=max(p.ranks for p in points), nics_per_node=reached.nics_per_node,
        latency_s=_within(reached.latency_s, 1e-9, 1.0), bandwidth_bytes_per_s=reached.effective_bytes_per_s,
        median_error=median_error(predict(x), measured))


def collective_s(cluster: Cluster, point: CollectivePoint) -> float:
    """The planner's seconds of that collective."""
    neighbours = 2 if point.collective == "point-to-point" and cluster.gpus % 2 == 0 else point.ranks
    if point.collective == "point-to-point" and point.level == "network":
        group = Group.of(cluster, {"rank": cluster.gpus_per_node, "node": cluster.nodes}, ("rank", "node"), "node")
    else:
        group = Group.contiguous(cluster, neighbours)
    return COLLECTIVES[point.collective](cluster, group, point.size_bytes)


def fitted_overlap(points: Sequence[OverlapPoint]) -> float | None:
    """The part of communication that is added to computation beside it, though the computation is long enough: the
    median of (together - what would be exposed anyway) / communication."""
    if not points:
        return None
    losses = [(p.together_s - max(p.compute_s, p.communication_s)) / min(p.compute_s, p.communication_s)
              for p in points]
    return min(1.0, max(0.0, statistics.median(losses)))


# -- numbers --------------------------------------------------------------------------------------
def mean_log_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean of |log(predicted / measured)|."""
    return statistics.fmean(abs(math.log(p / m)) for p, m in zip(predicted, measured, strict=True))


def median_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Median of |predicted / measured - 1|."""
    return statistics.median(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))


def minimise(cost: Callable[[Sequence[float]], float], starts: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """The best of compass searches from `starts`: steps along each axis, halved when none is better."""
    return min((_compass(cost, tuple(s)) for s in starts), key=lambda found: found[0])[1]


def _compass(cost: Callable[[Sequence[float]], float], x: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
    best, step, tried = cost(x), START_STEP, 0
    while step > LAST_STEP and tried < MOST_EVALUATIONS:
        moved = False
        for axis in range(len(x)):
            for sign in (1.0, -1.0):
                other = (*x[:axis], min(40.0, max(-40.0, x[axis] + sign * step)), *x[axis + 1:])
                value, tried = cost(other), tried + 1
                if value < best - 1e-12:
                    best, x, moved = value, other, True
        step = step if moved else step / 2
    return best, x


def _within(value: float, least: float, most: float) -> float:
    return min(most, max(least, value))
