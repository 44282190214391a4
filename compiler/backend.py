"""`torch.compile(model, backend="meshwright")`, and the path from Dynamo's graph to compiled code, for both entries.

    Dynamo graph → graph-level passes (`pipeline`) → AOTAutograd → the ATen engine (`aten`), once each for the
    forward, backward and inference graph.

Every stage may fail; each failure runs its own region eagerly (see `guard`).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..runtime import torch_compat
from ..runtime.locks import ForkSafeLock
from .guard import Boxed, GuardedGraph, describe, eager_boxed, fall_back
from .report import GraphKind, Report
from .settings import CompileSettings, resolve

if TYPE_CHECKING:
    from .aten import CompiledGraph
    from .kept_graph import Keeper

log = logging.getLogger(__name__)

_graph_numbers = itertools.count()
_recent: deque[Report] = deque(maxlen=64)
_recent_guard = ForkSafeLock()


def meshwright(gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
               options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The Dynamo backend. `mode` is "default" or "max"; `options` are the fields of `CompileSettings`.

    Each graph gets a report of its own, see `recent_reports()`.
    """
    settings = resolve(options, mode=mode)
    report = Report(f"graph {next(_graph_numbers)}")
    with _recent_guard:
        _recent.append(report)
    return compile_graph(gm, example_inputs, settings, report)


def recent_reports() -> list[Report]:
    """Reports of the last 64 graphs compiled through `torch.compile(backend="meshwright")`, oldest first."""
    with _recent_guard:
        return list(_recent)


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompileSettings,
                  report: Report) -> Callable[..., Any]:
    """A callable that stands for `gm`. Never raises because of Meshwright unless `settings.strict`."""
    where = describe(gm)
    _report_break(gm, report)
    report.add_dynamo(torch_compat.compile_started_ns())
    _start_compiler(example_inputs, settings)
    try:
        known = len(report.graphs)
        ours = compile_with_aot(gm, example_inputs, settings, report)
        if settings.mode == "max":
            from .candidates import fastest

            return fastest(gm, example_inputs, report, ours, report.graphs[known:])
        return ours
    except torch_compat.control_flow_exceptions():
        raise
    except Exception as error:
        if settings.strict:
            raise
        fall_back(report, where, error)
        return gm.forward


def _start_compiler(example_inputs: Sequence[Any], settings: CompileSettings) -> None:
    """Let the C++ compiler work on what every CPU graph needs while this one is traced."""
    elsewhere = any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in example_inputs)
    if not elsewhere and settings.target in (None, "cpu"):
        from ..codegen.program_cpp_run import start_host_library

        start_host_library()


def compile_with_aot(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompileSettings,
                     report: Report) -> Callable[..., Any]:
    """Our own leg: passes, AOTAutograd, the ATen engine."""
    from ..codegen.lowering import decompositions
    from .kept_graph import keeper_of
    from .pipeline import run_graph_passes

    keeper = keeper_of(gm, example_inputs, settings, report)
    known = keeper.start(example_inputs) if keeper is not None else None
    if known is not None:
        return known
    gm = run_graph_passes(gm, example_inputs, settings, report)
    started, others = time.perf_counter(), sum(report.phases.values())
    try:
        compiled = torch_compat.aot_autograd(
            gm, example_inputs, forward=_compiler("forward", settings, report),
            backward=_compiler("backward", settings, report),
            inference=_compiler("inference", settings, report, keeper), decompositions=decompositions())
    finally:
        inner = sum(report.phases.values()) - others
        report.add_seconds("aot", max(0.0, time.perf_counter() - started - inner))
    if keeper is not None:
        keeper.traced()
    return compiled


def _compiler(kind: GraphKind, settings: CompileSettings, report: Report,
              keeper: Keeper | None = None) -> Callable[..., Boxed]:
    """The compiler AOTAutograd calls for one kind of graph. `keeper` writes down what it compiled."""

    def compile_one(aten: fx.GraphModule, fake_inputs: Sequence[Any]) -> Boxed:
        where = f"{kind} graph of {describe(aten)}"
        known = len(report.graphs)
        try:
            call = _engine()(aten, fake_inputs, kind=kind, settings=settings, report=report)
        except torch_compat.control_flow_exceptions():
            raise
        except Exception as error:
            if settings.strict:
                raise
            fall_back(report, where, error)
            return torch_compat.mark_boxed(eager_boxed(aten))
        if keeper is not None and torch_compat.is_plain_inference(aten):
            call.on_ready = keeper.keep
        entry = report.graphs[known] if len(report.graphs) > known else None
        guarded = GuardedGraph(call, aten, where=where, settings=settings, report=report, entry=entry,
                               keeps_arguments=kind != "backward")
        return torch_compat.mark_boxed(guarded)

    return compile_one


def _engine() -> Callable[..., CompiledGraph]:
    """The ATen engine, imported at the first compilation."""
    from .aten import compile_aten_graph

    return compile_aten_graph


def _report_break(gm: fx.GraphModule, report: Report) -> None:
    found = torch_compat.break_reason(gm)
    if found is not None:
        report.region(found.reason, found.file, found.line)


def real_inputs(example_inputs: Sequence[Any]) -> bool:
    """True when every tensor among the inputs has data (DDP's optimizer and exports hand over fake ones)."""
    return not any(isinstance(x, torch.Tensor) and torch_compat.is_fake(x) for x in example_inputs)
