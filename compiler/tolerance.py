"""What "lossless" means: error against float64 at most twice eager's own error plus 4 ulp of the output's scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

ULPS = 4.0
EAGER_FACTOR = 2.0
UNREFERENCED_ULPS = 64.0  # where no float64 run is possible, eager itself is the reference


def difference(name: str, got: Any, eager: Any, exact: Any | None) -> str | None:
    """Why `got` is not as good as `eager`, or None when it is. `exact` is the float64 result where there is one.

    Tensors must agree in shape, dtype and device; integers and booleans bit for bit; floats within the rule above, and
    they must be finite wherever eager is.
    """
    if not isinstance(eager, torch.Tensor):
        return None if _same_value(got, eager) else f"{name}: got {got!r}, expected {eager!r}"
    if not isinstance(got, torch.Tensor):
        return f"{name}: got {type(got).__name__}, expected a tensor"
    for what in ("shape", "dtype", "device"):
        if getattr(got, what) != getattr(eager, what):
            return f"{name}: {what} {_show(getattr(got, what))}, expected {_show(getattr(eager, what))}"
    if not (eager.is_floating_point() or eager.is_complex()):
        return None if torch.equal(got, eager) else f"{name}: {int((got != eager).sum())} integer elements differ"
    return _float_difference(name, got.detach(), eager.detach(), None if exact is None else exact.detach())


def differences(name: str, got: Sequence[Any], eager: Sequence[Any], exact: Sequence[Any] | None) -> str | None:
    """The first difference between two lists of outputs, or None."""
    if len(got) != len(eager):
        return f"{name}: {len(got)} values, expected {len(eager)}"
    references = exact if exact is not None else [None] * len(eager)
    found = (difference(f"{name} {i}", g, e, x) for i, (g, e, x) in enumerate(zip(got, eager, references, strict=True)))
    return next((f for f in found if f is not None), None)


def _float_difference(name: str, got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor | None) -> str | None:
    if got.numel() == 0:
        return None
    wide = torch.complex128 if eager.is_complex() else torch.float64
    g, e = got.to(wide), eager.to(wide)
    finite = torch.isfinite(e)
    if not bool(torch.isfinite(g)[finite].all()):
        return f"{name}: not finite where eager is"
    bad = ~finite & ~torch.isclose(g, e, equal_nan=True)
    reference = e if exact is None else exact.to(wide)
    if exact is None and bool(bad.any()):
        return f"{name}: finite where eager is not"
    return _beyond_tolerance(name, g, e, reference, finite & torch.isfinite(reference), eager.dtype, exact is not None)


def _beyond_tolerance(name: str, g: torch.Tensor, e: torch.Tensor, reference: torch.Tensor, where: torch.Tensor,
                      dtype: torch.dtype, referenced: bool) -> str | None:
    if not bool(where.any()):
        return None
    error = float((g - reference).abs()[where].max())
    own = float((e - reference).abs()[where].max())
    scale = float(reference.abs()[where].max())
    ulps = ULPS if referenced else UNREFERENCED_ULPS
    allowed = EAGER_FACTOR * own + ulps * torch.finfo(dtype).eps * scale + torch.finfo(dtype).tiny
    if error <= allowed:
        return None
    against = f"float64, eager's own error is {own:.3g}" if referenced else "eager"
    return f"{name}: error {error:.3g} against {against}; allowed {allowed:.3g}"


def _same_value(a: Any, b: Any) -> bool:
    try:
        return bool(a == b) or (a != a and b != b)
    except Exception:
        return a is b


def _show(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
