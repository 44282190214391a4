"""Regions of a Dynamo graph: taking one out as a function, recording what flows into it, putting a replacement in.

Nothing here decides anything; `pipeline` does. A graph is only changed by `splice`, and only on a copy.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..passes.base import Candidate

_WIDE_METHODS = {"float": "double", "half": "double", "bfloat16": "double"}
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class SpliceError(Exception):
    """A replacement can't stand where its region stands; the message says why."""


def nodes_of(candidate: Candidate) -> tuple[fx.Node, ...]:
    """The region as nodes. Raises `SpliceError` for a module name."""
    if isinstance(candidate.region, str):
        raise SpliceError(f"region {candidate.region!r} is a module name in a graph-level pass")
    return candidate.region


def extract(gm: fx.GraphModule, candidate: Candidate) -> fx.GraphModule:
    """The region as a graph module from its inputs to the tuple of its outputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: graph.placeholder(f"in_{i}") for i, n in enumerate(candidate.inputs)}
    wanted = set(nodes_of(candidate))
    for node in gm.graph.nodes:
        if node in wanted:
            copies[node] = graph.node_copy(node, lambda n: _look_up(copies, n))
    graph.output(tuple(copies[n] for n in candidate.outputs))
    return fx.GraphModule(gm, graph)


def _look_up(copies: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    if node not in copies:
        raise SpliceError(f"the region reads {node.name}, which is not among its inputs")
    return copies[node]


def in_float64(region: fx.GraphModule) -> fx.GraphModule | None:
    """The same function with every floating-point dtype widened; None when it can't be copied."""
    try:
        wide = copy.deepcopy(region).double()
    except Exception:
        return None
    for node in wide.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _widen)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _widen)
        if node.op == "call_method" and node.target in _WIDE_METHODS:
            node.target = _WIDE_METHODS[node.target]
    wide.recompile()
    return wide


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps copies of the values of `wanted` nodes."""

    def __init__(self, gm: fx.GraphModule, wanted: Iterable[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted = set(wanted)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        return value


def record(gm: fx.GraphModule, inputs: Sequence[Any], wanted: Iterable[fx.Node]) -> dict[fx.Node, Any]:
    """Values of the `wanted` nodes in one eager run on copies of `inputs`."""
    recorder = _Recorder(gm, wanted)
    with torch.no_grad():
        recorder.run(*[v.detach().clone() if isinstance(v, torch.Tensor) else v for v in inputs])
    return recorder.values


def concrete(example_inputs: Sequence[Any]) -> list[Any]:
    """Example inputs with symbolic integers as the numbers of this call, without guarding on them."""
    return [v.node.hint if isinstance(v, (torch.SymInt, torch.SymFloat)) else v for v in example_inputs]


class _Replacement(nn.Module):
    """A replacement callable as a module, so that the graph can call it by name."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> tuple[Any, ...]:
        out = self.function(*args)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def splice(gm: fx.GraphModule, candidate: Candidate, name: str) -> None:
    """Put the replacement where the region was, in `gm` itself. Raises `SpliceError` and leaves `gm` as it was."""
    region = nodes_of(candidate)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    _check_border(region, candidate, order)
    moved = _late_users(gm, region, order)
    last = max(region, key=order.__getitem__)
    gm.add_submodule(name, _Replacement(candidate.replacement))
    with gm.graph.inserting_after(last):
        call = gm.graph.call_module(name, tuple(candidate.inputs))
    anchor = call
    for i, old in enumerate(candidate.outputs):
        with gm.graph.inserting_after(anchor):
            anchor = gm.graph.call_function(_item, (call, i))
        anchor.meta = {k: v for k, v in old.meta.items() if k in ("example_value", "stack_trace", "nn_module_stack")}
        old.replace_all_uses_with(anchor, delete_user_cb=lambda user: user not in region and user is not call)
    for node in moved:
        anchor.append(node)
        anchor = node
    for node in sorted(region, key=order.__getitem__, reverse=True):
        gm.graph.erase_node(node)


