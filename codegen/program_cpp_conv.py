"""Convolutions in the C++ program: oneDNN with packed weights, which arrive as two further inputs per convolution, or
the template on AMX tiles where `frame->convolutions` holds a weight for it (see program_cpp_conv_methods)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.program import Conv, Program, TensorSpec
from .affine import evaluate
from .expr import Expr, as_expr
from .program_cpp_tensors import Tensors, ints
from .program_memory import size_expr


@dataclass(frozen=True)
class PackedConv:
    """Weight and bias of a convolution, made from the inputs at `positions`: weight, [bias,] channel tensors.
    `input_size` is NCHW, over the program's symbols; `channels_last`: all its activations are, so that the template
    may take them."""

    positions: tuple[int, ...]
    step: Conv
    input_size: tuple[Expr, ...]
    channels_last: bool = True

    @property
    def fold(self) -> tuple[Hashable, ...]:
        """Equal where the same tensors give the same weight and bias."""
        return self.step.scale, self.step.shift, self.step.sources, self.step.bias is not None

    def pack(self, size: Sequence[int], weight: torch.Tensor, *rest: torch.Tensor,
             ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight with the factor folded in, in oneDNN's layout for inputs of `size`, bias with factor and shift)."""
        folded, shift = self.folded(weight, *rest)
        return self.reordered(folded, size), shift

    def reordered(self, weight: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """A weight in oneDNN's layout for inputs of `size` (NCHW)."""
        step = self.step
        made: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight, list(step.padding), list(step.stride), list(step.dilation), step.groups, list(size))
        return made

    def folded(self, weight: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight with the factor folded in, bias with factor and shift)."""
        step, others = self.step, list(rest)
        with torch.no_grad():
            bias = others.pop(0).detach().double() if step.bias is not None else 0.0
            channel = {n: t.detach().double() for n, t in zip(step.sources, others, strict=True)}
            ones = torch.ones(weight.shape[0], dtype=torch.float64, device="cpu")
            scale: Any = evaluate(step.scale, channel) * ones
            shift: Any = evaluate(step.shift, channel) * ones + bias * scale
            return (weight.detach().double() * scale.view(-1, 1, 1, 1)).float(), shift.float()


def print_conv(step: Conv, tensors: Tensors, program: Program, packed: list[PackedConv]) -> None:
    """One convolution: the template where the frame holds a weight for it, else oneDNN through torch's shim."""
    inputs = [i.name for i in program.inputs if isinstance(i, TensorSpec)]
    sources = (step.weight, *([step.bias] if step.bias else []), *step.sources)
    size = tuple(size_expr(n) for n in tensors.spec(step.x).shape)
    activations = [tensors.spec(n) for n in (step.x, *([step.other] if step.other else []))]
    want = PackedConv(tuple(inputs.index(n) for n in sources), step, size, all(map(_channels_last, activations)))
    number, first = len(packed), len(inputs) + 2 * len(packed)
    packed.append(want)
    x = tensors.handle(step.x)
    where = ", ".join(f"{ints(v)}" for v in (step.padding, step.stride, step.dilation))
    relu = "true" if step.relu else "false"
    kernel = ints(tensors.spec(step.weight).shape[2:])
    other = tensors.handle(step.other) if step.other else "nullptr"
    tensors.add_result(step.spec.name, step.spec,
                       f"convolution(frame, {number}, {x}, {other}, in[{first}], in[{first + 1}], {kernel}, "
                       f"{ints(step.spec.shape)}, {where}, {step.groups}, {relu})")


def _channels_last(spec: TensorSpec) -> bool:
    """True for dense NHWC memory."""
    _, c, h, w = (size_expr(n) for n in spec.shape)
    wanted = (c * h * w, as_expr(1), w * c, c)
    return tuple(size_expr(s) for s in spec.strides) == wanted


def can_convolve() -> bool:
    """True where this torch has oneDNN's packed convolution."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in (
            "_reorder_convolution_weight", "_get_mkldnn_serialized_md", "_nbytes", "data_ptr"))
