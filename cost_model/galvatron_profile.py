"""Galvatron's profile files, read and checked: what one layer, the embedding with the head, and the collectives cost.

The file formats and every fit are those of Galvatron v3, revision cea12ff (PKU-DAIR/Hetu-Galvatron): times in ms, sizes
in MB of 2^20 bytes, bandwidths in MB per ms. Its straight lines are ordinary least squares, here in closed form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
MESSAGE_SIZES_MB = tuple(2**i for i in range(11))
_COLLECTIVES = ("allreduce", "all2all")


class ProfileError(ValueError):
    """A profile file is missing, is no JSON, or holds a value that can't be priced. One sentence, the file named."""


@dataclass(frozen=True)
class Line:
    """`slope · x + intercept`."""

    slope: float
    intercept: float

    def __call__(self, x: float) -> float:
        return self.slope * x + self.intercept


@dataclass(frozen=True)
class CollectiveTimes:
    """Profiled ms of one collective in one group size by message MB, and the line for every other size."""

    table_ms: Mapping[float, float]
    line: Line

    def time_ms(self, message_mb: float) -> float:
        """The table's value at a size it holds, otherwise the line through all sizes; there is no interpolation."""
        found = self.table_ms.get(message_mb)
        return self.line(message_mb) if found is None else found


@dataclass(frozen=True)
class OtherMemory:
    """Model states and activation per sample, in MB, of embedding and head by degree of tensor parallelism."""

    states_mb: Mapping[int, float]
    activation_mb: Mapping[int, float]


@dataclass(frozen=True)
class Profile:
    """What Galvatron profiled for a model of equal layers (bf16) and for `gpus` GPUs, fitted as its search does.

    `layer_ms`, `other_ms`: forward ms of one layer, of embedding and head, by samples; `…_static_ms`: ms per sample
    measured at the first batch size. `hidden_mb_per_sample`: a bf16 hidden state, seq · hidden · 2 bytes.
    `other_memory`: by place, `off` (no pipeline), `first` and `last`.
    """

    gpus: int
    seq: int
    hidden: int
    layer_ms: Line
    other_ms: Line
    layer_static_ms: float
    other_static_ms: float
    parameter_mb: float
    activation_mb: Mapping[int, float]
    checkpoint_mb: float
    other_memory: Mapping[str, OtherMemory]
    allreduce_mb_per_ms: Mapping[tuple[int, int], float]
    p2p_mb_per_ms: Mapping[int, float]
    allgather: Mapping[int, CollectiveTimes]
    all2all: Mapping[int, CollectiveTimes]
    overlap: float

    @property
    def hidden_mb_per_sample(self) -> float:
        return self.seq * self.hidden * 2 / MIB


def read_profile(folder: Path, gpus: int, hidden: int | None = None) -> Profile:
    """Read the profile of one model and of `gpus` GPUs (a power of two) from `folder` or its sub-folders.

    The files do not tell the hidden size: where `hidden` is not given, it is what the entry of a checkpointed layer
    implies, which keeps its input of seq · hidden elements in fp32. Raises `ProfileError`.
    """
    if not folder.is_dir():
        raise ProfileError(f"{folder} is not a folder of Galvatron profiles")
    nodes = _gpu_files(folder, "allreduce_bandwidth", gpus)
    bandwidth, p2p = (_File(nodes[k]) for k in ("allreduce_bandwidth", "p2p_bandwidth"))
    times, overlap = _File(nodes["sp_time"]), _File(_one(folder, "overlap_coefficient.json"))
    computation = _File(_one(folder, "computation_profiling_bf16_*.json"))
    memory = _File(_one(folder, "memory_profiling_bf16_*.json"))
    degrees = _powers(gpus)
    seq = computation.sequence_length()
    layer, other = (computation.batch_times(kind, seq) for kind in ("0", "other"))
    layer_memory = memory.part("layertype_0_sp", seq)
    activation = layer_memory.part("tp_activation_per_bsz_dict")
    checkpoint_mb = activation.number("checkpoint")
    return Profile(
        gpus=gpus, seq=seq, hidden=hidden or _hidden(checkpoint_mb, seq, memory),
        layer_ms=_batch_line(layer, degrees[-1], computation), other_ms=_batch_line(other, degrees[-1], computation),
        layer_static_ms=next(iter(layer.values())), other_static_ms=next(iter(other.values())),
        parameter_mb=layer_memory.number("parameter_size"), checkpoint_mb=checkpoint_mb,
        activation_mb={d: activation.number(str(d)) for d in degrees},
        other_memory={place: _other_memory(memory.part(f"other_memory_pp_{key}_sp", seq), degrees)
                      for place, key in (("off", "off"), ("first", "on_first"), ("last", "on_last"))},
        allreduce_mb_per_ms={key: bandwidth.number("allreduce_size_{}_consec_{}".format(*key))
                             for key in _groups(degrees)},
        p2p_mb_per_ms={d: p2p.number(f"pp_size_{d}") for d in degrees[1:]},
        allgather={d: _collective(times, "allreduce", d, 0.5) for d in degrees[1:]},
        all2all={d: _collective(times, "all2all", d, 1.0) for d in degrees[1:]},
        overlap=overlap.number("overlap_coe", least=1.0))