def _item(values: tuple[Any, ...], index: int) -> Any:
    return values[index]


def _check_border(region: Sequence[fx.Node], candidate: Candidate, order: dict[fx.Node, int]) -> None:
    inside, outputs = set(region), set(candidate.outputs)
    for node in region:
        if node not in order:
            raise SpliceError(f"{node.name} is not in this graph any more (another rewrite took it)")
        if node not in outputs and any(u not in inside for u in node.users):
            raise SpliceError(f"{node.name} is used outside of the region but is not among its outputs")
    for node in candidate.inputs:
        if node not in order:
            raise SpliceError(f"input {node.name} is not in this graph any more")


def _late_users(gm: fx.GraphModule, region: Sequence[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
    """Nodes between the region's first and last that need its outputs: they must move behind it, in order."""
    inside = set(region)
    first, last = min(order[n] for n in region), max(order[n] for n in region)
    late: list[fx.Node] = []
    tainted = set(inside)
    for node in gm.graph.nodes:
        if first < order[node] < last and node not in inside:
            if is_mutation(node):
                raise SpliceError(f"{node.name} writes to memory between the nodes of the region")
            if any(i in tainted for i in node.all_input_nodes):
                tainted.add(node)
                late.append(node)
    needed = {i for n in region for i in n.all_input_nodes}
    if needed.intersection(late):
        raise SpliceError("the region is not closed: a node between its own depends on it and feeds it")
    return late


def is_mutation(node: fx.Node) -> bool:
    """True for calls that write to a tensor in place, by the conventions of torch's names."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function":
        return False
    if getattr(node.target, "__module__", "") == "_operator":
        return name == "setitem" or name in _INPLACE_OPERATORS
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or "out" in node.kwargs or node.kwargs.get("inplace") is True


_INPLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul",
                      "ilshift", "irshift"}


def module_path(node: fx.Node) -> str:
    """Qualified name of the module whose forward, or the backward of it, made this node ("" for the root)."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    last = next(reversed(stack.values()), None) if stack else None
    path = str(last[0]) if last else ""
    for prefix in ("L['module']", "L['self']", "L['fn']"):
        path = path.removeprefix(prefix)
    return path.replace("._modules['", ".").replace("']", "").replace("['", ".").strip(".")


def lint(gm: fx.GraphModule, candidate: Candidate) -> str | None:
    """Why the changed graph is not well formed, or None: fx's own lint, and fake outputs of the replacement compared
    in shape, stride, dtype and device with what the region's outputs had."""
    try:
        gm.graph.lint()
    except Exception as error:
        return f"graph lint: {error}"
    inputs = [n.meta.get("example_value") for n in candidate.inputs]
    outputs = [n.meta.get("example_value") for n in candidate.outputs]
    modes = (getattr(v, "fake_mode", None) for v in inputs)
    mode = next((m for m in modes if m is not None), None)
    if mode is None or any(v is None for v in (*inputs, *outputs)):
        return None
    with mode, _no_grad():
        got = candidate.replacement(*inputs)
    found = list(got) if isinstance(got, (tuple, list)) else [got]
    return _fake_difference(found, outputs)


@contextlib.contextmanager
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def _fake_difference(got: Sequence[Any], wanted: Sequence[Any]) -> str | None:
    if len(got) != len(wanted):
        return f"{len(got)} outputs, expected {len(wanted)}"
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        if isinstance(w, torch.Tensor) and _describe(g) != _describe(w):
            return f"output {i} is {_describe(g)}, expected {_describe(w)}"
    return None


def _describe(t: Any) -> str:
    if not isinstance(t, torch.Tensor):
        return type(t).__name__
    return f"{t.dtype} {[str(s) for s in t.shape]} stride {[str(s) for s in t.stride()]} on {t.device}"
