"""Fill the cost model's records: `op_record` from an ATen node and its fake tensors, `kernel_record` from kernel IR.

Symbolic sizes are replaced by the values in `symbol_values` (graph symbols such as `s0`, usually the hints of the
example inputs); a symbol that is missing there raises `ValueError` with its name.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from ..codegen.build import BuiltKernel
from ..codegen.cpp_plan import LoopPlan, plan_loops, plan_passes
from ..codegen.expr import Expr
from ..codegen.group import Group
from ..codegen.ir import DTYPES, Kernel, Load, Op, Reduce, stmt_axes
from ..codegen.lowering import kind_of, size_expr
from ..cost_model.records import ElementOps, KernelRecord, OpKind, OpRecord
from ..runtime import torch_compat

SymbolValues = Mapping[str, int]

TRANSCENDENTAL = frozenset((
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "atan2",
    "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "erfinv", "sigmoid", "pow", "gelu", "silu",
    "softplus", "mish", "log_sigmoid_forward", "_softmax", "_log_softmax", "logsumexp", "digamma", "lgamma", "hypot",
    "elu", "celu",
))
DIVISION = frozenset(("div", "sqrt", "rsqrt", "reciprocal", "fmod", "remainder", "mod", "floordiv", "truncdiv",
                      "floor_divide"))
SCALAR = frozenset(("var", "var_mean", "std", "std_mean", "argmax", "argmin", "cumsum", "cumprod", "cummax", "cummin",
                    "native_layer_norm", "native_group_norm", "native_batch_norm", "sort", "topk", "max.dim",
                    "min.dim"))
REDUCTIONS = frozenset(("sum", "mean", "amax", "amin", "prod", "any", "all", "var", "var_mean", "std", "std_mean",
                        "argmax", "argmin", "logsumexp", "max.dim", "min.dim", "_softmax", "_log_softmax",
                        "native_layer_norm"))
GEMMS = frozenset(("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "_int_mm", "_scaled_mm", "linear"))
COPIES = frozenset(("clone", "_to_copy", "copy", "copy_", "contiguous", "cat", "stack", "constant_pad_nd", "repeat",
                    "slice_scatter", "select_scatter", "fill", "full", "full_like", "zeros", "zeros_like", "ones",
                    "ones_like", "empty", "empty_like", "arange", "scalar_tensor", "new_zeros", "new_full"))
GATHERS = frozenset(("gather", "embedding", "index", "index_select", "take", "index_put", "scatter", "scatter_add",
                     "embedding_dense_backward", "index_add", "_unsafe_index", "_unsafe_index_put"))


def op_record(node: fx.Node, symbol_values: SymbolValues | None = None) -> OpRecord:
    """What one ATen node costs in eager mode. Needs `meta["val"]` on the node and its arguments."""
    values = symbol_values or {}
    name, overload = _names(node)
    outs = _tensors(node.meta.get("val"))
    dtype = str(outs[0].dtype).removeprefix("torch.") if outs else "int64"
    if node.target is operator.getitem or not outs:
        return OpRecord(name, "view", dtype, dispatches=0)
    kind = _kind(node, name, overload)
    if kind == "view":
        return OpRecord(name, "view", dtype, elements=_points(outs[0], values))
    ins = [t for a in node.all_input_nodes for t in _tensors(a.meta.get("val"))]
    written = sum(_bytes(t, values) for t in outs)
    elements = max(_points(t, values) for t in ([*ins, *outs] if kind == "reduction" else outs))
    read = _bytes_read(kind, ins, written, values)
    product = kind in ("gemm", "conv", "attention")
    work = ElementOps() if product else _element_ops(node, name, overload, ins, outs, elements)
    return OpRecord(name, kind, dtype, _flops(node, values), read, written, elements, work)


def group_records(group: Group, symbol_values: SymbolValues | None = None) -> list[OpRecord]:
    """The eager operators one kernel replaces, views that only it reads included."""
    return [op_record(n, symbol_values) for n in region_nodes(group)]


def region_nodes(group: Group) -> list[fx.Node]:
    """What must run in eager mode to compute what one kernel does, in graph order: the group's own nodes, its views, and
    the operators with several results (`var_mean`) whose results the group names by `getitem`."""
    nodes = [*group.nodes, *group.views]
    parents = {n.args[0] for n in group.nodes if n.target is operator.getitem}
    wanted = {*nodes, *(p for p in parents if isinstance(p, fx.Node))}
    return [n for n in group.nodes[0].graph.nodes if n in wanted] if group.nodes else []


def kernel_record(built: BuiltKernel, symbol_values: SymbolValues | None = None) -> KernelRecord:
    """What one launch of `built` costs."""
    plan = plan_loops(built.kernel)  # as the printers see it: merged axes, a vector axis chosen
    kernel, reduces = plan.kernel, bool(plan.kernel.reduce)
    inner = dict(zip(built.kernel.sizes, (_value(e, symbol_values or {}) for e in built.sizes), strict=True))
    sizes = {a.name: _value(a.size, inner) for a in kernel.axes}
    points, rows = _product(sizes.values()), _product(sizes[a.name] for a in kernel.parallel)
    capacity = {b.name: _bytes(n.meta["val"], symbol_values or {})
                for b, n in zip(kernel.inputs, built.inputs, strict=True)}
    written = sum(_bytes(n.meta["val"], symbol_values or {}) for n in built.outputs)
    return KernelRecord(
        kernel.name, _kernel_bytes_read(kernel, sizes, capacity), written, points, _kernel_ops(plan, sizes, rows),
        rows=rows, row_size=_product(sizes[a.name] for a in kernel.reduce),
        phases=len(plan_passes(kernel)[0]) if reduces else 1, column_reduction=reduces and not plan.rows)


# -- operators ------------------------------------------------------------------------------------
def _names(node: fx.Node) -> tuple[str, str]:
    """("add", "add.Tensor") for `aten.add.Tensor`."""
    target: Any = node.target
    if hasattr(target, "overloadpacket"):
        full = target.name().partition("::")[2]
        return full.partition(".")[0], full
    name = getattr(target, "__name__", str(target))
    return name, name


def _kind(node: fx.Node, name: str, overload: str) -> OpKind:
    if kind_of(node) == "view":
        return "view"
    if name in GEMMS:
        return "gemm"
    if "convolution" in name:
        return "conv"
    if "scaled_dot_product" in name or "flash_attention" in name:
        return "attention"
    if name in REDUCTIONS or overload in REDUCTIONS:
        return "reduction"
    if name in GATHERS:
        return "gather"
    if name in COPIES:
        return "copy"
    tags = getattr(node.target, "tags", ())
    return "pointwise" if torch.Tag.pointwise in tags or kind_of(node) == "compute" else "other"


def _element_ops(node: fx.Node, name: str, overload: str, ins: list[torch.Tensor], outs: list[torch.Tensor],
                 elements: int) -> ElementOps:
    if name in SCALAR or overload in SCALAR:
        return ElementOps(scalar=elements)
    strided = elements if name in GATHERS or any(_turned(t, outs[0]) for t in ins) else 0
    square = name == "pow" and len(node.args) > 1 and node.args[1] in (2, 3, 0.5, -1)  # ATen multiplies these out
    if name in TRANSCENDENTAL and not square:
        return ElementOps(transcendental=elements, strided=strided)
    if name in DIVISION and outs[0].dtype.is_floating_point:
        return ElementOps(division=elements, strided=strided)
    return ElementOps(simple=elements, strided=strided)


def _turned(source: torch.Tensor, out: torch.Tensor) -> bool:
    """True when walking `out` along its contiguous dimension leaps through `source` (same shape, other order)."""
    if source.dim() != out.dim() or source.dim() < 2 or source.numel() != out.numel():
        return False
    inner = [d for d in range(out.dim()) if out.shape[d] != 1 and out.stride(d) == 1]
    return bool(inner) and source.stride(inner[-1]) not in (0, 1)


def _bytes_read(kind: OpKind, ins: list[torch.Tensor], written: int, values: SymbolValues) -> int:
    """A gather reads its indices and as much of the table as it writes; everything else reads its operands whole."""
    each = [_bytes(t, values) for t in ins]
    if kind == "gather" and each:
        return min(each[0], written) + sum(each[1:])
    return sum(each)


def _flops(node: fx.Node, values: SymbolValues) -> int:
    """torch's own formula for products, convolutions and attention (and meshwright operators that register one)."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    tree = (node.args, node.kwargs, node.meta["val"])
    args, kwargs, out = torch_compat.tree_map(lambda v: _concrete(v, values), tree)
    return int(formula(*args, **kwargs, out_val=out))


