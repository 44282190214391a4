"""Published descriptions of GPUs. Every number has its source beside it; peaks are dense (no 2:4 sparsity).

Sources
  [A100]   NVIDIA A100 Tensor Core GPU datasheet (A100 80GB SXM column) and the Ampere GA100 architecture white paper.
  [H100]   NVIDIA H100 Tensor Core GPU datasheet (SXM column; its figures are with sparsity, halved here) and the
           Hopper architecture white paper.
  [H200]   NVIDIA H200 Tensor Core GPU datasheet (SXM column): the H100's compute, 141 GB, 4.8 TB/s.
  [B200]   NVIDIA HGX B200 figures per GPU at 1000 W; 148 SMs and 126 MB of L2 as reported by the device (Chips and
           Cheese, "Nvidia's B200: Keeping the CUDA Juggernaut Rolling").
  [L2]     L2 bandwidth of A100 (7219 GB/s) and H100 (8986 GB/s): Table 3 of doi:10.1016/j.ultsonch.2023.106546.
           None is published for the B200: twice the H100's (two dies of that kind) stands in, an estimate.
  [SFU]    CUDA C++ Programming Guide, arithmetic throughput: 16 special functions per SM and clock on 8.0, 9.0, 10.0;
           64 (8.0) or 128 (9.0, 10.0) fp32 results. Division and square root go through the same units.
  [graphs] "Getting Started with CUDA Graphs", NVIDIA developer blog, 2019: 3.4 µs per 2.9 µs kernel under graph replay,
           so 0.5 µs of launch; 3.8 µs with overlapped stream launches.
  [eager]  About 5 µs of CPU work per eager operator is the lower end of what is reported for PyTorch on servers; see
           Fernandez et al., "The Framework Tax", EMNLP 2023, for how it bounds small models.

The efficiencies are assumptions until `meshwright profile` measures them: 0.9 of peak bandwidth for streaming kernels
(STREAM-like copies reach that on these parts), 0.7 of the tensor-core peak for matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .device import Device, ElementRates, MemoryLevel

GB = 1e9
TERA = 1e12
MIB = 2**20

_EFFICIENCY = {"pointwise": 0.9, "reduction": 0.9, "copy": 0.9, "gather": 0.9, "other": 0.9,
               "gemm": 0.7, "conv": 0.7, "attention": 0.6}


def _gpu(name: str, *, peaks_tflops: Mapping[str, float], memory_gb: float, memory_bytes_per_s: float, l2_bytes: float,
         l2_bytes_per_s: float, vector_fp32_tflops: float, sm_count: int, clock_hz: float) -> Device:
    special_per_s = sm_count * 16 * clock_hz  # [SFU]
    simple_per_s = vector_fp32_tflops * TERA / 2  # a fused multiply-add counts as two FLOPs and is one operation
    return Device(
        name=name, kind="gpu", peak_flops_per_s={k: v * TERA for k, v in peaks_tflops.items()},
        levels=(MemoryLevel(l2_bytes, l2_bytes_per_s, l2_bytes_per_s),
                MemoryLevel(math.inf, memory_bytes_per_s, memory_bytes_per_s)),
        # uncoalesced accesses are counted in bytes, and a GPU runs dependent steps of many rows side by side
        rates=ElementRates(simple_per_s, special_per_s, special_per_s, simple_per_s, simple_per_s),
        eager_op_s=5e-6, eager_view_s=2e-6,  # [eager]; a view does not launch
        kernel_launch_s=0.5e-6,  # [graphs]
        memory_bytes=memory_gb * GB, efficiency=_EFFICIENCY)


_HOPPER_TFLOPS = {  # [H100], [H200]
    "float64": 67.0, "float32": 67.0, "tfloat32": 494.7, "bfloat16": 989.4, "float16": 989.4,
    "float8_e4m3fn": 1978.9, "float8_e5m2": 1978.9, "int8": 1978.9,
}

PRESETS: dict[str, Device] = {d.name: d for d in (
    _gpu("a100-80",
         peaks_tflops={"float64": 19.5, "float32": 19.5, "tfloat32": 156.0, "bfloat16": 312.0, "float16": 312.0,
                       "int8": 624.0},  # [A100]
         memory_gb=80, memory_bytes_per_s=2039 * GB,  # [A100]
         l2_bytes=40 * MIB, l2_bytes_per_s=7219 * GB,  # [A100], [L2]
         vector_fp32_tflops=19.5, sm_count=108, clock_hz=1.41e9),  # [A100]
    _gpu("h100-sxm", peaks_tflops=_HOPPER_TFLOPS,
         memory_gb=80, memory_bytes_per_s=3350 * GB,  # [H100]
         l2_bytes=50 * MIB, l2_bytes_per_s=8986 * GB,  # [H100], [L2]
         vector_fp32_tflops=67.0, sm_count=132, clock_hz=1.98e9),  # [H100]; the clock follows from 67 TFLOP/s
    _gpu("h200", peaks_tflops=_HOPPER_TFLOPS,
         memory_gb=141, memory_bytes_per_s=4800 * GB,  # [H200]
         l2_bytes=50 * MIB, l2_bytes_per_s=8986 * GB,  # the H100's die
         vector_fp32_tflops=67.0, sm_count=132, clock_hz=1.98e9),
    _gpu("b200",
         peaks_tflops={"float64": 40.0, "float32": 80.0, "tfloat32": 1100.0, "bfloat16": 2250.0, "float16": 2250.0,
                       "float8_e4m3fn": 4500.0, "float8_e5m2": 4500.0, "int8": 4500.0,
                       "float4_e2m1fn_x2": 9000.0},  # [B200]
         memory_gb=192, memory_bytes_per_s=8000 * GB,  # [B200]
         l2_bytes=126 * MIB, l2_bytes_per_s=2 * 8986 * GB,  # [B200], [L2]
         vector_fp32_tflops=80.0, sm_count=148, clock_hz=1.965e9),  # [B200]
)}


def preset(name: str) -> Device:
    """The device called `name`. Raises `ValueError` that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown device {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
