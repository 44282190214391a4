"""Is a replacement right? It runs beside the original on recorded and adversarial inputs, forward and backward.

Both sides get copies of the inputs and the same random state. Compared are outputs, what happened to the inputs
(mutation), which inputs the outputs alias, and gradients under random cotangents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..runtime import torch_compat
from .preserve import preserved
from .tolerance import differences

Function = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """Original and replacement as functions of a list of inputs (tensors and plain values).

    `exact` is the original in float64 (None when it can't be made). `parameters` are further tensors, shared by both
    sides, whose gradients must agree; `exact_parameters` are their float64 counterparts.
    """

    original: Function
    replacement: Function
    exact: Function | None = None
    parameters: Sequence[torch.Tensor] = field(default=())
    exact_parameters: Sequence[torch.Tensor] = field(default=())


def check(subject: Subject, recorded: Sequence[Any], *, backward: bool, lossless: bool = True) -> str | None:
    """Why the replacement must be dropped, or None. Raises whatever the replacement raises on the recorded inputs.

    With `lossless=False` only structure is compared: number, shape, dtype and device of outputs, and mutation.
    """
    with preserved():
        for label, inputs in input_sets(recorded):
            found = _check_once(subject, inputs, label, backward, lossless)
            if found is not None:
                return f"{found} (on {label} inputs)"
    return None


def input_sets(recorded: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """The recorded inputs, then adversarial ones: only floating-point tensors change (indices must stay in range)."""
    yield "recorded", list(recorded)
    yield "zero", [_changed(v, torch.zeros_like) for v in recorded]
    yield "large", [_changed(v, lambda t: t * 1e3) for v in recorded]
    yield "odd", [_changed(v, _odd) for v in recorded]


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    with torch.no_grad():
        return change(value.detach()).requires_grad_(value.requires_grad)


def _odd(t: torch.Tensor) -> torch.Tensor:
    """Signed zeros, subnormal-sized, tiny and large numbers, cycled over the tensor; no NaN, no infinity."""
    tiny = torch.finfo(t.dtype).tiny
    pattern = torch.tensor([0.0, -0.0, tiny, -tiny, 1e-6, -1.0, 0.5, 3.0, -17.25, 100.0, -1e-3],
                           dtype=t.dtype, device=t.device)
    return pattern.repeat(-(-t.numel() // pattern.numel()))[: t.numel()].reshape(t.shape)


@dataclass
class _Run:
    outputs: list[Any]
    inputs: list[Any]
    gradients: list[torch.Tensor | None]
    aliases: list[bool]


def _check_once(subject: Subject, inputs: list[Any], label: str, backward: bool, lossless: bool) -> str | None:
    state = torch.get_rng_state()
    try:
        eager = _run(subject.original, inputs, subject.parameters, backward, state)
    except Exception:
        if label == "recorded":
            raise
        return None  # the original itself refuses these inputs: nothing to compare
    got = _run(subject.replacement, inputs, subject.parameters, backward, state)
    exact = _exact_run(subject, inputs, backward, state) if lossless else None
    if not lossless:
        return _structure(got.outputs, eager.outputs)
    return (differences("output", got.outputs, eager.outputs, exact.outputs if exact else None)
            or _mutation(got.inputs, eager.inputs)
            or _aliasing(got.aliases, eager.aliases)
            or differences("gradient", got.gradients, eager.gradients, exact.gradients if exact else None))


def _run(function: Function, inputs: Sequence[Any], parameters: Sequence[torch.Tensor], backward: bool,
         state: torch.Tensor) -> _Run:
    leaves = [_leaf(v, backward) for v in inputs]
    taken = [v * 1 if backward and isinstance(v, torch.Tensor) and v.requires_grad else v for v in leaves]
    torch.set_rng_state(state)
    with torch.set_grad_enabled(backward):
        outputs = _as_list(function(*taken))
        gradients = _gradients(outputs, leaves, parameters, state) if backward else []
    pointers = {v.untyped_storage().data_ptr() for v in taken if isinstance(v, torch.Tensor) and v.numel()}
    return _Run(outputs, taken, gradients, [_lives_in(o, pointers) for o in outputs])


def _lives_in(output: Any, pointers: set[int]) -> bool:
    return isinstance(output, torch.Tensor) and output.numel() > 0 and output.untyped_storage().data_ptr() in pointers


def _leaf(value: Any, backward: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(backward and value.is_floating_point())


def _gradients(outputs: Sequence[Any], inputs: Sequence[Any], parameters: Sequence[torch.Tensor],
               state: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of inputs and parameters under cotangents drawn from a fixed seed (equal for all runs)."""
    wanted = [v for v in (*inputs, *parameters) if isinstance(v, torch.Tensor) and v.requires_grad]
    ends = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    if not wanted or not ends:
        return [None] * len(wanted)
    generator = torch.Generator().manual_seed(20)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in ends]
    return list(torch.autograd.grad(ends, wanted, cotangents, allow_unused=True, materialize_grads=True))


def _exact_run(subject: Subject, inputs: Sequence[Any], backward: bool, state: torch.Tensor) -> _Run | None:
    if subject.exact is None:
        return None
    wide = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs]
    try:
        return _run(subject.exact, wide, subject.exact_parameters, backward, state)
    except Exception:
        return None  # something in the region insists on a dtype: eager is the reference then


def _as_list(outputs: Any) -> list[Any]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return torch_compat.tree_leaves(outputs)


def _structure(got: Sequence[Any], eager: Sequence[Any]) -> str | None:
    if len(got) != len(eager):
        return f"{len(got)} outputs, expected {len(eager)}"
    for i, (g, e) in enumerate(zip(got, eager, strict=True)):
        if not isinstance(e, torch.Tensor):
            continue
        if not isinstance(g, torch.Tensor) or (g.shape, g.dtype, g.device) != (e.shape, e.dtype, e.device):
            return f"output {i}: {getattr(g, 'shape', g)} {getattr(g, 'dtype', '')}, expected {e.shape} {e.dtype}"
    return None


def _mutation(got: Sequence[Any], eager: Sequence[Any]) -> str | None:
    for i, (g, e) in enumerate(zip(got, eager, strict=True)):
        if isinstance(e, torch.Tensor) and not torch.equal(_bits(g), _bits(e)):
            return f"input {i} is left with other values than the original leaves"
    return None


def _bits(t: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(t.detach()) if t.is_floating_point() else t


def _aliasing(got: Sequence[bool], eager: Sequence[bool]) -> str | None:
    for i, (g, e) in enumerate(zip(got, eager, strict=True)):
        if g != e:
            return f"output {i} {'shares' if g else 'does not share'} memory with an input, unlike the original's"
    return None


def double_module(module: nn.Module) -> nn.Module | None:
    """A float64 copy of a module, None when it can't be copied."""
    try:
        return copy.deepcopy(module).double()
    except Exception:
        return None
