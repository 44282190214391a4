"""Programs of inference graphs, kept on disk: a process that meets a graph again starts from its program.

    first process:  Dynamo graph → AOTAutograd → lowering → acceptance → program → kept under `graph_key`
    later ones:     Dynamo graph → graph_key → program → printed, and built from the kernel cache

What is read is data (a program as in an artifact, verified in the same way) and is compared with the Dynamo graph, run
in eager, at its first call: a program that does not give eager's outputs is thrown away.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..codegen.expr import Expr, parse_expr, split_atom
from ..codegen.ir import Kernel
from ..codegen.ir_text import parse_kernel
from ..codegen.lowering import CannotLower, size_expr
from ..runtime import cache, torch_compat
from ..runtime.collector import collector_paused
from ..runtime.errors import MeshwrightError
from ..runtime.program import Json, Program
from ..runtime.program_json import program_from_json, program_to_json
from ..runtime.settings import settings as environment_settings
from .artifact_verify import verify_program
from .build_program import Built, Runner, build_kernels, build_program, choice_options, kernel_report, settle, submit
from .graph_key import Unkept, graph_key, symbols_of
from .guard import GuardedGraph, describe
from .pending import PendingGraph
from .program_builder import is_effect
from .report import CandidateRow, GraphReport, Note, Report
from .settings import CompileSettings
from .watch import in_time
from .whole_check import WrongResult, compare_whole, why_not_compared

if TYPE_CHECKING:
    from .aten import CompiledGraph

log = logging.getLogger(__name__)
RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Equality": operator.eq, "Unequality": operator.ne, "StrictLessThan": operator.lt, "LessThan": operator.le,
    "StrictGreaterThan": operator.gt, "GreaterThan": operator.ge}
ATOMS: dict[str, Callable[[Any, Any], Any]] = {
    "floordiv": operator.floordiv, "mod": operator.mod, "max": torch.sym_max, "min": torch.sym_min}
COUNTS = ("kernels", "kernel_bytes", "aten_bytes", "library_bytes")  # of a `GraphReport`
PLAIN = (torch.Tensor, torch.nn.Parameter)  # no subclasses
MAX_CONSTANT = 4096  # elements of a constant tensor that is kept with the program


@dataclass(frozen=True)
class Guard:
    """A relation between sizes that tracing found to hold and made a condition: `relation` is a key of `RELATIONS`."""

    relation: str
    left: str
    right: str


@dataclass(frozen=True)
class Constant:
    """A small tensor that was part of the traced graph."""

    dtype: str
    shape: list[int]
    values: list[Json]


@dataclass(frozen=True)
class KeptGraph:
    """What one graph's program and report need. `kernels`: the IR of all kernels that were compiled together (the
    program's, and those dropped since), so that their library is found again."""

    program: str
    kernels: list[str]
    guards: list[Guard]
    constants: list[Constant]
    nodes: int
    counts: dict[str, int]
    uncovered: dict[str, int]
    rows: list[CandidateRow]
    refused: list[Note]


