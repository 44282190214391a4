"""Running traced graphs kernel by kernel, outside of the compiler, for the OpInfo and fuzz suites.

`trace` makes an ATen graph with Meshwright's decompositions, `KernelGraph` groups it into kernels, `compile_graphs`
compiles the kernels of many graphs at once (a few translation units) with either printer. Nothing is checked,
measured or dropped on the way, as the compiler's acceptance would: a wrong kernel gives a wrong result here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from meshwright.codegen.expr import Expr
from meshwright.codegen.group import group
from meshwright.codegen.ir import Kernel
from meshwright.codegen.lowering import decompositions, size_expr

Printer = Literal["cpp", "triton"]
KernelCall = Callable[[Sequence[torch.Tensor], Sequence[int]], None]
POISON = 0x5B  # fills outputs before a kernel runs, so that an element it does not write shows


def trace(function: Callable[..., Any], inputs: Sequence[torch.Tensor], dynamic: bool = False) -> fx.GraphModule:
    """The ATen graph of `function(*inputs)`, functional but for `copy_` into mutated inputs at its end."""
    gm = _functional(function, inputs, dynamic)
    placeholders = gm.graph.find_nodes(op="placeholder")
    if any(_is_effect(n) and n.args[0] not in placeholders for n in gm.graph.nodes):
        gm = _functional(gm, inputs, dynamic)  # a composite operator was taken apart below functionalization
    return gm


def _functional(function: Callable[..., Any], inputs: Sequence[torch.Tensor], dynamic: bool) -> fx.GraphModule:
    gm = make_fx(
        torch.func.functionalize(function, remove="mutations"),
        decomposition_table=decompositions(),
        tracing_mode="symbolic" if dynamic else "fake",
        _allow_non_fake_inputs=True,
    )(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


@dataclass(frozen=True)
class Uncovered:
    """A node that is left to ATen although its operator is claimed."""

    target: str
    reason: str


class KernelGraph:
    """A traced graph and its kernels; `run` executes it with compiled kernels from `compile_graphs`."""

    def __init__(self, gm: fx.GraphModule, prefix: str = "k") -> None:
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 20000))
        self.gm = gm
        self.groups, rejected = group(gm.graph)
        self.uncovered = [Uncovered(str(r.node.target), r.reason) for r in rejected]
        self.names = {g.built.key: f"{prefix}_{i}" for i, g in enumerate(self.groups)}
        self.group_of = {n: g for g in self.groups for n in g.nodes}
        self.placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.output = next(n for n in gm.graph.nodes if n.op == "output")

    @property
    def kernels(self) -> list[Kernel]:
        return [g.built.kernel.renamed(self.names[g.built.key]) for g in {g.built.key: g for g in self.groups}.values()]

    @property
    def emitted(self) -> set[str]:
        """Operators that ended in a kernel, those of views and generators only a kernel reads included."""
        return {str(n.target) for g in self.groups for n in (*g.nodes, *g.views)}

    def run(self, inputs: Sequence[torch.Tensor], kernels: Mapping[str, KernelCall]) -> Any:
        """The graph's outputs. Mutated inputs are written at the end, as in the traced graph."""
        return _Run(self, inputs, kernels).outputs()


