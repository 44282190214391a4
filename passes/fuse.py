"""The `fuse` pass: pointwise chains, reductions, gathers and the views between them become single kernels.

What it rewrites: groups of ATen nodes found by `codegen.group` in one forward, backward or inference graph. Legal
because a kernel computes the same operations on the same values in the same dtypes (intermediates of narrow dtype
stay in fp32, which is closer to float64); results agree with eager within rounding, integers and bools exactly.
Matrix products, convolutions, attention, random numbers and sorting are left to the library.

Source: Framework Tax (Fernandez et al., EMNLP 2023) on why dispatch and memory traffic dominate; Slapo (Chen et al.,
ASPLOS 2024) on schedules as rewrites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from ..codegen.group import Group, group
from .base import Candidate, Finding, Level, PassContext, Predicted, Refused


@dataclass(frozen=True)
class Fuse:
    """Options: none yet. `find` needs an ATen graph whose nodes carry fake values in `meta["val"]`."""

    name: ClassVar[str] = "fuse"
    lossless: ClassVar[bool] = True
    level: ClassVar[Level] = "aten"

    def find(self, target: fx.GraphModule | nn.Module, context: PassContext) -> Sequence[Finding]:
        """One candidate per kernel, one refusal per claimed node that no kernel took."""
        if not isinstance(target, fx.GraphModule):
            return []
        groups, rejected = group(target.graph, context.left_out)
        found: list[Finding] = [as_candidate(g) for g in groups]
        found += [Refused(r.reason, r.node) for r in rejected]
        return found


def as_candidate(g: Group) -> Candidate:
    """A group in the pipeline's terms; the group itself travels as the replacement.

    Its prediction is left open: sizes may be symbolic, so the engine predicts when it knows them.
    """
    ops = ", ".join(dict.fromkeys(str(n.target) for n in g.nodes))
    return Candidate((*g.nodes, *g.views), FusedRegion(g), Predicted(0.0, 0.0), g.built.inputs, g.built.outputs,
    g.built.key, ops)


@dataclass(frozen=True)
class FusedRegion:
    """A replacement at level `aten`: a kernel still to be compiled. The engine compiles all of a graph's at once."""

    group: Group

    def __call__(self, *inputs: Any) -> Any:
        """Run the region's own ATen nodes (the meaning of the kernel)."""
        env = dict(zip(self.group.built.inputs, inputs, strict=True))
        for node in sorted({*self.group.nodes, *self.group.views}, key=_graph_order(self.group)):
            if node not in env:
                args = fx.map_arg(node.args, env.__getitem__)
                env[node] = node.target(*args, **fx.map_arg(node.kwargs, env.__getitem__))  # type: ignore[operator]
        return tuple(env[o] for o in self.group.built.outputs)


def _graph_order(g: Group) -> Callable[[fx.Node], int]:
    position = {n: i for i, n in enumerate(g.nodes[0].graph.nodes)}
    return position.__getitem__
