"""`compiled.save(directory)`: from one run of the example to files that hold a program, not a model.

The compiled inference graph runs once on the example inputs while its arguments and results are recorded. Which
argument is which input, Parameter or size, and which result is which output, is read off by identity.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx, nn

from ..runtime.artifact_files import FORMAT, Leaf, Manifest, Source, Weight, write_artifact
from ..runtime.errors import UnsupportedError
from ..runtime.isa import current_isa
from ..runtime.module import state_of
from ..runtime.program import Program, SymbolInput, TensorSpec
from ..runtime.structure import flatten
from .examples import Example
from .guard import GraphCall, recording
from .preserve import cloned, preserved

_PLAIN = (bool, int, float, str, type(None))


def save_artifact(module: nn.Module, example: Example | None, directory: str | Path) -> None:
    """Write the compiled inference program of `module` (in eval mode) to `directory`.

    Raises `UnsupportedError` when there was no example, the model has graph breaks or fell back, or an argument or
    result is something other than a tensor or a plain value.
    """
    if example is None:
        _refuse("a model compiled without example_inputs can't be saved", "Pass example_inputs to meshwright.compile.")
    arguments = _by_name(module, example)
    call, leaves, outputs, structure = _run(module, arguments)
    program = call.entry.program if call.entry is not None else None
    if program is None:
        _refuse("the model did not become one program", "Its report says which regions run eagerly.")
    writer = _Writer(module, program, call, leaves)
    sources, results = writer.inputs(), writer.outputs(outputs)
    isa = current_isa().name if program.device == "cpu" else ""
    from .. import __version__

    leaf_structure = flatten(arguments)[1]
    manifest = Manifest(
        format=FORMAT, meshwright=__version__, torch=torch.__version__, device=program.device,
        machine=platform.machine().lower(), isa=isa, model=type(module).__name__, parameters=_parameters(module),
        arguments=list(arguments), argument_structure=leaf_structure, leaves=writer.leaves(), inputs=sources,
        outputs=results, output_structure=structure, ranges=writer.ranges(),
        weights={k: Weight(shape=list(w.shape), strides=list(w.stride())) for k, w in writer.weights.items()},
        timings=call.entry.timings if call.entry is not None else {}, checksums={})
    write_artifact(Path(directory), manifest, program, writer.weights, _sources(module, call))


def _refuse(what: str, do: str = "") -> NoReturn:
    raise UnsupportedError(what, do=do)


def _parameters(module: nn.Module) -> list[str]:
    return [n for n, p in inspect.signature(module.forward).parameters.items()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _by_name(module: nn.Module, example: Example) -> dict[str, Any]:
    """The example's arguments by name. Raises `UnsupportedError` for `*args`."""
    bound = inspect.signature(module.forward).bind(*example.args, **example.kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            _refuse(f"{type(module).__name__}.forward takes *{name}, which can't be saved")
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _run(module: nn.Module, arguments: dict[str, Any]) -> tuple[GraphCall, list[Any], list[Any], dict[str, Any]]:
    """Run twice (the first run may still be accepting kernels), recording the second."""
    state = state_of(module)
    assert state is not None
    was_training = {m: m.training for m in module.modules()}
    try:
        module.eval()
        with preserved(module), torch.no_grad():
            state.call(module, **cloned(arguments))
            given = cloned(arguments)
            leaves = flatten(given)[0]
            with recording() as calls:
                result = state.call(module, **given)
    finally:
        for m, training in was_training.items():
            m.training = training
    if state.report.fall_backs:
        _refuse(f"the model falls back to eager ({state.report.fall_backs[0].reason}) and can't be saved")
    if state.report.graph_breaks or len(calls) != 1:
        found = state.report.graph_breaks
        why = f": {found[0].file}:{found[0].line}: {found[0].reason}" if found else ""
        _refuse(f"the model runs as {len(calls)} graphs with graph breaks between them{why}; only a model that is one "
                "graph can be saved", "Remove the graph breaks that its report names.")
    values, structure = flatten(result)
    return calls[0], leaves, values, structure


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
                      and a.dtype == b.dtype and a.numel() > 0)


