"""From the tables of a measurement to the profile: the device's facts, and the fitted scalars."""

from __future__ import annotations

import datetime
import platform

import torch

from ...cost_model.cluster import Cluster, LinkLevel, preset_cluster
from ...cost_model.machine_profile import CPU_NAME, Dtype, MachineProfile, ProfiledDevice, Tables
from ...cost_model.presets import PRESETS
from ...cost_model.profile_fit import fitted_compute, fitted_links, fitted_overlap
from ...cost_model.profile_use import device_name, planner_device
from .clock import Clock
from .measure import hardware_name, memory_bytes, transcendental_per_s


def device_facts(device: str, threads: int, tables: Tables, name: str | None = None) -> ProfiledDevice:
    """The device that this process sees. A preset keeps its data sheet's peaks, as far as they were measured."""
    hardware, memory = hardware_name(device), memory_bytes(device)
    name = name or (CPU_NAME if device == "cpu" else device_name(hardware, memory))
    known = PRESETS.get(name)
    rates: dict[Dtype, float] = {}
    for p in tables.products:
        rates[p.dtype] = max(rates.get(p.dtype, 0.0), 2 * p.batch * p.m * p.k * p.n / p.seconds)
    if known is not None:
        rates = {d: known.peak_flops_per_s.get(d, rate) for d, rate in rates.items()}
    bandwidth = known.memory_bandwidth_bytes_per_s if known is not None else max(
        p.moved_bytes / p.seconds for p in tables.streams)
    special = known.rates.transcendental_per_s if known is not None else transcendental_per_s(device, Clock(device))
    return ProfiledDevice(name=name, kind="cpu" if device == "cpu" else "gpu", hardware=hardware[:200],
                          memory_bytes=memory, threads=threads if device == "cpu" else 1, peak_flops_per_s=rates,
                          memory_bandwidth_bytes_per_s=bandwidth, transcendental_per_s=special)


def built(own: ProfiledDevice, tables: Tables, backend: str, nodes: int, ranks_per_node: int,
          writer: str) -> MachineProfile:
    """The profile of a device whose points are `tables`."""
    launch_s, links = fitted_links(measured_cluster(own, nodes, ranks_per_node), tables.collectives)
    return MachineProfile(
        made=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), writer=writer,
        torch=torch.__version__, system=f"{platform.system()} {platform.machine()}",
        backend=backend if tables.collectives else "none",  # type: ignore[arg-type]
        nodes=nodes, ranks_per_node=ranks_per_node, device=own, compute=fitted_compute(own, tables),
        collective_launch_s=launch_s, links=links, overlap_loss=fitted_overlap(tables.overlap), tables=tables)


def measured_cluster(own: ProfiledDevice, nodes: int, ranks_per_node: int) -> Cluster:
    """The ranks of a measurement, with the device's usual links where there is a preset, at most two levels of them."""
    if own.name in PRESETS:
        found = preset_cluster(own.name, nodes, ranks_per_node)
        if len(found.levels) <= 2:
            return found
        device, levels = found.device, found.levels[:2]
    else:
        device, levels = planner_device(own), (LinkLevel("inner", 1e-5, 1e10, ranks_per_node),)
    network = levels[1] if len(levels) > 1 else LinkLevel("network", 1e-5, 1e10, 1, ranks_per_node)
    wider = nodes * ranks_per_node
    outer = () if levels[0].group_size == wider else (LinkLevel(
        network.name, network.latency_s, network.bandwidth_bytes_per_s, wider, network.nics_per_node,
        network.efficiency),)
    return Cluster(f"{nodes}x{ranks_per_node} {own.name}", device, nodes, ranks_per_node, (levels[0], *outer))
