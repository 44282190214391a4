"""`Program` ⇄ JSON text, with a strict schema: a stranger's file is checked field by field before anything looks at it.

Reading builds plain data only. Limits on size and nesting come first, then types (unknown fields are errors); what the
names and numbers mean is verified by the loader (`compiler/artifact_verify.py`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from .errors import ArtifactError
from .program import Program

MAX_BYTES = 256 << 20
MAX_DEPTH = 24
MAX_VALUES = 5_000_000
MAX_TEXT = 1 << 20


def program_to_json(program: Program) -> str:
    """The program as JSON text; `program_from_json` gives an equal program back."""
    return str(_adapter().dump_json(program, indent=1).decode())


def program_from_json(text: str) -> Program:
    """Raises `ArtifactError` when `text` is too large, nested too deep, no JSON, or not of the schema."""
    data = parse_json(text)
    check_limits(data)
    from pydantic import ValidationError

    try:
        program: Program = _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise ArtifactError(f"the program is malformed at {where or 'its top'}: {first['msg']}") from None
    if json.loads(program_to_json(program)) != data:  # dataclasses drop fields they don't know
        raise ArtifactError("the program holds fields of another version", expected="the fields of runtime/program.py")
    return program


def parse_json(text: str) -> Any:
    """JSON of limited length, without NaN and Infinity. Raises `ArtifactError`."""
    if len(text) > MAX_BYTES:
        raise ArtifactError(f"{len(text)} characters of JSON", expected=f"at most {MAX_BYTES}")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"not readable as JSON ({error})") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def check_limits(value: Any) -> None:
    """Raise `ArtifactError` when a JSON value is nested too deep, or holds too many values or too long a text."""
    todo, seen = [(value, 0)], 0
    while todo:
        item, depth = todo.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise ArtifactError("JSON nested too deep or too large", expected=f"depth {MAX_DEPTH}, {MAX_VALUES} values")
        if isinstance(item, str) and len(item) > MAX_TEXT:
            raise ArtifactError(f"a text of {len(item)} characters", expected=f"at most {MAX_TEXT}")
        if isinstance(item, dict):
            todo += [(v, depth + 1) for v in (*item.keys(), *item.values())]
        elif isinstance(item, list):
            todo += [(v, depth + 1) for v in item]


@lru_cache(maxsize=1)
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Program)
