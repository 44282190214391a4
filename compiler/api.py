"""`meshwright.compile` and `meshwright.load`: the calls users type."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..passes.registry import check_name
from ..runtime import torch_compat
from ..runtime.errors import InvalidInputError
from ..runtime.module import CompiledState, compiled_module, plain, state_of
from . import backend, guard
from .examples import Example, read_example
from .preserve import cloned, preserved
from .quantized import refuse_quantized
from .report import Report
from .settings import CompileSettings, PassSpec, resolve

M = TypeVar("M", bound=nn.Module)
SETTLING_CALLS = 3  # after these, candidates.Contest knows the faster of Inductor and us
RECOMPILE_LIMIT = 64  # batch and sequence of 0, 1 and more, times train/eval, times cache/no cache, …


def compile(model: M, example_inputs: Any = None, *, passes: Iterable[PassSpec] | PassSpec | None = None,
            disable: Iterable[str] | str | None = None, mode: str | None = None,
            options: Mapping[str, Any] | None = None, time_limit_s: float | None = None, dynamic: bool | None = None,
            strict: bool | None = None) -> M:
    """A faster `model`: same class, same Parameters, same results within rounding; trainable.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of `forward`; with them compilation
    happens now (one run of the model that leaves random state, buffers and the inputs untouched), without them at the
    first call. passes: names or `Pass` objects, default all lossless ones. disable: pass names, or "name:pattern" for
    modules whose qualified name matches the shell pattern. mode: "default", or "max" to also try Inductor per graph.
    time_limit_s: seconds that passes, checks and measurements may take together. dynamic: trace with symbolic sizes
    (default True). options: the same as a dict, as `torch.compile(backend="meshwright", options=…)` takes it.

    The result has `.report`, `.kernels` and `.save(directory)`; where the model has attributes of these names, use
    `.meshwright.report` and so on. Weights edited through `.data` need `meshwright.refresh(model)`.

    Raises `InvalidInputError` (a non-module, example inputs the model itself rejects, bad options), `UnknownNameError`
    (with the nearest name) and `UnsupportedError` (an already quantized model). Failures inside Meshwright are no
    errors: the region runs eagerly, with a warning, unless `strict` or MESHWRIGHT_STRICT=1.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"a {type(model).__name__}", expected="a torch.nn.Module",
                                do="For a function use torch.compile(function, backend='meshwright').")
    settings = resolve(options, passes=passes, disable=disable, mode=mode, time_limit_s=time_limit_s, dynamic=dynamic,
                       strict=strict)
    _check_names(settings)
    source = plain(model)
    refuse_quantized(source)
    example = read_example(source, example_inputs)
    compiled = _build(source, settings, example)
    if example is not None:
        _compile_now(compiled, source, example, settings)
    return compiled  # type: ignore[return-value]


def _check_names(settings: CompileSettings) -> None:
    for spec in settings.passes or ():
        if isinstance(spec, str):
            check_name(spec)
    for entry in settings.disable:
        name = entry.partition(":")[0]
        if not any(not isinstance(p, str) and p.name == name for p in settings.passes or ()):
            check_name(name)


def _build(source: nn.Module, settings: CompileSettings, example: Example | None) -> nn.Module:
    from .module_passes import run_module_passes

    report = Report(type(source).__name__)
    source = run_module_passes(source, example, settings, report)

    def make(copied: nn.Module) -> nn.Module:
        return _build(copied, settings, None)

    def save(module: nn.Module, directory: str | Path) -> None:
        from .artifact import save_artifact

        save_artifact(module, example, directory)

    call = _compiled_call(source, settings, report)
    return compiled_module(source, CompiledState(type(source), call, report, save, make))


def _compiled_call(source: nn.Module, settings: CompileSettings, report: Report) -> Callable[..., Any]:
    """The function a compiled module runs: the model's forward under torch.compile, failures handled."""
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


def _compile_now(compiled: nn.Module, source: nn.Module, example: Example, settings: CompileSettings) -> None:
    """Run the example once. In training mode with gradients, so that what is compiled is what the first step runs."""
    training = source.training and any(p.requires_grad for p in source.parameters())
    state = state_of(compiled)
    assert state is not None
    with preserved(source), preserved(compiled), torch.set_grad_enabled(training):
        try:
            for _ in range(SETTLING_CALLS if settings.mode == "max" else 1):
                state.call(compiled, *cloned(example.args), **cloned(example.kwargs))
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


def load(directory: str | Path) -> nn.Module:
    """The module that `compiled.save(directory)` wrote: bit-equal outputs, without the model's class.

    Nothing in the directory is executed: the kernel IR and the launch list are parsed, verified and printed anew.
    Raises `ArtifactError` for a damaged artifact or one of another version, architecture or instruction set.
    """
    from .artifact_load import load_artifact

    return load_artifact(directory)


def refresh(model: nn.Module) -> None:
    """Say that weights of `model` were edited through `.data`: packed copies of them are made anew at the next call.

    Every other change (in place, by an optimizer, by `load_state_dict`) is noticed without this.
    """
    from ..runtime import packing

    packing.refresh([*model.parameters(), *model.buffers()])
