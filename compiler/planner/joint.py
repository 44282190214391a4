"""What one part of a model costs and saves, read off AOTAutograd's joint graph of its forward and backward pass.

What is saved between the two follows from the graph and a policy, `saveable`: a forward result that the backward pass
reads is kept if the policy keeps its operator, else its operator runs again, and so on down to the inputs.

    none       every operator's result may be kept: what eager autograd saves
    selective  products and attention are kept, everything else runs again
    full       nothing but the layer's inputs is kept
    min-cut    what `torch.compile` keeps: torch's own partitioner decides

Views cost nothing and hold the tensor they look at, which is counted once.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import fx

from ...cost_model.model import RECOMPUTE_MODES, RecomputeMode, Saved
from ...cost_model.records import OpRecord
from ...runtime import torch_compat
from ..records import op_record

InputRole = Literal["parameter", "buffer", "chain", "carried", "constant"]
PRODUCTS = frozenset(("gemm", "conv", "attention"))
ALIASES = frozenset(("_unsafe_view", "alias", "detach"))  # views whose schema does not say so, or not in every release


@dataclass
class Joint:
    """A joint graph taken apart. `roles[i]` is what input `i` of the traced function is."""

    module: fx.GraphModule
    forward_outputs: int
    roles: Sequence[InputRole]
    forward: list[fx.Node] = field(init=False)  # operators, in order, getitems and views included
    backward: list[fx.Node] = field(init=False)
    records: dict[fx.Node, OpRecord] = field(init=False)  # of those that do something
    read: frozenset[int] = field(init=False)  # the inputs that a result depends on

    def __post_init__(self) -> None:
        outputs = _outputs(self.module)
        needed = _ancestors(_nodes(outputs[:self.forward_outputs]))
        live = needed | _ancestors(_nodes(outputs[self.forward_outputs:]))
        for node in self.module.graph.nodes:  # the logsumexp of attention: no output needs it, its operator runs anyway
            if node in live and node.target is operator.getitem and node.args[0] in needed:
                needed.add(node)
        calls = [n for n in self.module.graph.nodes if n.op == "call_function" and n in live]
        self.forward = [n for n in calls if n in needed]
        self.backward = [n for n in calls if n not in needed]
        self.read = frozenset(i for n in live if n.op == "placeholder"
                              and (i := torch_compat.input_index(n)) is not None)
        self.records = {n: r for n in calls if not _is_view(n) and (r := op_record(n)).kind != "view"}

    @property
    def forward_records(self) -> tuple[OpRecord, ...]:
        return tuple(self.records[n] for n in self.forward if n in self.records)

    @property
    def backward_records(self) -> tuple[OpRecord, ...]:
        return tuple(self.records[n] for n in self.backward if n in self.records)

    def role(self, node: fx.Node) -> InputRole | None:
        """What a placeholder is; None for a gradient of an output and for operators."""
        index = torch_compat.input_index(node) if node.op == "placeholder" else None
        return None if index is None else self.roles[index]

    def saved(self) -> dict[RecomputeMode, Saved]:
        """Bytes kept and operators repeated, by mode. Nothing in a part without a backward pass."""
        if not self.backward:
            return {mode: Saved(0) for mode in RECOMPUTE_MODES}
        products = {n for n, r in self.records.items() if r.kind in PRODUCTS}
        return {"none": self._under(lambda n: True), "min-cut": self._min_cut(),
                "selective": self._under(lambda n: n in products), "full": self._under(lambda n: False)}

    def _under(self, saveable: Callable[[fx.Node], bool]) -> Saved:
        kept: set[fx.Node] = set()
        again: set[fx.Node] = set()
        forward, seen = set(self.forward), set[fx.Node]()
        queue = [a for n in self.backward for a in n.all_input_nodes]
        while queue:
            node = queue.pop()
            if node in seen or (node.op == "call_function" and node not in forward):
                continue
            seen.add(node)
            if node.op == "placeholder":
                kept.update([node] if self.role(node) is not None else [])  # gradients of outputs are not saved
            elif _is_view(node):
                queue.extend(node.all_input_nodes[:1])
            elif saveable(result_of(node)):
                kept.add(node)
            else:
                again.add(result_of(node))
                queue.extend(result_of(node).all_input_nodes)
        order = [n for n in self.forward if n in self.records]
        return Saved(self._bytes(kept), tuple(i for i, n in enumerate(order) if n in again), self._weight_bytes(kept))

    def min_cut_kept(self) -> frozenset[fx.Node]:
        """The tensors, behind views, that `min-cut` keeps."""
        return self._cut[0]

    @cached_property
    def _cut(self) -> tuple[frozenset[fx.Node], frozenset[str]]:
        """What torch's partitioner keeps, and the names of what it runs in the backward pass."""
        static = [i for i, role in enumerate(self.roles) if role in ("parameter", "buffer")]
        joint = copy.copy(self.module)  # the partitioner exchanges the graph of the module it is given
        with _quiet():
            forward, backward = min_cut_rematerialization_partition(
                joint, [], num_fwd_outputs=self.forward_outputs, static_lifetime_input_indices=static)
        by_name = {n.name: n for n in self.module.graph.nodes}
        kept = {view_root(n) for n in _outputs(forward)[self.forward_outputs:] if isinstance(n, fx.Node)}
        return (frozenset(by_name[n.name] for n in kept if n.name in by_name),
                frozenset(n.name for n in backward.graph.nodes if n.op == "call_function"))

    def _min_cut(self) -> Saved:
        ours, names = self._cut
        ran = [n for n in self.forward if n in self.records]
        again = tuple(i for i, n in enumerate(ran) if n.name in names)
        return Saved(self._bytes(ours), again, self._weight_bytes(ours))

    @cached_property
    def weight_only(self) -> frozenset[fx.Node]:
        """Backward operators that no gradient of an activation needs."""
        gradients = _outputs(self.module)[self.forward_outputs:]
        needed = _ancestors(_nodes([g for g, role in zip(gradients, self.roles, strict=False)
                                    if role in ("chain", "carried")]))
        return frozenset(n for n in self.backward if n not in needed)

    def _weight_bytes(self, kept: Set[fx.Node]) -> int:
        """Of what is kept, the bytes that gradients of weights read."""
        return self._bytes(kept & {view_root(a) for n in self.weight_only for a in n.all_input_nodes})

    def gradient_bytes(self) -> int:
        """Gradients of activations that only gradients of weights still read when these are delayed."""
        made = {view_root(a) for n in self.weight_only for a in n.all_input_nodes}
        return self._bytes({n for n in made if result_of(n) in set(self.backward) - self.weight_only
                            or (n.op == "placeholder" and self.role(n) is None)})

    def _bytes(self, kept: Set[fx.Node]) -> int:
        return sum(tensor_bytes(t) for n in kept if self.role(n) in (None, "chain")
                   for t in torch_compat.tree_leaves(n.meta.get("val")) if isinstance(t, torch.Tensor))


