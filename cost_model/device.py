"""`Device`: a processor as the roofline model sees it. Numbers come from `presets.py` (published) or `this_machine.py`
(measured); this module only holds them, checks them and stores them as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class MemoryLevel:
    """Working sets up to `capacity_bytes` stream at `bandwidth_bytes_per_s` (reads plus writes) with all threads, and
    at `serial_bandwidth_bytes_per_s` with one."""

    capacity_bytes: float
    bandwidth_bytes_per_s: float
    serial_bandwidth_bytes_per_s: float


@dataclass(frozen=True)
class ElementRates:
    """Scalar operations per second, of *one* thread of a CPU or of a whole GPU, by the classes of `ElementOps`."""

    simple_per_s: float
    division_per_s: float
    transcendental_per_s: float
    single_per_s: float
    serial_per_s: float


@dataclass(frozen=True)
class Device:
    """A CPU (with `threads` threads in use) or one GPU.

    `peak_flops_per_s`: dense matrix-product peak by torch dtype name; `levels`: caches, innermost first, then memory,
    whose capacity is infinite; `eager_op_s`: one operator through the framework's dispatcher, `eager_view_s` one view;
    `kernel_launch_s`: one emitted kernel; `parallel_region_s`: waking the threads. `efficiency`: the fraction of the
    roofline that kernels of a kind reach (missing: 1). Fresh results above `fresh_above_bytes` are written to pages the
    system has yet to provide, at `fresh_bytes_per_s`. Raises `ValueError` when a number is not positive.
    """

    name: str
    kind: Literal["cpu", "gpu"]
    peak_flops_per_s: Mapping[str, float]
    levels: tuple[MemoryLevel, ...]
    rates: ElementRates
    eager_op_s: float
    eager_view_s: float
    kernel_launch_s: float
    parallel_region_s: float = 0.0
    threads: int = 1
    memory_bytes: float = math.inf
    fresh_above_bytes: float = math.inf
    fresh_bytes_per_s: float = math.inf
    efficiency: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = {"eager_op_s": self.eager_op_s, "eager_view_s": self.eager_view_s, "threads": self.threads,
                    "kernel_launch_s": self.kernel_launch_s, "fresh_bytes_per_s": self.fresh_bytes_per_s,
                    **{f"peak of {k}": v for k, v in self.peak_flops_per_s.items()}, **asdict(self.rates),
                    **{f"efficiency of {k}": v for k, v in self.efficiency.items()}}
        for i, level in enumerate(self.levels):
            positive.update({f"level {i} {k}": v for k, v in asdict(level).items()})
        bad = {k: v for k, v in positive.items() if not v > 0}
        if bad or self.parallel_region_s < 0:
            raise ValueError(f"device {self.name}: expected positive numbers, got {bad or self.parallel_region_s}")
        if not self.levels or self.levels[-1].capacity_bytes != math.inf:
            raise ValueError(f"device {self.name}: the last memory level must have infinite capacity")
        if "float32" not in self.peak_flops_per_s:
            raise ValueError(f"device {self.name}: no float32 among the peaks {list(self.peak_flops_per_s)}")

    @property
    def memory_bandwidth_bytes_per_s(self) -> float:
        """Bandwidth of main memory with all threads."""
        return self.levels[-1].bandwidth_bytes_per_s

    def level_of(self, working_set_bytes: float) -> MemoryLevel:
        """The innermost level that holds `working_set_bytes`."""
        return next(level for level in self.levels if working_set_bytes <= level.capacity_bytes)

    def peak(self, dtype: str) -> float:
        """Matrix-product FLOP/s for a torch dtype name; unknown types compute as float32."""
        return self.peak_flops_per_s.get(dtype, self.peak_flops_per_s["float32"])

    def with_bandwidth(self, factor: float) -> Device:
        """This device with every memory level `factor` times as fast (for what-if questions)."""
        return replace(self, levels=tuple(
            replace(v, bandwidth_bytes_per_s=v.bandwidth_bytes_per_s * factor,
                    serial_bandwidth_bytes_per_s=v.serial_bandwidth_bytes_per_s * factor) for v in self.levels))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinity becomes None."""
        return _finite(asdict(self))  # type: ignore[no-any-return]


_INFINITE = ("memory_bytes", "fresh_above_bytes", "fresh_bytes_per_s", "capacity_bytes")


def device_from_dict(data: Mapping[str, Any]) -> Device:
    """Inverse of `Device.as_dict`. Raises `ValueError` when `data` describes no device."""
    try:
        fields = _infinite(data)
        fields["levels"] = tuple(MemoryLevel(**_infinite(v)) for v in fields["levels"])
        fields["rates"] = ElementRates(**fields["rates"])
        return Device(**fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a device description: {error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _infinite(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: math.inf if v is None and k in _INFINITE else v for k, v in data.items()}
