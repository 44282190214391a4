"""A measured profile in the place of presets: the cluster, calibration and software that the planner then reads.

What was measured counts, also where a cluster file says otherwise; what was not (links that no profile saw, the slow-
down of overlap, coefficients of software) stays. A level's measured bandwidth is what collectives reach, so the
calibration has no efficiency of its own to take off it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .calibration import Calibration, Software, calibration_for, committed_software
from .cluster import LINKS_OF_FILE, Cluster, LinkLevel, cpu_levels, size_and_device
from .device import Device, ElementRates, MemoryLevel
from .link_presets import LINKS, NIC_EFFICIENCY
from .machine_profile import CPU_NAME, Compute, Dtype, Link, MachineProfile, MachineProfileError, ProfiledDevice
from .presets import PRESETS

FALLBACK: tuple[Dtype, ...] = ("bfloat16", "float32", "float16", "tfloat32")


@dataclass(frozen=True)
class Profiled:
    """What a profile makes of a cluster. `facts`: for a plan's fingerprint; `doubts`: where the plan goes beyond what
    was measured."""

    cluster: Cluster
    calibration: Calibration
    software: Software
    facts: Mapping[str, str | float]
    doubts: tuple[str, ...] = ()


def use_profile(profile: MachineProfile, cluster: Cluster, dtype: str, digest: str = "") -> Profiled:
    """`cluster` with the measured numbers, for products of `dtype`. `digest` names the file's content. Raises
    `MachineProfileError` for a profile of another device, `ClusterError` for links that can't be together."""
    own = profile.device
    if not _same_device(profile, cluster):
        raise MachineProfileError(f"the profile is of {own.name} ({own.hardware}), the cluster of "
                                  f"{cluster.device.name}; expected a profile of the cluster's device")
    compute = compute_for(profile, cluster.gpus_per_node)
    measured = _cluster(profile, cluster)
    calibration, software = _scalars(profile, compute, measured, dtype)
    facts: dict[str, str | float] = {"profiled": f"{profile.made} on {own.hardware}", "torch": profile.torch}
    if digest:
        facts["profile"] = digest
    facts.update(eager_op_s=compute.eager_op_s, attention_backward=software.attention_backward)
    return Profiled(measured, calibration, software, facts, tuple(_doubts(profile, compute, measured, dtype)))


def profiled_cluster(profile: MachineProfile, description: str) -> Cluster | None:
    """The cluster that `"2x8 name"` describes where `name` is a profiled device without a preset, else None. Raises
    `MachineProfileError` where the profile lacks links that it would need."""
    found = size_and_device(description)
    if found is None or profile.device.kind != "gpu" or profile.device.name in PRESETS:
        return None
    nodes, gpus_per_node, name = found
    if name.lower() != profile.device.name:
        return None
    needed = [level for level, wanted in (("inner", gpus_per_node > 1), ("network", nodes > 1)) if wanted]
    missing = [level for level in needed if profile.link(level) is None]  # type: ignore[arg-type]
    if missing:
        where = " and ".join({"inner": "inside a node", "network": "between nodes"}[m] for m in missing)
        raise MachineProfileError(f"the profile of {name} has no links {where}; expected one measured with several "
                                  "ranks there")
    alone = Link(level="inner", ranks=1, latency_s=1e-6, bandwidth_bytes_per_s=1e12, median_error=0.0)  # not used
    inner = profile.link("inner") or alone
    levels = [LinkLevel("inner", inner.latency_s, inner.bandwidth_bytes_per_s, gpus_per_node)]
    network = profile.link("network")
    if network is not None and nodes > 1:
        levels.append(LinkLevel("network", max(network.latency_s, inner.latency_s),
                                min(network.bandwidth_bytes_per_s, inner.bandwidth_bytes_per_s), nodes * gpus_per_node,
                                network.nics_per_node or gpus_per_node))
    return Cluster(description, _device(profile, 1), nodes, gpus_per_node, tuple(levels), source="the profile")


