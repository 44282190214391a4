"""Nested containers of arguments and results as plain JSON, and back, without importing anybody's classes.

`flatten` gives the leaves and a description; `unflatten` builds tuples, lists and dicts from it, and a `Result` for
every other mapping (a Hugging Face `ModelOutput`): its fields are attributes, keys, and positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ArtifactError

Description = dict[str, Any]


class Result(OrderedDict[str, Any]):
    """A mapping whose values are also attributes and, by position, items: it stands for a ModelOutput after loading."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(self.values())


def flatten(value: Any) -> tuple[list[Any], Description]:
    """Leaves in order, and the containers around them."""
    if isinstance(value, Mapping):
        kind = "dict" if type(value) is dict else "result"
        parts = [flatten(value[k]) for k in value]
        return _leaves(parts), {"kind": kind, "keys": [str(k) for k in value], "items": [d for _, d in parts]}
    if isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", None)  # a named tuple
        parts = [flatten(v) for v in value]
        items = [d for _, d in parts]
        if fields is not None:
            return _leaves(parts), {"kind": "result", "keys": list(fields), "items": items}
        return _leaves(parts), {"kind": "list" if isinstance(value, list) else "tuple", "items": items}
    return [value], {"kind": "leaf"}


def _leaves(parts: Sequence[tuple[list[Any], Description]]) -> list[Any]:
    return [leaf for leaves, _ in parts for leaf in leaves]


def unflatten(leaves: Sequence[Any], description: Description) -> Any:
    """Inverse of `flatten` up to classes. Raises `ArtifactError` when the numbers of leaves differ."""
    rest = list(leaves)
    value = _build(rest, description)
    if rest:
        raise ArtifactError(f"{len(rest)} values too many for the output structure")
    return value


def _build(rest: list[Any], description: Description) -> Any:
    kind, items = description.get("kind"), description.get("items", [])
    if kind == "leaf":
        if not rest:
            raise ArtifactError("too few values for the output structure")
        return rest.pop(0)
    values = [_build(rest, d) for d in items]
    match kind:
        case "tuple":
            return tuple(values)
        case "list":
            return values
        case "dict":
            return dict(zip(description["keys"], values, strict=True))
        case "result":
            return Result(zip(description["keys"], values, strict=True))
    raise ArtifactError(f"unknown container {kind!r}", expected="leaf, tuple, list, dict or result")


def same_structure(a: Description, b: Description) -> bool:
    """True when two descriptions hold the same keys and positions; a tuple and a list, or two mappings, are alike."""
    sequence, mapping = {"tuple", "list"}, {"dict", "result"}
    kinds = {a["kind"], b["kind"]}
    if len(kinds) == 2 and not (kinds <= sequence or kinds <= mapping):
        return False
    items = a.get("items", []), b.get("items", [])
    return (a.get("keys") == b.get("keys") and len(items[0]) == len(items[1])
            and all(same_structure(x, y) for x, y in zip(*items, strict=True)))
