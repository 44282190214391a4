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
SERIAL = frozenset(("var", "var_mean", "std", "std_mean", "argmax", "argmin", "cumsum", "cumprod", "cummax", "cummin",
                    "native_layer_norm", "native_group_norm", "native_batch_norm", "sort", "topk", "max.dim",
                    "min.dim"))
SINGLE = frozenset(("where", "eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_or", "bitwise_xor",
                    "bitwise_not", "logical_and", "logical_or", "logical_not", "isnan", "isinf", "masked_fill"))
REDUCTIONS = frozenset(("sum", "mean", "amax", "amin", "prod", "any", "all", "var", "var_mean", "std", "std_mean",
                        "argmax", "argmin", "logsumexp", "max.dim", "min.dim", "_softmax", "_log_softmax",
                        "native_layer_norm"))
GEMMS = frozenset(("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "_int_mm", "_scaled_mm", "linear",
                   "grouped_mm", "grouped_mm_weights"))
COPIES = frozenset(("clone", "_to_copy", "copy", "copy_", "contiguous", "cat", "stack", "constant_pad_nd", "repeat",
                    "slice_scatter", "select_scatter", "fill", "full", "full_like", "zeros", "zeros_like", "ones",
                    "ones_like", "empty", "empty_like", "arange", "scalar_tensor", "new_zeros", "new_full"))
DISPATCHES = {  # operators that call others
    "slice_scatter": 3, "select_scatter": 3, "_to_copy": 2, "clone": 2, "arange": 3, "full": 2, "cat": 2, "mean": 2,
    "embedding": 2, "index": 3, "index_put": 3, "full_like": 2, "zeros_like": 2, "var_mean": 2, "constant_pad_nd": 3,
}
RUN_START = 12  # an inner loop of ATen's TensorIterator costs about as much to start as a dozen single steps
SWEEP_START, FOLD = 24, 8  # the same for one sweep over a row of an emitted kernel, and for folding its vector lanes
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
    work = ElementOps() if product else _element_ops(node, name, overload, ins, outs, elements, values)
    return OpRecord(name, kind, dtype, _flops(node, values), read, written, elements, work, DISPATCHES.get(name, 1),
                    _shape(name, kind, node, values))


def group_records(group: Group, symbol_values: SymbolValues | None = None) -> list[OpRecord]:
    """The eager operators one kernel replaces, views that only it reads included."""
    return [op_record(n, symbol_values) for n in region_nodes(group)]


def region_nodes(group: Group) -> list[fx.Node]:
    """What must run in eager mode to compute what one kernel does, in graph order: the group's own nodes, its views,
    and the operators with several results (`var_mean`) whose results the group names by `getitem`."""
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
        kernel.name, _kernel_bytes_read(kernel, sizes, capacity), written, points, _kernel_ops(plan, sizes),
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
                 elements: int, values: SymbolValues) -> ElementOps:
    if name in SERIAL or overload in SERIAL:
        return ElementOps(serial=elements)
    if name == "where" and _unpredictable(node.args[0]):
        return ElementOps(serial=elements)
    extra = ElementOps(single=_single_steps(name, ins, outs[0], values))
    multiplied = name == "pow" and len(node.args) > 1 and node.args[1] in (2, 3, 0.5, -1)  # ATen knows these powers
    if name in TRANSCENDENTAL and not multiplied:
        return extra + ElementOps(transcendental=elements)
    if name in DIVISION and outs[0].dtype.is_floating_point:
        return extra + ElementOps(division=elements)
    return extra + ElementOps(simple=elements)


def _unpredictable(mask: Any, depth: int = 4) -> bool:
    """True when a mask comes from comparing floats (a ReLU's sign, say): ATen's select branches on every element and
    the processor guesses half of them wrong. Masks of positions and lengths have long runs."""
    if not isinstance(mask, fx.Node) or not depth:
        return False
    name, _ = _names(mask)
    if name in ("eq", "ne", "lt", "le", "gt", "ge"):
        return any(t.dtype.is_floating_point for a in mask.all_input_nodes[:1] for t in _tensors(a.meta.get("val")))
    if mask.op == "placeholder":
        return True
    return any(_unpredictable(a, depth - 1) for a in mask.all_input_nodes)


