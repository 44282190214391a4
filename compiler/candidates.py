"""`mode="max"`: Inductor competes for every Dynamo graph, and the faster of the two stays.

Both sides compile the same graph. The first calls run ours and time nothing (it is still accepting kernels); then both
are timed on copies of the inputs of a real call, interleaved: forward alone, or forward and backward together when
gradients are wanted. Only this module imports Inductor, so the default mode never does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..runtime import torch_compat
from .guard import first_line
from .measure import Timing, compare
from .pipeline import copied_graph
from .preserve import preserved
from .report import CandidateRow, GraphReport, Report

log = logging.getLogger(__name__)
_WARM_CALLS = 2  # the first accepts kernels, the second builds what is left


def fastest(gm: fx.GraphModule, example_inputs: Sequence[Any], report: Report, ours: Callable[..., Any],
            entries: Sequence[GraphReport]) -> Callable[..., Any]:
    """A callable that settles, on an early call, for `ours` or Inductor's version of `gm`."""
    with report.phase("inductor"):
        try:
            theirs = torch_compat.compile_with_inductor(copied_graph(gm), example_inputs)
        except torch_compat.control_flow_exceptions():
            raise
        except Exception as error:
            report.note(f"Inductor failed on this graph ({type(error).__name__}: {first_line(error)})")
            return ours
    return Contest(ours, theirs, gm, report, entries)


class Contest:
    """Runs ours until both have been timed, then the winner."""

    def __init__(self, ours: Callable[..., Any], theirs: Callable[..., Any], gm: fx.GraphModule,
                 report: Report, entries: Sequence[GraphReport]) -> None:
        self.ours, self.theirs, self.gm = ours, theirs, gm
        self.report, self.entries = report, entries
        self._calls = 0
        self._winner: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        if self._winner is not None:
            return self._winner(*args)
        self._calls += 1
        if self._calls > _WARM_CALLS and self._lock.acquire(blocking=False):
            try:
                if self._winner is None:
                    self._winner = self._settle(args)
                return self._winner(*args)
            finally:
                self._lock.release()
        return self.ours(*args)

    def _settle(self, args: Sequence[Any]) -> Callable[..., Any]:
        training = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        try:
            with preserved(), self.report.phase("measure"):
                wrong = self._disagreement(args)
                timing = compare(_step(self.ours, args, training), _step(self.theirs, args, training), device=device)
        except Exception as error:
            self.report.note(f"Inductor's version was not timed ({type(error).__name__}: {first_line(error)})")
            return self.ours
        chosen = not wrong and timing.faster
        self._record(timing, "" if chosen else wrong or "Inductor is not faster")
        return self.theirs if chosen else self.ours

    def _disagreement(self, args: Sequence[Any]) -> str | None:
        """Inductor's results against eager's, a loose sanity check: it is torch's own compiler."""
        with torch.no_grad():
            state = torch.get_rng_state()
            got = torch_compat.tree_leaves(self.theirs(*_copies(args)))
            torch.set_rng_state(state)
            eager = torch_compat.tree_leaves(self.gm.forward(*_copies(args)))
        return _disagreement(got, eager)

    def _record(self, timing: Timing, reason: str) -> None:
        for graph in self.entries:
            graph.chosen = graph.chosen if reason else "inductor"
        self.report.candidate("inductor", CandidateRow(
            "whole graph", "dropped" if reason else "kept", reason, measured_before_s=timing.before_s,
            measured_after_s=timing.after_s))


def _disagreement(got: Sequence[Any], eager: Sequence[Any]) -> str | None:
    for i, (g, e) in enumerate(zip(got, eager, strict=True)):
        if not isinstance(e, torch.Tensor):
            continue
        try:
            torch.testing.assert_close(g, e, rtol=_LOOSE.get(e.dtype, 1e-3), atol=_LOOSE.get(e.dtype, 1e-3),
                                       equal_nan=True, check_stride=False)
        except AssertionError as error:
            return f"Inductor's output {i} differs from eager: {first_line(error)}"
    return None


_LOOSE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


def _copies(args: Sequence[Any]) -> list[Any]:
    """Parameters as they are (no graph of the supported kind writes to them), everything else cloned. Outside of
    inference mode: of buffers that are inference tensors no packed copy could be kept, and every call would pack."""
    with torch.inference_mode(False):
        return [a.detach().clone().requires_grad_(a.requires_grad)
                if isinstance(a, torch.Tensor) and not isinstance(a, torch.nn.Parameter) else a for a in args]


def _step(function: Callable[..., Any], args: Sequence[Any], training: bool) -> Callable[[], None]:
    inputs = _copies(args)
    wanted = [a for a in inputs if isinstance(a, torch.Tensor) and a.requires_grad]

    def step() -> None:
        outputs = torch_compat.tree_leaves(function(*inputs))
        ends = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
        if training and ends and wanted:
            torch.autograd.grad(ends, wanted, [torch.ones_like(o) for o in ends], allow_unused=True)

    return step