def compute_for(profile: MachineProfile, processes: int) -> Compute:
    """The measured column for `processes` on a node: of the most processes that are not more, else of the fewest."""
    fewer = [c for c in profile.compute if c.processes <= processes]
    return fewer[-1] if fewer else profile.compute[0]


def _same_device(profile: MachineProfile, cluster: Cluster) -> bool:
    if profile.device.name == CPU_NAME:
        return cluster.device.kind == "cpu"
    return profile.device.name == cluster.device.name


def planner_device(own: ProfiledDevice, processes: int = 1, kernel_s: float = 1e-6, eager_op_s: float = 1e-6) -> Device:
    """The device as the planner reads it, one of `processes` on a node. Rates that it does not read follow from the
    peak, as in `presets.py`."""
    memory_bytes = own.memory_bytes / processes if own.kind == "cpu" else own.memory_bytes
    rate = own.memory_bandwidth_bytes_per_s
    peaks: dict[str, float] = {str(dtype): rate for dtype, rate in own.peak_flops_per_s.items()}
    peaks.setdefault("float32", min(peaks.values()))
    simple = peaks["float32"] / 4
    rates = ElementRates(simple, own.transcendental_per_s, own.transcendental_per_s, simple, simple)
    return Device(own.name if own.kind == "gpu" else own.hardware, own.kind, peaks,
                  (MemoryLevel(math.inf, rate, rate),), rates, eager_op_s, eager_op_s, kernel_s,
                  threads=own.threads, memory_bytes=memory_bytes)


def _device(profile: MachineProfile, processes: int) -> Device:
    compute = compute_for(profile, processes)
    return planner_device(profile.device, processes, compute.kernel_s, compute.eager_op_s)


def _cluster(profile: MachineProfile, cluster: Cluster) -> Cluster:
    device = _device(profile, cluster.gpus_per_node)
    if cluster.device.kind == "gpu":  # what the profile does not measure is the preset's
        device = replace(cluster.device, memory_bytes=device.memory_bytes, peak_flops_per_s={
            **cluster.device.peak_flops_per_s, **device.peak_flops_per_s}, levels=(
                *cluster.device.levels[:-1], device.levels[-1]))
    levels = cluster.levels
    if device.kind == "cpu" and cluster.source != LINKS_OF_FILE:  # not by what this CPU does at the moment
        levels = cpu_levels(device.memory_bandwidth_bytes_per_s, cluster.nodes, cluster.gpus_per_node)
    launch_s = profile.collective_launch_s or cluster.collective_launch_s
    return replace(cluster, device=device, levels=_levels(profile, levels), collective_launch_s=launch_s,
                   source=f"{cluster.source}; measured where {profile.device.hardware} was profiled")


def _levels(profile: MachineProfile, levels: tuple[LinkLevel, ...]) -> tuple[LinkLevel, ...]:
    """Measured links in the place of others. Clusters demand that outer levels are no faster."""
    inner, network = profile.link("inner"), profile.link("network")
    found = [_reached(levels[0], inner) if inner else levels[0]]
    for number, level in enumerate(levels[1:]):
        if network:
            more_s = level.latency_s - levels[1].latency_s if number else 0.0  # a spine is further away than a leaf
            level = _reached(level, network, more_s)
        found.append(level)
    return no_faster_outside(found)


def no_faster_outside(levels: Sequence[LinkLevel]) -> tuple[LinkLevel, ...]:
    """The levels, none with more bandwidth or less latency than the one inside of it."""
    found = [levels[0]]
    for level in levels[1:]:
        before = found[-1]
        most = before.effective_bytes_per_s / level.bandwidth_bytes_per_s * (1 - 1e-12)  # also after rounding
        found.append(replace(level, latency_s=max(level.latency_s, before.latency_s),
                             efficiency=min(level.efficiency, most)))
    return tuple(found)


