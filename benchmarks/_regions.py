"""Every fused group of a model as something to run: its eager operators and its kernel, on recorded inputs.

`capture` compiles a model with a backend that changes nothing: it groups each ATen graph (inference, forward,
backward), runs it once node by node, and keeps what the first group of every structure reads.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from meshwright.codegen.cpp import CompiledCppKernel
from meshwright.codegen.group import Group, group
from meshwright.codegen.lowering import decompositions
from meshwright.compiler.records import group_records, kernel_record, region_nodes
from meshwright.cost_model.records import KernelRecord, OpRecord
from meshwright.runtime import torch_compat


@dataclass
class Region:
    """One structure of group; `count` groups of its graph share it. `eager(*eager_inputs)` gives its outputs."""

    graph: str
    group: Group
    before: list[OpRecord]
    after: KernelRecord
    eager: fx.GraphModule
    eager_inputs: list[Any] = field(default_factory=list)
    kernel_inputs: list[torch.Tensor] = field(default_factory=list)
    count: int = 1

    @property
    def ops(self) -> str:
        """Its operators, for the table: `mul add 2×sum`."""
        counts = Counter(r.op for r in self.before if r.kind != "view")
        return " ".join(op if n == 1 else f"{n}×{op}" for op, n in counts.items())

    def launcher(self, kernel: CompiledCppKernel) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """A call of `kernel` into outputs allocated once, and these outputs."""
        outs = [torch.empty_strided(tuple(v.shape), v.stride(), dtype=v.dtype)
                for v in (n.meta["val"] for n in self.group.built.outputs)]
        pointers = [t.data_ptr() for t in (*self.kernel_inputs, *outs)]
        buffers, sizes, entry = (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * 0)(), kernel.entry
        return lambda: entry(buffers, sizes), outs


def capture(run: Callable[[Callable[..., Any]], None], label: str) -> list[Region]:
    """Regions of every graph that `run(backend)` compiles and calls. Shapes must be static."""
    found: list[Region] = []

    def compiler(kind: str) -> Callable[..., Any]:
        def compile_one(gm: fx.GraphModule, fake_inputs: Sequence[Any]) -> Any:
            recorder = _Recorder(gm, f"{label} {kind}")
            done: list[bool] = []

            def call(args: list[Any]) -> Any:
                if done:
                    return gm.forward(*args)
                done.append(True)
                out = recorder.run(*args)
                found.extend(recorder.regions)
                return out

            return torch_compat.mark_boxed(call)

        return compile_one

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return torch_compat.aot_autograd(
            gm, example_inputs, forward=compiler("forward"), backward=compiler("backward"),
            inference=compiler("inference"), decompositions=decompositions())

    torch.compiler.reset()
    run(backend)
    torch.compiler.reset()
    return found


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what the first region of each structure reads."""

    def __init__(self, gm: fx.GraphModule, label: str) -> None:
        super().__init__(gm)
        self.regions: list[Region] = []
        self._wanted: dict[fx.Node, list[tuple[list[Any], int]]] = {}
        known: dict[tuple[str, ...], Region] = {}
        for g in group(gm.graph)[0]:
            before = group_records(g)
            key = (g.built.key, *(r.op for r in before))
            if key in known:
                known[key].count += 1
            else:
                known[key] = self._region(g, before, label)
        self.regions = list(known.values())

    def _region(self, g: Group, before: list[OpRecord], label: str) -> Region:
        eager, inputs = _extract(region_nodes(g), g.built.outputs)
        region = Region(label, g, before, kernel_record(g.built), eager, [None] * len(inputs),
                        [torch.empty(0)] * len(g.built.inputs))
        for store, nodes in ((region.eager_inputs, inputs), (region.kernel_inputs, g.built.inputs)):
            for i, n in enumerate(nodes):
                self._wanted.setdefault(n, []).append((store, i))
        return region

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for store, i in self._wanted.get(n, ()):
            store[i] = value.detach() if isinstance(value, torch.Tensor) else value
        return value


def _extract(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A module that runs `nodes` alone, and the nodes its arguments stand for."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
    graph, new = fx.Graph(), {}
    for n in inputs:
        new[n] = graph.placeholder(n.name)
    for n in nodes:
        new[n] = graph.node_copy(n, new.__getitem__)
    graph.output(tuple(new[n] for n in outputs))
    return fx.GraphModule(torch.nn.Module(), graph), inputs
