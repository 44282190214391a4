"""Cleaning an ATen graph before its kernels are chosen: equal computations once, no-ops and dead nodes gone.

Legal because only pure operators are touched (ATen and prims, no write, no random number, no size that depends on
data), and because memory is looked at, not only values:

* equal views of one tensor are one view; equal fresh tensors become one only while at most one of them leaves the
  graph and none is written to;
* nothing that an operator read before a write stands for what is read after it;
* a view that changes nothing (`alias`, `expand` to the same shape, a slice that takes everything) is its operand,
  unless it is itself returned; a copy that changes nothing is its operand while it stays inside the graph and neither
  is written to.

Results are bit-equal. The graph given is left as it is: it stays the eager form to fall back on.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..runtime.torch_compat import device_of, is_operator
from .guard import written_arguments
from .program_builder import is_effect

log = logging.getLogger(__name__)
aten = torch.ops.aten
COPIES = (aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default,
          torch.ops.prims.convert_element_type.default)
UNFILLED = ("empty", "new_empty", "_assert", "_functional_assert", "sym_constrain")  # no value, or there to raise
DATA_DEPENDENT = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
PYTHON_SIZES = ("_operator", "math", "torch")  # modules whose functions compute sizes from sizes


def clean_up(gm: fx.GraphModule) -> fx.GraphModule:
    """A cleaned copy of `gm`, or `gm` itself where there is nothing to do. Nodes keep their names and metadata."""
    plan = _Plan(gm.graph)
    for node in gm.graph.nodes:
        plan.visit(node)
    live = plan.live()
    before = len(gm.graph.nodes)
    if len(live) == before:
        return gm
    out = fx.GraphModule(gm, _rebuilt(gm.graph, plan.instead, live))
    out.meta.update(gm.meta)
    log.debug("cleaning left %d of %d nodes", len(live), before)
    return out


class _Plan:
    """Which node stands for which (`instead`), found in one walk in graph order."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.instead: dict[fx.Node, fx.Node] = {}
        self._first: dict[Any, fx.Node] = {}
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        self._returned = set(output.all_input_nodes)
        self._leaving = {s for n in self._returned for s in _storages(n)}
        self._written = {s for n in graph.nodes for w in _written_by(n) for s in _storages(w)}
        self._restrided = {s for n in graph.nodes if "as_strided" in str(n.target) for a in n.all_input_nodes
                           for s in _storages(a)}

    def visit(self, node: fx.Node) -> None:
        """Decide on `node`; every node before it is decided."""
        if _written_by(node):
            self._first.clear()
        if not _is_pure(node):
            return
        source = self._same_as(node)
        if source is not None:
            self.instead[node] = self._now(source)
            return
        first = self._first.setdefault(self._key(node), node)
        if first is not node and self._may_be_one(first, node):
            self.instead[node] = first
            if node in self._returned:
                self._returned.add(first)
            if self._leaving & _storages(node):
                self._leaving |= _storages(first)

    def live(self) -> set[fx.Node]:
        """Nodes that stay: inputs, the output, what is not pure, and all that these read."""
        live: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node in self.instead:
                continue
            if node in live or node.op in ("placeholder", "output") or not _is_pure(node):
                live.add(node)
                live.update(self._now(a) for a in node.all_input_nodes)
        return live

    def _now(self, node: fx.Node) -> fx.Node:
        return self.instead.get(node, node)

    def _key(self, node: fx.Node) -> Any:
        return (node.op, node.target, self._encode(node.args), self._encode(node.kwargs))

    def _encode(self, arg: Any) -> Any:
        """An argument as a key. Its type counts: 1, 1.0 and True are equal in Python."""
        if isinstance(arg, fx.Node):
            return self._now(arg)
        if isinstance(arg, (list, tuple)):
            return tuple(self._encode(a) for a in arg)
        if isinstance(arg, dict):
            return tuple((k, self._encode(v)) for k, v in sorted(arg.items()))
        return (type(arg).__name__, repr(arg))

    def _may_be_one(self, first: fx.Node, second: fx.Node) -> bool:
        if first in self._returned and second in self._returned:
            return False
        if not _is_fresh(second):
            return True
        memory = _storages(first), _storages(second)
        return not (memory[0] | memory[1]) & self._written and not all(m & self._leaving for m in memory)

    def _same_as(self, node: fx.Node) -> fx.Node | None:
        """The operand that `node` equals in every respect that its users can see, or None."""
        source = node.args[0] if node.args else None
        if node in self._returned or not isinstance(source, fx.Node) or not is_operator(node.target):
            return None
        value, under = node.meta.get("val"), source.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(under, torch.Tensor) or not _same_look(value, under):
            return None
        mine, its = _storages(node), _storages(source)
        if mine == its:
            return source if str(value.storage_offset()) == str(under.storage_offset()) else None
        if node.target not in COPIES or node.kwargs.get("pin_memory"):
            return None
        return None if mine & (self._leaving | self._restrided) or (mine | its) & self._written else source


