"""Which ATen nodes share a kernel.

Greedy, producers into consumers in graph order, then neighbours that read the same tensors. A merge must keep the graph
acyclic, must be buildable as one kernel (`build.build` is the judge), and must save bytes: every tensor that no longer
travels through memory is a gain, recomputation of a broadcast operand is a loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from .build import BuiltKernel
from .expr import Expr
from .lowering import kind_of
from .lowering.reductions import reduction_of
from .lowering.shapes import CannotLower, shape_of
from .structure import StructuralCache

MAX_NODES = 64
MAX_BUFFERS = 24
MAX_DISTANCE = 400  # graph positions a horizontal merge may span: tensors would live that much longer
TRANSPARENT = ("view", "generator", "multi")  # read through: no work of their own
MAX_INLINE = 12  # nodes recomputed per element when a smaller operand is inlined


@dataclass(frozen=True)
class Group:
    """Nodes that share a kernel. `nodes` are computed inside (graph order), `views` are views only the kernel reads."""

    nodes: tuple[fx.Node, ...]
    views: tuple[fx.Node, ...]
    built: BuiltKernel


@dataclass(frozen=True)
class Rejected:
    """A node the code generator claims but could not put into any kernel, and why."""

    node: fx.Node
    reason: str


class _Graph:
    """Data flow between compute nodes and outside nodes, views and generators read through."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = [n for n in graph.nodes]
        self.position = {n: i for i, n in enumerate(self.order)}
        self.kind = {n: kind_of(n) for n in self.order}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}
        self._sources: dict[fx.Node, list[fx.Node]] = {}
        for n in self.order:
            found: dict[fx.Node, None] = {}
            for a in n.all_input_nodes:
                for s in self.sources(a):
                    found.setdefault(s)
            self.inputs[n] = list(found)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """`node` itself, or what it reads when it is a view or generator."""
        if self.kind[node] not in TRANSPARENT:
            return [node]
        if node not in self._sources:
            found: dict[fx.Node, None] = {}
            for a in node.all_input_nodes:
                for s in self.sources(a):
                    found.setdefault(s)
            self._sources[node] = list(found)
        return self._sources[node]

    def consumers(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that use `node`, through views."""
        found: dict[fx.Node, None] = {}
        for u in node.users:
            if self.kind[u] in ("view", "multi"):
                for c in self.consumers(u):
                    found.setdefault(c)
            else:
                found.setdefault(u)
        return list(found)


class _Reach:
    """Ancestors and descendants of groups as bit masks over graph positions, kept up to date under merging."""

    def __init__(self, g: _Graph) -> None:
        n = len(g.order)
        self.mask = [1 << i for i in range(n)]
        self.above = [0] * n
        self.below = [0] * n
        for i, node in enumerate(g.order):
            for s in g.inputs[node]:
                j = g.position[s]
                self.above[i] |= self.above[j] | (1 << j)
        for i in range(n - 1, -1, -1):
            for s in g.inputs[g.order[i]]:
                j = g.position[s]
                self.below[j] |= self.below[i] | (1 << i)

    def acyclic(self, a: int, b: int) -> bool:
        """True when nothing outside lies on a path between the groups of positions a and b."""
        inside = self.mask[a] | self.mask[b]
        between = (self.above[b] & self.below[a]) | (self.above[a] & self.below[b])
        return not between & ~inside

    def merge(self, a: int, b: int) -> None:
        mask = self.mask[a] | self.mask[b]
        above = (self.above[a] | self.above[b]) & ~mask
        below = (self.below[a] | self.below[b]) & ~mask
        for i in _bits(mask):
            self.mask[i], self.above[i], self.below[i] = mask, above, below
        for i in _bits(below):
            self.above[i] |= above | mask
        for i in _bits(above):
            self.below[i] |= below | mask


def _bits(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class _Grouper:
    def __init__(self, graph: fx.Graph, left_out: Collection[fx.Node] = ()) -> None:
        self.g = _Graph(graph)
        self.left_out = left_out
        self.reach = _Reach(self.g)
        self.members: dict[int, list[fx.Node]] = {}  # leader position -> nodes
        self.leader: dict[fx.Node, int] = {}
        self.built: dict[int, BuiltKernel] = {}
        self.rejected: list[Rejected] = []
        self._failed: set[frozenset[fx.Node]] = set()
        self._structures = StructuralCache()

    # -- singletons ---------------------------------------------------------------------------
    def seed(self) -> None:
        """Every claimed node that can be built alone becomes a group of one."""
        for node in self.g.order:
            if not node.users or not self._wants_kernel(node):
                continue
            if node in self.left_out:
                self._reject(node, "disabled for this module")
                continue
            i = self.g.position[node]
            try:
                self.built[i] = self._structures.build([node], [node])
            except CannotLower as why:
                self._reject(node, str(why))
                continue
            self.members[i] = [node]
            self.leader[node] = i

    def _reject(self, node: fx.Node, reason: str) -> None:
        self.rejected.append(Rejected(node, reason))
        self.g.kind[node] = "outside"

    def _wants_kernel(self, node: fx.Node) -> bool:
        """Compute nodes, and generators that something outside reads (kernels recompute them instead)."""
        if self.g.kind[node] == "generator":
            return any(self.g.kind[c] == "outside" for c in self.g.consumers(node))
        return self.g.kind[node] == "compute"

    # -- merging ------------------------------------------------------------------------------
    def outputs(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        inside = set(nodes)
        return [n for n in nodes if any(c not in inside for c in self.g.consumers(n))]

    def try_merge(self, a: int, b: int) -> bool:
        """Join the groups led by a and b when that is legal, buildable and worth it."""
        if a == b:
            return False
        nodes = sorted(self.members[a] + self.members[b], key=self.g.position.__getitem__)
        if len(nodes) > MAX_NODES or not self.reach.acyclic(a, b):
            return False
        key = frozenset(nodes)
        if key in self._failed:
            return False
        built = self._build(nodes, a, b)
        if built is None:
            self._failed.add(key)
            return False
        self.reach.merge(a, b)
        self.members[a] = nodes
        self.built[a] = built
        for n in nodes:
            self.leader[n] = a
        del self.members[b], self.built[b]
        return True

    def _build(self, nodes: list[fx.Node], a: int, b: int) -> BuiltKernel | None:
        outputs = self.outputs(nodes)
        if not outputs or not self._worthwhile(nodes, outputs):
            return None
        try:
            built = self._structures.build(nodes, outputs)
        except CannotLower:
            return None
        if len(built.inputs) + len(built.outputs) > MAX_BUFFERS:
            return None
        return built

    def _worthwhile(self, nodes: list[fx.Node], outputs: list[fx.Node]) -> bool:
        """Refuse to recompute long chains per element of a bigger tensor."""
        frames = [_points(n) for n in nodes]
        if all(f.is_const for f in frames):
            whole = max(f.value for f in frames)
            inlined = [n for n, f in zip(nodes, frames, strict=True) if f.value < whole and n not in outputs]
            if not any(reduction_of(n) for n in nodes) and len(inlined) > MAX_INLINE:
                return False
        return True

    def vertical(self) -> None:
        for node in self.g.order:
            if node not in self.leader or self.g.kind[node] == "generator":
                continue
            for s in sorted(self.g.inputs[node], key=self.g.position.__getitem__, reverse=True):
                if s in self.leader:
                    self.try_merge(self.leader[s], self.leader[node])

    def horizontal(self) -> None:
        """Groups that read the same tensor, nearest first."""
        readers: dict[fx.Node, list[int]] = {}
        for lead in sorted(self.members):
            for n in self.built[lead].inputs:
                readers.setdefault(n, []).append(lead)
        for leads in readers.values():
            if len(leads) < 2 or len(leads) > 12:
                continue
            nodes = [self.g.order[i] for i in leads]
            for x, y in zip(nodes, nodes[1:], strict=False):
                a, b = self.leader[x], self.leader[y]
                if a != b and abs(a - b) <= MAX_DISTANCE and _same_space(self.built[a], self.built[b]):
                    self.try_merge(a, b)

    # -- result -------------------------------------------------------------------------------
    def groups(self) -> list[Group]:
        out = []
        for lead in sorted(self.members):
            nodes = self.members[lead]
            out.append(Group(tuple(nodes), self._internal_views(nodes), self.built[lead]))
        return out

    def _internal_views(self, nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """Views and generators that only these nodes read."""
        inside = set(nodes)
        found: list[fx.Node] = []
        grew = True
        while grew:
            grew = False
            for n in list(inside):
                for a in n.all_input_nodes:
                    if a not in inside and self.g.kind[a] in TRANSPARENT and all(u in inside for u in a.users):
                        inside.add(a)
                        found.append(a)
                        grew = True
        return tuple(sorted(found, key=self.g.position.__getitem__))


def _points(node: fx.Node) -> Expr:
    """Iteration points of a node: its elements, or its operand's for a reduction."""
    reduction = reduction_of(node)
    source = node if reduction is None else reduction.args[0]
    assert isinstance(source, fx.Node)
    return shape_of(source.meta["val"]).numel


def _same_space(a: BuiltKernel, b: BuiltKernel) -> bool:
    """The kernels walk equally many rows of equal length."""
    def space(k: BuiltKernel) -> tuple[Expr, Expr]:
        back = dict(zip(k.kernel.sizes, k.sizes, strict=True))
        return k.kernel.rows.subs(back), k.kernel.row_size.subs(back)
    return space(a) == space(b)


def group(graph: fx.Graph, left_out: Collection[fx.Node] = ()) -> tuple[list[Group], list[Rejected]]:
    """Partition the claimed nodes of an ATen graph into kernels; the second list names what was refused. Nodes that are
    `left_out` go into none."""
    grouper = _Grouper(graph, left_out)
    grouper.seed()
    grouper.vertical()
    grouper.horizontal()
    return grouper.groups(), grouper.rejected

