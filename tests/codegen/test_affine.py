"""Which kernels are per-channel affine forms, and what their factors and shifts evaluate to."""

from __future__ import annotations

import pytest
import torch

from meshwright.codegen.affine import Affine, evaluate, match_affine, tensors_of
from meshwright.codegen.ir_text import parse_kernel

HEAD = """kernel k(x: f32, y: f32, c: f32, d: f32 -> out: f32)
  axes p0: 3, p1: 10
  %0: f32 = load x[10*p0 + p1]
  %1: f32 = load c[p0]
  %2: f32 = load d[p0]
  %3: f32 = load y[10*p0 + p1]
  %4: f32 = const 0.0
"""


def match(*lines: str) -> Affine | None:
    return match_affine(parse_kernel(HEAD + "".join(f"  {line}\n" for line in lines)))


def test_factor_shift_residual_and_relu():
    form = match("%5: f32 = sub %0, %1", "%6: f32 = div %5, %2", "%7: f32 = sub %6, %3", "%8: f32 = max %7, %4",
                 "store out[10*p0 + p1] = %8")
    assert form is not None and form.relu and set(form.terms) == {"x", "y"}
    c, d = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 8.0])
    channel = {"c": c, "d": d}
    assert torch.equal(evaluate(form.terms["x"], channel), 1 / d)
    assert evaluate(form.terms["y"], channel) == -1.0
    assert torch.equal(evaluate(form.shift, channel), -c / d)
    assert tensors_of(form.shift) == ["c", "d"]


@pytest.mark.parametrize("lines", [
    ("%5: f32 = mul %0, %3", "store out[10*p0 + p1] = %5"),  # a product of two tensors
    ("%5: f32 = max %0, %4", "%6: f32 = add %5, %1", "store out[10*p0 + p1] = %6"),  # something after the ReLU
    ("%5: f32 = max %0, %1", "store out[10*p0 + p1] = %5"),  # a clamp at another value
    ("%5: f32 = add %0, %0", "store out[10*p0 + p1] = %5"),  # the same tensor twice
    ("%5: f32 = exp %0", "store out[10*p0 + p1] = %5"),
    ("%5: f32 = add %0, %1", "store out[p0 + 3*p1] = %5"),  # another order of the output
])
def test_other_kernels_do_not_match(lines: tuple[str, ...]):
    assert match(*lines) is None
