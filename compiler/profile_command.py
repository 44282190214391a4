"""`meshwright profile`, and profiles from files for everything that plans: measured, written, read, shown."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..cost_model.cluster import Cluster, ClusterError
from ..cost_model.machine_profile import (
    FORMAT,
    VERSION,
    MachineProfile,
    MachineProfileError,
    profile_from_json,
)
from ..cost_model.profile_use import Profiled, profiled_cluster, use_profile
from ..runtime.errors import InvalidInputError, MeshwrightError, UnknownNameError
from ..runtime.plan_data import first_fault, read_limited
from ..runtime.settings import torchrun_variables

if TYPE_CHECKING:
    from rich.console import Group

MAX_FILE_BYTES = 16 << 20
DEVICES = ("cpu", "cuda")
US, GIGA, TERA = 1e6, 1e9, 1e12


@dataclass(frozen=True)
class ProfileReport:
    """What was measured, and where it was written to."""

    profile: MachineProfile
    path: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the points stay in the file."""
        return {"path": self.path, **self.profile.model_dump(mode="json", exclude={"tables"})}

    def __rich__(self) -> Group:
        from rich.console import Group as Rows
        from rich.table import Table
        from rich.text import Text

        p, own = self.profile, self.profile.device
        table = Table(title="computation; error: median of |predicted / measured - 1| over the points",
                      title_justify="left")
        for name in ("processes", "dtype", "ceiling", "of peak", "depth knee", "area knee", "error", "attention",
                     "backward", "error"):
            table.add_column(name, justify="right")
        for c in p.compute:
            for dtype, g in c.products.items():
                a = c.attention.get(dtype)
                more = (f"{a.efficiency:.1%}", f"{a.backward:.2f}", f"{a.median_error:.0%}") if a else ("-", "-", "-")
                table.add_row(str(c.processes), dtype, f"{own.peak_flops_per_s[dtype] * g.efficiency / TERA:.3f} TF/s",
                              f"{g.efficiency:.0%}", f"{g.depth_knee:.0f}", f"{g.area_knee:.3g}",
                              f"{g.median_error:.0%}", *more)
        lines = [f"{c.processes} process{'es' if c.processes > 1 else ''}: memory "
                 f"{own.memory_bandwidth_bytes_per_s * c.memory_efficiency / GIGA:.1f} GB/s (error "
                 f"{c.memory_median_error:.0%}), a kernel {c.kernel_s * US:.1f} µs, an eager operator "
                 f"{c.eager_op_s * US:.1f} µs" for c in p.compute]
        lines += [f"links, {link.level} ({link.ranks} ranks, {p.backend}): alpha {link.latency_s * US:.1f} µs, "
                  f"{link.bandwidth_bytes_per_s / GIGA:.2f} GB/s (error {link.median_error:.0%})" for link in p.links]
        lines += [f"a collective's launch {p.collective_launch_s * US:.1f} µs"] if p.collective_launch_s else [
            "no links were measured: --ranks N does, with N processes"]
        lines += [f"overlap: {p.overlap_loss:.0%} of communication beside products is lost"] if p.overlap_loss is not \
            None else []
        return Rows(Text(f"{own.name}: {own.hardware}, {own.memory_bytes / 2**30:.0f} GiB, torch {p.torch}"), table,
                    *map(Text, lines), Text(f"written: {self.path}"))


def measure_profile(path: Path, device: str | None, ranks: int | None, threads: int, quick: bool, name: str | None,
                    progress: Callable[[str], None]) -> ProfileReport | None:
    """Measure and write. None on ranks of torchrun other than the first. Raises `MeshwrightError`."""
    from ..runtime.plan import in_a_folder, write_atomically
    from .profiler.build import built, device_facts
    from .profiler.ranks import Setting, in_own_processes, in_this_process, torchrun_place, under_torchrun

    in_a_folder(path)
    _check_name(name, device)
    device, place = _device(device), torchrun_place(torchrun_variables()) if ranks is None else None
    if place is not None and place.ranks > 1:
        setting = Setting(device, quick, place.ranks, threads)
        tables = under_torchrun(setting, place, progress)
        if tables is None:
            return None
        nodes, per_node = place.nodes, place.local_ranks
    else:
        setting, nodes, per_node = Setting(device, quick, ranks or 1, threads), 1, ranks or 1
        _check_ranks(setting)
        tables = in_own_processes(setting, progress) if setting.ranks > 1 else in_this_process(setting, progress)
    progress("fitting")
    from .. import __version__

    try:
        own = device_facts(device, threads, tables, name)
        profile = built(own, tables, setting.backend, nodes, per_node, __version__)
    except ValidationError as error:
        raise MeshwrightError(f"what was measured makes no sense: {first_fault(error)}", do="Measure again.") from None
    write_atomically(path, profile.to_json())
    return ProfileReport(profile, str(path))


