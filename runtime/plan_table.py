"""A plan as tables for a terminal: strategy per layer range, a step's time by stage, memory by category and stage.

Columns of time and memory are in ms per step and GiB per GPU. Everything that is printed from the file is plain text to
rich: markup in a name stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .plan_data import Name
from .plan_layout import LayerOptions
from .plan_predictions import Beaten, Predicted

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from .plan import Plan

GIB = 2**30
MAX_STAGES_SHOWN = 16
TIGHT_BYTES = 2 * GIB  # with less free, a peak that is a little higher than predicted does not fit
HEADERS = {"gradients": "grad.", "optimizer": "optim.", "activations": "activ.", "working-set": "working set",
           "communication": "comm. buffers", "allocator": "alloc."}  # so that no header breaks within a word
MEANINGS = {
    "weights": "parameters as products read them", "gradients": "accumulated gradients",
    "optimizer": "moments and float32 copies of parameters",
    "activations": "what forward passes save for their backward passes, of all micro-batches in flight",
    "logits": "scores over the vocabulary and their gradient",
    "working-set": "what a layer needs only while it runs, of the largest layer",
    "communication": "buffers of collectives", "allocator": "margin for memory that an allocator holds but can't use",
    "context": "what CUDA, NCCL and libraries hold before the model is there"}
"""Categories of a stage's memory, in words."""


def plan_table(plan: Plan) -> Group:
    """Headline, strategy, time, memory, and what to doubt."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(line, style="bold" if i == 0 else "") for i, line in enumerate(headline(plan))]
    parts += [strategy_table(plan), time_table(plan), memory_table(plan)]
    parts += [Text(line) for line in footnotes(plan)]
    return Group(*parts)


def headline(plan: Plan) -> list[str]:
    """What it is, how fast it is predicted to be, and how sure that is."""
    p, ask = plan.predicted, plan.ask
    idle = f", {plan.mesh.idle_gpus} idle" if plan.mesh.idle_gpus else ""
    padded = plan.training.padded_batch
    batch = f"{ask.global_batch}" + (f" (padded to {padded})" if padded > ask.global_batch else "")
    lines = [f"{plan.model.name} on {plan.mesh.gpus} GPUs ({ask.cluster}{idle}), {ask.seq} tokens × batch {batch}",
             plan.title, f"predicted: {speed(p)}"]
    if p.error_band:
        lines.append(f"error band: {error_band(p)} per step ({p.error_band.source})")
    money = [f"at most {energy(p.energy_joules)} (rated power × time)" if p.energy_joules is not None else "",
             f"{p.cost_usd:.4g} USD" if p.cost_usd is not None else ""]
    if any(money):
        lines.append(f"a step takes {' and '.join(m for m in money if m)}")
    if not p.fits:
        lines.append("DOES NOT FIT: " + "; ".join(missing(p)))
    return lines


def error_band(p: Predicted) -> str:
    """`1.1 s to 1.4 s (-9 % to +14 %)`; empty where no run was compared."""
    band = p.error_band
    if band is None:
        return ""
    low, high = p.step_time_s * (1 - band.low), p.step_time_s * (1 + band.high)
    return f"{duration(low)} to {duration(high)} (-{band.low:.0%} to +{band.high:.0%})"


def speed(p: Predicted) -> str:
    """`1.234 s per step · 56,789 tokens/s · MFU 42.1 %`."""
    mfu = f" · MFU {p.mfu:.1%}" if p.mfu is not None else ""
    return f"{duration(p.step_time_s)} per step · {p.tokens_per_s:,.0f} tokens/s{mfu}"


def confidence(p: Predicted) -> dict[str, Any]:
    """For JSON: the step's error band, shares of its time, and what there was nothing to compare with."""
    doubts = dict.fromkeys((*p.low_confidence, *(r.low_confidence for r in p.layers if r.low_confidence)))
    band = p.error_band
    return {"error_band": None if band is None else {
        "low": band.low, "high": band.high, "low_s": p.step_time_s * (1 - band.low),
        "high_s": p.step_time_s * (1 + band.high), "source": band.source}, "low_confidence": list(doubts)}


