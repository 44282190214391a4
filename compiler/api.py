"""`meshwright.compile` and `meshwright.load`: the calls users type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import jit, nn

from ..runtime.errors import InvalidInputError
from ..runtime.module import CompiledState, compiled_module, plain, state_of
from .capture import captured_call, run_example
from .examples import Example, read_example
from .quantized import refuse_quantized
from .report import Report
from .settings import CompileSettings, PassSpec, resolve

M = TypeVar("M", bound=nn.Module)


def compile(model: M, example_inputs: Any = None, *, passes: Iterable[PassSpec] | PassSpec | None = None,
            disable: Iterable[str] | str | None = None, mode: str | None = None,
            options: Mapping[str, Any] | None = None, time_limit_s: float | None = None, dynamic: bool | None = None,
            strict: bool | None = None) -> M:
    """A faster `model`: of the model's class (a subclass of its name), same Parameters, same results within rounding;
    trainable.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of `forward`; with them compilation
    happens now (one run of the model that leaves random state, buffers and the inputs untouched), without them at the
    first call. passes: names or `Pass` objects, default all lossless ones. disable: pass names, or "name:pattern" for
    modules whose qualified name matches the shell pattern, and all in them. mode: "default", or "max" to also try
    Inductor per graph. time_limit_s: seconds that passes, kernels, checks and measurements may take together (tracing
    comes on top). dynamic: trace with symbolic sizes (default True). options: the same as a dict, as
    `torch.compile(backend="meshwright", options=…)` takes it.

    The result has `.report`, `.kernels` and `.save(directory)`; where the model has attributes of these names, use
    `.meshwright.report` and so on. Weights edited through `.data` need `meshwright.refresh(model)`.

    Raises `InvalidInputError` (a non-module, example inputs the model itself rejects, bad options), `UnknownNameError`
    (with the nearest name) and `UnsupportedError` (an already quantized model). Failures inside Meshwright are no
    errors: the region runs eagerly, with a warning, unless `strict` or MESHWRIGHT_STRICT=1.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"a {type(model).__name__}", expected="a torch.nn.Module", do=(
            "Call the class first." if isinstance(model, type) else
            "For a function use torch.compile(function, backend='meshwright')." if callable(model) else ""))
    if isinstance(model, jit.ScriptModule):
        raise InvalidInputError(f"a {type(model).__name__}", expected="a torch.nn.Module in Python",
                                do="Compile the module that was scripted or traced.")
    settings = resolve(options, passes=passes, disable=disable, mode=mode, time_limit_s=time_limit_s, dynamic=dynamic,
                       strict=strict)
    source = plain(model)
    refuse_quantized(source)
    example = read_example(source, example_inputs)
    compiled = _build(source, settings, example)
    if example is not None:
        state = state_of(compiled)
        assert state is not None
        run_example(state.call, compiled, source, example, settings)
    return compiled  # type: ignore[return-value]


def _build(source: nn.Module, settings: CompileSettings, example: Example | None) -> nn.Module:
    from .module_passes import run_module_passes

    report = Report(type(source).__name__)
    source = run_module_passes(source, example, settings, report)

    def make(copied: nn.Module) -> nn.Module:
        return _build(copied, settings, None)

    def save(module: nn.Module, directory: str | Path) -> None:
        from .artifact import save_artifact

        save_artifact(module, example, directory)

    call = captured_call(source, settings, report)
    return compiled_module(source, CompiledState(type(source), call, report, save, make))


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