class Keeper:
    """One Dynamo graph's place on disk: `start` from it, or `keep` the program that compiling it gave."""

    def __init__(self, key: str, gm: fx.GraphModule, settings: CompileSettings, report: Report) -> None:
        self.key, self.gm, self.settings, self.report = key, gm, settings, report
        self._sizes = symbols_of(gm)
        self._guards_before = torch_compat.guard_count(self._symbols())
        self._guards: list[Guard] | None = None

    def _symbols(self) -> list[Any]:
        return list(self._sizes.values())

    # -- start ----------------------------------------------------------------------------------
    def start(self, example_inputs: Sequence[Any]) -> Callable[..., Any] | None:
        """The graph's callable, from the program on disk; None when there is none, or none that can be used. The
        weights among `example_inputs` are packed while Dynamo finishes its part."""
        with collector_paused():
            return self._start(example_inputs)

    def _start(self, example_inputs: Sequence[Any]) -> Callable[..., Any] | None:
        document = cache.get_json(self.key)
        if document is None:
            return None
        try:
            kept = read(document)
            program = program_from_json(kept.program)
            verify_program(program)
            kernels = [parse_kernel(text) for text in kept.kernels]
            constants = [tensor_of(c) for c in kept.constants]
            missing = program.kernels.keys() - {k.name for k in kernels}
            if missing or not all(holds(guard, self._sizes) for guard in kept.guards):
                return None
        except (MeshwrightError, ValueError, KeyError, RuntimeError) as error:
            log.debug("the program kept under %s can't be used: %s", self.key, error)
            return None
        entry = self._entry(kept, program)
        started = StartedGraph(self, program, kernels, constants, entry, example_inputs)
        guarded = GuardedGraph(started, self.gm, where=f"inference graph of {describe(self.gm)}",
                               settings=self.settings, report=self.report, entry=entry)
        return torch_compat.outside_of_autograd(guarded)

    def _entry(self, kept: KeptGraph, program: Program) -> GraphReport:
        """The report of what the first process found."""
        entry = self.report.add_graph(f"inference {len(self.report.graphs)}", "inference", kept.nodes)
        entry.program, entry.uncovered = program, dict(kept.uncovered)
        for name, value in kept.counts.items():
            setattr(entry, name, value)
        for note in kept.refused:
            self.report.refused("fuse", note.reason, note.where)
        for row in kept.rows:
            self.report.candidate("fuse", row)
        self.report.note(f"{entry.name} was compiled before: its program and its timings come from the kernel cache")
        for node in self.gm.graph.nodes:  # where `save` and the graph's users look for traced values
            if node.op == "placeholder":
                node.meta.setdefault("val", node.meta.get("example_value"))
        return entry

    def forget(self) -> None:
        """The program on disk is wrong here: the next process compiles the graph again."""
        cache.put_json(self.key, None)

    # -- keep -----------------------------------------------------------------------------------
    def traced(self) -> None:
        """Call it when tracing is over: what it asked of the sizes belongs to the program."""
        found = torch_compat.guards_since(self._symbols(), self._guards_before)
        with contextlib.suppress(CannotLower):
            self._guards = None if found is None else [
                Guard(relation, str(size_expr(left)), str(size_expr(right))) for relation, left, right in found]

    def keep(self, graph: CompiledGraph) -> None:
        """Write the accepted program of `graph` down, if it is one that can be. One that draws random numbers or writes
        into its inputs can't: the first call in a new process runs twice."""
        if any(n.op == "call_function" and is_effect(n) for n in graph.gm.graph.nodes):
            return
        program, entry = graph.entry.program, graph.entry
        known = self._guards is not None and all(g.relation in RELATIONS for g in self._guards)
        if program is None or not known or not all(_is_small(c) for c in graph.constants):
            return
        kept = KeptGraph(
            program_to_json(program), graph.compiled, self._guards or [], [constant_of(c) for c in graph.constants],
            entry.nodes, {n: getattr(entry, n) for n in COUNTS}, entry.uncovered, graph.rows, graph.refused)
        cache.put_json(self.key, asdict(kept))


