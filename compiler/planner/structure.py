"""Sizes that a parallel layout must divide, found in a graph: heads, feed-forward width, experts, vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from ...runtime import torch_compat
from .joint import Joint, result_of, view_root

SAME_VALUES = frozenset(("clone", "_to_copy", "contiguous"))
EMBEDDINGS, SOFTMAXES = frozenset(("embedding",)), frozenset(("_log_softmax",))
GROUPED = "grouped_mm"


@dataclass(frozen=True)
class Structure:
    """See the fields of `LayerKind` that have these names."""

    causal_flops_forward: int
    causal_flops_backward: int
    expert_flops_forward: int
    expert_flops_backward: int
    expert_parameters: int
    heads: int | None
    kv_heads: int | None
    ffn: int | None
    experts: int | None
    top_k: int | None
    expert_ffn: int | None
    vocabulary: int | None


def structure_of(joint: Joint, hidden: int | None, tokens: int | None, imbalance: float) -> Structure:
    """What the graph shows. `hidden`: width of the layer's input; `tokens`: its rows; None where it has none."""
    forward = [n for n in joint.forward if n in joint.records]
    attention = [n for n in forward if joint.records[n].kind == "attention"]
    grouped = [n for n in forward if _name(n) == GROUPED]
    experts = {view_root(n.args[1]) for n in grouped}  # type: ignore[arg-type]
    rows = int(_shape(grouped[0].args[0])[0]) if grouped else 0
    return Structure(
        causal_flops_forward=_flops(joint, joint.forward, _causal),
        causal_flops_backward=_flops(joint, joint.backward, _causal),
        expert_flops_forward=_flops(joint, joint.forward, _of_experts),
        expert_flops_backward=_flops(joint, joint.backward, _of_experts),
        expert_parameters=sum(math.prod(_shape(p)) for p in experts),
        heads=max((*(_shape(n.args[0])[1] for n in attention), *_softmax_heads(forward)), default=None),
        kv_heads=max((_kv_heads(n.args[1]) for n in attention), default=None),
        ffn=_ffn(joint, attention, hidden, grouped=False),
        experts=max((_shape(p)[0] for p in experts), default=None),
        top_k=max(1, int(rows / imbalance / tokens + 0.5)) if grouped and tokens else None,
        expert_ffn=_ffn(joint, attention, hidden, grouped=True),
        vocabulary=_vocabulary(forward, hidden))


def _softmax_heads(forward: list[fx.Node]) -> list[int]:
    """Heads of attention that is written out: a softmax over [batch, heads, queries, keys]."""
    return [_shape(n)[1] for n in forward if _name(n) == "_softmax" and len(_shape(n)) == 4]


def _vocabulary(forward: list[fx.Node], hidden: int | None) -> int | None:
    """Rows of the table that makes hidden states, or classes of the loss."""
    tables = [_shape(n.args[0]) for n in forward if _name(n) in EMBEDDINGS]
    classes = [_shape(n)[-1] for n in forward if _name(n) in SOFTMAXES]
    return max([*(rows for rows, width in tables if hidden in (None, width)), *classes], default=None)


def _flops(joint: Joint, nodes: list[fx.Node], wanted: Any) -> int:
    return sum(joint.records[n].flops for n in nodes if n in joint.records and wanted(joint, n))


def _causal(joint: Joint, node: fx.Node) -> bool:
    return joint.records[node].kind == "attention" and torch_compat.argument(node, "is_causal") is True


def _of_experts(_: Joint, node: fx.Node) -> bool:
    return _name(node).startswith(GROUPED)


def _kv_heads(key: Any) -> int:
    """Heads of a key before they were repeated for the query's: the size before `expand`, else the operator's."""
    heads = _shape(key)[1]
    node = key
    while node.op == "call_function" and (view_root(node) is not node or _name(node) in SAME_VALUES):
        if _name(node) == "expand":
            before = _shape(node.args[0])
            return int(before[1]) if len(before) > 1 else int(heads)
        node = node.all_input_nodes[0]
    return int(heads)


def _ffn(joint: Joint, attention: list[fx.Node], hidden: int | None, *, grouped: bool) -> int | None:
    """The widest inner size of a product that comes back to `hidden` from an element-wise operator: neither what leads
    into attention nor what comes out of it."""
    feeding, found = _leading_to(joint, attention), []
    for node in joint.forward:
        if node not in joint.records or joint.records[node].kind != "gemm" or (_name(node) == GROUPED) != grouped:
            continue
        rows = node.args[1] if _name(node) == "addmm" else node.args[0]
        inner = _kind(joint, _source(rows)) in ("pointwise", "other")
        if _shape(node)[-1] == hidden and inner and node not in feeding and _name(node) != "bmm":
            found.append(int(_shape(rows)[-1]))
    return max(found, default=None)


def _leading_to(joint: Joint, attention: list[fx.Node]) -> set[fx.Node]:
    """The products whose results reach attention without another product in between."""
    found, seen = set[fx.Node](), set[fx.Node]()
    queue = [a for n in attention for a in n.all_input_nodes]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in joint.records and joint.records[node].kind == "gemm":
            found.add(node)
        else:
            queue.extend(node.all_input_nodes)
    return found


def _source(node: Any) -> fx.Node:
    """The operator that computed the values of `node`, behind views and copies."""
    while node.op == "call_function":
        root = view_root(node)
        if root is node and _name(node) not in SAME_VALUES:
            break
        node = node.all_input_nodes[0]
    return node  # type: ignore[no-any-return]


def _kind(joint: Joint, node: fx.Node) -> str | None:
    record = joint.records.get(result_of(node))
    return record.kind if record is not None else None


def _name(node: Any) -> str:
    return getattr(getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target))


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
