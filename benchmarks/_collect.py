"""Every kernel that Meshwright emits for a model: found by the `fuse` pass, optionally interpreted against eager.

The model is traced by Dynamo and AOTAutograd as in a compilation, but its graphs then run in eager, so all kernels can
be collected for targets that this machine does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx, nn

from meshwright.codegen.group import Group
from meshwright.codegen.ir import Kernel
from meshwright.codegen.lowering import decompositions, size_expr
from meshwright.codegen.triton_build import triton_kernels
from meshwright.compiler.acceptance import Acceptance, kernel_names
from meshwright.compiler.aten import RecordedRun, symbol_values
from meshwright.passes.base import Candidate, PassContext
from meshwright.passes.fuse import Fuse, FusedRegion
from meshwright.runtime import torch_compat


@dataclass
class Collected:
    """One kernel of a model: its name there, in how many places it is launched, in which kinds of graph, what the
    judge said ("" while it has not run, "agrees", or the difference; "seen" when it compares nothing)."""

    kernel: Kernel
    hints: dict[str, int]
    launches: int = 0
    graphs: set[str] = field(default_factory=set)
    interpreted: str = ""


Judge = Callable[[Mapping[str, Any], Mapping[str, str], Mapping[str, int]], Any]


def compare_with_eager(kernels: Mapping[str, Any], names: Mapping[str, str], symbols: Mapping[str, int]) -> Acceptance:
    return Acceptance(kernels, names, symbols, measure=False)


class Collector:
    """Collects the kernels of whatever is compiled with its `backend`. `judge`: what looks at each one once, with the
    values of its inputs at hand; None: they are only collected."""

    def __init__(self, judge: Judge | None = compare_with_eager) -> None:
        self.judge = judge
        self.kernels: dict[str, Collected] = {}

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """A backend for `torch.compile`."""
        return torch_compat.aot_autograd(
            gm, example_inputs, forward=self._compiler("forward"), backward=self._compiler("backward"),
            inference=self._compiler("inference"), decompositions=decompositions())

    def _compiler(self, kind: str) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[[list[Any]], Any]]:
        def compile_one(gm: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
            groups = self._groups(gm, kind)
            names = kernel_names(groups)

            def call(args: list[Any]) -> list[Any]:
                inputs = list(args)
                args.clear()
                return self._run(gm, groups, names, inputs)

            return torch_compat.mark_boxed(call)

        return compile_one

    def _groups(self, gm: fx.GraphModule, kind: str) -> list[Group]:
        findings = Fuse().find(gm, PassContext("cuda", kind != "inference", {}))
        regions = [f.replacement for f in findings if isinstance(f, Candidate)]
        groups = [r.group for r in regions if isinstance(r, FusedRegion)]
        names = kernel_names(groups)
        for g in groups:
            key = g.built.key
            if key not in self.kernels:
                self.kernels[key] = Collected(g.built.kernel.renamed(names[key]), {})
            self.kernels[key].launches += 1
            self.kernels[key].graphs.add(kind)
        return groups

    def _run(self, gm: fx.GraphModule, groups: Sequence[Group], names: Mapping[str, str],
             inputs: list[Any]) -> list[Any]:
        symbols = symbol_values(gm, inputs)
        for g in groups:
            sizes = [e.evaluate(symbols) for e in g.built.sizes]
            self.kernels[g.built.key].hints.update(zip(g.built.kernel.sizes, sizes, strict=True))
        if self.judge is None:
            return [_zeros(o, symbols) for o in gm.graph.output_node().args[0]]
        new = [g for g in groups if not self.kernels[g.built.key].interpreted]
        callables = triton_kernels({names[g.built.key]: g.built.kernel for g in new})
        judge = self.judge(callables, names, symbols)
        outputs = RecordedRun(gm, new, judge, symbols).run(*inputs)
        for g in new:
            verdict = judge.verdicts.get(g.built.key)
            words = "seen" if verdict is None else "agrees" if verdict.ok else verdict.reason or "differs"
            self.kernels[g.built.key].interpreted = words
        return outputs


AnyCollector = TypeVar("AnyCollector", bound=Collector)


def _zeros(output: Any, symbols: Mapping[str, int]) -> Any:
    """A stand-in for a result that nobody looks at, so that collecting alone costs no arithmetic."""
    if not isinstance(output, fx.Node):
        return output
    value = output.meta["val"]
    if not isinstance(value, torch.Tensor):
        return size_expr(value).evaluate(symbols)
    sizes, strides = ([size_expr(n).evaluate(symbols) for n in ns] for ns in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device).zero_()


def collect_kernels(model: nn.Module, example_inputs: Mapping[str, torch.Tensor], *, backward: bool = False,
                    judge: Judge | None = compare_with_eager, dynamic: bool = False) -> list[Collected]:
    """The kernels of one forward (and backward, of the mean square of every floating output) of `model`."""
    found = collect_into(Collector(judge), model, example_inputs, backward=backward, dynamic=dynamic)
    return list(found.kernels.values())


def collect_into(collector: AnyCollector, model: nn.Module, example_inputs: Mapping[str, torch.Tensor], *,
                 backward: bool = False, dynamic: bool = False) -> AnyCollector:
    """`collector`, after it has seen the graphs of `model`."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend=collector.backend, dynamic=dynamic)
    if not backward:
        with torch.no_grad():
            compiled(**example_inputs)
        return collector
    outputs = compiled(**example_inputs)
    floats = [v for v in _tensors(outputs) if v.is_floating_point() and v.requires_grad]
    torch.stack([v.float().square().mean() for v in floats]).sum().backward()
    model.zero_grad(set_to_none=True)
    return collector


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []
