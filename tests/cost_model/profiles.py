"""Profiles for tests: points made from planted scalars by the planner's own functions, so that a fit can find them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshwright.cost_model.calibration import Calibration, committed_software
from meshwright.cost_model.cluster import Cluster, LinkLevel
from meshwright.cost_model.machine_profile import (
    AttentionPoint,
    CollectivePoint,
    Dtype,
    MachineProfile,
    OverheadPoint,
    OverlapPoint,
    ProductPoint,
    ProfiledDevice,
    StreamPoint,
    Tables,
)
from meshwright.cost_model.op_price import Rates
from meshwright.cost_model.profile_fit import (
    attention_s,
    collective_s,
    fitted_compute,
    fitted_links,
    fitted_overlap,
)
from meshwright.cost_model.profile_use import planner_device
from meshwright.cost_model.strategy import Training

PLANTED = Calibration("planted", gemm_efficiency=0.8, gemm_depth_knee=40.0, gemm_area_knee=2e4,
                      attention_efficiency=0.3, memory_efficiency=0.7, kernel_s=4e-6)
BACKWARD, LAUNCH_S, ALPHA_S, RATE = 0.9, 3e-5, 6e-5, 2e9
SHAPES = ((1, 64, 64, 64), (1, 256, 256, 1024), (1, 512, 768, 3072), (1, 1024, 16, 1024), (8, 128, 64, 128),
          (1, 32, 4096, 32), (1, 2048, 1024, 1024), (1, 64, 2048, 512))
CPU = ProfiledDevice(name="cpu", kind="cpu", hardware="Planted CPU", memory_bytes=8e9, threads=1,
                     peak_flops_per_s={"float32": 1e11, "bfloat16": 4e11}, memory_bandwidth_bytes_per_s=2e10,
                     transcendental_per_s=1e9)
GPU = ProfiledDevice(name="h100-sxm", kind="gpu", hardware="NVIDIA H100 80GB HBM3", memory_bytes=85e9,
                     peak_flops_per_s={"bfloat16": 989.4e12}, memory_bandwidth_bytes_per_s=3350e9,
                     transcendental_per_s=4e12)


def linked(nodes: int, ranks: int) -> Cluster:
    """A cluster with the planted links; the network is a third as fast."""
    levels = [LinkLevel("inner", ALPHA_S, RATE, ranks)]
    if nodes > 1:
        levels.append(LinkLevel("network", 2 * ALPHA_S, RATE / 3, nodes * ranks, ranks))
    return Cluster("planted", planner_device(CPU), nodes, ranks, tuple(levels), collective_launch_s=LAUNCH_S)


def tables(device: ProfiledDevice, processes: int, nodes: int = 1, slower: float = 1.0) -> Tables:
    """Points of one number of processes, `slower` times as slow; collectives where there are several."""
    products, attention = [], []
    for dtype in device.peak_flops_per_s:
        rates = Rates(planner_device(device), PLANTED, replace(committed_software(), attention_backward=BACKWARD),
                      Training(compute=dtype))
        products += [ProductPoint(processes=processes, dtype=dtype, batch=b, m=m, k=k, n=n,
                                  seconds=slower * rates.product_s(b, m, k, n)) for b, m, k, n in SHAPES]
        attention += [_attention(rates, dtype, processes, seq, backward) for seq in (64, 256, 1024)
                      for backward in (False, True)]
    rate = device.memory_bandwidth_bytes_per_s * PLANTED.memory_efficiency
    streams = [StreamPoint(processes=processes, operator="add", moved_bytes=size,
                           seconds=slower * size / rate + PLANTED.kernel_s) for size in (10**6, 10**7, 10**8)]
    overheads = [OverheadPoint(processes=processes, what=what, seconds=PLANTED.kernel_s)
                 for what in ("kernel", "operator")]  # type: ignore[arg-type]
    return Tables(products=tuple(products), streams=tuple(streams), attention=tuple(attention),
                  overheads=tuple(overheads), collectives=collectives(nodes, processes),
                  overlap=(OverlapPoint(ranks=processes, size_bytes=1 << 20, compute_s=0.03, communication_s=0.02,
                                        together_s=0.035),) if nodes * processes > 1 else ())


def _attention(rates: Rates, dtype: Dtype, processes: int, seq: int, backward: bool) -> AttentionPoint:
    empty = AttentionPoint(processes=processes, dtype=dtype, batch=2, heads=8, seq=seq, head_size=64, backward=backward,
                           seconds=1.0)
    return empty.model_copy(update={"seconds": attention_s(rates, empty)})


def collectives(nodes: int, ranks: int) -> tuple[CollectivePoint, ...]:
    found = []
    for level, size in (("inner", ranks), ("network", nodes * ranks)):
        if size == 1 or (level == "network" and nodes == 1):
            continue
        cluster = linked(1, ranks) if level == "inner" else linked(nodes, ranks)
        for name in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "point-to-point"):
            for size_bytes in (1 << 10, 1 << 16, 1 << 20, 1 << 24):
                empty = CollectivePoint(level=level, collective=name, ranks=size,  # type: ignore[arg-type]
                                        size_bytes=size_bytes, seconds=1.0)
                found.append(empty.model_copy(update={"seconds": collective_s(cluster, empty)}))
    return tuple(found)


def profile(device: ProfiledDevice = CPU, processes: int = 2, nodes: int = 1, **changed: Any) -> MachineProfile:
    """A profile as `meshwright profile` would write it from the planted points."""
    own = tables(device, processes, nodes)
    launch_s, links = fitted_links(linked(nodes, processes), own.collectives)
    fields: dict[str, Any] = dict(
        made="2026-12-01T00:00:00+00:00", writer="0", torch="2.0", system="Linux x86_64",
        backend="gloo" if own.collectives else "none", nodes=nodes, ranks_per_node=processes, device=device,
        compute=fitted_compute(device, own), collective_launch_s=launch_s, links=links,
        overlap_loss=fitted_overlap(own.overlap), tables=own)
    return MachineProfile(**{**fields, **changed})
