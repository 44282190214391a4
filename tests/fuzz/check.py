"""Running fuzzed programs three ways (eager, C++ kernels, interpreted Triton kernels), comparing, and shrinking."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.torch_version import TorchVersion

from ..differential import KernelGraph, Printer, compile_graphs, difference, flat, trace, widen
from .program import Line, Program

# Chains of 60 operations amplify last-bit differences, and on a handful of elements eager's own error can be lucky:
# hence wider than the 2 and 4 that single operators are held to. A wrong kernel is off by far more.
OWN_FACTOR, ULPS = 16.0, 256.0


@dataclass(frozen=True)
class Run:
    """One way to run a program: traced with these sizes (or symbolic), called with those."""

    program: Program
    traced: dict[str, int]
    called: dict[str, int]
    dynamic: bool

    @property
    def label(self) -> str:
        return f"{'symbolic' if self.dynamic else 'static'} {self.called}"


def plan(program: Program) -> list[Run]:
    """Static sizes; symbolic ones called with others than traced; a size of zero where the program allows it."""
    out = [Run(program, program.sizes, program.sizes, False)]
    if _traces_with_symbols(program):
        out.append(Run(program, program.sizes, program.other_sizes, True))
    else:
        out.append(Run(program, program.other_sizes, program.other_sizes, False))
    for name in program.zero:
        empty = {**program.other_sizes, name: 0}
        out.append(Run(program, empty, empty, False))
    return out


def _traces_with_symbols(program: Program) -> bool:
    """False where torch 2.11 stops with an internal assertion: `make_fx` over `torch.func.grad` of `index_select`
    with symbolic sizes. (AOTAutograd, through which models are compiled, takes another way.)"""
    return TorchVersion(torch.__version__) >= (2, 12) or not (program.has_grad and "index_select" in program.source())


@dataclass(frozen=True)
class Failure:
    run: Run
    reason: str

    def report(self) -> str:
        return self.run.program.reproducer(f"{self.run.label}: {self.reason}")


def failures(runs: Sequence[Run], printer: Printer) -> list[Failure]:
    """Compile all runs together, execute each, and say which differ from eager."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns about var() of one element
        graphs, out = traced(runs)
        return out + compared(graphs, printer)


Graphs = list[tuple[Run, KernelGraph]]


def traced(runs: Sequence[Run]) -> tuple[Graphs, list[Failure]]:
    """The kernel graphs of `runs`, and the runs that could not be traced and grouped."""
    graphs: Graphs = []
    broken: list[Failure] = []
    for k, run in enumerate(runs):
        try:
            graphs.append((run, _graph(run, f"f{k}")))
        except Exception as error:
            broken.append(Failure(run, f"grouping: {type(error).__name__}: {error}"))
    return graphs, broken


def compared(graphs: Graphs, printer: Printer) -> list[Failure]:
    """Compile the graphs' kernels together, execute each graph, and say which differ from eager."""
    try:
        kernels = compile_graphs([g for _, g in graphs], printer)
    except Exception as error:
        if len(graphs) == 1:
            return [Failure(graphs[0][0], f"{printer}: {type(error).__name__}: {error}"[:2000])]
        return [f for one in graphs for f in compared([one], printer)]
    found = [(run, _compare(run, graph, kernels)) for run, graph in graphs]
    return [Failure(run, f"{printer}: {reason}") for run, reason in found if reason is not None]


def _graph(run: Run, prefix: str) -> KernelGraph:
    torch.manual_seed(0)
    traced = trace(run.program.function(), run.program.make_inputs(run.traced), run.dynamic)
    if run.dynamic and not holds_for(traced, run.program.make_inputs(run.called)):  # a compiler would compile again
        traced = trace(run.program.function(), run.program.make_inputs(run.called))
    return KernelGraph(traced, prefix)


