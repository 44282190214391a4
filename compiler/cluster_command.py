"""`meshwright cluster`: a cluster's levels with their sources, how the groups of a mesh lie in it, and seconds of
collectives over them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost_model.cluster import Cluster, ClusterError, shorten
from ..cost_model.collectives import COLLECTIVES
from ..cost_model.group import Group
from ..runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

SIZES_BYTES = (10**6, 10**7, 10**8, 10**9)
_AXIS = re.compile(r"\s*([A-Za-z]\w{0,30})\s*=\s*(\d{1,9})\s*")


@dataclass(frozen=True)
class Row:
    """Seconds of a collective of `size_bytes` over a group, all such groups at once."""

    collective: str
    group: str
    group_size: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class ClusterReport:
    """What `meshwright cluster` shows; rich prints it. `groups`: by name, of a mesh or of consecutive GPUs."""

    cluster: Cluster
    groups: Mapping[str, Group]
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = [level.name for level in self.cluster.levels]
        groups = [{"group": name, "size": group.size, "even": group.even,
                   "levels": [{"level": level, "members_per_block": m, "blocks": b, "groups_sharing_a_block": c}
                              for level, m, b, c in zip(names, group.members, group.blocks, group.concurrent,
                                                        strict=True)]}
                  for name, group in self.groups.items()]
        return {"cluster": self.cluster.as_dict(), "groups": groups,
                "collectives": [dict(vars(row)) for row in self.rows]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cluster = self.cluster
        memory = cluster.usable_memory_bytes / 1e9
        power = "" if cluster.power_w is None else f", {cluster.power_w:g} W"
        price = "" if cluster.price_usd_per_gpu_hour is None else f", {cluster.price_usd_per_gpu_hour:g} USD an hour"
        yield f"{cluster.name}: {cluster.gpus} x {cluster.device.name}, {memory:.0f} GB usable each{power}{price}"
        yield _levels(cluster)
        yield f"sources: {cluster.source}; cost_model/presets.py and link_presets.py give one for every number"
        yield _layouts(cluster, self.groups)
        for name in COLLECTIVES:
            yield _times(name, [row for row in self.rows if row.collective == name])


def load_cluster(description: str) -> Cluster:
    """The cluster named by `"8x8 h100-sxm"` or described by a file (`.yaml`, `.yml`, `.json`, or any file that exists).
    Raises `InvalidInputError`, one sentence."""
    path = Path(description)
    try:
        # a name that no preset could have, or a file that exists
        if path.suffix.lower() in (".yaml", ".yml", ".json") or _is_file(path):
            from ..cost_model.cluster_file import read_cluster

            return read_cluster(path)
        return Cluster.parse(description)
    except ClusterError as error:
        raise InvalidInputError(str(error)) from None


def describe(description: str, mesh: str | None = None, profile: str = "") -> ClusterReport:
    """The cluster and the times of every collective: over consecutive GPUs, or over the axes of `mesh`, such as
    `"tp=8,dp=8"` with the axis of neighbouring ranks first. `profile`: a file of measured numbers for the presets'
    place. Raises `InvalidInputError`."""
    from .profile_command import described_cluster

    cluster, _ = described_cluster(description, profile, "bfloat16")
    try:
        groups = _mesh_groups(cluster, mesh) if mesh is not None else \
            {f"{n} GPUs": Group.contiguous(cluster, n) for n in group_sizes(cluster)}
    except ClusterError as error:
        raise InvalidInputError(str(error)) from None
    rows = [Row(collective, name, group.size, size_bytes, seconds(cluster, group, size_bytes))
            for collective, seconds in COLLECTIVES.items() for name, group in groups.items()
            for size_bytes in SIZES_BYTES]
    return ClusterReport(cluster, groups, tuple(rows))


def _mesh_groups(cluster: Cluster, mesh: str) -> dict[str, Group]:
    """The groups along every axis of more than one rank."""
    sizes: dict[str, int] = {}
    for part in mesh.split(","):
        found = _AXIS.fullmatch(part)
        if found is None or found[1] in sizes:
            raise InvalidInputError(f"the mesh {shorten(mesh)}", expected="every axis once with its degree, "
                                    "neighbouring ranks first, such as tp=8,dp=8")
        sizes[found[1]] = int(found[2])
    return {f"{axis} {n}": Group.of(cluster, sizes, list(sizes), axis) for axis, n in sizes.items() if n > 1}


def group_sizes(cluster: Cluster) -> list[int]:
    """Sizes worth a row: powers of two that divide the cluster, a node, every level's block, all GPUs."""
    powers = {1 << i for i in range(cluster.gpus.bit_length()) if cluster.gpus % (1 << i) == 0}
    return sorted((powers | {cluster.gpus_per_node} | {level.group_size for level in cluster.levels}) - {1})


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _levels(cluster: Cluster) -> Table:
    from rich.table import Table

    table = Table(title="links, innermost first (bandwidths per direction)", title_justify="left")
    for column in ("level", "joins GPUs", "α", "port", "reached", "NICs a node", "per GPU, all sending"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for i, level in enumerate(cluster.levels):
        table.add_row(level.name, str(level.group_size), f"{level.latency_s * 1e6:.1f} µs",
                      f"{level.bandwidth_bytes_per_s / 1e9:.1f} GB/s", f"{level.efficiency:.0%}",
                      str(level.nics_per_node or "-"), f"{cluster.bandwidth_per_gpu_bytes_per_s(i) / 1e9:.1f} GB/s")
    return table


def _layouts(cluster: Cluster, groups: Mapping[str, Group]) -> Table:
    from rich.table import Table

    table = Table(title="members of a group in each block that it touches x blocks, groups that share a block",
                  title_justify="left")
    table.add_column("group")
    for level in cluster.levels:
        table.add_column(level.name, justify="right")
    for name, group in groups.items():
        table.add_row(name, *(f"{m}{'' if group.even else '+'} x {b}, {c}" for m, b, c in
                              zip(group.members, group.blocks, group.concurrent, strict=True)))
    return table


def _times(name: str, rows: list[Row]) -> Table:
    from rich.table import Table

    table = Table(title=f"{name}, ms", title_justify="left")
    table.add_column("group")
    for size_bytes in SIZES_BYTES:
        table.add_column(f"{size_bytes // 10**6} MB" if size_bytes < 10**9 else "1 GB", justify="right")
    for group in dict.fromkeys(row.group for row in rows):
        table.add_row(group, *(f"{row.seconds * 1e3:.3f}" for row in rows if row.group == group))
    return table