class StartedGraph(PendingGraph):
    """A program from the disk. Its first call runs eager too, compares, and returns eager's result."""

    def __init__(self, keeper: Keeper, program: Program, kernels: Sequence[Kernel], constants: list[torch.Tensor],
                 entry: GraphReport, example_inputs: Sequence[Any]) -> None:
        super().__init__(constants, keeper.settings, keeper.report)
        self.keeper, self.entry = keeper, entry
        self._work = program, kernels
        self._built: Future[Built] = submit(self._build, *self._work)
        if all(type(x) in PLAIN for x in example_inputs if isinstance(x, torch.Tensor)):
            submit(self._prepare, self._built, [*example_inputs, *constants], torch.get_num_threads())

    def _prepare(self, built: Future[Built], inputs: Sequence[Any], threads: int) -> None:
        """Pack the weights in the background; what fails here is met again, and told, by the first call."""
        prepare = getattr(built.result().run, "prepare", None)
        if prepare is not None:
            prepare(inputs, threads)

    def _build(self, program: Program, kernels: Sequence[Kernel]) -> Built:
        with self.report.phase("compiler"), collector_paused():
            options = choice_options(self.report, self.entry, self.settings) if program.device == "cuda" else None
            built = build_program(program, lambda: build_kernels(program.device, kernels), options=options)
        for kernel in kernels:
            if kernel.name in program.kernels:
                self.report.add_kernel(kernel_report(kernel, program.device))
        return built

    def _first_call(self, args: list[Any]) -> list[Any]:
        gm = self.keeper.gm
        if self._in_new_process() and not self._built.done():
            self._built = submit(self._build, *self._work)
        eager = list(gm.forward(*args))
        if not in_time(self._built, self.deadline):
            self.report.note(f"{self.entry.name} runs eagerly until its program is compiled: time limit reached")
            return eager
        built = self._built.result()
        self.entry.source, self.entry.timings = built.source, built.timings
        self.entry.behind_products = built.behind_products
        settle(built.run, [*args, *self.constants], self.report)
        reason = why_not_compared(gm, eager) if self.settings.check else "the check is off"
        if reason:
            self.report.note(f"{self.entry.name} was not compared with eager in this process: {reason}")
        else:
            self._compare(built.run, args, eager)
        self._run = built.run
        self.entry.state = "ready"
        args.clear()
        return eager

    def _compare(self, run: Runner, args: list[Any], eager: list[Any]) -> None:
        try:
            with self.report.phase("check"):
                compare_whole(run([*args, *self.constants]), eager, lambda moved: list(self.keeper.gm.forward(*moved)),
                              args)
        except WrongResult:
            self.keeper.forget()
            raise


def keeper_of(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: CompileSettings,
              report: Report) -> Keeper | None:
    """The place of a Dynamo graph on disk, None when it is one that is not kept."""
    if not environment_settings().graph_cache:
        return None
    try:
        return Keeper(graph_key(gm, example_inputs, settings), gm, settings, report)
    except Unkept as why:
        log.debug("%s is not kept: %s", report.name, why)
        return None


def holds(guard: Guard, sizes: Mapping[str, Any]) -> bool:
    """Whether sizes stand in the relation; asking makes it a condition of this compilation, as tracing did."""
    left, right = (value_of(parse_expr(side), sizes) for side in (guard.left, guard.right))
    return bool(RELATIONS[guard.relation](left, right))


def value_of(expression: Expr, sizes: Mapping[str, Any]) -> Any:
    """The value of an integer expression, symbolic where `sizes` are."""
    total: Any = 0
    for names, factor in expression.terms:
        term: Any = factor
        for name in names:
            call = split_atom(name)
            term = term * (sizes[name] if call is None else ATOMS[call[0]](*[value_of(a, sizes) for a in call[1]]))
        total = total + term
    return total


def constant_of(value: torch.Tensor) -> Constant:
    """A tensor as data."""
    return Constant(str(value.dtype).removeprefix("torch."), list(value.shape), value.flatten().tolist())


def tensor_of(constant: Constant) -> torch.Tensor:
    """The tensor that `constant_of` wrote. Raises `ValueError` for data that is none."""
    dtype = getattr(torch, constant.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {constant.dtype!r}")
    return torch.tensor(constant.values, dtype=dtype).reshape(constant.shape)


def _is_small(value: Any) -> bool:
    plain = type(value) in PLAIN and value.device.type == "cpu"
    return plain and value.numel() <= MAX_CONSTANT and not value.is_complex()


def read(document: Any) -> KeptGraph:
    """Check a JSON value from the disk field by field. Raises `ValueError` (pydantic's is one)."""
    kept: KeptGraph = _adapter().validate_python(document)
    if not set(kept.counts) <= set(COUNTS):
        raise ValueError(f"unknown fields {sorted(set(kept.counts) - set(COUNTS))}")
    return kept


@lru_cache(maxsize=1)
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(KeptGraph)