def _concrete(value: Any, values: SymbolValues) -> Any:
    """A meta tensor with numbers for sizes in place of a node or of a fake tensor with symbols."""
    if isinstance(value, fx.Node):
        return torch_compat.tree_map(lambda v: _concrete(v, values), value.meta["val"])
    if isinstance(value, torch.Tensor):
        return torch.empty([_value(s, values) for s in value.shape], dtype=value.dtype, device="meta")
    return _value(value, values) if isinstance(value, torch.SymInt) else value


# -- sizes ----------------------------------------------------------------------------------------
def _value(size: int | torch.SymInt | Expr, values: SymbolValues) -> int:
    if isinstance(size, int):
        return size
    expr = size if isinstance(size, Expr) else size_expr(size)
    missing = expr.symbols() - set(values)
    if missing:
        raise ValueError(f"size {expr} needs values for {', '.join(sorted(missing))}, got {sorted(values) or 'none'}")
    return expr.evaluate(values)


def _product(sizes: Iterable[int]) -> int:
    out = 1
    for s in sizes:
        out *= s
    return out


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _points(t: torch.Tensor, values: SymbolValues) -> int:
    return _product(_value(s, values) for s in t.shape)


def _bytes(t: torch.Tensor, values: SymbolValues) -> int:
    """Bytes a tensor occupies; dimensions expanded with stride 0 count once."""
    strides = [_value(s, values) for s in t.stride()]
    return t.element_size() * _product(1 if st == 0 and n > 0 else n for n, st in
                                       zip((_value(s, values) for s in t.shape), strides, strict=True))


