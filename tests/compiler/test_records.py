"""Records of known operators and kernels have exact bytes, FLOPs and element operations."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from meshwright.codegen.group import group
from meshwright.codegen.lowering import decompositions
from meshwright.compiler.records import group_records, kernel_record, op_record, region_nodes
from meshwright.cost_model.records import ElementOps, KernelRecord, OpRecord

aten = torch.ops.aten


def trace(f: Callable[..., Any], *args: torch.Tensor, symbolic: bool = False) -> fx.GraphModule:
    mode = "symbolic" if symbolic else "fake"
    gm: fx.GraphModule = make_fx(f, decomposition_table=decompositions(), tracing_mode=mode)(*args)
    gm.graph.eliminate_dead_code()
    return gm


def record_of(target: Any, f: Callable[..., Any], *args: torch.Tensor) -> OpRecord:
    nodes = [n for n in trace(f, *args).graph.nodes if n.target is target]
    assert len(nodes) == 1, nodes
    return op_record(nodes[0])


def only_kernel(f: Callable[..., Any], *args: torch.Tensor, **values: int) -> KernelRecord:
    groups, rejected = group(trace(f, *args, symbolic=bool(values)).graph)
    assert len(groups) == 1 and not rejected
    return kernel_record(groups[0].built, values)


# -- operators ------------------------------------------------------------------------------------
def test_pointwise_counts_each_operand_once() -> None:
    r = record_of(aten.add.Tensor, lambda x, y: x + y, torch.ones(4, 8), torch.ones(8))
    assert (r.kind, r.dtype, r.elements, r.bytes_read, r.bytes_written, r.flops) == \
        ("pointwise", "float32", 32, 4 * 32 + 4 * 8, 128, 0)


def test_expanded_dimensions_are_read_once() -> None:
    r = record_of(aten.mul.Tensor, lambda x, y: x * y.expand(64, 8), torch.ones(64, 8), torch.ones(1, 8))
    assert r.bytes_read == 4 * (64 * 8 + 8)


@pytest.mark.parametrize("dtype,size", [(torch.bfloat16, 2), (torch.float64, 8), (torch.int64, 8), (torch.bool, 1)])
def test_bytes_follow_the_dtype(dtype: torch.dtype, size: int) -> None:
    r = record_of(aten.clone.default, lambda x: x.clone(), torch.ones(10, 10).to(dtype))
    assert (r.kind, r.bytes_read, r.bytes_written, r.dtype) == ("copy", 100 * size, 100 * size, str(dtype)[6:])


def test_transcendentals_and_divisions_are_told_apart() -> None:
    x = torch.ones(6, 7)
    assert record_of(aten.tanh.default, torch.tanh, x).element_ops == ElementOps(transcendental=42)
    assert record_of(aten.div.Tensor, lambda v: v / v, x).element_ops == ElementOps(division=42)
    assert record_of(aten.mul.Tensor, lambda v: v * v, x).transcendentals == 0
    assert record_of(aten.pow.Tensor_Scalar, lambda v: v**2, x).transcendentals == 0
    assert record_of(aten.pow.Tensor_Scalar, lambda v: v**1.5, x).transcendentals == 42


def test_products_use_torchs_own_formulas() -> None:
    r = record_of(aten.mm.default, torch.mm, torch.ones(3, 5), torch.ones(5, 7))
    assert (r.kind, r.flops, r.bytes_read, r.bytes_written) == ("gemm", 2 * 3 * 5 * 7, 4 * (15 + 35), 4 * 21)
    r = record_of(aten.addmm.default, torch.addmm, torch.ones(7), torch.ones(3, 5), torch.ones(5, 7))
    assert (r.kind, r.flops) == ("gemm", 2 * 3 * 5 * 7)
    r = record_of(aten.bmm.default, torch.bmm, torch.ones(2, 3, 5), torch.ones(2, 5, 7))
    assert r.flops == 2 * 2 * 3 * 5 * 7


def test_convolution_flops() -> None:
    r = record_of(aten.convolution.default, lambda x, w: torch.conv2d(x, w, padding=1),
                  torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3))
    assert (r.kind, r.flops) == ("conv", 2 * 2 * 8 * 8 * 4 * 3 * 9)


def test_reduction_counts_its_operand() -> None:
    r = record_of(aten.sum.dim_IntList, lambda x: x.sum(1), torch.ones(16, 1000))
    assert (r.kind, r.elements, r.bytes_read, r.bytes_written) == ("reduction", 16000, 64000, 64)


def test_gather_reads_what_it_returns_not_the_table() -> None:
    r = record_of(aten.embedding.default, lambda w, i: torch.embedding(w, i), torch.ones(1000, 16), torch.arange(3))
    assert (r.kind, r.bytes_read, r.bytes_written) == ("gather", 4 * 48 + 8 * 3, 4 * 48)


def test_views_are_free_but_for_their_dispatch() -> None:
    r = record_of(aten.view.default, lambda x: x.view(8, 4), torch.ones(4, 8))
    assert (r.kind, r.bytes_moved, r.dispatches) == ("view", 0, 1)


def test_transposed_copies_go_one_element_at_a_time() -> None:
    straight = record_of(aten.clone.default, lambda x: x.clone(), torch.ones(32, 48))
    turned = record_of(aten.clone.default, lambda x: x.t().clone(memory_format=torch.contiguous_format),
                       torch.ones(32, 48))
    assert straight.element_ops.single == 0 and turned.element_ops.single == 32 * 48


def test_masks_from_floats_are_unpredictable_masks_from_positions_are_not() -> None:
    x, i = torch.ones(64, 64), torch.arange(64)
    assert record_of(aten.where.self, lambda v: torch.where(v <= 0, v, v + 1), x).element_ops.serial == 64 * 64
    assert record_of(aten.where.self, lambda v, n: torch.where(n[:, None] >= n, v, v + 1), x, i).element_ops.serial == 0


# -- symbolic sizes -------------------------------------------------------------------------------
def test_symbols_take_the_values_given() -> None:
    gm = trace(lambda x: torch.mm(x, x.t()), torch.ones(5, 7), symbolic=True)
    node = next(n for n in gm.graph.nodes if n.target is aten.mm.default)
    rows, inner = (str(s.node.expr) for s in node.args[0].meta["val"].shape)
    record = op_record(node, {rows: 100, inner: 10})
    assert (record.flops, record.bytes_written) == (2 * 100 * 100 * 10, 4 * 100 * 100)
    with pytest.raises(ValueError, match=rf"needs values for {rows}, got \['{inner}'\]"):
        op_record(node, {inner: 10})


def test_kernel_sizes_take_the_values_given() -> None:
    gm = trace(lambda x: (x * 2).tanh(), torch.ones(5, 7), symbolic=True)
    (found,), _ = group(gm.graph)
    shape = next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"].shape
    record = kernel_record(found.built, {str(shape[0].node.expr): 11, str(shape[1].node.expr): 13})
    assert (record.elements, record.bytes_read, record.bytes_written) == (143, 4 * 143, 4 * 143)


# -- kernels --------------------------------------------------------------------------------------
def test_pointwise_kernel_reads_and_writes_once() -> None:
    r = only_kernel(lambda x, b: torch.tanh(x * b + x), torch.ones(16, 32), torch.ones(32))
    assert (r.bytes_read, r.bytes_written, r.elements, r.rows, r.phases) == (4 * (512 + 32), 4 * 512, 512, 512, 1)
    assert r.element_ops == ElementOps(simple=2 * 512, transcendental=512)


def test_softmax_kernel_sweeps_its_rows() -> None:
    r = only_kernel(lambda x: torch.softmax(x, -1), torch.ones(16, 200))
    assert (r.bytes_read, r.bytes_written, r.elements) == (12800, 12800, 3200)
    assert (r.rows, r.row_size, r.column_reduction) == (16, 200, False)
    assert r.phases >= 2 and r.element_ops.transcendental >= 3200


def test_column_sums_are_recognised() -> None:
    r = only_kernel(lambda x: (x * x).sum(0), torch.ones(64, 200))
    assert (r.column_reduction, r.rows, r.row_size, r.bytes_written) == (True, 200, 64, 800)


def test_kernel_gather_reads_rows_in_lanes() -> None:
    r = only_kernel(lambda w, i: torch.embedding(w, i) * 2, torch.ones(1000, 64), torch.arange(8))
    assert r.bytes_read == 4 * 8 * 64 + 8 * 8 and r.element_ops.single == 0


def test_kernel_moves_fewer_bytes_than_the_operators_it_replaces() -> None:
    (found,), _ = group(trace(lambda x, w: torch.nn.functional.layer_norm(x, (64,), w), torch.ones(32, 64),
                              torch.ones(64)).graph)
    before, after = group_records(found), kernel_record(found.built)
    assert sum(r.bytes_moved for r in before) > 3 * after.bytes_moved


def test_region_holds_the_operator_behind_getitem() -> None:
    (found,), _ = group(trace(lambda x: torch.nn.functional.layer_norm(x, (64,)), torch.ones(32, 64)).graph)
    nodes = region_nodes(found)
    parents = [n.args[0] for n in nodes if n.target is operator.getitem]
    assert all(p in nodes for p in parents)
    assert len(nodes) == len(set(nodes)) and len(group_records(found)) == len(nodes)