@dataclass
class _Writer:
    """Finds out where every value comes from; collects the weights it meets."""

    module: nn.Module
    program: Program
    call: GraphCall
    given: Sequence[Any]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        state = {**dict(self.module.named_parameters(remove_duplicate=False)),
                 **dict(self.module.named_buffers(remove_duplicate=False))}
        self.named = {k: v.detach() for k, v in state.items()}
        gm = self.call.gm
        extra = [getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"]
        self.actual = [*self.call.inputs, *extra]
        self.symbols_of_leaf: dict[tuple[int, int], str] = {}
        self.placeholders = [n for n in self.call.gm.graph.nodes if n.op == "placeholder"]

    def inputs(self) -> list[Source]:
        """A `Source` for every input of the program."""
        found = [self._input(i, item) for i, item in enumerate(self.program.inputs)]
        return [self._size(item) if source is None else source
                for item, source in zip(self.program.inputs, found, strict=True)]

    def _input(self, i: int, item: TensorSpec | SymbolInput) -> Source | None:
        value = self.actual[i]
        if isinstance(item, SymbolInput):
            return None
        for k, leaf in enumerate(self.given):
            if isinstance(leaf, torch.Tensor) and _same_memory(leaf, value):
                self._note_symbols(k, item)
                return Source(kind="input", index=k)
        return Source(kind="weight", name=self._weight(value))

    def _note_symbols(self, leaf: int, spec: TensorSpec) -> None:
        for d, size in enumerate(spec.shape):
            if isinstance(size, str):
                self.symbols_of_leaf[leaf, d] = size

    def _weight(self, value: torch.Tensor) -> str:
        for name, weight in self.named.items():
            if _same_memory(weight, value):
                return self._keep(name.replace(".", "__"), weight)
        return self._keep(f"constant_{len(self.weights)}", value.detach())

    def _keep(self, name: str, value: torch.Tensor) -> str:
        self.weights[name] = value
        return name

    def _size(self, item: TensorSpec | SymbolInput) -> Source:
        """Where an integer argument comes from: the size of an input of this symbol, else it is a constant."""
        position = next(i for i, other in enumerate(self.program.inputs) if other is item)
        symbol = _symbol_text(self.placeholders[position]) if position < len(self.placeholders) else ""
        for (leaf, dim), text in self.symbols_of_leaf.items():
            if symbol and text == symbol:
                return Source(kind="size", index=leaf, dim=dim)
        value = self.actual[position]
        return Source(kind="value", value=None if value is None else int(value))

    def outputs(self, results: Sequence[Any]) -> list[Source]:
        """A `Source` for every leaf of the model's result."""
        return [self._output(i, r) for i, r in enumerate(results)]

    def _output(self, i: int, result: Any) -> Source:
        if not isinstance(result, torch.Tensor):
            if isinstance(result, _PLAIN):
                return Source(kind="value", value=result)
            _refuse(f"output {i} is a {type(result).__name__}, which can't be saved",
                    "Return tensors and plain values only (for Hugging Face models: use_cache=False).")
        for k, out in enumerate(self.call.outputs):
            if isinstance(out, torch.Tensor) and _same_memory(result, out):
                return Source(kind="output", index=k)
        for k, leaf in enumerate(self.given):
            if isinstance(leaf, torch.Tensor) and _same_memory(result, leaf):
                return Source(kind="input", index=k)
        for name, weight in self.named.items():
            if _same_memory(result, weight):
                return Source(kind="weight", name=self._keep(name.replace(".", "__"), weight))
        _refuse(f"output {i} is a view that is made outside of the compiled graph, which can't be saved")

    def leaves(self) -> list[Leaf]:
        """What the example's leaves must look like."""
        return [self._leaf(i, v) for i, v in enumerate(self.given)]

    def _leaf(self, i: int, value: Any) -> Leaf:
        if isinstance(value, torch.Tensor):
            shape = [self.symbols_of_leaf.get((i, d), int(n)) for d, n in enumerate(value.shape)]
            return Leaf(tensor=True, dtype=str(value.dtype).removeprefix("torch."), shape=shape)
        if isinstance(value, _PLAIN):
            return Leaf(tensor=False, value=value)
        _refuse(f"argument leaf {i} is a {type(value).__name__}, which can't be saved",
                "Use tensors and plain values as example_inputs.")

    def ranges(self) -> dict[str, list[int]]:
        """Smallest and largest value of every symbol, as Dynamo's guards leave them; one value where a guard relates
        a symbol to others in a way that is not a range."""
        found: dict[str, list[int]] = {}
        for (leaf, dim), text in self.symbols_of_leaf.items():
            node = next((n for n in self.placeholders for s in _shape(n) if str(s) == text), None)
            actual = int(self.given[leaf].shape[dim])
            found[text] = _range(node, text, actual)
        return found


def _shape(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else [value] if isinstance(value, torch.SymInt) else []


def _symbol_text(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(value.node.expr) if isinstance(value, torch.SymInt) else ""


def _range(node: fx.Node | None, text: str, actual: int) -> list[int]:
    size = next((s for s in _shape(node) if str(s) == text), None) if node is not None else None
    if not isinstance(size, torch.SymInt):
        return [actual, actual]
    environment, expr = size.node.shape_env, size.node.expr
    if any(expr in g.expr.free_symbols and not _is_range(g.expr) for g in environment.guards):
        return [actual, actual]
    bounds = environment.var_to_range.get(expr)
    if bounds is None:
        return [actual, actual]
    upper = int(bounds.upper) if bounds.upper.is_Integer else 1 << 62
    return [int(bounds.lower), min(upper, 1 << 62)]


def _is_range(guard: Any) -> bool:
    """True for `s < 5`, `s != 1` and the like, whose effect is in the symbol's range."""
    return len(guard.free_symbols) == 1 and getattr(guard, "is_Relational", False) and all(
        side.is_Symbol or side.is_Integer for side in guard.args)


def _sources(module: nn.Module, call: GraphCall) -> dict[str, str]:
    """The printed program and kernels, to read."""
    state = state_of(module)
    assert state is not None and call.entry is not None
    found = {}
    if call.entry.source:
        found["program.cpp" if "extern" in call.entry.source else "program.py"] = call.entry.source
    wanted = set(call.entry.program.kernels) if call.entry.program is not None else set()
    for kernel in state.report.kernels:
        if kernel.name in wanted:
            found[f"{kernel.name}.{'cpp' if kernel.language == 'c++' else 'py'}"] = kernel.source
    return found
