"""What rewrites of operator calls share: the walk, and when a call may move."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from ..runtime.program import Alloc, Call, Program, Step, TensorSpec, View, reads
from .program_memory import writes
from .schema import operator_of

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


def disturbed(steps: Sequence[Step], names: Collection[str], root: Mapping[str, str]) -> bool:
    """Whether a step may write into one of the roots `names`."""
    for step in steps:
        touched = reads(step) if isinstance(step, Call) and operator_of(step.op)._schema.is_mutable else writes(step)
        if any(root[n] in names for n in touched):
            return True
    return False
