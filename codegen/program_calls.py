"""The walk that rewrites of operator calls share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..runtime.program import Alloc, Call, Program, Step, TensorSpec, View

Lower = Callable[[Call, Mapping[str, TensorSpec]], "list[Step] | None"]


def lower_calls(program: Program, lower: Lower) -> Program:
    """`program` with every call replaced by `lower(call, specs)`, or kept where that is None. `specs` describes what is
    known so far, the call's own results included."""
    specs = {i.name: i for i in program.inputs if isinstance(i, TensorSpec)}
    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step, (Alloc, View)):
            specs[step.spec.name] = step.spec
        lowered = None
        if isinstance(step, Call):
            specs.update((s.name, s) for s in step.specs if s is not None)
            lowered = lower(step, specs)
        steps += [step] if lowered is None else lowered
    return replace(program, steps=tuple(steps))
