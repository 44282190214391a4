"""The ATen engine: one forward, backward or inference graph from AOTAutograd becomes kernels and a program.

    fuse → print → compile (kernels and host program) → first call: eager run that accepts every region → program

Until its first call a compiled graph is *pending*: its kernels exist, but nothing has been compared on real data.
The first call runs the graph in eager, returns that result, and settles which regions stay (see `acceptance`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import fx

from ..codegen.group import Group
from ..codegen.lowering.shapes import shape_of
from ..cost_model.device import Device
from ..cost_model.op_cost import predict
from ..cost_model.this_machine import this_machine
from ..passes.base import Candidate, PassContext, Refused
from ..passes.fuse import Fuse, FusedRegion
from ..runtime import cache, torch_compat
from .acceptance import Acceptance, Verdict, kernel_names
from .build_program import Kernels, Runner, build_kernels, build_program, choice_options, kernel_report, settle, submit
from .dump import dump_graph, dump_text
from .graph_bytes import count_bytes
from .graph_cleanup import clean_up
from .pending import PendingGraph
from .program_builder import NotAProgram, ProgramBuilder
from .records import group_records, kernel_record
from .regions import module_path
from .report import CandidateRow, GraphKind, GraphReport, Note, Report
from .settings import CompileSettings
from .splice import splice
from .watch import in_time
from .whole_check import compare_whole, why_not_compared

log = logging.getLogger(__name__)


def compile_aten_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], *, kind: GraphKind,
                       settings: CompileSettings, report: Report) -> CompiledGraph:
    """A boxed callable that stands for `gm`. `example_inputs` are the fake inputs AOTAutograd traced with."""
    return CompiledGraph(gm, kind, settings, report)


class CompiledGraph(PendingGraph):
    """A graph on its way from pending to ready. The first call does the acceptance."""

    def __init__(self, gm: fx.GraphModule, kind: GraphKind, settings: CompileSettings, report: Report) -> None:
        start = time.perf_counter()
        gm = clean_up(gm)
        report.add_seconds("lowering", time.perf_counter() - start)
        super().__init__([getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"], settings, report)
        self.gm, self.kind = gm, kind
        self.entry: GraphReport = report.add_graph(f"{kind} {len(report.graphs)}", kind, len(gm.graph.nodes))
        self.static = {name: name for name in torch_compat.static_inputs(gm)}
        self.device = settings.target or graph_device(gm)
        self.rows: list[CandidateRow] = []
        self.refused: list[Note] = []
        self.compiled: list[str] = []  # the IR of the kernels that are compiled together
        self.on_ready: Callable[[CompiledGraph], None] | None = None
        self.groups = self._find()
        self.names = kernel_names(self.groups)
        self._kernels: Future[Kernels] = submit(self._compile_kernels, self.groups)
        self._program: Future[Runner] = submit(self._make_runner, self.groups)
        self._kept: list[Group] | None = None  # the groups of `_program`, once they are accepted

    # -- compile ------------------------------------------------------------------------------
    def _find(self) -> list[Group]:
        if not self.settings.wants("fuse"):
            return []
        start = time.perf_counter()
        dump_graph(self.settings, self.report, f"{self.entry.name}-aten", self.gm)
        left_out = frozenset(n for n in self.gm.graph.nodes if self.settings.disables("fuse", module_path(n)))
        context = PassContext(self.device, self.kind != "inference", left_out=left_out)
        groups = []
        for finding in Fuse().find(self.gm, context):
            if isinstance(finding, Refused):
                self.refused.append(Note(finding.reason, str(finding.node or "")))
                self.report.refused("fuse", finding.reason, finding.node)
            elif isinstance(finding, Candidate) and isinstance(finding.replacement, FusedRegion):
                groups.append(finding.replacement.group)
        self.report.add_seconds("lowering", time.perf_counter() - start, of="fuse")
        kernels = {g.built.key: str(g.built.kernel) for g in groups}
        dump_text(self.settings, self.report, f"{self.entry.name}-kernels", "\n\n".join(kernels.values()))
        return groups

    def _compile_kernels(self, groups: Sequence[Group]) -> Kernels:
        unique = {g.built.key: g.built.kernel.renamed(self.names[g.built.key]) for g in groups}
        self.compiled = [str(kernel) for kernel in unique.values()]
        with self.report.phase("compiler"):
            return build_kernels(self.device, list(unique.values()))

    def _make_runner(self, groups: Sequence[Group]) -> Runner:
        """The program of the graph with these groups, ready to call."""
        kernels = self._kernels
        try:
            program = ProgramBuilder(self.gm, groups, self.names, _identifier(self.entry.name),
                                     self.kind == "inference", self.static).build()
        except NotAProgram as why:
            log.debug("%s runs as a spliced graph: %s", self.entry.name, why)
            self.report.note(f"{self.entry.name} runs node by node: {why}")
            return splice(self.gm, groups, self.names, kernels.result())
        options = choice_options(self.report, self.entry, self.settings, self._late) if self.device == "cuda" else None
        built = build_program(program, kernels.result, options=options)
        self.entry.program, self.entry.source, self.entry.timings = program, built.source, built.timings
        self.entry.behind_products = built.behind_products
        if built.note:
            self.report.note(f"{self.entry.name} is driven from Python: {built.note}")
        dump_text(self.settings, self.report, f"{self.entry.name}-program-of-{len(groups)}-regions", built.source)
        return built.run

    # -- call ---------------------------------------------------------------------------------
    def _first_call(self, args: list[Any]) -> list[Any]:
        inputs = list(args)
        args.clear()
        self._take_over()
        if not in_time(self._kernels, self.deadline):
            self.report.note(f"{self.entry.name} runs eagerly until its kernels are compiled: time limit reached")
            return list(self.gm.forward(*inputs))
        outputs = list(self.gm.forward(*inputs)) if self._kept is not None else self._accept(inputs)
        if not in_time(self._program, self.deadline):
            self.report.note(f"{self.entry.name} runs eagerly until its program is compiled: time limit reached")
            return outputs
        run = self._program.result()
        settle(run, [*inputs, *self.constants], self.report)
        self._compare_whole(run, inputs, outputs)
        self._run = run  # only now: a caller that catches `WrongResult` and calls again must meet it again
        self.entry.state = "ready"
        if self.on_ready is not None:
            self.on_ready(self)
        return outputs

    def _accept(self, inputs: list[Any]) -> list[Any]:
        """Run in eager, settle which regions stay, and give eager's outputs."""
        symbols = symbol_values(self.gm, inputs)
        judge = Acceptance(self._kernels.result(), self.names, symbols, check=self.settings.check,
                           measure=self.settings.measure, deadline=self.deadline)
        outputs = RecordedRun(self.gm, self.groups, judge, symbols).run(*inputs)
        self.report.add_seconds("check", judge.check_s, of="fuse")
        self.report.add_seconds("measure", judge.measure_s, of="fuse")
        kept = [g for g in self.groups if judge.verdicts[g.built.key].ok]
        self._record(judge.verdicts, kept, symbols)
        if len(kept) < len(self.groups):
            self._program = submit(self._make_runner, kept)
        self._kept = kept
        return outputs

    def _take_over(self) -> None:
        """Start again, in a forked child, what the parent's threads had not finished: they did not come along."""
        if not self._in_new_process():
            return
        if not self._kernels.done():
            self._kernels = submit(self._compile_kernels, self.groups)
        if not self._program.done():
            self._program = submit(self._make_runner, self.groups if self._kept is None else self._kept)

    def _compare_whole(self, run: Runner, inputs: list[Any], eager: list[Any]) -> None:
        """Raises `WrongResult` when the finished program does not give eager's outputs."""
        if not self.settings.check:
            return
        reason = "time limit reached" if self._late() else why_not_compared(self.gm, eager)
        if reason:
            self.report.note(f"{self.entry.name} was compared with eager region by region, not as a whole: {reason}")
            return
        with self.report.phase("check"), torch.no_grad():
            ours = run([*inputs, *self.constants])
            compare_whole(ours, eager, lambda moved: list(self.gm.forward(*moved)), inputs)

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    # -- report -------------------------------------------------------------------------------
    def _record(self, verdicts: Mapping[str, Verdict], kept: Sequence[Group], symbols: Mapping[str, int]) -> None:
        counts = Counter(g.built.key for g in self.groups)
        first = {g.built.key: g for g in reversed(self.groups)}
        machine = local_device() if self.device == "cpu" and verdicts else None
        for key, verdict in verdicts.items():
            group = first[key]
            before, after = predict_group(group, symbols, machine) if machine is not None else (None, None)
            self.rows.append(CandidateRow(
                _place(group, self.names[key]),
                "kept" if verdict.ok else "dropped", verdict.reason, self.names[key], counts[key],
                predicted_before_s=before, predicted_after_s=after,
                measured_before_s=verdict.eager_s, measured_after_s=verdict.kernel_s))
            self.report.candidate("fuse", self.rows[-1])
            if verdict.ok:
                self.report.add_kernel(kernel_report(group.built.kernel.renamed(self.names[key]), self.device))
        self.entry.kernels = len(kept)
        found = count_bytes(self.gm, kept, symbols)
        self.entry.kernel_bytes, self.entry.aten_bytes = found.kernels, found.aten
        self.entry.library_bytes, self.entry.uncovered = found.library, found.uncovered


