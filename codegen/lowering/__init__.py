"""ATen to kernel IR: which operators become kernels, and how."""

from __future__ import annotations

import operator
from typing import Any, Literal

from torch import fx

from . import data, pointwise, reductions, views  # noqa: F401  (they fill the tables)
from .builder import TABLES, Frame, KernelBuilder, Value, view_of
from .decompositions import decompositions
from .shapes import CannotLower, Shape, shape_of, size_expr

NodeKind = Literal["compute", "view", "generator", "multi", "outside"]

__all__ = ["TABLES", "CannotLower", "Frame", "KernelBuilder", "NodeKind", "Shape", "Value", "claimed_ops",
           "decompositions", "kind_of", "shape_of", "size_expr", "view_of"]


def claimed_ops() -> list[Any]:
    """Every ATen overload the code generator takes, views included, sorted by name."""
    ops = {*TABLES.compute, *TABLES.views, *TABLES.generators, *TABLES.multi, *TABLES.split_views}
    return sorted(ops, key=str)


def kind_of(node: fx.Node) -> NodeKind:
    """What code generation does with a node, by its operator alone (its build may still be refused)."""
    if node.op != "call_function":
        return "outside"
    if view_of(node) is not None:
        return "view"
    if node.target in TABLES.generators:
        return "generator"
    if node.target in TABLES.compute:
        return "compute"
    if node.target in TABLES.multi or node.target in TABLES.split_views:
        return "multi"  # computes nothing by itself: each getitem of it is a compute node
    parent = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(parent, fx.Node) and parent.target in TABLES.multi:
        return "compute"
    return "outside"