def fit_line(points: Mapping[float, float]) -> Line:
    """Ordinary least squares through at least two points (x, y), unweighted."""
    n = len(points)
    mean_x, mean_y = math.fsum(points) / n, math.fsum(points.values()) / n
    spread = math.fsum((x - mean_x) ** 2 for x in points)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points.items()) / spread
    return Line(slope, mean_y - slope * mean_x)


@dataclass(frozen=True)
class _Part:
    """A JSON object of a file, at `where` (the file's name and the keys that lead here)."""

    data: Mapping[str, Any]
    where: str

    def number(self, key: str, least: float = 0.0) -> float:
        """A finite number above 0, and at least `least`."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ProfileError(f"{self.where}: {key!r} is {_short(value)}; expected a number")
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if not (math.isfinite(found) and found > 0 and found >= least):
            expected = f"a number of at least {least:g}" if least else "a positive number"
            raise ProfileError(f"{self.where}: {key!r} is {found:g}; expected {expected}")
        return found

    def part(self, key: str, seq: int | None = None) -> _Part:
        """The object under `key`; with `seq`, the one for that sequence length inside it."""
        value = self._get(key)
        if not isinstance(value, Mapping):
            raise ProfileError(f"{self.where}: {key!r} is {_short(value)}; expected an object")
        found = _Part(value, f"{self.where}: {key}")
        return found if seq is None else found.part(str(seq))

    def _get(self, key: str) -> Any:
        if key not in self.data:
            raise ProfileError(f"{self.where}: the key {key!r} is missing")
        return self.data[key]


class _File(_Part):
    def __init__(self, path: Path) -> None:
        super().__init__(_read_object(path), str(path))

    def sequence_length(self) -> int:
        """The one sequence length of a computation file, which must describe one type of layer."""
        found = [re.fullmatch(r"layertype_(\w+?)_bsz\d{1,9}_seq(\d{1,9})", key) for key in self.data]
        layers = sorted({m[1] for m in found if m and m[1] != "other"})
        lengths = sorted({int(m[2]) for m in found if m})
        if layers != ["0"]:
            raise ProfileError(f"{self.where} has times of the layer types {layers}; expected one type, '0', as in "
                               "'layertype_0_bsz1_seq2048'")
        if len(lengths) != 1 or not lengths[0]:
            raise ProfileError(f"{self.where} has times for the sequence lengths {lengths}; expected one")
        return lengths[0]

    def batch_times(self, kind: str, seq: int) -> dict[int, float]:
        """Forward ms per sample by batch size, in the file's order."""
        pattern = re.compile(rf"layertype_{kind}_bsz(\d{{1,9}})_seq{seq}")
        keys = {int(m[1]): key for key in self.data if (m := pattern.fullmatch(key))}
        if len(keys) < 2 or 0 in keys:
            raise ProfileError(f"{self.where} has times of 'layertype_{kind}' for the batch sizes {sorted(keys)}; "
                               "expected two or more, each at least 1")
        return {n: self.number(key) for n, key in keys.items()}


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path} can't be read: {error.strerror or error}") from None
    except RecursionError:
        raise ProfileError(f"{path} is nested too deeply for a profile") from None
    except ValueError as error:  # no JSON, no UTF-8, or an integer of thousands of digits
        raise ProfileError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, Mapping):
        raise ProfileError(f"{path} holds {_short(data)}; expected a JSON object")
    return data


