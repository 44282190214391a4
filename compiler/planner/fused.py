"""Bytes that cross memory when element-wise operators and reductions next to each other run as one kernel.

A region is what edges connect without a product on the way: operators of one pass that have the same number of products
before them. It reads each tensor from outside once and writes what others read. The backward pass reads what min-cut
keeps: a forward result that is not kept is computed again inside the region, from what is.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ...runtime import torch_compat
from .joint import Joint, result_of, tensor_bytes, view_root

FUSED = frozenset(("pointwise", "reduction", "copy", "other"))


def fused_bytes(joint: Joint) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes at every record of the forward and of the backward pass, those of a region at the operators in it that read
    or write them."""
    passes = _Passes(joint)
    return passes.one(joint.forward), passes.one(joint.backward)


class _Passes:
    def __init__(self, joint: Joint) -> None:
        self._records, self._in_forward = joint.records, set(joint.forward)
        self._kept = joint.min_cut_kept() if joint.backward else frozenset[fx.Node]()
        self._level: dict[fx.Node, int] = {}
        self._readers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node in joint.module.graph.nodes:
            if node in self._records or node.op == "output":
                for used in node.all_input_nodes:
                    self._readers[view_root(used)].add(node)

    def one(self, calls: Sequence[fx.Node]) -> tuple[int, ...]:
        nodes = [n for n in calls if n in self._records]
        region = self._regions(nodes)
        seen = set[tuple[int, fx.Node]]()
        return tuple(self._written(n, region) + self._read(n, region, seen) for n in nodes)

    def _read(self, node: fx.Node, region: Mapping[fx.Node, int], seen: set[tuple[int, fx.Node]]) -> int:
        """Bytes that `node` is the first of its region to read."""
        record, total = self._records[node], 0
        if record.kind == "gather":
            return record.bytes_read  # of a table only what is looked up
        for root in {r for used in node.all_input_nodes for r in self._sources(view_root(used), node, region)}:
            if (region[node], root) not in seen:
                seen.add((region[node], root))
                total += _bytes(root)
        return total

    def _regions(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """The region of each operator; products and gathers are alone in theirs."""
        inside = set(nodes)
        region: dict[fx.Node, int] = {}
        parent: list[int] = []

        def find(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for number, node in enumerate(nodes):
            parent.append(number)
            before = [p for a in node.all_input_nodes if (p := result_of(view_root(a))) in inside]
            self._level[node] = max((self._level[p] + (self._records[p].kind not in FUSED) for p in before), default=0)
            region[node] = number
            for p in before:
                if {self._records[p].kind, self._records[node].kind} <= FUSED and self._level[p] == self._level[node]:
                    parent[find(region[p])] = find(number)
        return {n: find(r) for n, r in region.items()}

    def _sources(self, root: fx.Node, reader: fx.Node, region: Mapping[fx.Node, int]) -> set[fx.Node]:
        """What `reader` has to read from memory for `root`."""
        maker = result_of(root)
        if maker in region:
            return set() if region[maker] == region[reader] else {root}
        again = (maker in self._in_forward and maker in self._records and root not in self._kept
                 and self._records[maker].kind in FUSED)
        if not again:
            return {root}
        return {r for used in maker.all_input_nodes for r in self._sources(view_root(used), reader, region)}

    def _written(self, node: fx.Node, region: Mapping[fx.Node, int]) -> int:
        results = [u for u in node.users if u.target is operator.getitem] or [node]
        return sum(_bytes(r) for r in results if r in self._kept or any(
            u.op == "output" or (u in region and region[u] != region[node]) for u in self._readers[r]))


def _bytes(root: fx.Node) -> int:
    leaves = torch_compat.tree_leaves(root.meta.get("val"))
    return sum(tensor_bytes(t) for t in leaves if isinstance(t, torch.Tensor))