# -- kernels --------------------------------------------------------------------------------------
def _kernel_bytes_read(kernel: Kernel, sizes: Mapping[str, int], capacity: Mapping[str, int]) -> int:
    """Distinct elements each buffer's loads touch, at most the whole tensor."""
    axes = stmt_axes(kernel)
    touched: dict[str, int] = {b.name: 0 for b in kernel.inputs}
    for s in kernel.body:
        if isinstance(s, Load):
            touched[s.buffer] += _product(sizes[a] for a in axes[s.dst]) * DTYPES[s.dtype]
    return sum(min(n, capacity[b]) for b, n in touched.items())


def _kernel_ops(plan: LoopPlan, sizes: Mapping[str, int], rows: int) -> ElementOps:
    """Element operations of one launch: statements times the points of the loops they stand in."""
    kernel, vector = plan.kernel, plan.vector
    axes, reduce_names = stmt_axes(kernel), {a.name for a in kernel.reduce}
    points = _product(sizes[a.name] for a in kernel.axes)
    total = ElementOps()
    for s in kernel.body:
        if isinstance(s, (Op, Reduce, Load)):
            over = axes[s.src] if isinstance(s, Reduce) else axes[s.dst]
            total += _statement_ops(s, vector.name if vector else None).times(points if over & reduce_names else rows)
    return total


def _statement_ops(s: Op | Reduce | Load, vector: str | None) -> ElementOps:
    if isinstance(s, Load):
        return ElementOps() if _in_lanes(s, vector) else ElementOps(strided=1)
    if isinstance(s, Reduce):
        return ElementOps(scalar=1) if s.op in ("argmax", "argmin") else ElementOps(simple=1)
    if s.op in TRANSCENDENTAL:
        return ElementOps(transcendental=1)
    return ElementOps(division=1) if s.op in DIVISION else ElementOps(simple=1)


def _in_lanes(s: Load, vector: str | None) -> bool:
    """True when neighbouring lanes of the vector axis read neighbouring elements, or all the same one."""
    if vector is None:
        return True
    names = s.index.symbols()
    if any(n.startswith("%") for n in names):
        return False
    if vector not in names:
        return True
    try:
        return s.index.coefficient(vector) == 1
    except ValueError:
        return False