def _reached(level: LinkLevel, link: Link, more_s: float = 0.0) -> LinkLevel:
    """The level with alpha and bandwidth as measured; the port stays what it was where it can."""
    nics = level.nics_per_node if level.nics_per_node is None else link.nics_per_node or level.nics_per_node
    port = max(level.bandwidth_bytes_per_s, link.bandwidth_bytes_per_s)
    return replace(level, latency_s=link.latency_s + more_s, bandwidth_bytes_per_s=port, nics_per_node=nics,
                   efficiency=link.bandwidth_bytes_per_s / port)


def _scalars(profile: MachineProfile, compute: Compute, cluster: Cluster, dtype: str) -> tuple[Calibration, Software]:
    name = cluster.device.name
    usual, software = calibration_for(name), replace(committed_software(), eager_op_s=compute.eager_op_s)
    products = compute.products[_known(dtype, compute.products)]
    changed: dict[str, float] = {}
    if compute.attention:
        attention = compute.attention[_known(dtype, compute.attention)]
        changed["attention_efficiency"] = attention.efficiency
        software = replace(software, attention_backward=attention.backward)
    if profile.overlap_loss is not None:
        changed["overlap_loss"] = profile.overlap_loss
    links = LINKS.get(name)
    if profile.link("inner") is not None:  # `Calibration.cluster` then leaves the measured level as it is
        changed["inner_efficiency"] = links.inner_efficiency if links else cluster.levels[0].efficiency
        changed["latency_factor"] = 1.0
    if profile.link("network") is not None:
        changed["network_efficiency"] = NIC_EFFICIENCY
    return replace(usual, device=name, gemm_efficiency=products.efficiency, gemm_depth_knee=products.depth_knee,
                   gemm_area_knee=products.area_knee, memory_efficiency=compute.memory_efficiency,
                   kernel_s=compute.kernel_s, **changed), software


def _known(dtype: str, measured: Mapping[Dtype, object]) -> Dtype:
    wanted = [d for d in FALLBACK if d == dtype]
    return next(d for d in (*wanted, *FALLBACK) if d in measured)


def _doubts(profile: MachineProfile, compute: Compute, cluster: Cluster, dtype: str) -> list[str]:
    found = []
    if dtype not in compute.products:
        found.append(f"the profile has no {dtype} products: those of {_known(dtype, compute.products)} stand in")
    if cluster.gpus_per_node > compute.processes and cluster.device.kind == "cpu":
        found.append(f"{cluster.gpus_per_node} processes share the CPU, the profile measured {compute.processes}")
    inner, network = profile.link("inner"), profile.link("network")
    if cluster.gpus_per_node > 1 and inner is None:
        found.append("the profile has no links inside a node: the preset's stand in")
    elif inner is not None and inner.ranks < cluster.gpus_per_node:
        found.append(f"links were measured with {inner.ranks} ranks, a node of the cluster has {cluster.gpus_per_node}")
    if cluster.nodes > 1 and network is None:
        found.append("the profile has no links between nodes: the preset's stand in")
    return found


def device_name(hardware: str, memory_bytes: float) -> str:
    """The preset of a GPU that torch calls `hardware`, else a name made from that."""
    text, large = hardware.lower(), memory_bytes > 60e9
    for pattern, name in _KNOWN_GPUS:
        if re.search(pattern, text):
            name = name if name != "a100" else "a100-80" if large else "a100-40"
            return name if name in PRESETS else _slug(text)
    return _slug(text)


_KNOWN_GPUS = ((r"\bgb300\b", "gb300"), (r"\bgb200\b", "gb200"), (r"\bb300\b", "b300"), (r"\bb200\b", "b200"),
               (r"\bh200\b", "h200"), (r"\bh100 pcie\b", "h100-pcie"), (r"\bh100 80gb hbm3\b", "h100-sxm"),
               (r"\ba100[- ]", "a100"), (r"\bv100[- ]sxm2", "v100"), (r"\brtx 4090$", "rtx-4090"))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:80] or "gpu"