def _rebuilt(graph: fx.Graph, instead: dict[fx.Node, fx.Node], live: set[fx.Node]) -> fx.Graph:
    """The graph with its live nodes only."""
    out = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        return copies[instead.get(node, node)]

    for node in graph.nodes:
        if node in live:
            copies[node] = out.node_copy(node, copied)
            _follow_base(node, copies[node], copied)
    return out


def _follow_base(old: fx.Node, new: fx.Node, copied: Any) -> None:
    """A view whose operand was replaced is a view of other memory now: its fake value must say so."""
    base = _viewed(old)
    if base is None:
        return
    value, under = old.meta.get("val"), base.meta.get("val")  # what a wrapped operator gives has none
    if not isinstance(value, torch.Tensor) or not isinstance(under, torch.Tensor) or value.dtype != under.dtype:
        return
    now = copied(base).meta["val"]
    if _storage(value) != _storage(under) or _storage(now) == _storage(under):
        return
    offset = value.storage_offset() - under.storage_offset() + now.storage_offset()
    with torch.no_grad():
        new.meta["val"] = now.as_strided(value.shape, value.stride(), offset)


def _viewed(node: fx.Node) -> fx.Node | None:
    """What `node` would be a view of: its first operand; for a part of a split, what is split."""
    base = node.args[0] if node.op == "call_function" and node.args else None
    if node.target is operator.getitem and isinstance(base, fx.Node) and base.args:
        base = base.args[0]
    return base if isinstance(base, fx.Node) else None


def _is_pure(node: fx.Node) -> bool:
    """Running `node` once, twice or not at all makes no difference beyond its result."""
    if node.op == "get_attr":
        return isinstance(node.meta.get("val"), torch.Tensor)
    if node.op != "call_function":
        return False
    target = node.target
    if target is operator.getitem:
        return True
    if is_operator(target):
        tags = target.tags
        return (target.namespace in ("aten", "prims") and not is_effect(node) and bool(target._schema.returns)
                and not any(t in tags for t in DATA_DEPENDENT)
                and not target._schema.name.split("::")[1].startswith(UNFILLED))
    is_size = isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
    return is_size and getattr(target, "__module__", "") in PYTHON_SIZES


def _written_by(node: fx.Node) -> list[fx.Node]:
    """Nodes whose memory `node` may write: as its schema says; all it reads where there is no schema."""
    if node.op != "call_function" or _is_pure(node):
        return []
    if is_operator(node.target):
        return written_arguments(node)
    return node.all_input_nodes


def _is_fresh(node: fx.Node) -> bool:
    """`node` has memory of its own."""
    return not _storages(node) & {s for a in node.all_input_nodes for s in _storages(a)}


def _same_look(a: torch.Tensor, b: torch.Tensor) -> bool:
    def look(t: torch.Tensor) -> tuple[Any, ...]:  # as text: comparing symbolic sizes would guard on them
        return t.dtype, device_of(t), t.layout, str(tuple(t.shape)), str(t.stride()), t.is_conj(), t.is_neg()
    return look(a) == look(b)


def _storages(node: fx.Node) -> set[int]:
    return {_storage(t) for t in _tensors(node.meta.get("val"))}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)
