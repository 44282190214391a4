"""Kernels in IR text with inputs and a torch reference: one table that every printer of the IR is tested with.

A `Case` says what its kernel computes as a torch function. Tests run that function twice: on float64 copies of the
inputs (the truth) and on the inputs themselves (eager), and hold the printed kernel to
`error <= 2 * eager's error + 4 ulp of the output's scale`, elementwise scale where `elementwise` is true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from meshwright.codegen.ir import Kernel
from meshwright.codegen.ir_text import parse_kernel

TORCH = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
         "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "b1": torch.bool}
Reference = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One kernel to run. `inputs()` gives contiguous CPU tensors; `outputs` their counterparts' shapes."""

    name: str
    text: str
    inputs: Callable[[], list[torch.Tensor]]
    outputs: tuple[tuple[int, ...], ...]
    reference: Reference
    sizes: tuple[int, ...] = ()
    elementwise: bool = False
    kernel: Kernel = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", parse_kernel(self.text))

    def new_outputs(self) -> list[torch.Tensor]:
        """Uninitialised memory in shape and dtype, poisoned so that an unwritten element shows."""
        made = []
        for shape, buffer in zip(self.outputs, self.kernel.outputs, strict=True):
            out = torch.empty(shape, dtype=TORCH[buffer.dtype])
            out.view(torch.uint8).fill_(0x5B) if out.dim() and out.numel() else out.fill_(1)
            made.append(out)
        return made


def wide(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Float64 copies of the floating tensors, the others as they are."""
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check(case: Case, run: Callable[[Case, list[torch.Tensor], list[torch.Tensor]], None], ulps: int = 4) -> None:
    """Run `case` by `run(case, inputs, outputs)` and compare with torch; `AssertionError` says where it differs."""
    inputs = case.inputs()
    outputs = case.new_outputs()
    before = [t.clone() for t in inputs]
    run(case, inputs, outputs)
    for was, now in zip(before, inputs, strict=True):
        assert torch.equal(was.view(torch.uint8) if was.dim() and was.numel() else was,
                           now.view(torch.uint8) if now.dim() and now.numel() else now), f"{case.name}: input changed"
    truths, eagers = case.reference(*wide(inputs)), case.reference(*inputs)
    for got, truth, eager in zip(outputs, truths, eagers, strict=True):
        compare(case.name, got, truth, eager, case.elementwise, ulps)


def compare(name: str, got: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor, elementwise: bool,
            ulps: int = 4) -> None:
    """The accuracy rule; integers and bools must be equal, NaN and infinities in the same places."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    if not got.is_floating_point():
        assert torch.equal(got, truth.to(got.dtype)), f"{name}: {_worst(got, truth.to(got.dtype), got != truth)}"
        return
    rounded, eager = truth.to(got.dtype), eager.to(got.dtype)  # an overflow of the narrow type is no error
    misplaced = got.isnan() ^ rounded.isnan()
    assert not misplaced.any(), f"{name}: {_worst(got, rounded, misplaced)}"
    finite = rounded.isfinite() & eager.isfinite() & got.isfinite()
    edge = (rounded.isinf() | got.isinf()) & (got != rounded)
    overflow = torch.finfo(got.dtype).max * 0.999  # one rounding may decide between the largest number and infinity
    near_edge = (got.abs() >= overflow) & (truth.abs() >= overflow) & (got.sign() == rounded.sign())
    assert not (edge & ~near_edge).any(), f"{name}: {_worst(got, rounded, edge)}"
    zero = torch.zeros_like(truth, dtype=torch.float64)
    truth = torch.where(finite, truth.double(), zero)
    error = torch.where(finite, (got.double() - truth).abs(), zero)
    eager_error = torch.where(finite, (eager.double() - truth).abs(), zero)
    scale = truth.abs() if elementwise or not truth.numel() else truth.abs().max().expand_as(truth)
    info = torch.finfo(got.dtype)
    allowed = 2 * eager_error + ulps * (scale * info.eps).clamp_min(info.smallest_normal * info.eps)
    bad = error > allowed
    assert not bad.any(), f"{name}: {_worst(got, truth, bad)}"


def _worst(got: torch.Tensor, truth: torch.Tensor, bad: torch.Tensor) -> str:
    where = bad.nonzero()[:4].tolist()
    return "; ".join(f"at {tuple(i)}: got {got[tuple(i)].item()}, expected {truth[tuple(i)].item()}" for i in where)


# -- inputs ---------------------------------------------------------------------------------------
SPECIAL = [
    0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 0.5, -0.5, 1e-45, -1e-45, 1e-38, -1e-38, 1e-30, 1e-20,
    1e-8, -1e-8, 1e-4, -1e-4, 0.1, -0.1, 0.3466, -0.3466, 0.62, 0.95, -0.95, 0.9999999, 1.0000001, 1.5, -1.5, 2.5,
    -2.5, 3.5, 4.0, -4.0, 9.01, -9.01, 17.3, -17.3, 87.3, -87.3, 88.4, 88.72, 88.73, -88.72, -95.0, -103.9, -104.1,
    89.4, 500.0, -500.0, 1000.25, -1000.25, 65504.0, 1e6, -1e6, 8388607.5, -8388608.5, 1e9, 1e20, -1e20, 1e30,
    3.4028234e38, -3.4028234e38, 3.1415927, 1.5707964, -1.5707964, 6.2831855,
]


def floats(*shape: int, dtype: str = "f32", seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return made.to(TORCH[dtype])


def special(dtype: str = "f32") -> torch.Tensor:
    """Special values and a few hundred ordinary ones of many magnitudes, an odd number of them."""
    exponents = torch.linspace(-30, 30, 401, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(201)[:401]
    values = torch.cat([torch.tensor(SPECIAL, dtype=torch.float64), signs * 2**exponents,
                        torch.linspace(-20, 20, 1000, dtype=torch.float64),
                        torch.linspace(-1, 1, 501, dtype=torch.float64)])
    return values.to(TORCH[dtype])


def pairs(dtype: str = "f32") -> list[torch.Tensor]:
    """All pairs of special values, then random ones."""
    s = torch.tensor(SPECIAL, dtype=torch.float64)
    a = torch.cat([s.repeat(len(s)), floats(999, dtype="f64", seed=1, scale=8)])
    b = torch.cat([s.repeat_interleave(len(s)), floats(999, dtype="f64", seed=2, scale=3)])
    return [a.to(TORCH[dtype]), b.to(TORCH[dtype])]


def ints(*shape: int, dtype: str = "i64", low: int = -50, high: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(TORCH[dtype])


def bools(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def all_cases() -> list[Case]:
    """Every case; names are unique."""
    from . import cases_ops, cases_rows, cases_views

    found = [*cases_ops.cases(), *cases_rows.cases(), *cases_views.cases()]
    assert len({c.name for c in found}) == len(found)
    return found