class _Run:
    """One execution: values on demand, effects last."""

    def __init__(self, graph: KernelGraph, inputs: Sequence[torch.Tensor], kernels: Mapping[str, KernelCall]) -> None:
        self.graph, self.kernels = graph, kernels
        self.values: dict[fx.Node, Any] = dict(zip(graph.placeholders, inputs, strict=True))
        self.symbols = symbol_values(graph.placeholders, inputs)
        self.effects = [n for n in graph.gm.graph.nodes if _is_effect(n)]
        self.after = _reached_from(self.effects)

    def outputs(self) -> Any:
        wanted = list(self.graph.output.all_input_nodes)
        for node in [*wanted, *(a for e in self.effects for a in e.all_input_nodes)]:
            if node not in self.after:
                self.value(node)
        for node in self.effects:
            self.value(node)
        return fx.map_arg(self.graph.output.args[0], self.value)

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            found = self.graph.group_of.get(node)
            if found is None or node not in found.built.outputs:
                self.values[node] = self._call(node)
            else:
                self._launch(found.built)
        return self.values[node]

    def _call(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return getattr(self.graph.gm, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        return node.target(*args, **kwargs)

    def _launch(self, built: Any) -> None:
        outputs = [self._allocate(n.meta["val"]) for n in built.outputs]
        inputs = [self.value(n) for n in built.inputs]
        sizes = [e.evaluate(self.symbols) for e in built.sizes]
        self.kernels[self.graph.names[built.key]]([*inputs, *outputs], sizes)
        self.values.update(zip(built.outputs, outputs, strict=True))

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        shape, strides = ([self._int(size_expr(s)) for s in x] for x in (like.shape, like.stride()))
        made = torch.empty_strided(shape, strides, dtype=like.dtype)
        made.untyped_storage().fill_(POISON & 1 if like.dtype is torch.bool else POISON)
        return made

    def _int(self, e: Expr) -> int:
        return e.value if e.is_const else e.evaluate(self.symbols)


def _is_effect(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _reached_from(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found, todo = set(nodes), list(nodes)
    while todo:
        for user in todo.pop().users:
            if user not in found:
                found.add(user)
                todo.append(user)
    return found


def symbol_values(placeholders: Sequence[fx.Node], inputs: Sequence[Any]) -> dict[str, int]:
    """Symbolic sizes by name, read off the shapes (and strides) of actual inputs."""
    values: dict[str, int] = {}
    for node, actual in zip(placeholders, inputs, strict=True):
        traced = node.meta.get("val")
        if isinstance(traced, torch.Tensor):
            pairs = [*zip(traced.shape, actual.shape, strict=True), *zip(traced.stride(), actual.stride(), strict=True)]
            for size, real in pairs:
                if isinstance(size, torch.SymInt) and str(size.node.expr).isidentifier():
                    values.setdefault(str(size.node.expr), int(real))
    return values


def compile_graphs(graphs: Sequence[KernelGraph], printer: Printer) -> dict[str, KernelCall]:
    """Compile the kernels of all graphs; their prefixes must differ. By kernel name."""
    kernels = [k for g in graphs for k in g.kernels]
    if printer == "triton":
        from meshwright.codegen.triton_build import triton_kernels

        return dict(triton_kernels({k.name: k for k in kernels}))
    from meshwright.codegen.cpp import compile_kernels

    return dict(compile_kernels(kernels))


# -- comparison -----------------------------------------------------------------------------------
def flat(result: Any) -> list[torch.Tensor]:
    """The tensors of a nested result, in order; numbers become tensors."""
    return [x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in pytree.tree_leaves(result) if x is not None]


def widen(value: Any) -> Any:
    """Floating tensors of a nested value as float64."""
    return pytree.tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, value)


def difference(
    got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, *, own_factor: float = 2.0, ulps: float = 4.0
) -> str | None:
    """Why `got` is not as good as eager's result, or None.

    Floats: error against the float64 truth at most `own_factor` × eager's own largest error + `ulps` ulp of the
    output's scale, NaN and infinities where eager has them. Integers and bools: equal to eager. Shape and dtype:
    equal to eager.
    """
    if got.shape != eager.shape or got.dtype != eager.dtype:
        return f"{got.dtype}{list(got.shape)}, eager gives {eager.dtype}{list(eager.shape)}"
    if not eager.numel():
        return None
    if not eager.is_floating_point():
        wrong = got != eager
        return f"{int(wrong.sum())} of {eager.numel()} elements differ from eager" if bool(wrong.any()) else None
    if not torch.equal(got.isnan(), eager.isnan()):
        return f"NaN at {int((got.isnan() != eager.isnan()).sum())} other places than in eager"
    return _float_difference(got.double(), eager.double(), truth.double(), torch.finfo(eager.dtype), own_factor, ulps)


def _float_difference(
    got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, info: torch.finfo, own_factor: float, ulps: float
) -> str | None:
    infinite = (got.isinf() | eager.isinf()) & (got != eager)
    if bool((infinite & (truth.abs() < info.max * 0.99)).any()):
        return "an infinity where eager has none, or the other way round"
    usable = got.isfinite() & eager.isfinite() & truth.isfinite()
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(usable, (got - truth).abs(), zero).max().item()
    own = torch.where(usable, (eager - truth).abs(), zero).max().item()
    scale = torch.where(usable, truth.abs(), zero).max().item()
    allowed = own_factor * own + ulps * max(scale * info.eps, info.tiny)
    if error <= allowed:
        return None
    return f"error {error:.3g}, allowed {allowed:.3g} (eager's own {own:.3g}, scale {scale:.3g})"
