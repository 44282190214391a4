"""Capture: from a model and its calls to the graphs that everything else works on.

Dynamo traces `forward` at a call, cuts it where it meets code it can't trace, and hands each piece to our backend
(`backend.compile_graph`). One wrapper function around `forward` is compiled per model, with

* symbolic sizes from the start, so that no second compile follows except for sizes 0 and 1;
* a code object of its own (see `_eager_call`);
* whatever is on at the call (autocast, inference mode, train or eval, gradients) as part of Dynamo's guards: each
  combination is captured when it first occurs.

The model runs as it is: hooks, gradient checkpointing and `generate` need nothing here. What was cut out and why is
reported by file and line.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..runtime import torch_compat
from ..runtime.errors import InvalidInputError
from . import backend, guard
from .examples import Example
from .preserve import cloned, preserved
from .report import Report
from .settings import CompileSettings

SETTLING_CALLS = 3  # after these, candidates.Contest knows the faster of Inductor and us
RECOMPILE_LIMIT = 64  # batch and sequence of 0, 1 and more, times train/eval, times cache/no cache, …


def captured_call(source: nn.Module, settings: CompileSettings, report: Report) -> Callable[..., Any]:
    """The function a compiled module runs, `call(module, *args, **kwargs)`: the model's forward under Dynamo.

    Regions that can't be captured run eagerly and are named in `report` with file, line and reason. A failure of ours
    runs the whole model eagerly from then on, unless `settings.strict` or a part of it has run already.
    """
    eager = _eager_call(source)

    def our_backend(gm: Any, inputs: Any) -> Callable[..., Any]:
        return backend.compile_graph(gm, inputs, settings, report)

    keywords: dict[str, Any] = {"backend": our_backend, "dynamic": True if settings.dynamic else None}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        keywords["recompile_limit"] = RECOMPILE_LIMIT
    compiled = torch.compile(eager, **keywords)
    chosen = [compiled]

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        runs, breaks = guard.runs(), torch_compat.break_reasons_so_far()
        try:
            if settings.dynamic and not any(isinstance(a, float) for a in (*args, *kwargs.values())):
                with torch_compat.specializing_floats():
                    return chosen[0](module, *args, **kwargs)
            return chosen[0](module, *args, **kwargs)
        except torch_compat.dynamo_exceptions() as error:
            cause = torch_compat.backend_failure(error)
            if settings.strict or guard.runs() != runs:  # a part has run: starting over could repeat its effects
                raise cause from None
            out = eager(module, *args, **kwargs)  # a mistake in the call shows itself here, in the model's own words
            guard.fall_back(report, type(module).__name__, cause)
            chosen[0] = eager
            return out
        finally:
            if torch_compat.break_reasons_so_far() != breaks:  # also frames that hold no graph, which no backend sees
                for found in torch_compat.break_reasons_since(breaks):
                    report.region(found.reason, found.file, found.line)

    return call


def _eager_call(source: nn.Module) -> Callable[..., Any]:
    """`forward` as a function of the module, with a code object of its own.

    Dynamo keeps compiled code, and counts recompilations, per code object: models of one class must not share it.
    """
    if "forward" in source.__dict__:  # set on the instance, by hook libraries
        bound = source.__dict__["forward"]

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return bound(*args, **kwargs)
    else:
        forward = type(source).forward

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(module, *args, **kwargs)

    fresh = types.FunctionType(run.__code__.replace(), run.__globals__, "forward", run.__defaults__, run.__closure__)
    return functools.wraps(type(source).forward)(fresh)


def run_example(call: Callable[..., Any], compiled: nn.Module, source: nn.Module, example: Example,
                settings: CompileSettings) -> None:
    """Capture now, by running the example. In training mode with gradients, so that what is compiled is what the first
    step runs. Random state, buffers and attributes are left as they were.

    Raises `InvalidInputError` when the model itself fails on the example.
    """
    training = source.training and any(p.requires_grad for p in source.parameters())
    with preserved(source), preserved(compiled), torch.set_grad_enabled(training):
        try:
            for _ in range(SETTLING_CALLS if settings.mode == "max" else 1):
                call(compiled, *cloned(example.args), **cloned(example.kwargs))
        except Exception as error:
            _blame_example(source, example, error)
            raise


def _blame_example(source: nn.Module, example: Example, error: Exception) -> None:
    """Raise `InvalidInputError` when the model itself fails on the example inputs too."""
    try:
        with torch.no_grad():
            source(*cloned(example.args), **cloned(example.kwargs))
    except Exception as own:
        raise InvalidInputError(
            f"{type(source).__name__} fails on these example_inputs, also without Meshwright "
            f"({type(own).__name__}: {guard.first_line(own)})",
            expected="inputs the model accepts") from error
