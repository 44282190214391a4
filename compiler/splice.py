"""Run a graph that no `Program` can say (unbacked sizes, higher-order operators, constants of odd kinds): the graph
itself, with every accepted region replaced by its kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ..codegen.expr import Expr
from ..codegen.group import Group
from .acceptance import KernelFunction, empty_outputs
from .program_builder import is_effect


class SplicedGraph(fx.Interpreter):
    """The graph node by node; a region runs as its kernel when its last input is there."""

    def __init__(self, gm: fx.GraphModule, groups: Sequence[Group], names: Mapping[str, str],
                 kernels: Mapping[str, KernelFunction]) -> None:
        super().__init__(gm)
        self._kernel = {g.built.key: kernels[names[g.built.key]] for g in groups}
        self._outputs_of = {o: g for g in groups for o in g.built.outputs}
        self._inside = {n for g in groups for n in (*g.nodes, *g.views)}
        self._effects = [n for n in gm.graph.nodes if is_effect(n)]
        self._symbol_sources = _symbol_sources(gm)
        self.garbage_collect_values = False

    def run_node(self, n: fx.Node) -> Any:
        group = self._outputs_of.get(n)
        if group is None:
            return None if n in self._inside else super().run_node(n)
        if n not in self.env:
            self._launch(group)
        return self.env[n]

    def _launch(self, group: Group) -> None:
        for node in group.built.inputs:
            if node in self._outputs_of and node not in self.env:
                self._launch(self._outputs_of[node])
        inputs = [self._value(node) for node in group.built.inputs]
        sizes = [self._size(e) for e in group.built.sizes]
        outputs = empty_outputs(group.built.outputs, self._size, inputs[0].device if inputs else torch.device("cpu"))
        self._kernel[group.built.key]([*inputs, *outputs], sizes)
        self.env.update(zip(group.built.outputs, outputs, strict=True))

    def _value(self, node: fx.Node) -> Any:
        if node not in self.env:
            if node in self._effects:  # wanted early: those before it come first (random numbers keep their order)
                for earlier in self._effects[:self._effects.index(node)]:
                    self._value(earlier)
            for a in node.all_input_nodes:
                self._value(a)
            self.env[node] = super().run_node(node)
        return self.env[node]

    def _size(self, e: Expr) -> int:
        return e.evaluate({s: self._symbol_sources[s](self) for s in e.symbols()})


def _symbol_value(node: fx.Node, dim: int | None, run: SplicedGraph) -> int:
    """The integer that `node` holds, or the size of its dimension `dim`."""
    value = run._value(node)
    return int(value if dim is None else value.shape[dim])


def _symbol_sources(gm: fx.GraphModule) -> dict[str, Callable[[SplicedGraph], int]]:
    """How to read each symbol: from a node that holds it, or from a dimension of a tensor."""
    found: dict[str, Callable[[SplicedGraph], int]] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            found.setdefault(str(value.node.expr), partial(_symbol_value, node, None))
        elif isinstance(value, torch.Tensor):
            for d, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(str(size.node.expr), partial(_symbol_value, node, d))
    return found


def splice(gm: fx.GraphModule, groups: Sequence[Group], names: Mapping[str, str],
           kernels: Mapping[str, KernelFunction]) -> Callable[[Sequence[Any]], list[Any]]:
    """A callable of the graph's inputs."""
    def run(inputs: Sequence[Any]) -> list[Any]:
        count = sum(n.op == "placeholder" for n in gm.graph.nodes)
        with torch.no_grad():
            return list(SplicedGraph(gm, groups, names, kernels).run(*inputs[:count], enable_io_processing=False))
    return run
