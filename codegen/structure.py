"""Build equal groups once: the layers of a model repeat the same few regions, and building a kernel costs
milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..runtime.torch_compat import device_of
from .build import BuiltKernel, build
from .lowering import kind_of
from .lowering.shapes import CannotLower

Signature = tuple[Any, ...]


class StructuralCache:
    """`build` with a memory. Two groups are equal when their nodes, read from the outputs backwards, have the same
    operators, arguments, shapes, strides and dtypes, and read the same pattern of outside tensors."""

    def __init__(self) -> None:
        self._built: dict[Signature, tuple[BuiltKernel, tuple[int, ...]] | str] = {}
        self._values: dict[fx.Node, Any] = {}  # printing symbolic shapes is the expensive part

    def build(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> BuiltKernel:
        """As `build.build`; raises `CannotLower` for a structure that failed before."""
        signature, outside = self._signature(nodes, outputs)
        known = self._built.get(signature)
        if known is None:
            try:
                built = build(nodes, outputs)
            except CannotLower as why:
                self._built[signature] = str(why)
                raise
            position = {n: i for i, n in enumerate(outside)}
            self._built[signature] = (built, tuple(position[n] for n in built.inputs))
            return built
        if isinstance(known, str):
            raise CannotLower(known)
        built, picks = known
        return BuiltKernel(built.kernel, tuple(outside[i] for i in picks), tuple(outputs), built.sizes)

    def _signature(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> tuple[Signature, list[fx.Node]]:
        inside = set(nodes)
        number: dict[fx.Node, int] = {}
        outside: list[fx.Node] = []
        parts: list[Any] = []

        def encode(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return ("node", visit(arg))
            if isinstance(arg, (list, tuple)):
                return tuple(encode(a) for a in arg)
            if isinstance(arg, dict):
                return tuple((k, encode(v)) for k, v in arg.items())
            return (type(arg).__name__, str(arg))

        def visit(node: fx.Node) -> int:
            if node in number:
                return number[node]
            if node in inside or kind_of(node) in ("view", "generator", "multi"):
                arguments = (encode(node.args), encode(node.kwargs))
                part: Any = (str(node.target), arguments, node in inside, self._value(node))
            else:
                outside.append(node)
                part = ("outside", self._value(node))
            number[node] = len(number)
            parts.append(part)
            return number[node]

        ends = tuple(visit(o) for o in outputs)
        order = tuple(number.get(n, -1) for n in nodes)
        return (tuple(parts), ends, order), outside

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = _describe(node)
        return self._values[node]


def _describe(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), str(tuple(value.shape)), str(value.stride()), str(device_of(value)))
    if isinstance(value, (list, tuple)):
        return tuple(str(getattr(v, "shape", v)) for v in value)
    return str(value)
