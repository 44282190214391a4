"""What a compilation did, as data: per pass what matched, was rewritten, refused or dropped and why, predicted and
measured seconds, seconds per compile phase, every emitted kernel, and every region that runs eagerly.

One `Report` belongs to one compiled model (or to one `torch.compile` call). Graphs, forward and backward, are compiled
at different moments and on different threads, all adding to the same report: every method takes its lock. Rendering
is in `report_render`; use `print(report)`, `report.as_dict()` or `report.to_html()`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..runtime.locks import ForkSafeLock

if TYPE_CHECKING:
    from ..codegen.program_cpp_packing import BehindProduct
    from ..runtime.program import Program

PHASES = ("dynamo", "aot", "passes", "lowering", "compiler", "check", "measure", "inductor")
GraphKind = Literal["graph", "forward", "backward", "inference"]


@dataclass(frozen=True)
class Note:
    """A reason and the place it concerns (an FX node, a module name, `file:line`)."""

    reason: str
    where: str = ""


@dataclass
class CandidateRow:
    """One place a pass wanted to rewrite: its verdict ("kept" or "dropped") and its seconds per call.

    `count` regions share this `key` (checked and timed once). Unknown numbers are None.
    """

    region: str
    verdict: Literal["kept", "dropped"]
    reason: str = ""
    key: str = ""
    count: int = 1
    predicted_before_s: float | None = None
    predicted_after_s: float | None = None
    measured_before_s: float | None = None
    measured_after_s: float | None = None


@dataclass
class PassReport:
    """One pass over all graphs. `seconds` is what finding, checking and timing its candidates took; the sums below run
    over kept candidates."""

    name: str
    matched: int = 0
    rewritten: int = 0
    refused: list[Note] = field(default_factory=list)
    dropped: list[Note] = field(default_factory=list)
    candidates: list[CandidateRow] = field(default_factory=list)
    seconds: float = 0.0

    def total(self, what: str) -> float | None:
        """Sum of a `CandidateRow` field (times `count`) over kept candidates that have it; None when none has."""
        found = [(getattr(c, what), c.count) for c in self.candidates if c.verdict == "kept"]
        known = [v * n for v, n in found if v is not None]
        return sum(known) if known else None

    @property
    def predicted_s(self) -> float | None:
        """Predicted seconds saved per call."""
        return _difference(self.total("predicted_before_s"), self.total("predicted_after_s"))

    @property
    def measured_s(self) -> float | None:
        """Measured seconds saved per call."""
        return _difference(self.total("measured_before_s"), self.total("measured_after_s"))


@dataclass(frozen=True)
class RegionReport:
    """A region that runs eagerly: user code Dynamo can't capture ("graph break") or a failure of ours ("fall-back")."""

    reason: str
    file: str = ""
    line: int = 0
    kind: Literal["graph break", "fall-back"] = "graph break"


@dataclass(frozen=True)
class KernelReport:
    """One emitted kernel: `language` is "c++" or "triton", `source` its text, `ir` the kernel IR it was made from."""

    name: str
    language: str
    source: str
    ir: str = ""
    path: str = ""


@dataclass
class GraphReport:
    """One compiled graph. The aten engine fills `program`, `source` (the readable program) and the bytes.

    `kernel_bytes` move in emitted kernels, `aten_bytes` in ATen calls other than GEMM, convolution and attention,
    `library_bytes` in those; all per call at the first call's sizes.
    """

    name: str
    kind: GraphKind
    nodes: int = 0
    program: Program | None = None
    source: str = ""
    timings: dict[str, dict[str, float]] = field(default_factory=dict)  # what decided between methods (codegen/timings)
    behind_products: list[BehindProduct] = field(default_factory=list)  # kernels that may run inside of a product
    kernels: int = 0
    kernel_bytes: int = 0
    aten_bytes: int = 0
    library_bytes: int = 0
    uncovered: dict[str, int] = field(default_factory=dict)  # aten operator -> bytes not moved in kernels
    chosen: str = "meshwright"  # or "inductor" or "eager" (mode="max", fall-back)
    # "pending" until the first real call has accepted it
    state: Literal["pending", "ready", "fallen back"] = "pending"


