"""One model three ways (float64, eager fp32, compiled fp32): outputs and gradients side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from meshwright.compiler.acceptance import jitter
from meshwright.compiler.backend import recent_reports
from meshwright.compiler.report import Report

# Every kernel runs, none is dropped for being slow or wrong: the comparison below must see all of them.
EVERY_KERNEL = {"check": False, "measure": False}
# A model chains hundreds of operations, each rounded in its own order: what is left of 24 bits at its end differs
# between two correct implementations by a few times eager's own error, and small gradients are sums of large
# cancelling terms.
RELATIVE, OF_LARGEST = 2e-5, 2e-6


@dataclass(frozen=True)
class Result:
    """Floating outputs by position, gradients by parameter name."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def floating_outputs(result: Any) -> dict[str, torch.Tensor]:
    leaves = pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    found = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return {f"output {k}": x for k, x in enumerate(found)}


def run(call: Callable[..., Any], model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Result:
    """Forward, a loss over every output, backward. Gradients are taken off the model afterwards."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    outputs = floating_outputs(call(**inputs))
    loss = sum(o.square().mean() for o in outputs.values() if o.requires_grad)
    if isinstance(loss, torch.Tensor):
        loss.backward()
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Result({n: o.detach().clone() for n, o in outputs.items()}, gradients)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64. Experts are computed one after the other there: the library's grouped product, which
    transformers uses by default, takes no float64."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation") and getattr(wide.config, "_experts_implementation", None):
        wide.set_experts_implementation("eager")
    return wide


def widened(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


def assert_close(got: Result, eager: Result, truth: Result, moved: Callable[[], Result] | None = None) -> None:
    """Error ≤ 2 × eager's own + 2e-5 of the tensor's scale + 2e-6 of the largest gradient (see above).

    `moved`: eager's result where every floating input moved by at most one unit in the last place. It is asked when
    something is off: eager's own error is then the larger of the two, as in the acceptance of kernels, because a badly
    conditioned gradient (MobileNet's depthwise weights) may be right in one eager run by luck."""
    assert got.outputs.keys() == eager.outputs.keys() and got.gradients.keys() == eager.gradients.keys()
    assert got.outputs, "the model has no floating output"
    problems = _all_problems(got, [eager], truth)
    if problems and moved is not None:
        problems = _all_problems(got, [eager, moved()], truth)
    assert not problems, "\n".join(problems[:8])


def _all_problems(got: Result, eager: Sequence[Result], truth: Result) -> list[str]:
    return _problems(got.outputs, [e.outputs for e in eager], truth.outputs) + _problems(
        got.gradients, [e.gradients for e in eager], truth.gradients
    )


def _problems(
    got: Mapping[str, torch.Tensor], runs: Sequence[Mapping[str, torch.Tensor]], truth: Mapping[str, torch.Tensor]
) -> list[str]:
    eager = runs[0]
    largest = max((float(t.abs().max()) for t in truth.values() if t.numel()), default=0.0)
    out = []
    for name, g in got.items():
        if g.shape != eager[name].shape or g.dtype != eager[name].dtype:
            out.append(f"{name}: {g.dtype}{list(g.shape)}, eager {eager[name].dtype}{list(eager[name].shape)}")
            continue
        t = truth[name].double()
        if not t.numel():
            continue
        if not torch.equal(g.isnan(), eager[name].isnan()):
            out.append(f"{name}: NaN where eager has none, or the other way round")
            continue
        error, *theirs = (float((x.double() - t).abs().nan_to_num(0.0).max()) for x in (g, *(r[name] for r in runs)))
        own = max(theirs)
        allowed = 2 * own + RELATIVE * float(t.abs().nan_to_num(0.0).max()) + OF_LARGEST * largest
        if error > allowed:
            out.append(f"{name}: error {error:.3g}, allowed {allowed:.3g} (eager's own {own:.3g})")
    return out


@contextmanager
def reports_made() -> Iterator[list[Report]]:
    """The reports of graphs compiled in the `with` body."""
    known = {id(r) for r in recent_reports()}
    found: list[Report] = []
    yield found
    found.extend(r for r in recent_reports() if id(r) not in known)


def assert_no_fall_back(reports: list[Report]) -> None:
    """Something was compiled into kernels, and nothing fell back to eager."""
    assert reports, "no graph was compiled"
    for report in reports:
        assert not report.fall_backs, f"{report.name}: {report.fall_backs}"
        for graph in report.graphs:
            assert graph.state != "fallen back", f"{report.name}, {graph.name}"
    assert sum(g.kernels for r in reports for g in r.graphs) > 0, "no kernel was emitted"


def against_eager(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], compile_model: Callable[[nn.Module], Any], calls: int = 2
) -> list[Report]:
    """Compare the last of `calls` calls (a graph's first call runs in eager while it is accepted) with eager."""
    wide = in_float64(model)
    truth, eager = run(wide, wide, widened(inputs)), run(model, model, inputs)
    with reports_made() as reports:
        compiled = compile_model(model)
        for _ in range(calls):
            got = run(compiled, model, inputs)
    moved = {n: jitter(x, i) for i, (n, x) in enumerate(inputs.items())}
    assert_close(got, eager, truth, lambda: run(model, model, moved))
    assert_no_fall_back(reports)
    return reports
