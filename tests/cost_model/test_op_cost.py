"""The roofline: exact on hand-made devices, monotone everywhere."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost_model.device import Device, ElementRates, MemoryLevel
from meshwright.cost_model.op_cost import kernel_time_s, op_time_s, predict
from meshwright.cost_model.presets import PRESETS
from meshwright.cost_model.records import ElementOps, KernelRecord, OpRecord

CPU = Device(
    name="toy", kind="cpu", peak_flops_per_s={"float32": 1e11}, threads=2, parallel_region_s=2e-6,
    levels=(MemoryLevel(1e6, 1e11, 5e10), MemoryLevel(math.inf, 2e10, 1e10)),
    rates=ElementRates(1e10, 2e9, 1e9, 1e9, 1e8),
    eager_op_s=3e-6, eager_view_s=1e-6, kernel_launch_s=1e-7, fresh_above_bytes=32e6, fresh_bytes_per_s=2e9)
DEVICES = [CPU, *PRESETS.values()]

counts = st.integers(0, 10**9)
factors = st.integers(0, 1000)
element_ops = st.builds(ElementOps, counts, counts, counts, counts, counts)
op_records = st.builds(OpRecord, op=st.just("op"), flops=st.integers(0, 10**13), bytes_read=counts,
                       bytes_written=counts, elements=counts, element_ops=element_ops,
                       kind=st.sampled_from(["pointwise", "reduction", "gemm", "conv", "attention", "copy", "gather"]),
                       dtype=st.sampled_from(["float32", "bfloat16", "int8", "bool"]))
kernel_records = st.builds(KernelRecord, name=st.just("k"), bytes_read=counts, bytes_written=counts, elements=counts,
                           element_ops=element_ops, rows=st.integers(1, 10**6), row_size=st.integers(1, 10**4),
                           phases=st.integers(1, 4), column_reduction=st.booleans())
devices = st.sampled_from(DEVICES)


def test_memory_bound_operator_by_hand() -> None:
    """8 MB out of cache with two threads: 0.4 ms of traffic, 2 µs of waking, 3 µs of dispatch."""
    record = OpRecord("add", "pointwise", bytes_read=4_000_000, bytes_written=4_000_000, elements=10**6,
                      element_ops=ElementOps(simple=10**6))
    assert op_time_s(record, CPU) == pytest.approx(8e6 / 2e10 + 2e-6 + 3e-6)


def test_compute_bound_operator_by_hand() -> None:
    record = OpRecord("mm", "gemm", flops=10**11, bytes_read=1000, bytes_written=1000, elements=100)
    assert op_time_s(record, CPU) == pytest.approx(1.0 + 2e-6 + 3e-6)


def test_small_work_stays_on_one_thread() -> None:
    record = OpRecord("exp", "pointwise", bytes_read=400, bytes_written=400, elements=100,
                      element_ops=ElementOps(transcendental=100))
    assert op_time_s(record, CPU) == pytest.approx(100 / 1e9 + 3e-6)


def test_views_cost_their_dispatch_only() -> None:
    assert op_time_s(OpRecord("view", "view", elements=10**9), CPU) == CPU.eager_view_s
    assert op_time_s(OpRecord("getitem", "view", dispatches=0), CPU) == 0.0


def test_big_fresh_results_pay_for_their_pages() -> None:
    small, big = (OpRecord("full", "copy", bytes_written=n, elements=n // 4) for n in (32_000_000, 32_000_004))
    assert op_time_s(big, CPU) - op_time_s(small, CPU) == pytest.approx(32e6 / 2e9, rel=1e-3)


def test_later_sweeps_read_from_cache_when_a_row_fits() -> None:
    once = KernelRecord("k", 8_000_000, 0, 2_000_000, rows=1000, row_size=2000)
    twice = replace(once, phases=2)
    whole = replace(twice, column_reduction=True)
    assert kernel_time_s(twice, CPU) - kernel_time_s(once, CPU) == pytest.approx(8e6 / 1e11)
    assert kernel_time_s(whole, CPU) - kernel_time_s(once, CPU) == pytest.approx(8e6 / 2e10)


def test_predict_adds_up() -> None:
    before = [OpRecord("a", "pointwise", bytes_read=100), OpRecord("b", "view")]
    after = KernelRecord("k", 100, 100, 25)
    assert predict(before, after, CPU) == (sum(op_time_s(r, CPU) for r in before), kernel_time_s(after, CPU))


@given(op_records, devices, factors, st.sampled_from(["flops", "bytes_read", "bytes_written"]))
def test_more_work_never_makes_an_operator_faster(record: OpRecord, device: Device, more: int, field: str) -> None:
    bigger: Any = {field: getattr(record, field) + more * 10**6}
    assert op_time_s(replace(record, **bigger), device) >= op_time_s(record, device) > 0


@given(kernel_records, devices, factors, st.sampled_from(["bytes_read", "bytes_written", "phases"]))
def test_more_work_never_makes_a_kernel_faster(record: KernelRecord, device: Device, more: int, field: str) -> None:
    bigger: Any = {field: getattr(record, field) + (more if field == "phases" else more * 10**6)}
    assert kernel_time_s(replace(record, **bigger), device) >= kernel_time_s(record, device) > 0


@given(kernel_records, op_records, devices, element_ops)
def test_more_element_operations_are_never_faster(kernel: KernelRecord, op: OpRecord, device: Device,
                                                  extra: ElementOps) -> None:
    slower = replace(kernel, element_ops=kernel.element_ops + extra)
    assert kernel_time_s(slower, device) >= kernel_time_s(kernel, device)
    assert op_time_s(replace(op, element_ops=op.element_ops + extra), device) >= op_time_s(op, device)


@given(kernel_records, op_records, devices, st.floats(1.0, 100.0))
def test_more_bandwidth_is_never_slower(kernel: KernelRecord, op: OpRecord, device: Device, factor: float) -> None:
    faster = device.with_bandwidth(factor)
    assert kernel_time_s(kernel, faster) <= kernel_time_s(kernel, device)
    assert op_time_s(op, faster) <= op_time_s(op, device)


@given(op_records, st.sampled_from([d for d in DEVICES if d.kind == "gpu"]))
def test_no_operator_beats_the_roofline(record: OpRecord, device: Device) -> None:
    best_bandwidth = max(v.bandwidth_bytes_per_s for v in device.levels)
    assert op_time_s(record, device) >= record.bytes_moved / best_bandwidth
    assert op_time_s(record, device) >= record.flops / device.peak(record.dtype)


def test_element_ops_arithmetic() -> None:
    assert ElementOps(1, 2, 3, 4, 5) + ElementOps(1, 1, 1, 1, 1) == ElementOps(2, 3, 4, 5, 6)
    assert ElementOps(1, 2, 3, 4, 5).times(3) == ElementOps(3, 6, 9, 12, 15)
