"""Devices: presets are sane, descriptions survive JSON, bad numbers are refused, this machine is measured once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from meshwright.cost_model.device import Device, device_from_dict
from meshwright.cost_model.presets import PRESETS, preset
from meshwright.cost_model.this_machine import this_machine

# Published numbers outside of the bounds below: the V100 has no bfloat16 units, 900 GB/s, 6 MiB of L2 and 32 GB; the
# RTX 4090 has 24 GB; the 40 GB of the A100-40 are not above 40 GB. PUBLISHED holds all three exactly.
SMALLER = ("v100", "rtx-4090", "a100-40")


@pytest.mark.parametrize("device", [d for d in PRESETS.values() if d.name not in SMALLER], ids=lambda d: d.name)
def test_presets_have_plausible_units(device: Device) -> None:
    assert 1e12 < device.peak_flops_per_s["float32"] <= device.peak_flops_per_s["bfloat16"] < 1e16
    assert 1e12 < device.memory_bandwidth_bytes_per_s < 1e14
    assert device.levels[0].bandwidth_bytes_per_s > device.memory_bandwidth_bytes_per_s
    assert 1e7 < device.levels[0].capacity_bytes < 1e9
    assert 1e-7 < device.kernel_launch_s < device.eager_op_s < 1e-4
    assert 40e9 < device.memory_bytes < 1e12
    assert device.rates.transcendental_per_s <= device.rates.simple_per_s


PUBLISHED = [  # GB/s, dense fp16 TFLOP/s, GB, MiB of L2: the documents that cost_model/presets.py quotes
    ("a100-80", 2039, 312, 80, 40), ("h100-sxm", 3350, 989.4, 80, 50), ("h200", 4800, 989.4, 141, 50),
    ("b200", 7700, 2250, 180, 126.5), ("gb200", 8000, 2500, 186, 126.5),
    ("b300", 7700, 2250, 270, 129.25), ("gb300", 8000, 2500, 279, 129.25), ("h100-pcie", 2000, 756.5, 80, 50),
    ("h100-96-hbm2e", 2400, 989.4, 96, 50), ("a100-40", 1555, 312, 40, 40), ("v100", 900, 125, 32, 6),
    ("rtx-4090", 1008, 165.2, 24, 72)]


TOTAL_GIB = {"a100-80": 79.14, "h100-sxm": 79.11, "h200": 139.72, "b200": 178.35, "gb200": 184.31, "b300": 267.5,
             "gb300": 276.62, "h100-pcie": 79.11, "h100-96-hbm2e": 95.0, "a100-40": 39.38, "v100": 31.73,
             "rtx-4090": 23.52}  # what torch's messages say


@pytest.mark.parametrize("name,bandwidth_gb,fp16_tflops,memory_gb,l2_mib", PUBLISHED)
def test_presets_hold_published_numbers(name: str, bandwidth_gb: float, fp16_tflops: float, memory_gb: float,
                                        l2_mib: float) -> None:
    device = preset(name)
    assert device.memory_bandwidth_bytes_per_s == bandwidth_gb * 1e9
    assert device.peak("float16") == fp16_tflops * 1e12
    assert device.peak("bfloat16") == (device.peak("float32") if name == "v100" else fp16_tflops * 1e12)
    assert device.memory_bytes == TOTAL_GIB.get(name, memory_gb / 1.073741824) * 2**30
    assert 1.04 < device.memory_bytes / (memory_gb * 1e9) < 1.075 or name not in TOTAL_GIB  # sold as GB, nearly GiB
    assert device.levels[0].capacity_bytes == l2_mib * 2**20


def test_published_numbers_cover_every_preset() -> None:
    assert {name for name, *_ in PUBLISHED} == set(PRESETS)


@pytest.mark.parametrize("device", PRESETS.values(), ids=lambda d: d.name)
def test_peaks_are_dense_and_ordered_by_width(device: Device) -> None:
    peaks = device.peak_flops_per_s
    assert peaks["float32"] <= peaks.get("tfloat32", peaks["float32"]) < peaks["float16"]
    # twice as fast at half the width; the RTX 4090 halves what accumulates in fp32, and so has four times as much int8
    assert peaks.get("float8_e4m3fn", 0) < 2.01 * peaks["float16"]
    assert peaks.get("int8", 0) < (4.01 if device.name == "rtx-4090" else 2.01) * peaks["float16"]


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown device 'p100', expected one of a100-80, a100-40, h100-sxm"):
        preset("p100")


@pytest.mark.parametrize("device", PRESETS.values(), ids=lambda d: d.name)
def test_json_round_trip(device: Device) -> None:
    assert device_from_dict(json.loads(json.dumps(device.as_dict(), allow_nan=False))) == device


@pytest.mark.parametrize("change", [
    {"eager_op_s": 0.0}, {"peak_flops_per_s": {"float32": -1.0}}, {"peak_flops_per_s": {"bfloat16": 1.0}},
    {"efficiency": {"gemm": 0.0}}, {"levels": ()}, {"kernel_launch_s": math.nan}, {"parallel_region_s": -1.0}])
def test_bad_numbers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="device a100-80"):
        replace(preset("a100-80"), **change)


@pytest.mark.parametrize("data", [{}, {"name": "x"}, [], {"levels": 3}, {**preset("h200").as_dict(), "extra": 1}])
def test_malformed_descriptions_are_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="not a device description"):
        device_from_dict(data)


def test_levels_are_chosen_by_working_set() -> None:
    device = preset("h100-sxm")
    assert device.level_of(1 << 20) is device.levels[0]
    assert device.level_of(device.levels[0].capacity_bytes + 1) is device.levels[-1]


@pytest.fixture(scope="module")
def measured() -> tuple[Device, dict[str, Any]]:
    stored: dict[str, Any] = {}
    return this_machine(1, load=stored.get, save=stored.__setitem__), stored


def test_this_machine_is_plausible(measured: tuple[Device, dict[str, Any]]) -> None:
    device, _ = measured
    assert device.kind == "cpu" and device.threads == 1
    assert 1e8 < device.peak_flops_per_s["float32"] < 1e13
    bandwidths = [v.bandwidth_bytes_per_s for v in device.levels]
    assert bandwidths == sorted(bandwidths, reverse=True) and 1e7 < bandwidths[-1] < 1e13
    assert 1e-8 < device.eager_view_s < 1e-2 and 1e-8 < device.eager_op_s < 1e-2


def test_this_machine_is_measured_once(measured: tuple[Device, dict[str, Any]],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    device, stored = measured
    monkeypatch.setattr("meshwright.cost_model.this_machine.measure", lambda threads: pytest.fail("measured again"))
    kept = json.loads(json.dumps(stored))
    assert this_machine(1, load=kept.get) == device


def test_a_broken_cache_entry_is_measured_anew(measured: tuple[Device, dict[str, Any]],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = measured
    monkeypatch.setattr("meshwright.cost_model.this_machine.measure", lambda threads: device)
    saved: dict[str, Any] = {}
    assert this_machine(1, load=lambda key: {"name": 3}, save=saved.__setitem__) is device
    assert list(saved.values()) == [device.as_dict()]


def test_measures_real_tensors_inside_a_trace(measured: tuple[Device, dict[str, Any]],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch._subclasses import FakeTensorMode

    seen: list[type] = []

    def measure(threads: int) -> Device:
        seen.append(type(torch.ones(2)))
        return measured[0]

    monkeypatch.setattr("meshwright.cost_model.this_machine.measure", measure)
    with FakeTensorMode():
        this_machine(1)
    assert seen == [torch.Tensor]


def test_thread_count_is_put_back_and_checked() -> None:
    import torch

    before = torch.get_num_threads()
    this_machine(1)
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        this_machine(0)