class RecordedRun(fx.Interpreter):
    """One eager run of a graph that hands every region's values to the acceptance as soon as they exist. Sizes that are
    known only inside the graph are added to `symbols`."""

    def __init__(self, gm: fx.GraphModule, groups: Sequence[Group], judge: Acceptance, symbols: dict[str, int]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.judge, self.symbols = judge, symbols
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        pending: dict[str, Group] = {}
        for g in groups:  # the first of each structure is judged
            pending.setdefault(g.built.key, g)
        self._due: dict[fx.Node, list[Group]] = {}
        last_use: dict[fx.Node, int] = {}
        for n in order:
            for a in n.all_input_nodes:
                last_use[a] = order[n]
        for g in pending.values():
            ready = max(g.nodes, key=order.__getitem__)
            self._due.setdefault(ready, []).append(g)
            for n in (*g.built.inputs, *g.built.outputs):
                last_use[n] = max(last_use.get(n, 0), order[ready])
        self._drop: dict[int, list[fx.Node]] = {}
        for n, i in last_use.items():
            self._drop.setdefault(i, []).append(n)
        self._order = order

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.env[n] = result
        learn_symbols(self.symbols, n.meta.get("val"), result)
        for group in self._due.get(n, ()):
            self.judge.judge(group, self.env, [self.env[o] for o in group.built.outputs])
        for gone in self._drop.get(self._order[n], ()):
            if gone.op == "call_function" and gone is not n:
                self.env.pop(gone, None)
        return result

    def run(self, *args: Any, **_: Any) -> list[Any]:
        with torch.no_grad():
            return list(super().run(*args, enable_io_processing=False))


def _place(group: Group, name: str) -> str:
    """A kernel and where its first region stands, for the report."""
    first = ", ".join(n.name for n in group.nodes[:4])
    return f"{name} ({first}{', …' if len(group.nodes) > 4 else ''})"


def local_device() -> Device:
    """This machine as the cost model sees it with the current number of threads (measured once, kept on disk)."""
    return this_machine(torch.get_num_threads(), load=lambda key: cache.get_json(cache.key_of(key)),
                        save=lambda key, value: cache.put_json(cache.key_of(key), value))


def predict_group(group: Group, symbols: Mapping[str, int], device: Device) -> tuple[float, float]:
    """Seconds of a region in eager and as a kernel, by the cost model."""
    return predict(group_records(group, symbols), kernel_record(group.built, symbols), device)


def symbol_values(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """Values of the symbolic sizes, read off the actual inputs."""
    values: dict[str, int] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, actual in zip(placeholders, inputs, strict=True):
        learn_symbols(values, node.meta.get("val"), actual)
    return values


def learn_symbols(values: dict[str, int], traced: Any, actual: Any) -> None:
    """Add the symbolic sizes that a traced value shows in its actual one."""
    if isinstance(traced, torch.SymInt):
        values.setdefault(str(traced.node.expr), int(actual))
    elif isinstance(traced, torch.Tensor) and isinstance(actual, torch.Tensor):
        for size, real in zip(traced.shape, actual.shape, strict=True):
            if isinstance(size, torch.SymInt):
                values.setdefault(str(size.node.expr), int(real))


def graph_device(gm: fx.GraphModule) -> str:
    """Device type of the graph's tensors: "cuda" when any is there, else "cpu"."""
    values = (n.meta.get("val") for n in gm.graph.nodes)
    kinds = {torch_compat.device_of(v).type for v in values if isinstance(v, torch.Tensor)}
    return "cuda" if "cuda" in kinds else "cpu"


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


__all__ = ["CompiledGraph", "compile_aten_graph", "graph_device", "shape_of", "symbol_values"]