def _single_steps(name: str, ins: list[torch.Tensor], out: torch.Tensor, values: SymbolValues) -> int:
    """Steps ATen takes one at a time: every element of masks, gathers and transposed operands; else the starts of its
    inner loops, one per stretch that all operands walk contiguously, or one per result of a reduction."""
    points = _points(out, values)
    if name in ("embedding", "index_select"):  # whole rows at a time
        return RUN_START * points // max(1, _value(out.shape[-1], values))
    if name in SINGLE or name in GATHERS:
        return points
    if name in REDUCTIONS:
        return points if points * 64 > sum(_points(t, values) for t in ins) else 0
    run = min((_inner_run(t, out, values) for t in ins), default=points)
    return points if run == 1 else RUN_START * (points // max(run, 1)) if run < points else 0


def _inner_run(source: torch.Tensor, out: torch.Tensor, values: SymbolValues) -> int:
    """How many neighbouring elements of `out` are neighbours in `source` too (or all the same element)."""
    sizes = [_value(s, values) for s in out.shape]
    steps = [_value(s, values) for s in out.stride()]
    lead = out.dim() - source.dim()
    if lead < 0:
        return _product(sizes)
    froms = [0] * lead + [0 if _value(n, values) == 1 else _value(s, values)
                          for n, s in zip(source.shape, source.stride(), strict=True)]
    dims = sorted((d for d in range(out.dim()) if sizes[d] != 1), key=lambda d: steps[d])
    run = 1
    constant = bool(dims) and froms[dims[0]] == 0
    for d in dims:
        if steps[d] != run or froms[d] != (0 if constant else run):
            break
        run *= sizes[d]
    return run if dims else 1 << 62


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


def _shape(name: str, kind: OpKind, node: fx.Node, values: SymbolValues) -> tuple[int, ...]:
    """See `OpRecord.shape`; empty for products of other than one or two matrices."""
    sizes = [[_value(s, values) for s in t.shape] for a in node.args if isinstance(a, fx.Node)
             for t in _tensors(a.meta.get("val"))]
    if kind == "attention":
        query, key = sizes[int("backward" in name):][:2]  # a backward takes the output's gradient first
        return (*query[:3], key[2], query[3], key[1]) if len(query) == len(key) == 4 else ()
    if kind != "gemm" or len(sizes) < 2 or not all(len(s) in (2, 3) for s in sizes[-2:]):
        return ()
    a, b = sizes[-2:]
    if name == "grouped_mm_weights":  # rows [S, K], grad [S, N]
        return (int(node.args[2]), a[0], a[1], b[1])  # type: ignore[arg-type]
    if name == "grouped_mm":  # rows [S, K], weights [E, K, N]
        return (b[0], a[0], a[1], b[2])
    return (a[0] if len(a) == 3 else 1, *a[-2:], b[-1])


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


def _kernel_ops(plan: LoopPlan, sizes: Mapping[str, int]) -> ElementOps:
    """Element operations of one launch: statements times the points of the loops they stand in."""
    axes, reduce_names = stmt_axes(plan.kernel), {a.name for a in plan.kernel.reduce}
    vector = plan.vector.name if plan.vector else None
    total = ElementOps()
    for s in plan.kernel.body:
        if isinstance(s, (Op, Reduce, Load)):
            over = axes[s.src] if isinstance(s, Reduce) else axes[s.dst]
            loops = [n for n in sizes if (n != vector or n in over) and (n not in reduce_names or over & reduce_names)]
            total += _statement_ops(s, vector, axes).times(_product(sizes[n] for n in loops))
    if not plan.rows:
        return total
    reduces = sum(isinstance(s, Reduce) for s in plan.kernel.body)
    starts = SWEEP_START * len(plan_passes(plan.kernel)[0]) + FOLD * reduces
    return total + ElementOps(single=starts).times(_product(sizes[a.name] for a in plan.kernel.parallel))


def _statement_ops(s: Op | Reduce | Load, vector: str | None, axes: Mapping[str, frozenset[str]]) -> ElementOps:
    if isinstance(s, Load):
        return ElementOps() if _in_lanes(s, vector, axes) else ElementOps(single=1)
    if isinstance(s, Reduce):
        return ElementOps(serial=1) if s.op in ("argmax", "argmin") else ElementOps(simple=4)  # a chain of additions
    if s.op in TRANSCENDENTAL:
        return ElementOps(transcendental=1)
    return ElementOps(division=1) if s.op in DIVISION else ElementOps(simple=1)


def _in_lanes(s: Load, vector: str | None, axes: Mapping[str, frozenset[str]]) -> bool:
    """True when neighbouring lanes of the vector axis read neighbouring elements, or all the same one."""
    names = s.index.symbols()
    if any(vector in axes[n] for n in names if n.startswith("%")):
        return False
    if vector is None or vector not in names:
        return True
    try:
        return s.index.coefficient(vector) == 1
    except ValueError:
        return False