def missing(p: Predicted) -> list[str]:
    """`stage 0 lacks 1.23 GiB of 70.00 GiB`, for every stage that does not fit."""
    return [f"stage {i} lacks {s.missing_bytes / GIB:.2f} GiB above its limit of {s.limit_bytes / GIB:.2f} GiB"
            for i, s in enumerate(p.stages) if s.missing_bytes]


def tight(p: Predicted) -> list[str]:
    """`stage 0 has 0.08 GiB free`, for every stage that fits with less than `TIGHT_BYTES` to spare."""
    return [f"stage {i} has {(s.limit_bytes - s.peak_bytes) / GIB:.2f} GiB free" for i, s in enumerate(p.stages)
            if not s.missing_bytes and s.limit_bytes - s.peak_bytes < TIGHT_BYTES]


def footnotes(plan: Plan) -> list[str]:
    """Little free memory, low confidence, what can't be run yet, and the certificate."""
    near = tight(plan.predicted)
    more = f" and {len(near) - 3} more stages" if len(near) > 3 else ""
    lines = [f"tight: {', '.join(near[:3])}{more}; a peak a little above the prediction does not fit"] if near else []
    lines += [f"low confidence: {text}" for text in plan.predicted.low_confidence]
    reasons = dict.fromkeys(r.options.why_not_runnable for r in plan.layers if not r.options.runnable)
    lines += [f"not runnable yet: {reason}" for reason in reasons]
    c = plan.certificate
    if c is not None:
        counts = ", ".join(f"{c.count(state)} {state}" for state in ("solved", "searched", "bounded", "infeasible")
                           if c.count(state))
        lines.append(f"certificate: no plan takes less than {duration(c.lower_bound_ns / 1e9)}, gap "
                     f"{c.gap(plan.predicted.step_time_ns):.2%}; {len(c.tuples)} outer tuples: {counts}")
    return lines


@dataclass(frozen=True)
class LayerGroup:
    """Neighbouring ranges, over stages and chunks, that are of one kind and run the same way."""

    stages: tuple[int, ...]
    first: str
    last: str
    count: int
    kind: str
    options: LayerOptions
    compute_ns: int
    exposed_ns: int
    memory_bytes: int
    low_confidence: str

    @property
    def layers(self) -> str:
        return self.first if self.first == self.last else f"{self.first} … {self.last}"

    @property
    def where(self) -> str:
        """`0`, `0–3` or `0, 2`."""
        stages = sorted(set(self.stages))
        if len(stages) > 2 and stages == list(range(stages[0], stages[-1] + 1)):
            return f"{stages[0]}–{stages[-1]}"
        return ", ".join(map(str, stages))


def layer_groups(plan: Plan) -> list[LayerGroup]:
    """The plan's strategy in as few rows as it has changes."""
    found: list[LayerGroup] = []
    for r, p, stage in zip(plan.layers, plan.predicted.layers, plan.stages_of_ranges(), strict=True):
        g = LayerGroup((stage,), r.first, r.last, r.count, r.kind, r.options, p.compute_ns, sum(p.exposed_ns.values()),
                   sum(p.memory_bytes.values()), p.low_confidence)
        before = found[-1] if found else None
        if before and (before.kind, before.options, before.low_confidence) == (g.kind, g.options, g.low_confidence):
            found[-1] = replace(before, stages=(*before.stages, stage), last=g.last, count=before.count + g.count,
                                compute_ns=before.compute_ns + g.compute_ns,
                                exposed_ns=before.exposed_ns + g.exposed_ns,
                                memory_bytes=before.memory_bytes + g.memory_bytes)
        else:
            found.append(g)
    return found


def strategy_table(plan: Plan) -> Table:
    """A row per group of layers; numbers are of one layer of it, on average."""
    groups = layer_groups(plan)
    doubt = ("",) if any(g.low_confidence for g in groups) else ()
    table = _table("strategy; one layer's ms per step and GiB per GPU (predicted)",
                   ("stage", "layers", "count", "kind", "strategy"), ("compute", "exposed", "memory"), doubt)
    for g in groups:
        numbers = (_ms(g.compute_ns / g.count), _ms(g.exposed_ns / g.count), f"{g.memory_bytes / g.count / GIB:.2f}")
        mark = ("low confidence" if g.low_confidence else "",) if doubt else ()
        table.add_row(*map(_text, (g.where, g.layers, str(g.count), g.kind, g.options.title, *numbers, *mark)))
    return table


