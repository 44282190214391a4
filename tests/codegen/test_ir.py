"""The kernel IR: text round trip and the verifier's rules."""

from __future__ import annotations

import pytest

from meshwright.codegen.ir import IRError, phases, stmt_axes, verify
from meshwright.codegen.ir_text import parse_kernel, print_kernel

from .cases import all_cases

RMS = """kernel rms(s0, x: f32, w: bf16 -> y: f32)
  axes p0: s0, r0: 768 reduce
  %0: f32 = load x[768*p0 + r0]
  %1: f32 = mul %0, %0
  %2: f32 = reduce_sum %1
  %3: f32 = rsqrt %2
  %4: f32 = mul %0, %3
  %5: bf16 = load w[r0]
  %6: f32 = cast %5
  %7: f32 = mul %4, %6
  store y[768*p0 + r0] = %7
"""


@pytest.mark.parametrize("case", all_cases(), ids=lambda c: c.name)
def test_text_reads_back(case) -> None:
    assert parse_kernel(print_kernel(case.kernel)) == case.kernel
    verify(case.kernel)


def test_levels_and_phases() -> None:
    kernel = parse_kernel(RMS)
    axes, phase = stmt_axes(kernel), phases(kernel)
    assert axes["%2"] == {"p0"} and axes["%4"] == {"p0", "r0"} and axes["%5"] == {"r0"}
    assert phase["%1"] == 0 and phase["%2"] == 1 and phase["%7"] == 1


@pytest.mark.parametrize(("old", "new", "complaint"), [
    ("mul %0, %0", "mul %0, %9", "used before it is defined"),
    ("mul %4, %6", "mul %4, %5", "mixes"),
    ("load x[768*p0 + r0]", "load x[768*p0 + q]", "unknown axis or size"),
    ("load x[768*p0 + r0]", "load z[768*p0 + r0]", "declared None"),
    ("%2: f32 = reduce_sum", "%2: i64 = reduce_sum", "gives f32"),
    ("rsqrt", "frobnicate", "unknown operation"),
    ("%3: f32 = rsqrt %2", "%2: f32 = rsqrt %2", "defined twice"),
    ("store y[768*p0 + r0] = %7", "store y[768*p0 + r0] = %5", "store of bf16"),
    ("axes p0: s0, r0: 768 reduce", "axes r0: 768 reduce, p0: s0", "must come after"),
])
def test_broken_rules_are_named_with_the_statement(old: str, new: str, complaint: str) -> None:
    assert old in RMS
    with pytest.raises(IRError, match=complaint):
        verify(parse_kernel(RMS.replace(old, new, 1)))


@pytest.mark.parametrize("text", ["", "kernel x", "kernel k(a: f32 -> b: f32)\n axes p0: 4\n %0 = load a[p0]",
                                  "kernel k(a: f32)\n axes p0: 4\n store b[p0] = %0"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(IRError):
        parse_kernel(text)
