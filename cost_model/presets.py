"""Published descriptions of GPUs. Every number has its source beside it; peaks are dense (no 2:4 sparsity).

Sources, with what they say (TFLOP/s; a star: given with sparsity, halved here)
  [A100]   NVIDIA A100 Tensor Core GPU datasheet, SXM: fp64 tensor 19.5, fp32 19.5, tf32 156, bf16 and fp16 312, int8
           624; 80 GB at 2039 GB/s, 40 GB at 1555 GB/s. Ampere GA100 white paper: 108 SMs, 1410 MHz, L2 of 40 MB (a
           device query prints 41,943,040 bytes, so MiB).
  [H100]   NVIDIA H100 Tensor Core GPU datasheet, SXM: fp64 tensor and fp32 67, tf32 989*, bf16 and fp16 1979*, fp8 and
           int8 3958*; 80 GB at 3.35 TB/s. Hopper architecture white paper: the dense figures with a digit more (494.7,
           989.4, 1978.9), 132 SMs, L2 of 50 MB, 1980 MHz outside tensor cores (67 TFLOP/s = 132 · 128 · 2 · 1.98 GHz).
  [H100P]  The same two, PCIe: fp64 tensor and fp32 51, tf32 756*, bf16 and fp16 1513*, fp8 and int8 3026*; 80 GB of
           HBM2e at 2000 GB/s, 114 SMs, L2 of 50 MB; 51 TFLOP/s = 114 · 128 · 2 · 1.755 GHz.
  [H100T]  torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: "96GB HBM2e with 2.4 TB/sec", 500 W. Assumption: no
           document gives this part's peaks, the SXM part's stand in; at 500 W they are an upper bound.
  [H200]   NVIDIA H200 Tensor Core GPU datasheet, SXM: the H100's compute figures, 141 GB at 4.8 TB/s.
  [B200]   NVIDIA Blackwell datasheet (3384703), HGX B200 per GPU, up to 1000 W: fp64 37, fp32 75, tf32 2200*, bf16 and
           fp16 4500*, fp8 and int8 9000*, fp4 18000*; 180 GB at 7.7 TB/s. (The architecture brief's first edition said
           40, 80, 192 GB and 8 TB/s, its V2.1 says 37, 75 and 7.7; the DGX B200 datasheet keeps 8.) Device query in
           pytorch/ao pull request 4002: a memory bus of 7680 bits at 3996 MHz, so 7.67 TB/s, 148 SMs, L2 of 126.5 MiB;
           others print 129536 KiB of L2 and at most 1965 MHz. Chips and Cheese, "Nvidia's B200: Keeping the CUDA
           Juggernaut Rolling": 148 SMs, clocks like the H100 SXM's.
  [GB200]  The same datasheet, GB200 NVL72 per GPU, up to 1200 W: fp64 40, fp32 80, tf32 2500*, bf16 and fp16 5000*, fp8
           and int8 10000*, fp4 20000*; 186 GB at 8 TB/s (MLPerf system descriptions: "GB200 186 GB").
  [B300]   Verda, "NVIDIA GB300 NVL72: GPU Architecture & Performance" (verda.com/blog/gb300-nvl72-architecture), dense,
           per GPU. HGX B300, up to 1100 W: fp4 14000, fp8 4500, bf16 and fp16 2250, tf32 1100, fp32 75, int8 150; 270
           GB at 7.7 TB/s. GB300 NVL72, up to 1400 W: fp4 15000, fp8 5000, bf16 and fp16 2500, tf32 1250, fp32 80, int8
           165; 279 GB at 8 TB/s. Both 10.7 · 10¹² exponentials per second where the B200 has 5, so twice as many per SM
           and clock. NVIDIA's own sums agree: "36 PFLOPS sparse / 2 / 8 GPUs = 2.25" of bf16 for HGX B300
           (NVIDIA/cosmos-framework pull request 114), 1080 and 360 PFLOP/s of fp4 and fp8 for 72 GB300. fp64: Glenn
           Lockwood's notes (glennklockwood.com/garden/processors/B300), 1.25 for the HGX part; assumption: the same for
           the GB300. Device queries in OpenXLA, xla/backends/gpu/target_config/specs: an L2 of 135,528,448 bytes in
           both, the GB300 152 SMs at 2070 MHz, the B300 1965 MHz (its 158 SMs there would give 79.5 TFLOP/s of fp32;
           148 give the 75 above).
  [V100]   Volta GV100 white paper, SXM2: 80 SMs, 1530 MHz, fp64 7.8, fp32 15.7, tensor 125 (80 · 8 · 64 · 2 · 1.53
           GHz), 900 GB/s, L2 of 6144 KB; V100 datasheet: 32 GB. No bf16, tf32, fp8 or int8 tensor operations.
  [4090]   NVIDIA Ada GPU architecture white paper, GeForce RTX 4090: 128 SMs, 2520 MHz, fp32 82.6; tensor peaks with
           fp32 accumulation: tf32 82.6, bf16 and fp16 165.2, fp8 330.3, int8 660.6; 24 GB at 1008 GB/s, L2 of 72 MB.
  [L2]     Table 3 of doi:10.1016/j.ultsonch.2023.106546, peak L2 bandwidth: V100 3133, A100 7219, H100 8986 GB/s (2048
           and twice 5120 bytes per clock). Assumptions: all H100 and H200 parts share the die and that figure; B200
           to GB300 have two dies of that kind, so twice; the RTX 4090's is five times its memory's (nothing
           published; the A100-80's is 3.5 times, its cache is half as large).
  [torch]  Memory that torch can use, as its out-of-memory messages state the "total capacity": the GB of data sheets
           are nearly GiB. The least that public reports have of each part: H100 79.11 GiB (vllm-project/vllm issue
           27508; others 79.18 and 79.19), A100 79.14 and 39.38 (79.25 and 39.56 with other drivers), V100 31.73, RTX
           4090 23.52, H200 139.72, B200 178.35, GB200 184.31, H100 of 96 GB 95.00. GB300: the 297,021,079,552
           bytes of [B300]'s query. Assumptions: H100 PCIe as SXM, of the B300's 270 as much as of the B200's 180.
  [SFU]    CUDA C programming guide, throughput of arithmetic instructions: 16 special functions per SM and clock on
           Volta. Assumptions: the same on every later part, division and square root through the same units. Verda,
           "NVIDIA GB300 NVL72: GPU Architecture & Performance", gives the B200 and GB200 5 · 10¹² exponentials per
           second; 148 · 16 · 1.965 GHz are 4.7 · 10¹².

Read in the original: torchtitan's page, the table of [L2], Chips and Cheese, Verda, Lockwood, OpenXLA's files, MLPerf
system descriptions, the pull requests. The vendor's data sheets, white papers, guides and briefs were compared through
transcriptions of their tables: glennklockwood.com for A100, H100 and the brief's first edition, three public
repositories that agree for the Blackwell datasheet and the brief's V2.1, archive-lib.hpctech.co.jp for both H100, the
PC2 Paderborn wiki for the A100, waredb.com for the RTX 4090, techrival.com and hardwaretimes.com for the V100.

Assumptions, no document: 0.5 µs for a kernel launch inside a CUDA graph, 5 µs for an eager operator and 2 µs for a
view (Fernandez et al., "The Framework Tax", EMNLP 2023, shows how such a constant bounds small models); the
efficiencies, until `meshwright profile` measures them: 0.9 of peak bandwidth for streaming kernels, 0.7 of the
tensor-core peak for matrix products, 0.6 for attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .device import Device, ElementRates, MemoryLevel

GB = 1e9
GIB = 2**30
TERA = 1e12
MIB = 2**20

_EFFICIENCY = {"pointwise": 0.9, "reduction": 0.9, "copy": 0.9, "gather": 0.9, "other": 0.9,
               "gemm": 0.7, "conv": 0.7, "attention": 0.6}


def _gpu(name: str, *, peaks_tflops: Mapping[str, float], memory_gb: float, memory_bytes_per_s: float, l2_bytes: float,
         l2_bytes_per_s: float, vector_fp32_tflops: float, sm_count: int, clock_hz: float,
         exponentials_per_clock: int = 16) -> Device:
    special_per_s = sm_count * 16 * clock_hz  # [SFU]
    exponentials_per_s = sm_count * exponentials_per_clock * clock_hz
    simple_per_s = vector_fp32_tflops * TERA / 2  # a fused multiply-add counts as two FLOPs and is one operation
    return Device(
        name=name, kind="gpu", peak_flops_per_s={k: v * TERA for k, v in peaks_tflops.items()},
        levels=(MemoryLevel(l2_bytes, l2_bytes_per_s, l2_bytes_per_s),
                MemoryLevel(math.inf, memory_bytes_per_s, memory_bytes_per_s)),
        # uncoalesced accesses are counted in bytes, and a GPU runs dependent steps of many rows side by side
        rates=ElementRates(simple_per_s, special_per_s, exponentials_per_s, simple_per_s, simple_per_s),
        eager_op_s=5e-6, eager_view_s=2e-6, kernel_launch_s=0.5e-6,  # assumptions
        memory_bytes=CAPACITY_GIB[name] * GIB if name in CAPACITY_GIB else memory_gb * GB, efficiency=_EFFICIENCY)


_AMPERE_TFLOPS = {"float64": 19.5, "float32": 19.5, "tfloat32": 156.0, "bfloat16": 312.0, "float16": 312.0,
                  "int8": 624.0}  # [A100]
_HOPPER_TFLOPS = {"float64": 67.0, "float32": 67.0, "tfloat32": 494.7, "bfloat16": 989.4, "float16": 989.4,
                  "float8_e4m3fn": 1978.9, "float8_e5m2": 1978.9, "int8": 1978.9}  # [H100], [H200]

CAPACITY_GIB = {"v100": 31.73, "a100-40": 39.38, "a100-80": 79.14, "h100-sxm": 79.11, "h100-pcie": 79.11,
                "h100-96-hbm2e": 95.0, "h200": 139.72, "rtx-4090": 23.52, "b200": 178.35, "gb200": 184.31,
                "b300": 267.5, "gb300": 276.62}  # [torch]

PRESETS: dict[str, Device] = {d.name: d for d in (
    _gpu("a100-80", peaks_tflops=_AMPERE_TFLOPS,
         memory_gb=80, memory_bytes_per_s=2039 * GB,  # [A100]
         l2_bytes=40 * MIB, l2_bytes_per_s=7219 * GB,  # [A100], [L2]
         vector_fp32_tflops=19.5, sm_count=108, clock_hz=1.41e9),  # [A100]
    _gpu("a100-40", peaks_tflops=_AMPERE_TFLOPS,
         memory_gb=40, memory_bytes_per_s=1555 * GB,  # [A100]
         l2_bytes=40 * MIB, l2_bytes_per_s=7219 * GB,  # [A100], [L2]
         vector_fp32_tflops=19.5, sm_count=108, clock_hz=1.41e9),  # [A100]
    _gpu("h100-sxm", peaks_tflops=_HOPPER_TFLOPS,
         memory_gb=80, memory_bytes_per_s=3350 * GB,  # [H100]
         l2_bytes=50 * MIB, l2_bytes_per_s=8986 * GB,  # [H100], [L2]
         vector_fp32_tflops=67.0, sm_count=132, clock_hz=1.98e9),  # [H100]
    _gpu("h200", peaks_tflops=_HOPPER_TFLOPS,
         memory_gb=141, memory_bytes_per_s=4800 * GB,  # [H200]
         l2_bytes=50 * MIB, l2_bytes_per_s=8986 * GB,  # the H100's die
         vector_fp32_tflops=67.0, sm_count=132, clock_hz=1.98e9),  # the H100's die
    _gpu("h100-96-hbm2e", peaks_tflops=_HOPPER_TFLOPS,  # assumption: [H100T]
         memory_gb=96, memory_bytes_per_s=2400 * GB,  # [H100T]
         l2_bytes=50 * MIB, l2_bytes_per_s=8986 * GB,  # the H100's die
         vector_fp32_tflops=67.0, sm_count=132, clock_hz=1.98e9),  # assumption: [H100T]
    _gpu("h100-pcie",
         peaks_tflops={"float64": 51.0, "float32": 51.0, "tfloat32": 378.0, "bfloat16": 756.5, "float16": 756.5,
                       "float8_e4m3fn": 1513.0, "float8_e5m2": 1513.0, "int8": 1513.0},  # [H100P]
         memory_gb=80, memory_bytes_per_s=2000 * GB,  # [H100P]
         l2_bytes=50 * MIB, l2_bytes_per_s=8986 * GB,  # [H100P], [L2]
         vector_fp32_tflops=51.0, sm_count=114, clock_hz=1.755e9),  # [H100P]
    _gpu("v100",
         peaks_tflops={"float64": 7.8, "float32": 15.7, "float16": 125.0},  # [V100]
         memory_gb=32, memory_bytes_per_s=900 * GB,  # [V100]
         l2_bytes=6 * MIB, l2_bytes_per_s=3133 * GB,  # [V100], [L2]
         vector_fp32_tflops=15.7, sm_count=80, clock_hz=1.53e9),  # [V100]
    _gpu("rtx-4090",
         peaks_tflops={"float32": 82.6, "tfloat32": 82.6, "bfloat16": 165.2, "float16": 165.2,
                       "float8_e4m3fn": 330.3, "float8_e5m2": 330.3, "int8": 660.6},  # [4090]
         memory_gb=24, memory_bytes_per_s=1008 * GB,  # [4090]
         l2_bytes=72 * MIB, l2_bytes_per_s=5 * 1008 * GB,  # [4090]; assumption: [L2]
         vector_fp32_tflops=82.6, sm_count=128, clock_hz=2.52e9),  # [4090]
    _gpu("gb200",
         peaks_tflops={"float64": 40.0, "float32": 80.0, "tfloat32": 1250.0, "bfloat16": 2500.0, "float16": 2500.0,
                       "float8_e4m3fn": 5000.0, "float8_e5m2": 5000.0, "int8": 5000.0,
                       "float4_e2m1fn_x2": 10000.0},  # [GB200]
         memory_gb=186, memory_bytes_per_s=8000 * GB,  # [GB200]
         l2_bytes=126.5 * MIB, l2_bytes_per_s=2 * 8986 * GB,  # the B200's dies
         vector_fp32_tflops=80.0, sm_count=148, clock_hz=1.965e9),  # the B200's dies
    _gpu("b200",
         peaks_tflops={"float64": 37.0, "float32": 75.0, "tfloat32": 1100.0, "bfloat16": 2250.0, "float16": 2250.0,
                       "float8_e4m3fn": 4500.0, "float8_e5m2": 4500.0, "int8": 4500.0,
                       "float4_e2m1fn_x2": 9000.0},  # [B200]
         memory_gb=180, memory_bytes_per_s=7700 * GB,  # [B200]
         l2_bytes=126.5 * MIB, l2_bytes_per_s=2 * 8986 * GB,  # [B200]; assumption: [L2]
         vector_fp32_tflops=75.0, sm_count=148, clock_hz=1.965e9),  # [B200]
    _gpu("b300",
         peaks_tflops={"float64": 1.25, "float32": 75.0, "tfloat32": 1100.0, "bfloat16": 2250.0, "float16": 2250.0,
                       "float8_e4m3fn": 4500.0, "float8_e5m2": 4500.0, "int8": 150.0,
                       "float4_e2m1fn_x2": 14000.0},  # [B300]
         memory_gb=270, memory_bytes_per_s=7700 * GB,  # [B300]
         l2_bytes=129.25 * MIB, l2_bytes_per_s=2 * 8986 * GB,  # [B300]; assumption: [L2]
         vector_fp32_tflops=75.0, sm_count=148, clock_hz=1.965e9, exponentials_per_clock=32),  # [B300]
    _gpu("gb300",
         peaks_tflops={"float64": 1.25, "float32": 80.0, "tfloat32": 1250.0, "bfloat16": 2500.0, "float16": 2500.0,
                       "float8_e4m3fn": 5000.0, "float8_e5m2": 5000.0, "int8": 165.0,
                       "float4_e2m1fn_x2": 15000.0},  # [B300]; fp64 assumed
         memory_gb=279, memory_bytes_per_s=8000 * GB,  # [B300]
         l2_bytes=129.25 * MIB, l2_bytes_per_s=2 * 8986 * GB,  # [B300]; assumption: [L2]
         vector_fp32_tflops=80.0, sm_count=152, clock_hz=2.07e9, exponentials_per_clock=32),  # [B300]
)}


def preset(name: str) -> Device:
    """The device called `name`. Raises `ValueError` that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown device {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
