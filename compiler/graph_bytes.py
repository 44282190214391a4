"""Where a graph's bytes move: in emitted kernels, in library products (GEMM, convolution, attention), or elsewhere
in ATen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..codegen.group import Group
from ..codegen.lowering import CannotLower, kind_of, shape_of
from ..runtime.torch_compat import is_operator
from .program_builder import IN_PLACE

aten = torch.ops.aten
LIBRARY = frozenset((
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward, aten.mv, aten.dot,
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_cudnn_attention_backward, aten._grouped_mm,
    aten._flash_attention_forward, aten._flash_attention_backward, aten._addmm_activation,
))


@dataclass
class BytesMoved:
    """Bytes per call: in emitted kernels, in other ATen calls (`uncovered` by operator), in library products."""

    kernels: int = 0
    aten: int = 0
    library: int = 0
    uncovered: dict[str, int] = field(default_factory=dict)


def tensor_bytes(value: Any, symbols: Mapping[str, int]) -> int:
    """Bytes of a (fake) tensor or of the tensors in a tuple, at these sizes; 0 for what is no plain tensor."""
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(v, symbols) for v in value)
    if not isinstance(value, torch.Tensor):
        return 0
    try:
        return shape_of(value).numel.evaluate(symbols) * value.element_size()
    except (CannotLower, ValueError):
        return 0


def count_bytes(gm: fx.GraphModule, kept: Sequence[Group], symbols: Mapping[str, int]) -> BytesMoved:
    """Count what each launch and call reads and writes (every tensor once per launch or call)."""
    out = BytesMoved()
    inside = {n for g in kept for n in (*g.nodes, *g.views)}
    for g in kept:
        out.kernels += sum(tensor_bytes(n.meta["val"], symbols) for n in (*g.built.inputs, *g.built.outputs))
    for node in gm.graph.nodes:
        if node in inside or node.op != "call_function" or not is_operator(node.target):
            continue
        if not node.users or kind_of(node) in ("view", "multi") or not tensor_bytes(node.meta.get("val"), symbols):
            continue
        if node.target in IN_PLACE and node.args[0] in inside:  # only the rows that are written move
            small = 2 * sum(tensor_bytes(a.meta.get("val"), symbols) for a in node.all_input_nodes[1:])
            out.aten += small
            out.uncovered[str(node.target)] = out.uncovered.get(str(node.target), 0) + small
            continue
        read = sum(tensor_bytes(a.meta.get("val"), symbols) for a in node.all_input_nodes)
        moved = read + tensor_bytes(node.meta.get("val"), symbols)
        if node.target.overloadpacket in LIBRARY:
            out.library += moved
        else:
            out.aten += moved
            out.uncovered[str(node.target)] = out.uncovered.get(str(node.target), 0) + moved
    return out
