"""Module-level passes: submodules are replaced on a copy of the module tree, before Dynamo sees the model.

The copy shares Parameters and buffers, so the original is never touched. A replacement is checked on the inputs its
submodule received in one run of the example (recorded by hooks); without example inputs nothing can be checked, so
nothing is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..passes.base import Candidate, Pass, PassContext
from ..runtime import torch_compat
from ..runtime.module import shallow_tree
from .check import Subject, double_module
from .examples import Example
from .guard import first_line
from .pipeline import Verdict, find, judge, ordered_passes, record_row
from .preserve import cloned, preserved
from .report import Report
from .settings import CompileSettings


def run_module_passes(model: nn.Module, example: Example | None, settings: CompileSettings,
                      report: Report) -> nn.Module:
    """`model`, or a copy of its tree with submodules replaced; Parameters are the same objects."""
    passes = ordered_passes(settings, "module")
    if not passes:
        return model
    if example is None:
        for each in passes:
            report.refused(each.name, "needs example_inputs: replacements of modules are checked before tracing")
        return model
    work = shallow_tree(model)
    replaced = sum(_run_pass(each, work, example, settings, report) for each in passes)
    return work if replaced else model


def _run_pass(each: Pass, work: nn.Module, example: Example, settings: CompileSettings, report: Report) -> int:
    training = work.training and any(p.requires_grad for p in work.parameters())
    device = next((p.device.type for p in work.parameters()), "cpu")
    context = PassContext(device, training, dict(settings.extra))
    found = [c for c in find(each, work, context, settings, report) if _allowed(each, c, settings, report)]
    if not found:
        return 0
    calls = _record(work, [str(c.region) for c in found], example, report)
    verdicts: dict[str, Verdict] = {}
    replaced = 0
    for i, candidate in enumerate(found):
        key = candidate.key or str(i)
        if key not in verdicts:
            verdicts[key] = _verdict(each, work, candidate, calls, context, settings, report)
        verdict = _keys_problem(each, work, candidate) or verdicts[key]
        if not verdict.reason:
            work.set_submodule(str(candidate.region), candidate.replacement)  # type: ignore[arg-type]
            replaced += 1
        record_row(report, each.name, candidate, verdict)
    return replaced


def _allowed(each: Pass, candidate: Candidate, settings: CompileSettings, report: Report) -> bool:
    name = candidate.region
    if not isinstance(name, str) or not isinstance(candidate.replacement, nn.Module):
        report.dropped(each.name, "a module-level candidate names a submodule and brings a module", str(name))
        return False
    if settings.disables(each.name, name):
        report.refused(each.name, "disabled for this module", name)
        return False
    return True


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _record(model: nn.Module, names: Sequence[str], example: Example, report: Report) -> dict[str, _Call]:
    """The first call of each named submodule in one run of the example."""
    calls: dict[str, _Call] = {}
    handles = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, _Call(cloned(args), cloned(kwargs)))

        return hook

    modules = dict(model.named_modules())
    try:
        with report.phase("check"), preserved(model), torch.no_grad():
            handles = [modules[n].register_forward_pre_hook(hook_for(n), with_kwargs=True)
                       for n in names if n in modules]
            model(*cloned(example.args), **cloned(example.kwargs))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _verdict(each: Pass, work: nn.Module, candidate: Candidate, calls: dict[str, _Call], context: PassContext,
             settings: CompileSettings, report: Report) -> Verdict:
    name = str(candidate.region)
    if name not in calls:
        return Verdict("not called on the example inputs, so it can't be checked")
    original, replacement = work.get_submodule(name), candidate.replacement
    assert isinstance(replacement, nn.Module)
    replacement.train(original.training)
    call = calls[name]
    leaves = torch_compat.tree_leaves((call.args, call.kwargs))
    rebuild = torch_compat.tree_rebuilder((call.args, call.kwargs))

    def of(module: nn.Module) -> Callable[..., tuple[Any, ...]]:
        def run(*values: Any) -> tuple[Any, ...]:
            args, kwargs = rebuild(list(values))
            return tuple(torch_compat.tree_leaves(module(*args, **kwargs)))

        return run

    exact = double_module(original)
    shared = _shared_parameters(original, replacement, exact)
    subject = Subject(of(original), of(replacement), of(exact) if exact is not None else None, *shared)
    try:
        with preserved(original), preserved(replacement):
            return judge(subject, leaves, each, context, settings, report)
    except Exception as error:
        return Verdict(f"raised {type(error).__name__}: {first_line(error)}")


def _shared_parameters(original: nn.Module, replacement: nn.Module, exact: nn.Module | None,
                       ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Trainable Parameters of the original, with their float64 counterparts."""
    names = [n for n, p in original.named_parameters() if p.requires_grad]
    own = dict(original.named_parameters())
    wide = dict(exact.named_parameters()) if exact is not None else {}
    return [own[n] for n in names], [wide[n] for n in names if n in wide]


def _keys_problem(each: Pass, work: nn.Module, candidate: Candidate) -> Verdict | None:
    """Lossless passes keep Parameter objects and state_dict keys."""
    if not each.lossless:
        return None
    before = {k: id(p) for k, p in work.get_submodule(str(candidate.region)).named_parameters()}
    assert isinstance(candidate.replacement, nn.Module)
    after = {k: id(p) for k, p in candidate.replacement.named_parameters()}
    if before == after:
        return None
    return Verdict("a lossless replacement must keep the same Parameter objects under the same names")
