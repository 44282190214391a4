"""The key under which a compiled graph is kept on disk: everything its program depends on, as text.

Two Dynamo graphs with one key give the same program. So the text holds the graph with its nodes renumbered, what is
known of every input (shape, strides, dtype, device, whether it is a weight, ranges of symbolic sizes), the settings,
the switches of torch that tracing reads, the versions, and this package's own source. Whatever is not understood here
makes the graph one that is not kept (`Unkept`): an unknown function or argument, a module call, a constant tensor.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..runtime import cache, torch_compat
from ..runtime.isa import current_isa
from .pipeline import ordered_passes
from .settings import CompileSettings

ROOT = Path(__file__).parent.parent
SOURCES = ("codegen", "compiler", "cost_model", "passes", "runtime")
_PLAIN = (bool, int, float, complex, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout,
          torch.memory_format)
_MODULES = ("torch", "math", "operator", "_operator", "builtins")


class Unkept(Exception):
    """This graph is not kept; the message says what stands against it."""


def graph_key(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompileSettings) -> str:
    """64 hexadecimal digits. Raises `Unkept`."""
    if settings.dump_dir is not None or any(":" in entry for entry in settings.disable):
        raise Unkept("every step is written out, or a pass is off for some modules")
    if ordered_passes(settings, "graph"):
        raise Unkept("a graph-level pass rewrites it")
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    if len({id(x) for x in tensors}) != len(tensors):
        raise Unkept("one tensor is passed twice")
    text = "\n".join([*_graph_lines(gm, example_inputs), f"settings {_settings_text(settings)}",
                      *torch_compat.tracing_state(), *_machine({x.device for x in tensors}), _own_source()])
    return cache.key_of("kept graph", text)


def symbols_of(gm: fx.GraphModule) -> dict[str, torch.SymInt]:
    """The symbolic sizes of a Dynamo graph by name, as its inputs show them."""
    found: dict[str, torch.SymInt] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            for size in _sizes(node.meta.get("example_value")):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(str(size.node.expr), size)
    return found


# -- the graph --------------------------------------------------------------------------------
def _graph_lines(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str]:
    names: dict[fx.Node, str] = {}
    given = iter(example_inputs)
    lines = []
    for number, node in enumerate(gm.graph.nodes):
        names[node] = f"%{number}"
        match node.op:
            case "placeholder":
                lines.append(f"input {_input_text(node.meta.get('example_value'), next(given))}")
            case "call_function":
                lines.append(f"{_function_text(node.target)} {_arguments_text(node, names)}")
            case "call_method":
                lines.append(f".{node.target} {_arguments_text(node, names)}")
            case "output":
                lines.append(f"output {_text(node.args, names)}")
            case _:
                raise Unkept(f"it holds a {node.op} node ({node.target})")
    for name, size in sorted(symbols_of(gm).items()):
        lines.append(f"{name} in {torch_compat.symbol_range(size)}")
    return lines


def _input_text(traced: Any, given: Any) -> str:
    if isinstance(traced, torch.SymInt):
        return str(traced.node.expr)
    if not isinstance(traced, torch.Tensor) or not isinstance(given, torch.Tensor):
        raise Unkept(f"an input is a {type(traced).__name__}")
    plain = torch_compat.is_fake(traced) and type(given) in (torch.Tensor, torch.nn.Parameter)
    if not plain or traced.layout != torch.strided or traced.is_conj() or traced.is_neg():
        raise Unkept(f"an input is a {type(given).__name__} of layout {traced.layout}")
    sizes = [str(s.node.expr) if isinstance(s, torch.SymInt) else str(s) for s in _sizes(traced)]
    return " ".join([*sizes, str(traced.dtype), str(traced.device), f"grad={traced.requires_grad}",
                     f"weight={torch_compat.is_static_input(given)}"])


def _sizes(value: Any) -> Iterable[Any]:
    if isinstance(value, torch.SymInt):
        return (value,)
    return (*value.shape, *value.stride(), value.storage_offset()) if isinstance(value, torch.Tensor) else ()


def _function_text(target: Callable[..., Any]) -> str:
    """The full name of a function of torch or Python, which leads back to the same function."""
    if torch_compat.is_operator(target):
        if target.namespace not in ("aten", "prims"):
            raise Unkept(f"it calls {target}, whose code can change")
        return str(target)
    module, name = str(getattr(target, "__module__", None)), str(getattr(target, "__name__", None))
    built_in = isinstance(target, (types.BuiltinFunctionType, types.MethodDescriptorType))
    if module.partition(".")[0] not in _MODULES or not (
            built_in or getattr(sys.modules.get(module), name, None) is target):
        raise Unkept(f"it calls {target}")
    return f"{module}.{name}"


def _arguments_text(node: fx.Node, names: dict[fx.Node, str]) -> str:
    return _text([list(node.args), dict(node.kwargs)], names)


def _text(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if type(value) in (list, tuple, fx.immutable_collections.immutable_list, torch.Size):
        return f"{type(value).__name__}({', '.join(_text(v, names) for v in value)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_text(v, names)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(_text(v, names) for v in (value.start, value.stop, value.step))})"
    if isinstance(value, torch.SymInt):
        return str(value.node.expr)
    if type(value) in _PLAIN:
        return f"{type(value).__name__} {value!r}"
    raise Unkept(f"an argument is a {type(value).__name__}")


# -- around the graph -------------------------------------------------------------------------
def _settings_text(settings: CompileSettings) -> str:
    if any(not isinstance(p, str) for p in settings.passes or ()) or settings.extra:
        raise Unkept("a pass has options of its own")
    return repr((settings.passes, sorted(settings.disable), settings.target, settings.check, settings.measure))


def _machine(devices: set[torch.device]) -> list[str]:
    cards = [torch.cuda.get_device_name(d) for d in sorted(devices, key=str) if d.type == "cuda"]
    return [*cards, current_isa().name, f"threads {torch.get_num_threads()}"]


@functools.lru_cache(maxsize=1)
def _own_source() -> str:
    """A digest of every source file of the package that a program can depend on."""
    digest = hashlib.sha256()
    for file in sorted(f for room in SOURCES for f in (ROOT / room).rglob("*") if f.suffix in (".py", ".h")):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
