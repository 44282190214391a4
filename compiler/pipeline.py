"""The pass pipeline: find → keep what gains → check → measure → splice → lint → record.

A pass proposes; this file decides. A candidate is dropped, with the reason in the report, when it is predicted to gain
nothing, is wrong (forward, backward, in what it does to its inputs), is not faster, hangs, raises, or does not fit.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..passes.base import Candidate, Finding, Level, Pass, PassContext, Refused
from ..passes.registry import known_passes, make_pass
from . import regions
from .check import Subject, check
from .dump import dump_graph
from .guard import first_line
from .measure import Timing, compare
from .preserve import preserved
from .report import CandidateRow, Report
from .settings import CompileSettings
from .watch import TimeUp, watched

log = logging.getLogger(__name__)


def ordered_passes(settings: CompileSettings, level: Level) -> list[Pass]:
    """The passes of one level, in the order they run."""
    if settings.passes is None:
        # Module-level passes change what is traced and so run first (by level). Within a level built-in passes run
        # before third parties', which then see the graph as we leave it; those run in order of registration. Lossy
        # passes run only when named.
        found = [make_pass(name) for name in known_passes()]
        chosen = [p for p in found if p is not None and p.lossless]
    else:
        named = [make_pass(p) if isinstance(p, str) else p for p in settings.passes]  # the user's own order
        chosen = [p for p in named if p is not None]
    return [p for p in chosen if p.level == level and not settings.disables(p.name)]


@dataclass(frozen=True)
class Verdict:
    """The outcome of check and measurement: `reason` is empty when the replacement is kept."""

    reason: str = ""
    timing: Timing | None = None


def run_graph_passes(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompileSettings,
                     report: Report) -> fx.GraphModule:
    """Dynamo's graph after all graph-level passes: a changed copy, or `gm` itself when nothing was kept."""
    dump_graph(settings, report, "dynamo", gm)
    passes = ordered_passes(settings, "graph")
    if not passes:
        return gm
    inputs = regions.concrete(example_inputs)
    context = _context(inputs, settings)
    changed = gm
    for each in passes:
        with preserved():
            changed = GraphPass(each, changed, inputs, context, settings, report).run()
        dump_graph(settings, report, each.name, changed)
    if changed is not gm:
        return _whole_graph_check(gm, changed, inputs, context, settings, report)
    return gm


def _context(inputs: Sequence[Any], settings: CompileSettings) -> PassContext:
    tensors = [v for v in inputs if isinstance(v, torch.Tensor)]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return PassContext(tensors[0].device.type if tensors else "cpu", training, dict(settings.extra))


@dataclass
class GraphPass:
    """One pass on one Dynamo graph."""

    each: Pass
    gm: fx.GraphModule
    inputs: Sequence[Any]
    context: PassContext
    settings: CompileSettings
    report: Report

    def run(self) -> fx.GraphModule:
        """A changed copy of the graph, or the graph itself."""
        work = copied_graph(self.gm)
        kept = [c for c in find(self.each, work, self.context, self.settings, self.report) if self._allowed(c)]
        verdicts = self._judge(work, kept)
        done = 0
        for i, candidate in enumerate(kept):
            verdict = verdicts[candidate.key or str(i)]
            done += self._apply(work, candidate, verdict, f"meshwright_{self.each.name}_{i}")
        if not done:
            return self.gm
        work.recompile()
        return work

    def _allowed(self, candidate: Candidate) -> bool:
        paths = [] if isinstance(candidate.region, str) else [regions.module_path(n) for n in candidate.region]
        if any(self.settings.disables(self.each.name, p) for p in paths):
            self.report.refused(self.each.name, "disabled for this module", where(candidate))
            return False
        return True

    def _judge(self, work: fx.GraphModule, kept: Sequence[Candidate]) -> dict[str, Verdict]:
        """One verdict per key; regions of one key share it."""
        first = {c.key or str(i): c for i, c in reversed(list(enumerate(kept)))}
        if not first:
            return {}
        try:
            with self.report.phase("check", of=self.each.name):
                wanted = [n for c in first.values() for n in c.inputs]
                values = watched(lambda: regions.record(work, self.inputs, wanted), self.settings, self.report)
        except Exception as error:
            reason = f"its inputs could not be recorded ({type(error).__name__}: {first_line(error)})"
            self.report.note(f"{self.each.name}: nothing could be checked, {reason}")
            return dict.fromkeys(first, Verdict(reason))
        return {key: self._verdict(work, c, values) for key, c in first.items()}

    def _verdict(self, work: fx.GraphModule, candidate: Candidate, values: dict[fx.Node, Any]) -> Verdict:
        try:
            region = regions.extract(work, candidate)
        except regions.SpliceError as error:
            return Verdict(str(error))
        subject = Subject(region, _tupled(candidate.replacement), regions.in_float64(region))
        recorded = [values[n] for n in candidate.inputs]
        return judge(subject, recorded, self.each, self.context, self.settings, self.report)

    def _apply(self, work: fx.GraphModule, candidate: Candidate, verdict: Verdict, name: str) -> int:
        if not verdict.reason:
            before = _copied(work)
            try:
                regions.splice(work, candidate, name)
                problem = regions.lint(work, candidate)
            except Exception as error:
                problem = f"{type(error).__name__}: {first_line(error)}"
            if problem:
                verdict = Verdict(problem, verdict.timing)
                work.graph = before  # any later candidate finds its nodes gone, and says so
        record_row(self.report, self.each.name, candidate, verdict)
        return 0 if verdict.reason else 1


