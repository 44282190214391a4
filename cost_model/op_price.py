"""Seconds of one operator of a layer after the layer was divided among GPUs: shapes in, seconds out.

Formulas: `calibration.py`. Every function is monotone: more rows, columns or bytes never take less time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .calibration import Calibration, Software
from .device import Device
from .strategy import Training

REFERENCE_YEAR = 2026.0
FP8 = "float8_e4m3fn"
FP4 = "float4_e2m1fn_x2"
NARROW = {"nvfp4": FP4}
"""Dtype of the layers' products by recipe; every recipe that is not here has FP8."""
ELEMENT_BYTES = {"float64": 8, "float32": 4, "tfloat32": 4, "bfloat16": 2, "float16": 2, FP8: 1, "float8_e5m2": 1,
                 FP4: 0.5625}  # blocks of 16 share a scale of one byte
UNFITTED_RECIPE = 0.85  # assumption: of gemm_efficiency, for recipes without a fitted number
QUANTIZE_BYTES = 4  # of an activation's element: read in 16 bit, written in 8 bit for both orders the passes need
AMPERE_KERNELS = frozenset(("flash-2", "triton"))
WARPGROUP_DEVICES = frozenset(("h100-sxm", "h100-pcie", "h200", "h100-96-hbm2e", "b200", "gb200", "b300", "gb300"))
MMA_OF_WARPGROUP_PEAK = 0.63
"""Kernels made of Ampere's instructions (mma) reach 62.9 % of Hopper's peak, for which its own (wgmma) are needed: Luo
et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", arXiv:2402.13499."""
UNFUSED_SCORE_BYTES, UNFUSED_SCORE_GRADIENT_BYTES = 13, 21
"""Bytes that attention without a fused kernel moves per score, in 16 bit with dropout: the scores are written (2), the
fused softmax reads and writes (4), dropout reads, writes and keeps a mask (5), the second product reads (2). Backward:
the gradient of the probabilities is written (2), dropout's and softmax's gradients read and write (5 and 6), three
products read scores (6), the mask (2)."""


@dataclass(frozen=True)
class Rates:
    """A device with its calibration and a training's precision, ready to price operators."""

    device: Device
    calibration: Calibration
    software: Software
    training: Training

    @property
    def slow(self) -> float:
        """The software generation's seconds over those of today's."""
        age = max(0.0, REFERENCE_YEAR - self.training.software_year)
        trend: float = self.software.per_year**age
        return trend * self.software.generation.get(self.training.software, 1.0)

    @property
    def fp8(self) -> bool:
        """Whether the layers' products run in fewer than 16 bits."""
        return bool(self.training.fp8_recipe)

    @property
    def narrow(self) -> str:
        """Their dtype, under the training's recipe."""
        return NARROW.get(self.training.fp8_recipe, FP8)

    def memory_s(self, moved_bytes: float) -> float:
        """Seconds to move bytes through a GPU's memory."""
        return moved_bytes / (self.device.memory_bandwidth_bytes_per_s * self.calibration.memory_efficiency) * self.slow

    def product_s(self, batch: float, m: float, k: float, n: float, *, fp8: bool = False, quantized: float = 0.0,
                  grouped: bool = False) -> float:
        """Seconds of `batch` products [m, k] · [k, n]; with `fp8`, quantising `quantized` elements included: forward
        the input, backward the output's gradient; weights are quantised once a step and their gradients find both
        operands quantised. `grouped`: one kernel for the products of several experts."""
        c = self.calibration
        element = ELEMENT_BYTES.get(self.training.compute, 2)
        peak = self.device.peak(self.training.compute) * c.gemm_efficiency
        extra_s = 0.0
        if fp8 and self.narrow in self.device.peak_flops_per_s:
            reached = self.software.fp8.get(self.training.fp8_recipe, UNFITTED_RECIPE)
            peak = self.device.peak(self.narrow) * c.gemm_efficiency * reached
            extra_s = self.memory_s(QUANTIZE_BYTES * quantized)
            element = ELEMENT_BYTES[self.narrow]
        if grouped:
            peak *= self.software.expert_product
        fill = (1 + c.gemm_depth_knee / max(k, 1)) * (1 + c.gemm_area_knee / max(batch * m * n, 1))
        moved = batch * (m * k * element + m * n * 2 + k * n * element)
        math_s = 2 * batch * m * k * n / peak * fill * self.slow
        return max(math_s, self.memory_s(moved)) + extra_s + c.kernel_s

    def attention_s(self, scores: float, head_size: float, flops: float, other_bytes: float, *,
                    backward: bool) -> float:
        """Seconds of fused attention over `scores` pairs of query and key (masked blocks left out) with `flops`, or of
        one that writes its scores out, by the training's choice."""
        c, s = self.calibration, self.software
        if not self.training.flash_attention:
            return self._written_out_s(scores, head_size, backward)
        kernel = self.training.attention_kernel
        efficiency = c.attention_efficiency * s.attention.get(kernel, 1.0)
        if kernel in AMPERE_KERNELS and self.device.name in WARPGROUP_DEVICES:
            efficiency *= MMA_OF_WARPGROUP_PEAK
        if backward:
            efficiency *= s.attention_backward * s.attention_backwards.get(kernel, 1.0)
        math_s = flops / (self.device.peak(self.training.compute) * efficiency)
        special_s = scores / self.device.rates.transcendental_per_s
        return max((math_s + special_s) * self.slow, self.memory_s(other_bytes)) + c.kernel_s * (3 if backward else 1)

    def _written_out_s(self, scores: float, head_size: float, backward: bool) -> float:
        """Products over heads that are limited by their short side, and passes over the scores."""
        c, side = self.calibration, math.sqrt(max(scores, 1))
        products = 4 if backward else 2
        peak = self.device.peak(self.training.compute) * c.gemm_efficiency
        math_s = products * 2 * scores * head_size / peak * (1 + c.gemm_depth_knee / min(head_size, side)) * self.slow
        moved = scores * (UNFUSED_SCORE_GRADIENT_BYTES if backward else UNFUSED_SCORE_BYTES)
        return math_s + self.memory_s(moved) + c.kernel_s * (products + (3 if backward else 2))


def exposed_s(communication_s: float, window_s: float, loss: float) -> float:
    """What communication adds to `window_s` of computation that it runs beside: what exceeds the window, and at least
    `loss` of its own time, by which the computation is slowed down (Galvatron, VLDB 2022, measures this)."""
    return max(communication_s - window_s, communication_s * loss)
