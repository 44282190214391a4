"""A fingerprint of a problem's tables. Outer tuples share their tables; each is written once."""

from __future__ import annotations

import hashlib
import json

from .problem import Problem


def tables_digest(problem: Problem) -> str:
    """SHA-256 of everything that a plan's price or a bound depends on."""
    found = hashlib.sha256(json.dumps([problem.kinds, problem.layers, problem.gpus, problem.global_batch,
                                       problem.capacity_bytes, problem.mixing]).encode())
    seen: dict[int, int] = {}
    for outer in problem.outers:
        number = seen.setdefault(id(outer.options), len(seen))
        found.update(json.dumps([outer.title, number]).encode())
        if number == len(seen) - 1:
            for tables in (outer.options, outer.reshard, outer.transfer):
                for row in tables:
                    for entry in row:
                        found.update(repr(tuple(entry.__dict__.items())).encode())
                    found.update(b";")
    return found.hexdigest()