def copied_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own that shares `gm`'s submodules and metadata values."""
    out = fx.GraphModule(gm, _copied(gm))
    out.meta.update(gm.meta)
    return out


def _copied(gm: fx.GraphModule) -> fx.Graph:
    """A copy of the graph that shares node metadata values."""
    graph = fx.Graph()
    output: Any = graph.graph_copy(gm.graph, {}, return_output_node=True)
    if output is not None:
        value, old = output
        new = graph.output(value, getattr(old, "type", None))
        new.meta = copy.copy(old.meta)
    return graph


def find(each: Pass, target: Any, context: PassContext, settings: CompileSettings, report: Report) -> list[Candidate]:
    """Candidates of a pass with a predicted gain; refusals, losses and failures go to the report."""
    try:
        with report.phase("passes", of=each.name):
            findings: Sequence[Finding] = watched(lambda: list(each.find(target, context)), settings, report)
    except Exception as error:
        report.dropped(each.name, f"find failed: {_error(error)}")
        if settings.strict and not isinstance(error, TimeUp):
            log.debug("pass %s failed", each.name, exc_info=error)
        return []
    report.pass_report(each.name)
    kept: list[Candidate] = []
    for finding in findings:
        if isinstance(finding, Refused):
            report.refused(each.name, finding.reason, finding.node)
        elif finding.predicted.gain_s <= 0:
            record_row(report, each.name, finding, Verdict("no gain predicted"))
        else:
            kept.append(finding)
    return kept


def judge(subject: Subject, recorded: Sequence[Any], each: Pass, context: PassContext, settings: CompileSettings,
          report: Report) -> Verdict:
    """Check one replacement by the pass `each`, then time it."""
    try:
        if settings.check:
            with report.phase("check", of=each.name):
                wrong = watched(lambda: check(subject, recorded, backward=context.training, lossless=each.lossless),
                                settings, report)
            if wrong:
                return Verdict(f"wrong: {wrong}")
        if not settings.measure:
            return Verdict()
        with report.phase("measure", of=each.name), preserved():
            timing = watched(lambda: compare(*_timed(subject, recorded, context.training), device=context.device),
                             settings, report)
        return Verdict("" if timing.faster else "not faster", timing)
    except Exception as error:
        return Verdict(_error(error))


def _timed(subject: Subject, recorded: Sequence[Any], training: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def one(function: Callable[..., Any]) -> Callable[[], Any]:
        inputs = [v.detach().requires_grad_(training and v.is_floating_point()) if isinstance(v, torch.Tensor) else v
                  for v in (v.clone() if isinstance(v, torch.Tensor) else v for v in recorded)]
        wanted = [v for v in (*inputs, *subject.parameters) if isinstance(v, torch.Tensor) and v.requires_grad]

        def step() -> None:
            with torch.set_grad_enabled(training):
                out = function(*inputs)
                ends = [o for o in (out if isinstance(out, (tuple, list)) else [out])
                        if isinstance(o, torch.Tensor) and o.requires_grad]
                if training and ends and wanted:
                    torch.autograd.grad(ends, wanted, [torch.ones_like(o) for o in ends], allow_unused=True)

        return step

    return one(subject.original), one(subject.replacement)


def _whole_graph_check(gm: fx.GraphModule, changed: fx.GraphModule, inputs: Sequence[Any], context: PassContext,
                       settings: CompileSettings, report: Report) -> fx.GraphModule:
    """The changed graph when it agrees with the original on the example inputs, else the original."""
    if not settings.check or any(not p.lossless for p in ordered_passes(settings, "graph")):
        return changed
    try:
        with report.phase("check"):
            subject = Subject(gm, changed, regions.in_float64(gm))
            wrong = watched(lambda: check(subject, inputs, backward=context.training), settings, report)
    except TimeUp as error:
        report.note(f"whole-graph check skipped: {error}")
        return changed
    except Exception as error:
        wrong = _error(error)
    if not wrong:
        return changed
    for each in ordered_passes(settings, "graph"):
        report.dropped(each.name, f"the whole graph differs: {wrong}", "whole graph")
    return gm


def record_row(report: Report, name: str, candidate: Candidate, verdict: Verdict) -> None:
    """Add a candidate and its verdict to the report."""
    timing, predicted = verdict.timing, candidate.predicted
    report.candidate(name, CandidateRow(
        where(candidate), "dropped" if verdict.reason else "kept", verdict.reason, candidate.key,
        predicted_before_s=predicted.before_s, predicted_after_s=predicted.after_s,
        measured_before_s=timing.before_s if timing else None, measured_after_s=timing.after_s if timing else None))


def where(candidate: Candidate) -> str:
    """The region in a few words."""
    region = candidate.region
    if isinstance(region, str):
        return region
    names = [n.name for n in region]
    shown = ", ".join(names[:3]) + (f", … ({len(names)} nodes)" if len(names) > 3 else "")
    return f"{candidate.description}: {shown}" if candidate.description else shown


def _tupled(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    def run(*args: Any) -> tuple[Any, ...]:
        out = function(*args)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    return run


def _error(error: BaseException) -> str:
    return str(error) if isinstance(error, TimeUp) else f"raised {type(error).__name__}: {first_line(error)}"
