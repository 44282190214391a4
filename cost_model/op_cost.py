"""Seconds of one operator or one emitted kernel: the roofline model.

    time = max(flops / (peak · efficiency), bytes / (bandwidth · efficiency), element operations / rate) + launch

Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009; the bandwidth is
that of the memory level that holds the working set (the cache-aware roofline of Ilic, Pratas, Sousa, IEEE CAL 2014).
On a CPU the time is the smaller of one thread's and all threads' (a library splits only what is worth it), the latter
with the cost of waking them. Every function is monotone: more bytes or operations never take less time, a faster
device never more. `benchmarks/predicted_vs_measured.py` prints the measured error; benchmarks/results keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .device import Device
from .records import ElementOps, KernelRecord, OpRecord


def op_time_s(record: OpRecord, device: Device) -> float:
    """Seconds of one eager operator call, dispatch included."""
    if record.kind == "view":
        return record.dispatches * device.eager_view_s
    times = [_roofline_s(record, device, threads) for threads in _thread_counts(device, record.elements)]
    return min(times) + _fresh_s(record.bytes_written, device) + record.dispatches * device.eager_op_s


def kernel_time_s(record: KernelRecord, device: Device) -> float:
    """Seconds of one launch of an emitted kernel into memory that exists."""
    times = [_kernel_s(record, device, threads) for threads in _thread_counts(device, record.rows)]
    return min(times) + device.kernel_launch_s


def predict(before: Sequence[OpRecord], after: KernelRecord, device: Device) -> tuple[float, float]:
    """(seconds of the eager operators, seconds of the kernel that replaces them)."""
    return sum(op_time_s(r, device) for r in before), kernel_time_s(after, device)


def memory_time_s(bytes_moved: float, working_set_bytes: float, device: Device, threads: int) -> float:
    """Seconds to move `bytes_moved` to or from the memory level that holds `working_set_bytes`."""
    level = device.level_of(working_set_bytes)
    serial = device.kind == "cpu" and threads == 1
    return bytes_moved / (level.serial_bandwidth_bytes_per_s if serial else level.bandwidth_bytes_per_s)


def element_time_s(ops: ElementOps, device: Device, threads: int) -> float:
    """Seconds of scalar operations spread evenly over `threads`."""
    rates = device.rates
    one = (ops.simple / rates.simple_per_s + ops.division / rates.division_per_s
           + ops.transcendental / rates.transcendental_per_s + ops.single / rates.single_per_s
           + ops.serial / rates.serial_per_s)
    return one / threads


def _roofline_s(record: OpRecord, device: Device, threads: int) -> float:
    efficiency = device.efficiency.get(record.kind, 1.0)
    flops_s = record.flops / (device.peak(record.dtype) * efficiency) * (device.threads / threads)
    bytes_s = memory_time_s(record.bytes_moved, record.bytes_moved, device, threads) / efficiency
    return max(flops_s, bytes_s, element_time_s(record.element_ops, device, threads)) + _wake_s(device, threads)


def _kernel_s(record: KernelRecord, device: Device, threads: int) -> float:
    kind = "reduction" if record.row_size > 1 else "pointwise"
    efficiency = device.efficiency.get(kind, 1.0)
    moved_s = memory_time_s(record.bytes_moved, record.bytes_moved, device, threads)
    # later sweeps read again what the first one left in cache: one row, or everything when columns are reduced
    kept = record.bytes_read if record.column_reduction else record.bytes_read / max(1, record.rows)
    again_s = (record.phases - 1) * memory_time_s(record.bytes_read, kept, device, threads)
    work_s = element_time_s(record.element_ops, device, threads)
    return max((moved_s + again_s) / efficiency, work_s) + _wake_s(device, threads)


def _thread_counts(device: Device, items: int) -> tuple[int, ...]:
    """The teams worth considering: one thread, and all of them where there is work to share. A GPU counts as one."""
    return (1, device.threads) if device.kind == "cpu" and device.threads > 1 and items > 1 else (1,)


def _wake_s(device: Device, threads: int) -> float:
    return device.parallel_region_s if threads > 1 else 0.0


def _fresh_s(bytes_written: int, device: Device) -> float:
    """A big fresh result costs page faults: allocators give big blocks back to the system after every use."""
    return bytes_written / device.fresh_bytes_per_s if bytes_written > device.fresh_above_bytes else 0.0