def holds_for(traced: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether inputs of these sizes meet what symbolic tracing took for granted (of a size of 1, that it stays 1)."""
    values = [n.meta["val"] for n in traced.graph.find_nodes(op="placeholder")]
    return bool(traced.shape_env.evaluate_guards_for_args(values, inputs, ignore_static=False))


def _compare(run: Run, graph: KernelGraph, kernels: dict) -> str | None:
    function, inputs = run.program.function(), run.program.make_inputs(run.called)
    ours, theirs, wide = inputs, run.program.make_inputs(run.called), widen(run.program.make_inputs(run.called))
    try:
        got = flat((graph.run(ours, kernels), ours))
    except (Exception, RecursionError) as error:
        return f"{type(error).__name__}: {error}"[:2000]
    eager = flat((function(*theirs), theirs))
    with default_dtype(torch.float64):  # of what integers are promoted to
        truth = flat((run.program.function(wide=True)(*wide), wide))
    assert len(got) == len(eager) == len(truth)
    for k, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        reason = difference(g, e, t, own_factor=OWN_FACTOR, ulps=ULPS)
        if reason is not None:
            return f"result {k} of {len(got)}: {reason}"
    return None


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- shrinking ------------------------------------------------------------------------------------
def shrink(failure: Failure, printer: Printer, budget: int = 60) -> Failure:
    """A smaller program that still fails: fewer outputs, then without statements nothing needs, then one by one."""
    for smaller in _candidates_until_fixed(failure):
        if budget == 0:
            break
        budget -= 1
        found = _still_fails(replace(failure.run, program=smaller), printer)
        if found is not None:
            return shrink(found, printer, budget)
    return failure


def _candidates_until_fixed(failure: Failure) -> Iterable[Program]:
    program = failure.run.program
    if len(program.outputs) > 1:
        for name in dict.fromkeys(program.outputs):
            yield pruned(program, (name,))
        for k in range(len(program.outputs)):
            yield pruned(program, program.outputs[:k] + program.outputs[k + 1 :])
    named = [line.target for line in program.lines if line.target is not None]
    for name in reversed(named):
        if name not in program.outputs:
            yield pruned(program, (name,))
    for k, line in enumerate(program.lines):
        if line.target is None:
            yield replace(program, lines=program.lines[:k] + program.lines[k + 1 :], _cache={})
    for line in program.lines:
        yield from (bypassed(program, line, name) for name in line.uses if line.target is not None)
    if program.has_grad:
        yield replace(program, inputs=tuple(replace(i, grad=False) for i in program.inputs), _cache={})


def bypassed(program: Program, line: Line, operand: str) -> Program:
    """`program` without `line`: `operand` stands for its result (torch decides whether that is still a program)."""

    def rename(text: str) -> str:
        return re.sub(rf"\b{line.target}\b", operand, text)

    rest = tuple(
        replace(o, text=rename(o.text), uses=tuple(dict.fromkeys(map(rename, o.uses))))
        for o in program.lines
        if o is not line
    )
    return replace(program, lines=rest, outputs=tuple(map(rename, program.outputs)), _cache={})


def pruned(program: Program, outputs: tuple[str, ...]) -> Program:
    """`program` with these outputs and only the lines they need (mutations stay while their target is needed)."""
    needed, kept = set(outputs), list[Line]()
    names_mutated = {line.uses[0] for line in program.lines if line.target is None}
    for line in reversed(program.lines):
        if line.target in needed or (line.target is None and (line.uses[0] in needed or needed & names_mutated)):
            kept.append(line)
            needed.update(line.uses)
    return replace(program, lines=tuple(reversed(kept)), outputs=outputs, _cache={})


def _still_fails(run: Run, printer: Printer) -> Failure | None:
    if not run.program.lines:
        return None
    try:
        run.program.function()(*run.program.make_inputs(run.called))
    except Exception:  # the smaller program is not valid: not a candidate
        return None
    found = failures([run], printer)
    return found[0] if found else None