def time_table(plan: Plan) -> Table:
    """A row per stage: compute, optimizer, exposed communication by collective, bubble."""
    stages = plan.predicted.stages
    names = keys(s.exposed_ns for s in stages)
    table = _table("step time by stage, ms (predicted)", ("stage",),
                   ("compute", "optimizer", *(f"exposed {n}" for n in names), "bubble", "step"), ())
    _rows(table, len(stages), lambda i: [_ms(stages[i].compute_ns), _ms(stages[i].optimizer_ns),
                                         *(_ms(stages[i].exposed_ns.get(n, 0)) for n in names),
                                         _ms(stages[i].bubble_ns), _ms(stages[i].total_ns)], plan.predicted.tightest)
    return table


def memory_table(plan: Plan) -> Table:
    """A row per stage: every category, their sum, and the limit."""
    stages = plan.predicted.stages
    names = keys(s.memory_bytes for s in stages)
    table = _table("memory by stage at its peak, GiB per GPU (predicted)", ("stage",),
                   (*(HEADERS.get(n, n) for n in names), "total", "limit", "free"), ())
    _rows(table, len(stages), lambda i: [*(f"{stages[i].memory_bytes.get(n, 0) / GIB:.2f}" for n in names),
                                         f"{stages[i].peak_bytes / GIB:.2f}", f"{stages[i].limit_bytes / GIB:.2f}",
                                         f"{(stages[i].limit_bytes - stages[i].peak_bytes) / GIB:.2f}"],
          plan.predicted.tightest)
    hard = [(HEADERS.get(n, n), text) for n, text in meanings(plan.predicted) if n not in ("weights", "gradients")]
    table.caption, table.caption_justify = "; ".join(f"{name}: {text}" for name, text in hard), "left"
    return table


def meanings(p: Predicted) -> list[tuple[str, str]]:
    """The categories of memory that a plan has, with what they are."""
    return [(n, MEANINGS[n]) for n in keys(s.memory_bytes for s in p.stages) if n in MEANINGS]


def beaten_by(step_time_ns: int, b: Beaten) -> tuple[str, str]:
    """(step time, by how much it is slower than `step_time_ns`) of a beaten plan, in words."""
    if b.step_time_ns is None:
        return "does not fit" if b.missing_bytes else "-", f"{b.missing_bytes / GIB:.2f} GiB missing" * bool(
            b.missing_bytes)
    slower = b.step_time_ns / step_time_ns - 1
    equal = " (equal within the error band" + ", the simplest" * b.preferred + ")"
    return duration(b.step_time_ns / 1e9), f"{slower:+.1%}" + equal * b.near_tie


def keys(tables: Iterable[dict[Name, int]]) -> list[str]:
    """The names that have a value in any of the tables, in the order of their first appearance."""
    return list(dict.fromkeys(k for table in tables for k, v in table.items() if v))


def energy(joules: float) -> str:
    """`12.3 kJ` or `1.23 MJ`."""
    size, unit = next((s, u) for s, u in ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J")) if joules >= s or s == 1.0)
    return f"{joules / size:.3g} {unit}"


def duration(seconds: float) -> str:
    """`1.234 s`, `12.34 ms` or `1.2 µs`."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _rows(table: Table, count: int, row: Callable[[int], Sequence[str]], tightest: int) -> None:
    """All stages, or the first, the last and the tightest ones where there are many."""
    half = MAX_STAGES_SHOWN // 2
    shown = range(count) if count <= MAX_STAGES_SHOWN else sorted({*range(half), tightest, *range(count - half, count)})
    before = -1
    for i in shown:
        if i != before + 1:
            table.add_row("…")
        table.add_row(str(i), *row(i))
        before = i


def _table(title: str, left: Sequence[str], right: Sequence[str], last: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in (*left, *right, *last):
        table.add_column(_text(name), justify="right" if name in right else "left", overflow="fold")
    return table


def _text(value: str) -> Any:
    from rich.text import Text

    return Text(value)


def _ms(ns: float) -> str:
    return f"{ns / 1e6:,.1f}" if ns else "-"
