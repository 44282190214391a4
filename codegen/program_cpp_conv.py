"""Convolutions in the C++ program: oneDNN with packed weights, which arrive as two further inputs per convolution."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.program import Conv, Program, TensorSpec
from .affine import evaluate
from .program_cpp_tensors import Tensors, ints


@dataclass(frozen=True)
class PackedConv:
    """Weight and bias of a convolution, made from the inputs at `positions`: weight, [bias,] channel tensors."""

    positions: tuple[int, ...]
    step: Conv
    input_size: tuple[int, ...]

    @property
    def variant(self) -> Hashable:
        """Equal for equal packed copies of the same tensors."""
        s = self.step
        return ("conv", s.stride, s.padding, s.dilation, s.groups, s.scale, s.shift, s.sources, self.input_size)

    def pack(self, weight: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(reordered weight with the factor folded in, bias with factor and shift)."""
        step, others = self.step, list(rest)
        with torch.no_grad():
            bias = others.pop(0).detach().double() if step.bias is not None else 0.0
            channel = {n: t.detach().double() for n, t in zip(step.sources, others, strict=True)}
            ones = torch.ones(weight.shape[0], dtype=torch.float64)
            scale: Any = evaluate(step.scale, channel) * ones
            shift: Any = evaluate(step.shift, channel) * ones + bias * scale
            folded = (weight.detach().double() * scale.view(-1, 1, 1, 1)).float()
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                folded, list(step.padding), list(step.stride), list(step.dilation), step.groups, list(self.input_size))
            return packed, shift.float()


def print_conv(step: Conv, tensors: Tensors, program: Program, packed: list[PackedConv]) -> None:
    """One call of oneDNN's convolution through torch's shim."""
    inputs = [i.name for i in program.inputs if isinstance(i, TensorSpec)]
    sources = (step.weight, *([step.bias] if step.bias else []), *step.sources)
    size = tuple(int(n) for n in tensors.spec(step.x).shape)
    want = PackedConv(tuple(inputs.index(n) for n in sources), step, size)
    first = len(inputs) + 2 * len(packed)
    packed.append(want)
    x = tensors.handle(step.x)
    where = ", ".join(f"{ints(v)}" for v in (step.padding, step.stride, step.dilation))
    relu = "true" if step.relu else "false"
    other = tensors.handle(step.other) if step.other else "nullptr"
    tensors.add_result(step.spec.name, step.spec,
                       f"convolve({x}, {other}, in[{first}], in[{first + 1}], {where}, {step.groups}, {relu})")


def packing_of(conv: PackedConv, threads: int) -> tuple[tuple[int, ...], Hashable, Callable[..., Any]]:
    """What `PackedWeights` wants to know. A weight packed for another number of threads would be reordered every call
    (measured on ResNet-50: 3 times slower)."""
    return conv.positions, (threads, conv.variant), conv.pack


def can_convolve() -> bool:
    """True where this torch has oneDNN's packed convolution."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
