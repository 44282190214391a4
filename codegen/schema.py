"""What an ATen operator's schema says about a `Call`: argument types in order, and which results share memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..runtime.program import Call, Json, tensors_in


class Unsupported(Exception):
    """A step that the C++ program can't express; the caller runs the program step by step from Python instead."""

    def __init__(self, reason: str, step: Any = None) -> None:
        super().__init__(f"{reason}: {step}" if step is not None else reason)
        self.reason = reason
        self.step = step


@dataclass(frozen=True)
class Argument:
    """One parameter of an operator: its schema type as text (`"Optional[Tensor]"`), default, and what it may alias."""

    name: str
    type: str
    keyword_only: bool
    default: Any
    has_default: bool
    alias: frozenset[str]


@dataclass(frozen=True)
class Schema:
    """`name` is `"aten::addmm"`; `returns` pairs each result's type with the alias sets it belongs to."""

    name: str
    overload: str
    arguments: tuple[Argument, ...]
    returns: tuple[tuple[str, frozenset[str]], ...]


def operator_of(op: str) -> Any:
    """torch's operator `"aten.addmm.default"`. Raises `Unsupported` when this torch has none of that name."""
    parts = op.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, parts[0]), ".".join(parts[1:-1])), parts[-1])
    except (AttributeError, IndexError) as error:
        raise Unsupported(f"this torch has no operator {op}") from error


@lru_cache(maxsize=1024)
def schema_of(op: str) -> Schema:
    """The schema of `"aten.addmm.default"`. Raises `Unsupported` when this torch has no such operator."""
    found = operator_of(op)._schema
    arguments = tuple(
        Argument(a.name, str(a.type), a.kwarg_only, a.default_value, a.has_default_value(), _alias(a.alias_info))
        for a in found.arguments
    )
    returns = tuple((str(r.type), _alias(r.alias_info)) for r in found.returns)
    return Schema(found.name, found.overload_name, arguments, returns)


def _alias(info: Any) -> frozenset[str]:
    """Alias sets; `*` (any) where the schema names the set on a list's elements, as in `Tensor(a)[]`."""
    return frozenset() if info is None else frozenset(info.before_set) or frozenset("*")


def bind(call: Call) -> list[tuple[Argument, Json]]:
    """Every parameter with the value the call gives it (its default where it gives none). Raises `Unsupported`."""
    schema = schema_of(call.op)
    bound: list[tuple[Argument, Json]] = []
    for i, argument in enumerate(schema.arguments):
        if i < len(call.args) and not argument.keyword_only:
            value: Json = call.args[i]
        elif argument.name in call.kwargs:
            value = call.kwargs[argument.name]
        elif argument.has_default:
            value = argument.default
        else:
            raise Unsupported(f"no value for {argument.name}", call)
        bound.append((argument, value))
    return bound


def aliased_arguments(call: Call) -> Sequence[str | None]:
    """For every result, the tensor argument whose memory it may share, or None."""
    schema = schema_of(call.op)
    is_list = [t for t, _ in schema.returns] == ["List[Tensor]"]  # one schema result stands for all of the call's
    out: list[str | None] = []
    for k in range(len(call.outs)):
        place = 0 if is_list else k
        sets = schema.returns[place][1] if place < len(schema.returns) else frozenset()
        names = [t for a, value in (bind(call) if sets else []) if a.alias & sets or (a.alias and "*" in sets)
                 for t in tensors_in(value)]
        out.append(names[0] if names else None)
    return out