def steps_of(device: str | None, ranks: int | None, quick: bool) -> int:
    """Reports of progress that `measure_profile` makes, at most."""
    from .profiler.ranks import Setting

    return Setting(_device(device), quick, ranks or 1).steps + 1


def _device(device: str | None) -> str:
    import torch

    if device is not None and device not in DEVICES:
        raise UnknownNameError("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError("--device cuda without a GPU that torch can use", expected="cpu here")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _check_name(name: str | None, device: str | None) -> None:
    if name is not None and (_device(device) == "cpu" or not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,79}", name)):
        raise InvalidInputError(f"--name {name[:80]!r}", expected="a GPU's name of small letters, digits and hyphens; "
                                "a CPU is always cpu")


def _check_ranks(setting: Any) -> None:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = torch.cuda.device_count() if setting.device == "cuda" else cores
    if setting.ranks * (setting.threads if setting.device == "cpu" else 1) > most:
        what = "GPUs" if setting.device == "cuda" else "processors"
        raise InvalidInputError(f"{setting.ranks} ranks of {setting.threads} thread(s) on {most} {what}",
                                expected=f"no more than there are {what}")


# -- profiles from files --------------------------------------------------------------------------
def load_profile(path: str | os.PathLike[str]) -> MachineProfile:
    """The profile in a file. Raises `InvalidInputError`, one line: no profile, too large, nested too deep, a newer
    version, NaN, a number that makes no sense in its unit."""
    return _loaded(path)[0]


def _loaded(path: str | os.PathLike[str]) -> tuple[MachineProfile, str]:
    name = os.fspath(path)
    try:
        size = os.stat(name).st_size
        if size > MAX_FILE_BYTES:
            raise InvalidInputError(f"{name} has {size} bytes", expected=f"a profile of at most {MAX_FILE_BYTES}")
        data = Path(name).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{name} can't be read: {getattr(error, 'strerror', None) or error}") from None
    return _parsed(name, data), hashlib.sha256(data).hexdigest()[:16]


@lru_cache(maxsize=8)
def _parsed(name: str, data: bytes) -> MachineProfile:
    found = read_limited(data, name, "a profile that meshwright saved")
    version = found.get("version")
    if found.get("format") != FORMAT:
        raise InvalidInputError(f"{name} is no Meshwright profile", expected=f'JSON with "format": "{FORMAT}"')
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InvalidInputError(f"{name} has the version {str(version)[:40]!r}", expected=f"a number up to {VERSION}")
    if version > VERSION:
        raise InvalidInputError(f"{name} is a profile of version {version}; this release reads up to version {VERSION}",
                                do="Install a newer Meshwright, or profile again with this one.")
    try:
        return profile_from_json(json.dumps(found))
    except MachineProfileError as error:
        raise InvalidInputError(f"{name}: {error}") from None


def described_cluster(cluster: str, profile: str, dtype: str) -> tuple[Cluster, Profiled | None]:
    """The cluster that `cluster` describes and, where `profile` or the cluster's own file names one, what the measured
    profile makes of it for products of `dtype`: then the cluster is the measured one. Raises `InvalidInputError`."""
    from .cluster_command import load_cluster

    if not profile:
        described = load_cluster(cluster)
        if not described.profile:
            return described, None
        profile = described.profile
    found, digest = _loaded(profile)
    try:
        made = use_profile(found, profiled_cluster(found, cluster) or load_cluster(cluster), dtype, digest)
    except (MachineProfileError, ClusterError) as error:
        raise InvalidInputError(f"{profile}: {error}") from None
    return made.cluster, made
