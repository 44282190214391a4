"""`Cluster`: equal GPUs in equal nodes and the links between them. `Cluster.parse("8x8 h100-sxm")` fills it from
presets (`presets.py`, `link_presets.py`), `cluster_file.read_cluster` from a file. No number of it grows with the
cluster.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
from dataclasses import dataclass, replace
from typing import Any

from .device import Device
from .link_presets import (
    COLLECTIVE_LAUNCH_S,
    LINKS,
    NIC_EFFICIENCY,
    NIC_LATENCY_S,
    NODES_PER_LEAF,
    SPINE_LATENCY_S,
    LinkPreset,
    cpu_links,
)
from .presets import PRESETS

MAX_GPUS = 1 << 24
CPU = "cpu"
LINKS_OF_FILE = "the cluster file gives the links"  # `Cluster.source` of a file that lists its own
_TEXT = re.compile(r"\s*(\d{1,9})\s*[x×]\s*(\d{1,9})\s+(\S+)\s*", re.IGNORECASE)
_EXPECTED = 'expected nodes x GPUs per node and a device, such as "8x8 h100-sxm"'


class ClusterError(ValueError):
    """A cluster, or a group in it, that can't be: one sentence that says what was given and what was expected."""


@dataclass(frozen=True)
class LinkLevel:
    """One level of links. It joins `group_size` consecutive ranks (those of a node, a leaf, everything).

    `bandwidth_bytes_per_s`: one GPU's port at this level, per direction; where `nics_per_node` is given, one NIC's, and
    all groups with members in a node share its NICs. `efficiency`: the part of it that collectives reach. `latency_s`:
    α of one step. An oversubscribed level has a smaller bandwidth. `in_switch_efficiency`: the part of what collectives
    reach that is left when the level's switches do an all-reduce's additions; None where they can't. Raises
    `ClusterError`.
    """

    name: str
    latency_s: float
    bandwidth_bytes_per_s: float
    group_size: int
    nics_per_node: int | None = None
    efficiency: float = 1.0
    in_switch_efficiency: float | None = None

    def __post_init__(self) -> None:
        where = f"link level {self.name!r}"
        positive(f"{where}: bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        positive(f"{where}: latency_s", self.latency_s)
        for name in ("efficiency", "in_switch_efficiency"):
            value = getattr(self, name)
            if value is not None and positive(f"{where}: {name}", value) > 1:
                raise ClusterError(f"{where}: {name} is {value:g}; expected at most 1")
        whole(f"{where}: group_size", self.group_size)
        if self.nics_per_node is not None:
            whole(f"{where}: nics_per_node", self.nics_per_node)

    @property
    def effective_bytes_per_s(self) -> float:
        """What collectives reach of one port."""
        return self.bandwidth_bytes_per_s * self.efficiency


@dataclass(frozen=True)
class Cluster:
    """`nodes` × `gpus_per_node` of one device; `levels` innermost first, the last one joins every GPU.

    `reserved_memory_bytes`: per GPU, not for the plan (driver, communicators). `power_w` and `price_usd_per_gpu_hour`
    are None where unknown. `collective_launch_s`: once per collective. `profile`: path of a measured profile that its
    file names, not opened here. Raises `ClusterError`.
    """

    name: str
    device: Device
    nodes: int
    gpus_per_node: int
    levels: tuple[LinkLevel, ...]
    reserved_memory_bytes: float = 0.0
    power_w: float | None = None
    price_usd_per_gpu_hour: float | None = None
    collective_launch_s: float = COLLECTIVE_LAUNCH_S
    source: str = ""
    profile: str = ""

    def __post_init__(self) -> None:
        whole("nodes", self.nodes)
        whole("gpus_per_node", self.gpus_per_node)
        if self.gpus > MAX_GPUS:
            raise ClusterError(f"{self.nodes} nodes of {self.gpus_per_node} are {self.gpus} GPUs; expected at most "
                               f"{MAX_GPUS}")
        for name in ("power_w", "price_usd_per_gpu_hour", "collective_launch_s"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        reserved = self.reserved_memory_bytes
        if not 0 <= reserved < self.device.memory_bytes:  # refuses NaN too
            raise ClusterError(f"the reserved memory is {reserved:g} bytes; expected at least 0 and less than the "
                               f"device's {self.device.memory_bytes:g}")
        self._check_levels()

    def _check_levels(self) -> None:
        levels = self.levels
        joined = levels[-1].group_size if levels else 0
        if joined != self.gpus:
            raise ClusterError(f"the outermost link level joins {joined} GPUs; expected all {self.gpus}")
        if levels[0].nics_per_node is not None and self.gpus_per_node > 1:
            raise ClusterError(f"link level {levels[0].name!r} is innermost and has NICs; expected the links in a node")
        for level in levels[1:]:
            if level.in_switch_efficiency is not None:
                raise ClusterError(f"link level {level.name!r} has in_switch_efficiency; expected it on the innermost "
                                   "level only")
        for inner, outer in itertools.pairwise(levels):
            pair = f"link level {outer.name!r} around {inner.name!r}"
            if outer.group_size % inner.group_size or outer.group_size == inner.group_size:
                raise ClusterError(f"{pair} joins {outer.group_size} GPUs; expected a multiple of {inner.group_size}")
            if outer.effective_bytes_per_s > inner.effective_bytes_per_s or outer.latency_s < inner.latency_s:
                raise ClusterError(f"{pair} is faster; expected outer levels of no more bandwidth and no less latency")
            if inner.nics_per_node is not None and outer.nics_per_node is None:
                raise ClusterError(f"{pair} has no NICs; expected nics_per_node in every level from the first NICs on")
            if outer.nics_per_node is not None and inner.group_size % self.gpus_per_node:
                raise ClusterError(f"{pair} has NICs; expected them around whole nodes of {self.gpus_per_node} GPUs")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_memory_bytes(self) -> float:
        """Memory of one GPU that a plan may use."""
        return self.device.memory_bytes - self.reserved_memory_bytes

    def ports(self, level: int) -> float:
        """How many ports of `bandwidth_bytes_per_s` leave one block of the level inside of `level`."""
        inside = self.levels[level - 1].group_size if level else 1
        nics = self.levels[level].nics_per_node
        return inside if nics is None else nics * inside / self.gpus_per_node

    def bandwidth_per_gpu_bytes_per_s(self, level: int) -> float:
        """Effective bytes per second and direction of a level for each GPU while all of them send."""
        inside = self.levels[level - 1].group_size if level else 1
        return self.levels[level].effective_bytes_per_s * min(1.0, self.ports(level) / inside)

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """`"8x8 h100-sxm"`: nodes × GPUs per node and a device; `"1x2 cpu"` measures this CPU (imports torch).

        Up to 32 nodes share leaf switches, more get a spine level. Raises `ClusterError`: unknown device, several, a
        size of 0.
        """
        if not isinstance(text, str):
            raise ClusterError(f"a cluster of type {type(text).__name__}; {_EXPECTED}")
        refuse_mixed(text)
        found = size_and_device(text)
        if found is None:
            raise ClusterError(f"the cluster {shorten(text)} is not understood; {_EXPECTED}")
        return preset_cluster(found[2], found[0], found[1])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; unknown and infinite numbers are None."""
        memory = self.device.memory_bytes
        return {
            "name": self.name, "device": self.device.name, "nodes": self.nodes, "gpus_per_node": self.gpus_per_node,
            "gpus": self.gpus, "memory_bytes": memory if math.isfinite(memory) else None,
            "reserved_memory_bytes": self.reserved_memory_bytes, "power_w": self.power_w,
            "price_usd_per_gpu_hour": self.price_usd_per_gpu_hour, "collective_launch_s": self.collective_launch_s,
            "memory_bandwidth_bytes_per_s": self.device.memory_bandwidth_bytes_per_s,
            "peak_flops_per_s": dict(self.device.peak_flops_per_s), "source": self.source,
            "levels": [{"name": v.name, "group_size": v.group_size, "latency_s": v.latency_s,
                        "bandwidth_bytes_per_s": v.bandwidth_bytes_per_s, "efficiency": v.efficiency,
                        "nics_per_node": v.nics_per_node, "in_switch_efficiency": v.in_switch_efficiency,
                        "bandwidth_per_gpu_bytes_per_s": self.bandwidth_per_gpu_bytes_per_s(i)}
                       for i, v in enumerate(self.levels)]}


def preset_cluster(device_name: str, nodes: int, gpus_per_node: int) -> Cluster:
    """A cluster of a preset device with its usual links. Raises `ClusterError`."""
    whole("nodes", nodes)
    whole("gpus_per_node", gpus_per_node)
    name = device_name.lower()
    device, links = _device(name, gpus_per_node)
    levels = _levels(links, nodes, gpus_per_node) if nodes * gpus_per_node <= MAX_GPUS else ()
    return Cluster(name=f"{nodes}x{gpus_per_node} {name}", device=device, nodes=nodes, gpus_per_node=gpus_per_node,
                   levels=levels, power_w=links.power_w or None, source=links.source)


def size_and_device(text: str) -> tuple[int, int, str] | None:
    """(nodes, GPUs per node, device) of a text such as `"8x8 h100-sxm"`, whatever the device; None for others."""
    found = _TEXT.fullmatch(text)
    return (int(found[1]), int(found[2]), found[3]) if found else None


def cpu_levels(memory_bandwidth_bytes_per_s: float, nodes: int, processes: int) -> tuple[LinkLevel, ...]:
    """The usual links of processes on CPUs of that bandwidth."""
    return _levels(cpu_links(memory_bandwidth_bytes_per_s, processes), nodes, processes)


def _device(name: str, processes: int) -> tuple[Device, LinkPreset]:
    if name == CPU:
        from .this_machine import this_machine

        device = replace(this_machine(1), memory_bytes=_system_memory_bytes() / processes)
        return device, cpu_links(device.memory_bandwidth_bytes_per_s, processes)
    if name not in PRESETS:
        known = (*PRESETS, CPU)
        near = [k for k in known if name and k.startswith(name)] or difflib.get_close_matches(name, known, 3, 0.4)
        raise ClusterError(f"unknown device {shorten(name)}; expected one of {', '.join(known)}"
                           + (f" (nearest: {', '.join(near)})" if near else ""))
    return PRESETS[name], LINKS[name]


def _levels(links: LinkPreset, nodes: int, gpus_per_node: int) -> tuple[LinkLevel, ...]:
    """NVLink or PCIe, then leaf switches, then a spine; a level that would join nothing more is left out."""
    gpus, domain_nodes = nodes * gpus_per_node, 1
    if links.domain_gpus:
        if gpus_per_node > links.domain_gpus:
            raise ClusterError(f"nodes of {gpus_per_node} GPUs; expected at most the {links.domain_gpus} that one "
                               f"{links.inner_name} domain joins")
        domain_nodes = _divisor(nodes, links.domain_gpus // gpus_per_node)
    leaf_nodes = domain_nodes * _divisor(nodes // domain_nodes, max(1, NODES_PER_LEAF // domain_nodes))
    nics = max(1, math.ceil(gpus_per_node / links.gpus_per_nic))
    found = [LinkLevel(links.inner_name, links.inner_latency_s, links.inner_bandwidth_bytes_per_s,
                       domain_nodes * gpus_per_node, efficiency=links.inner_efficiency,
                       in_switch_efficiency=links.in_switch_efficiency)]
    network = ("leaf", leaf_nodes * gpus_per_node, NIC_LATENCY_S), ("spine", gpus, SPINE_LATENCY_S)
    for kind, size, latency_s in network:
        if size > found[-1].group_size:
            found.append(LinkLevel(f"{links.nic_name} {kind}", max(latency_s, links.inner_latency_s),
                                   links.nic_bandwidth_bytes_per_s, size, nics, NIC_EFFICIENCY))
    return tuple(found)


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`: switches then serve equal parts."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def _system_memory_bytes() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


# -- refusals, shared with cluster_file ------------------------------------------------------------
def refuse_mixed(text: str) -> None:
    """Raise when `text` names several devices: plans are for equal GPUs."""
    names = re.findall(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*", text[:4096].lower())
    devices = dict.fromkeys(n for n in names if n in PRESETS or n == CPU)
    if len(devices) > 1:
        raise ClusterError(f"mixed GPU types ({', '.join(devices)}) in one cluster; expected one device: plan each "
                           "part as a cluster of its own")


def positive(what: str, value: float) -> float:
    """`value`, or `ClusterError` when it is not a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ClusterError(f"{what} is {value:g}; expected a finite number above 0")
    return value


def whole(what: str, value: int) -> int:
    """`value`, or `ClusterError` when it is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ClusterError(f"{what} is {value}; expected a whole number of at least 1")
    return value


def shorten(text: str) -> str:
    """`text` in quotes, on one line and short enough for an error message."""
    line = " ".join(text[:400].split())
    return repr(line if len(line) <= 60 else line[:57] + "...")