class Report:
    """The report of one compilation; printable. All adding methods may be called from any thread."""

    def __init__(self, name: str = "model") -> None:
        self.name = name
        self.passes: dict[str, PassReport] = {}
        self.regions: list[RegionReport] = []
        self.graphs: list[GraphReport] = []
        self.kernels: list[KernelReport] = []
        self.phases: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.notes: list[Note] = []
        self._started: dict[int, float] = {}
        self._lock = ForkSafeLock()

    # -- adding -------------------------------------------------------------------------------
    def pass_report(self, name: str) -> PassReport:
        """The entry of pass `name`, made at first use."""
        with self._lock:
            return self.passes.setdefault(name, PassReport(name))

    def matched(self, name: str, count: int = 1) -> None:
        with self._lock:
            self.pass_report(name).matched += count

    def rewritten(self, name: str, count: int = 1) -> None:
        with self._lock:
            self.pass_report(name).rewritten += count

    def refused(self, name: str, reason: str, where: object = "") -> None:
        """Pass `name` looked at `where` and left it alone."""
        with self._lock:
            self.pass_report(name).refused.append(Note(reason, str(where or "")))

    def dropped(self, name: str, reason: str, where: object = "") -> None:
        """A replacement by `name` at `where` was found wrong, slower, or failed."""
        with self._lock:
            self.pass_report(name).dropped.append(Note(reason, str(where or "")))

    def candidate(self, name: str, row: CandidateRow) -> None:
        """Add one candidate's row; counts `matched`, `rewritten` and `dropped` with it."""
        with self._lock:
            entry = self.pass_report(name)
            entry.candidates.append(row)
            entry.matched += row.count
            if row.verdict == "kept":
                entry.rewritten += row.count
            else:
                entry.dropped.append(Note(row.reason, row.region))

    @contextmanager
    def phase(self, name: str, of: str = "") -> Iterator[None]:
        """Count the seconds of the `with` body to a compile phase (one of `PHASES`) and to the pass `of`, if any."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - start, of)

    def add_seconds(self, phase: str, seconds: float, of: str = "") -> None:
        with self._lock:
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
            if of:
                self.pass_report(of).seconds += seconds

    def add_dynamo(self, started_ns: int | None) -> None:
        """Count the time since Dynamo's compilation began (`time.time_ns()`), less what other phases took in it."""
        if started_ns is None:
            return
        with self._lock:
            spent = sum(self.phases.values())
            first = self._started.setdefault(started_ns, spent)  # a restarted analysis arrives here again
            self.add_seconds("dynamo", max(0.0, (time.time_ns() - started_ns) / 1e9 - (spent - first)))

    def add_kernel(self, kernel: KernelReport) -> None:
        """Add an emitted kernel once per (name, language)."""
        with self._lock:
            if not any(k.name == kernel.name and k.language == kernel.language for k in self.kernels):
                self.kernels.append(kernel)

    def add_graph(self, name: str, kind: GraphKind, nodes: int = 0) -> GraphReport:
        """A new graph entry, which the caller fills."""
        with self._lock:
            self.graphs.append(GraphReport(name, kind, nodes))
            return self.graphs[-1]

    def region(self, reason: str, file: str = "", line: int = 0,
               kind: Literal["graph break", "fall-back"] = "graph break") -> None:
        """A region runs eagerly; equal entries are kept once."""
        with self._lock:
            entry = RegionReport(reason, file, line, kind)
            if entry not in self.regions:
                self.regions.append(entry)

    def note(self, reason: str, where: object = "") -> None:
        """Anything else a user should know (a skipped check, a time limit)."""
        with self._lock:
            entry = Note(reason, str(where or ""))
            if entry not in self.notes:
                self.notes.append(entry)

    # -- reading ------------------------------------------------------------------------------
    @property
    def fall_backs(self) -> list[RegionReport]:
        """Regions that run eagerly because something in Meshwright failed."""
        with self._lock:
            return [r for r in self.regions if r.kind == "fall-back"]

    @property
    def graph_breaks(self) -> list[RegionReport]:
        with self._lock:
            return [r for r in self.regions if r.kind == "graph break"]

    @property
    def coverage(self) -> float | None:
        """Share of the bytes outside GEMM, convolution and attention that move in emitted kernels (0 to 1)."""
        with self._lock:
            kernel = sum(g.kernel_bytes for g in self.graphs)
            total = kernel + sum(g.aten_bytes for g in self.graphs)
        return kernel / total if total else None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the programs, as plain JSON values."""
        with self._lock:
            return {
                "name": self.name,
                "passes": [asdict(p) | {"predicted_s": p.predicted_s, "measured_s": p.measured_s}
                           for p in self.passes.values()],
                "regions": [asdict(r) for r in self.regions],
                "graphs": [{k: v for k, v in vars(g).items() if k != "program"}
                           | {"behind_products": [asdict(b) for b in g.behind_products]} for g in self.graphs],
                "kernels": [asdict(k) for k in self.kernels],
                "phases": dict(self.phases),
                "coverage": self.coverage,
                "notes": [asdict(n) for n in self.notes],
            }

    def to_html(self) -> str:
        """A page that stands alone (no scripts, no links)."""
        from .report_render import to_html

        return to_html(self)

    def __rich__(self) -> Any:
        from .report_render import to_rich

        return to_rich(self)

    def __str__(self) -> str:
        from .report_render import to_text

        return to_text(self)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {k: v for k, v in vars(self).items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = ForkSafeLock()


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after
