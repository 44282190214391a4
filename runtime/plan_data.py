"""What the parts of a plan file are made of: checked plain values, their limits, fingerprints.

`PlanData` allows nothing unknown, converts nothing and never changes after it was made. A file from a stranger is read
by `read_limited`, which refuses what is too large or nested too deep before anything looks at it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import InvalidInputError

MAX_BYTES = 64 << 20
MAX_DEPTH = 16
MAX_LAYERS = 4096
MAX_TUPLES = 100_000

Amount = Annotated[int, Field(ge=0, le=10**18)]  # nanoseconds or bytes
Count = Annotated[int, Field(ge=1, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**18)]
Degree = Annotated[int, Field(ge=1, le=1 << 24)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=2000)]
Key = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,49}$")]  # a category, a collective, a fact
Amounts = Annotated[dict[Key, Amount], Field(max_length=64)]
Fact = str | int | Annotated[float, Field(allow_inf_nan=False)] | bool | None


class PlanData(BaseModel):
    """Plain values, checked when they are made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


P = TypeVar("P", bound=PlanData)


class Fingerprint(PlanData):
    """What one input of a plan was: the digest of all of it, and the facts worth naming when it differs."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    facts: Annotated[dict[Key, Fact], Field(max_length=200)] = {}

    @classmethod
    def of(cls, value: Any, facts: Mapping[str, Fact] | None = None) -> Fingerprint:
        """The fingerprint of any plain data (what `json.dumps` takes)."""
        return cls(sha256=digest(value), facts=dict(facts or {}))

    def differences(self, now: Fingerprint) -> list[str]:
        """What is not the same in `now`, a phrase each; empty when the digests agree."""
        if self.sha256 == now.sha256:
            return []
        names = [*self.facts, *(k for k in now.facts if k not in self.facts)]
        named = [f"{k} was {_shown(self.facts.get(k))}, is {_shown(now.facts.get(k))}" for k in names
                 if self.facts.get(k) != now.facts.get(k)]
        return named or ["differs in something that no recorded fact names"]


class Fingerprints(PlanData):
    """Of everything that a plan's predictions depend on."""

    model: Fingerprint
    cluster: Fingerprint
    profile: Fingerprint
    options: Fingerprint

    def differences(self, now: Fingerprints) -> list[str]:
        """`"cluster: nodes was 8, is 4"`, for every input that changed."""
        return [f"{name}: {phrase}" for name in Fingerprints.model_fields
                for phrase in getattr(self, name).differences(getattr(now, name))]


def digest(value: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_limited(text: str | bytes, what: str, expected: str = "a plan that meshwright saved") -> dict[str, Any]:
    """The JSON object in `text`; `expected` is for messages. Raises `InvalidInputError`, one line, for what is too
    large, nested too deep or no JSON object."""
    if len(text) > MAX_BYTES:
        raise InvalidInputError(f"{what} has {len(text)} bytes", expected=f"at most {MAX_BYTES}")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidInputError(f"{what} is nested too deep", expected=f"at most {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise InvalidInputError(f"{what} is not JSON ({error})", expected=expected) from None
    if too_deep(value):  # a recursion limit that somebody raised lets deep ones through
        raise InvalidInputError(f"{what} is nested too deep", expected=f"at most {MAX_DEPTH} levels")
    if not isinstance(value, dict):
        raise InvalidInputError(f"{what} holds a JSON {type(value).__name__}", expected=expected)
    return value


def validated(kind: type[P], text: str | bytes, what: str) -> P:
    """`kind` from JSON text. Raises `InvalidInputError`, one line that names the field."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise InvalidInputError(f"{what}: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """`layers.3.options.tp: Input should be …`."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {message}" if where else message


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def too_deep(value: Any) -> bool:
    """Whether JSON data has more than `MAX_DEPTH` levels of objects and lists, without recursion."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _shown(value: Fact) -> str:
    text = "absent" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
