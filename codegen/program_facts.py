"""What rewrites of programs ask about a program's tensors: descriptions, whose memory they are, who reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..runtime.program import (
    Alloc,
    Call,
    Program,
    Release,
    Step,
    SymbolInput,
    TensorSpec,
    View,
    defines,
    reads,
    tensors_in,
)
from .expr import Expr, const
from .program_calls import disturbed
from .program_memory import roots, size_expr, with_releases, writes


@dataclass(frozen=True)
class ProgramFacts:
    """Answers about one program, computed once."""

    program: Program

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor's description, by name."""
        found = {i.name: i for i in self.program.inputs if isinstance(i, TensorSpec)}
        for step in self.program.steps:
            if isinstance(step, (Alloc, View)):
                found[step.spec.name] = step.spec
            elif isinstance(step, Call):
                found.update((s.name, s) for s in step.specs if s is not None)
        return found

    @cached_property
    def root(self) -> dict[str, str]:
        return roots(self.program)

    @cached_property
    def offset(self) -> dict[str, Expr]:
        """Elements from a root's first to a view's first, for tensors that `View` steps alone lead to."""
        found = {name: const(0) for name, root in self.root.items() if name == root}
        for step in self.program.steps:
            if isinstance(step, View) and step.base in found:
                found[step.spec.name] = found[step.base] + size_expr(step.offset)
        return found

    @cached_property
    def users(self) -> dict[str, list[int]]:
        """Numbers of the steps that read or write a root, views and releases aside."""
        found: dict[str, list[int]] = {}
        for i, step in enumerate(self.program.steps):
            if not isinstance(step, (View, Release)):
                for root in {self.root[n] for n in (*reads(step), *writes(step))}:
                    found.setdefault(root, []).append(i)
        return found

    @cached_property
    def maker(self) -> dict[str, int]:
        """The step that brings a tensor into being."""
        return {n: i for i, step in enumerate(self.program.steps) for n in defines(step)}

    @cached_property
    def leaving(self) -> set[str]:
        """Roots that the program's results show."""
        outputs = [{"tensor": o} if isinstance(o, str) else o for o in self.program.outputs]
        return {self.root[n] for n in tensors_in(outputs)}

    def views_of(self, root: str) -> list[int]:
        """The `View` steps of a root's memory."""
        return [i for i, s in enumerate(self.program.steps) if isinstance(s, View) and self.root[s.spec.name] == root]

    def may_move(self, names: Collection[str], start: int, end: int) -> bool:
        """Whether reading `names` at step `end` finds what step `start` would have read."""
        return not disturbed(self.program.steps[start:end], {self.root[n] for n in names}, self.root)


def rewritten(program: Program, gone: Collection[int], added: dict[int, Sequence[Step]],
              inputs: Sequence[TensorSpec] = ()) -> Program:
    """`program` without the steps `gone`, with `added[i]` before step i, and with further inputs at the end."""
    steps: list[Step] = []
    for i, step in enumerate(program.steps):
        steps += added.get(i, ())
        if i not in gone and not isinstance(step, Release):
            steps.append(step)
    used = set(tensors_in([{"tensor": o} if isinstance(o, str) else o for o in program.outputs]))
    kept: list[Step] = []
    for step in reversed(steps):
        if not isinstance(step, View) or step.spec.name in used:
            used.update((*reads(step), *writes(step)))
            kept.append(step)
    return with_releases(replace(program, inputs=(*program.inputs, *inputs), steps=tuple(reversed(kept))))


def alone(facts: ProgramFacts, steps: Sequence[Step], results: Sequence[str],
          further: Sequence[TensorSpec] = ()) -> Program:
    """A program of some steps, which may be new ones over the tensors of `facts` and of `further`: memory that is read
    from outside becomes an input, then the symbols; what is written into is allocated."""
    specs = {**facts.specs, **{s.name: s for s in further}}
    known: set[str] = set()
    wanted: dict[str, TensorSpec] = {}
    body: list[Step] = []

    def need(name: str) -> None:
        maker = facts.program.steps[facts.maker[name]] if name in facts.maker else None
        if name in known:
            return
        known.add(name)
        if isinstance(maker, View):
            need(maker.base)
            body.append(maker)
        else:
            wanted[name] = specs[name]

    for step in steps:
        for name in writes(step):
            if name not in known:
                known.add(name)
                body.append(Alloc(specs[name]))
        for name in reads(step):
            need(name)
        body.append(step)
        known.update(defines(step))
    symbols = tuple(replace(s, argument=len(wanted) + i, tensor=None) for i, s in enumerate(facts.program.symbols))
    inputs: list[TensorSpec | SymbolInput] = [*wanted.values(), *(SymbolInput(f"{s.name}_size") for s in symbols)]
    made = Program("alone", tuple(inputs), symbols, tuple(body), tuple(results), {}, facts.program.inference)
    return with_releases(made)
