"""What data sheets don't say about a GPU: at most ten physical numbers per device, and what software adds to them.

    product     flops / (peak · gemm_efficiency) · (1 + gemm_depth_knee / k) · (1 + gemm_area_knee / (batch · m · n))
    attention   flops / (peak · attention_efficiency) + exponentials / (special functions per second)
    others      bytes / (bandwidth · memory_efficiency)
    every one   + kernel_s
    link        bandwidth · inner_efficiency or · network_efficiency; latency · latency_factor
    overlap     computation hides communication, but loses overlap_loss of the time that both run

The depth knee is what a tile's prologue and epilogue cost, in steps of k; the area knee is half a wave of tiles, which
is idle on average. Both make time a polynomial with positive terms: more work never takes less time. The files
`calibration-*.json` come from `benchmarks/costmodel_published.py --refit`; devices without one use their family's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from .cluster import Cluster, LinkLevel
from .link_presets import LINKS, NIC_EFFICIENCY
from .presets import PRESETS

T = TypeVar("T")
FOLDER = Path(__file__).parent
CHIP = {"a100-40": "a100-80", "h200": "h100-sxm"}  # parts of one chip that differ in memory only
FAMILY = {"a100-40": "a100-80", "h100-pcie": "h100-sxm", "h200": "h100-sxm", "h100-96-hbm2e": "h100-sxm",
          "b200": "b200", "gb200": "b200", "b300": "b200", "gb300": "gb200", "v100": "a100-80", "rtx-4090": "a100-80"}


@dataclass(frozen=True)
class Calibration:
    """Ten numbers of one GPU model; see the formulas above. Efficiencies are fractions of the data sheet's figures.
    Raises `ValueError` for a number that is not positive and finite, or an efficiency above 1."""

    device: str = ""
    gemm_efficiency: float = 0.8
    gemm_depth_knee: float = 128.0
    gemm_area_knee: float = 1.5e6
    attention_efficiency: float = 0.75
    memory_efficiency: float = 0.85
    kernel_s: float = 2e-6
    inner_efficiency: float = 0.8
    network_efficiency: float = 0.8
    latency_factor: float = 1.0
    overlap_loss: float = 0.15

    def __post_init__(self) -> None:
        for name, value in self.scalars().items():
            if not (math.isfinite(value) and value >= 0) or (name.endswith(("efficiency", "loss")) and value > 1):
                raise ValueError(f"calibration of {self.device or 'a device'}: {name} is {value:g}; expected a finite "
                                 "number of at least 0, and at most 1 for efficiencies")

    def scalars(self) -> dict[str, float]:
        """The fitted numbers by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "device"}

    def cluster(self, cluster: Cluster) -> Cluster:
        """`cluster` with the links that collectives were seen to reach. Its groups stay what they are. A level whose
        efficiency is not the preset's was described by its owner and keeps its ratio to the preset."""
        inner, *outer = cluster.levels
        links = LINKS.get(cluster.device.name)

        def slower(level: LinkLevel, fitted: float, usual: float, most: float = 1.0) -> LinkLevel:
            reached = fitted if level.efficiency == usual else min(1.0, level.efficiency * fitted / usual)
            return replace(level, efficiency=min(reached, most), latency_s=level.latency_s * self.latency_factor)

        first = slower(inner, self.inner_efficiency, links.inner_efficiency if links else inner.efficiency)
        return replace(cluster, levels=(first, *(
            slower(v, self.network_efficiency, NIC_EFFICIENCY, first.effective_bytes_per_s / v.bandwidth_bytes_per_s)
            for v in outer)))


@dataclass(frozen=True)
class Software:
    """One number for each thing that software brings, for every GPU alike.

    `attention`, `attention_backwards`: efficiency of an attention kernel over `attention_efficiency`, and of its
    backward over `attention_backward` of that. `fp8`: fraction of gemm_efficiency that fp8 products reach, by recipe.
    `per_year`: seconds of computation of software that is a year older; `generation`: how a stack differs from that
    trend. `eager_op_s`: one operator through the dispatcher, hidden behind the GPU's work where that is longer.
    `async_tp`: the part of tensor-parallel communication that products can hide. `expert_overlap`: the part of a
    layer's pass that hides rows on their way to experts. `expert_pass_s`: what sorting rows by experts costs the host
    in a pass, when row counts have to come back from the GPU; `expert_product`: the fraction of gemm_efficiency that
    products of several experts in one kernel reach. What has no entry by its name counts as 1.
    """

    attention_backward: float = 0.8
    per_year: float = 1.0
    eager_op_s: float = 5e-6
    async_tp: float = 0.8
    expert_overlap: float = 0.3
    expert_pass_s: float = 3e-4
    expert_product: float = 1.0
    fp8: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    generation: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    attention: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    attention_backwards: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())


def file_of(name: str) -> Path:
    """Where the numbers of a device, or of "software", are committed."""
    return FOLDER / f"calibration-{name}.json"


def power_share(device: str) -> float:
    """Part of the peak of products that the power limit sustains, of the A100's: power grows with the cube of the clock
    (its square is the voltage's), so the clock with the cube root of the watts per peak FLOP/s. At most 1, the A100's
    own; 1 for what is not in the presets. That products run at their power limit: He, "Strangely, Matrix
    Multiplications on GPUs Run Faster When Given 'Predictable' Data!", 2024."""
    def watts_per_flops(name: str) -> float:
        peaks = PRESETS[name].peak_flops_per_s
        return LINKS[name].power_w / peaks.get("bfloat16", peaks.get("float16", peaks["float32"]))

    if device not in LINKS or device not in PRESETS:
        return 1.0
    share: float = (watts_per_flops(device) / watts_per_flops("a100-80")) ** (1 / 3)
    return min(1.0, share)


def transferred(found: Calibration, device: str) -> Calibration:
    """The numbers of one GPU for another of its family: products run as fast as that one's power limit lets them."""
    if found.device == device:
        return found
    efficiency = found.gemm_efficiency * (power_share(device) / power_share(found.device))
    return replace(found, gemm_efficiency=min(0.97, efficiency))


def calibration_for(device: str) -> Calibration:
    """The committed calibration of a device, else of its family (see `transferred`), else the defaults above."""
    for name in (device, FAMILY.get(device, "")):
        path = file_of(name)
        if name and path.is_file():
            return transferred(calibration_from_json(path.read_text()), device)
    return Calibration(device)


def committed_software() -> Software:
    """The committed coefficients of software, else the defaults above."""
    path = file_of("software")
    return software_from_json(path.read_text()) if path.is_file() else Software()


def calibration_from_json(text: str) -> Calibration:
    """Raises `ValueError`, in one sentence, for anything but what `--refit` writes."""
    return _from_json(Calibration, "calibration", text)


def software_from_json(text: str) -> Software:
    """Raises `ValueError`, in one sentence, for anything but what `--refit` writes."""
    return _from_json(Software, "software", text)


def _from_json(kind: type[T], key: str, text: str) -> T:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(json.loads(text)[key])
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a calibration: {str(error).splitlines()[0]}") from None