def _find(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.rglob(pattern))
    except OSError as error:  # a folder in it may not be read, or vanished meanwhile
        raise ProfileError(f"{folder} can't be searched: {error.strerror} ({error.filename})") from None


def _one(folder: Path, pattern: str) -> Path:
    found = _find(folder, pattern)
    if len(found) != 1:
        many = f"{len(found)} files {pattern} ({', '.join(f.name for f in found[:3])})" if found else f"no {pattern}"
        raise ProfileError(f"{folder} has {many}; expected exactly one")
    return found[0]


def _gpu_files(folder: Path, first: str, gpus: int) -> dict[str, Path]:
    """The hardware files of the number of nodes that `first` has been measured for."""
    names = [f.name for f in _find(folder, f"{first}_*nodes_*gpus_per_node.json")]
    shapes = [(m[1], m[2]) for name in names if (m := re.search(r"_(\d{1,6})nodes_(\d{1,6})gpus", name))]
    fitting = sorted({s for s in shapes if int(s[0]) * int(s[1]) == gpus})
    if len(fitting) != 1:
        have = ", ".join(f"{n} × {g}" for n, g in shapes) or "none"
        raise ProfileError(f"{folder} has {'no' if not fitting else 'several'} {first}_*.json for {gpus} GPUs "
                           f"(nodes × GPUs measured: {have}); expected exactly one")
    nodes, per_node = fitting[0]
    return {kind: _one(folder, f"{kind}_{nodes}nodes_{per_node}gpus_per_node.json")
            for kind in (first, "p2p_bandwidth", "sp_time")}


def _batch_line(per_sample_ms: Mapping[int, float], degrees: int, file: _Part) -> Line:
    line = fit_line({float(n): n * ms for n, ms in per_sample_ms.items()})
    if line.slope <= 0 or line(1 / degrees) <= 0:
        raise ProfileError(f"{file.where}: the line through the forward times is not positive at 1/{degrees} sample "
                           f"({line.slope:.4g} ms per sample {line.intercept:+.4g} ms)")
    return line


def _collective(file: _Part, kind: str, size: int, factor: float) -> CollectiveTimes:
    assert kind in _COLLECTIVES
    table = {float(mb): factor * file.number(f"{kind}_size_{size}_{mb}MB_time") for mb in MESSAGE_SIZES_MB}
    line = fit_line(table)
    if line.slope < 0 or line(0.0) < 0:
        raise ProfileError(f"{file.where}: the line through the {kind} times of {size} GPUs is negative "
                           f"({line.slope:.4g} ms per MB {line.intercept:+.4g} ms)")
    return CollectiveTimes(table, line)


def _other_memory(part: _Part, degrees: Iterable[int]) -> OtherMemory:
    states, activation = part.part("model_states"), part.part("activation")
    return OtherMemory({d: states.number(str(d)) for d in degrees}, {d: activation.number(str(d)) for d in degrees})


def _groups(degrees: Iterable[int]) -> list[tuple[int, int]]:
    """(group size, consecutive) of the bandwidths that pricing asks for; all GPUs together are always consecutive."""
    *inner, last = [d for d in degrees if d > 1] or [1]
    return [(d, c) for d in inner for c in (0, 1)] + ([(last, 1)] if last > 1 else [])


def _powers(gpus: int) -> list[int]:
    if gpus < 1 or gpus & (gpus - 1):
        raise ProfileError(f"{gpus} GPUs; expected a power of two, as Galvatron's search does")
    return [2**i for i in range(gpus.bit_length())]


def _hidden(checkpoint_mb: float, seq: int, file: _Part) -> int:
    hidden = checkpoint_mb * MIB / (seq * 4)
    if hidden < 1 or hidden != int(hidden):
        raise ProfileError(f"{file.where}: the checkpoint entry, {checkpoint_mb:g} MB, implies a hidden size of "
                           f"{hidden:g}; give the model's own with --hidden")
    return int(hidden)


def _short(value: Any) -> str:
    if isinstance(value, (Mapping, list)):
        return "an object" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