def trace(function: Callable[..., Any], inputs: Sequence[torch.Tensor], roles: Sequence[InputRole]) -> Joint:
    """The joint graph of `function(*inputs)`, which takes and returns fake tensors."""
    with _quiet():
        module, outputs = torch_compat.joint_graph(function, inputs)
    return Joint(module, outputs, roles)


def tensor_bytes(value: torch.Tensor) -> int:
    """Bytes of a tensor's elements; dimensions expanded with stride 0 count once."""
    elements = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        elements *= 1 if stride == 0 and size > 0 else size
    return elements * value.element_size()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the partitioner's remarks about graphs that it was not made for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _outputs(module: fx.GraphModule) -> list[Any]:
    output: Any = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    return list(output.args[0])


def _nodes(values: Sequence[Any]) -> list[fx.Node]:
    return [v for v in values if isinstance(v, fx.Node)]


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    seen, queue = set[fx.Node](), list(nodes)
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return seen


def result_of(node: fx.Node) -> fx.Node:
    """The operator behind one of several results."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _is_view(node: fx.Node) -> bool:
    target = result_of(node).target
    name = getattr(getattr(target, "overloadpacket", target), "__name__", "")
    return node.op == "call_function" and (torch_compat.is_view(target) or name in ALIASES)


def view_root(node: fx.Node) -> fx.Node:
    """The tensor that a view looks at."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node
