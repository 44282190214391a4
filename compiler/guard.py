"""Falling back: a failure of ours never reaches a user whose model works eagerly.

`GuardedGraph` stands between AOTAutograd and a compiled graph. When the compiled call raises, the graph runs eagerly
instead, from then on, with one warning that says why. A graph that writes into its inputs is copied before its first
run, so that a failure half way can be undone; a later failure of such a graph is raised, because its inputs may be
half written.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..runtime.errors import MeshwrightWarning
from ..runtime.locks import ForkSafeLock
from ..runtime.torch_compat import is_view
from .report import GraphReport, Report
from .settings import CompileSettings

log = logging.getLogger(__name__)
_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+)', re.MULTILINE)
Boxed = Callable[[list[Any]], Any]


def fall_back(report: Report, where: str, error: BaseException) -> None:
    """Record and warn, once per reason, that `where` runs eagerly because of `error`."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    known = len(report.fall_backs)
    report.region(reason, file=where, kind="fall-back")
    log.debug("%s falls back to eager", where, exc_info=error)
    if len(report.fall_backs) > known:
        warnings.warn(MeshwrightWarning(
            f"{where} runs eagerly because Meshwright failed on it ({reason}). The results are right, only not faster; "
            "MESHWRIGHT_STRICT=1 raises the error instead."), stacklevel=3)


def describe(gm: fx.GraphModule) -> str:
    """`file:line` where the user's code begins to make this graph, or its name."""
    for node in gm.graph.nodes:
        trace = node.meta.get("stack_trace") if node.op == "call_function" else None
        frames = _FRAME.findall(trace or "")
        users = [(file, line) for file, line in frames if Path(file).parent != Path(__file__).parent]
        if users:
            return ":".join(users[-1])
    return type(gm).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next((ln.strip() for ln in str(error).splitlines() if ln.strip()), "no message")


def eager_boxed(gm: fx.GraphModule) -> Boxed:
    """`gm` under the boxed convention."""

    def run(args: list[Any]) -> Any:
        taken = list(args)
        args.clear()
        return gm.forward(*taken)

    return run


def written_inputs(gm: fx.GraphModule) -> tuple[int, ...]:
    """Positions of the inputs an ATen graph writes into (`copy_` and other mutating operators, seen through views)."""
    positions = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    roots = {_root(n) for node in gm.graph.nodes for n in written_arguments(node)}
    return tuple(sorted(positions[root] for root in roots & positions.keys()))


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes that an operator's schema says it writes into."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    names = [a.name for a in schema.arguments]
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    pairs = [*zip(names, node.args, strict=False), *node.kwargs.items()]
    return [n for name, arg in pairs if name in written for n in _nodes(arg)]


def _nodes(arg: Any) -> list[fx.Node]:
    if isinstance(arg, fx.Node):
        return [arg]
    return [n for item in arg for n in _nodes(item)] if isinstance(arg, (list, tuple)) else []


def _root(node: fx.Node) -> fx.Node:
    """The placeholder or operator whose memory `node` is (a view of)."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node) and is_view(node.target):
        node = node.args[0]
    return node


@dataclass(frozen=True)
class GraphCall:
    """One run of one compiled graph: the ATen graph, its report entry, inputs and outputs in the graph's own order."""

    gm: fx.GraphModule
    entry: GraphReport | None
    inputs: list[Any]
    outputs: list[Any]


_runs = 0


def runs() -> int:
    """How many compiled graphs have been started in this process (a hint: counted without a lock)."""
    return _runs


_recorder: Callable[[GraphCall], None] | None = None


@contextmanager
def recording() -> Iterator[list[GraphCall]]:
    """Collect the calls of compiled graphs during the `with` body (`save` learns from them how arguments map)."""
    global _recorder
    calls: list[GraphCall] = []
    _recorder = calls.append
    try:
        yield calls
    finally:
        _recorder = None


class GuardedGraph:
    """A compiled graph (boxed callable) that turns into the eager one when it fails."""

    def __init__(self, call: Boxed, gm: fx.GraphModule, *, where: str, settings: CompileSettings, report: Report,
                 entry: GraphReport | None = None, keeps_arguments: bool = True) -> None:
        self._call, self._gm, self._where = call, gm, where
        self._settings, self._report, self._entry = settings, report, entry
        self._written = written_inputs(gm)
        self._keeps = keeps_arguments
        self._tried = False
        self._guard = ForkSafeLock()

    def __call__(self, args: list[Any]) -> Any:
        global _runs
        _runs += 1
        if _recorder is None:
            return self._run(args)
        given = list(args)
        out = self._run(args)
        _recorder(GraphCall(self._gm, self._entry, given, list(out)))
        return out

    def _run(self, args: list[Any]) -> Any:
        if self._settings.strict or (self._tried and not self._keeps):
            return self._call(args)
        kept = list(args)  # the callee may empty `args`
        undo = self._snapshot(kept) if not self._tried else None
        try:
            out = self._call(args)
        except Exception as error:
            return self._recover(error, kept, undo)
        self._tried = True
        return out

    def _snapshot(self, args: Sequence[Any]) -> Callable[[], None]:
        copies = [(args[i], args[i].detach().clone()) for i in self._written if isinstance(args[i], torch.Tensor)]
        devices = {a.device for a in args if isinstance(a, torch.Tensor) and a.device.type == "cuda"}
        cpu_state = torch.get_rng_state()
        cuda_states = [(d, torch.cuda.get_rng_state(d)) for d in devices]

        def undo() -> None:
            torch.set_rng_state(cpu_state)
            for device, state in cuda_states:
                torch.cuda.set_rng_state(state, device)
            with torch.no_grad():
                for tensor, copy in copies:
                    tensor.copy_(copy)

        return undo

    def _recover(self, error: Exception, args: list[Any], undo: Callable[[], None] | None) -> Any:
        if undo is None and self._written:
            raise error  # inputs may be half written: an eager run would start from wrong values
        if undo is not None:
            undo()
        eager = eager_boxed(self._gm)
        out = eager(args)  # a mistake in the call (an index out of range) shows itself here and is no failure of ours
        with self._guard:
            self._call, self._tried = eager, True
            if self._entry is not None:
                self._entry.state, self._entry.chosen = "fallen back", "eager"
        fall_back(self._report, self._where, error)
        return out
