"""Geometry of the report's drawings, as plain numbers and texts that the page's template writes as SVG.

Every drawing is `WIDTH` units wide. What would be too much to draw is thinned, and the drawing's `note` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..runtime.plan import Plan
from ..runtime.plan_predictions import StagePrediction, TupleResult
from ..runtime.plan_table import GIB, duration, keys
from .plan_timeline import PlanTimeline, timeline

WIDTH, LEFT, RIGHT = 1000.0, 84.0, 36.0
MOST_ROWS = 64
MOST_EVENTS = 4000
MOST_TITLES = 1500
SEEN_EVENTS = 110  # of one stage, at the width of the page
TITLE = 18.0  # the height of an axis' title
TUPLE_STATES = ("solved", "searched", "bounded")


@dataclass(frozen=True)
class Box:
    """A rectangle of the colour class `css`; `label` is written into it, `title` shown under the pointer."""

    x: float
    y: float
    width: float
    height: float
    css: str
    title: str = ""
    label: str = ""


@dataclass(frozen=True)
class Mark:
    """A text at a place, a tick with a line down from it, or a point of radius `size`, by where it is used."""

    x: float
    y: float
    text: str = ""
    css: str = ""
    size: float = 4.5


@dataclass(frozen=True)
class Chart:
    """A drawing: boxes and points, a label before every row, ticks of the axis below, vertical and horizontal `lines`
    (x or y, with a text), a legend of (colour class, text). `height` has `TITLE` for `x_title` where there is one."""

    height: float
    boxes: Sequence[Box] = ()
    points: Sequence[Mark] = ()
    rows: Sequence[Mark] = ()
    ticks: Sequence[Mark] = ()
    y_ticks: Sequence[Mark] = ()
    lines: Sequence[Mark] = ()
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    paths: dict[str, str] = field(default_factory=dict)
    x_title: str = ""
    y_title: str = ""


def timeline_charts(plan: Plan) -> list[tuple[str, Chart]]:
    """The step, and its start enlarged where single operations are too narrow to be seen; nothing for a pipeline of so
    many stages that neither could be."""
    drawn = timeline(plan, MOST_EVENTS)
    if drawn is None:
        return []
    end, most = max(drawn.line.makespan_ns, 1), max(map(len, drawn.line.events))
    charts = [("", timeline_chart(plan, drawn, end))]
    if most > SEEN_EVENTS:
        warm_up = max(events[0].start_ns for events in drawn.line.events)
        shown = min(end, max(end * SEEN_EVENTS // most, 2 * warm_up))
        if shown < end * 0.6:
            charts.append((f"The first {duration(shown / 1e9)}, enlarged", timeline_chart(plan, drawn, shown)))
    return charts


def timeline_chart(plan: Plan, drawn: PlanTimeline, end: int) -> Chart:
    """A row per stage up to `end` ns: forwards, backwards, weight gradients, synchronisation and optimizer; gaps are
    the bubble."""
    line, p = drawn.line, plan.schedule.stages
    per_ns = (WIDTH - LEFT - RIGHT) / end
    high = 26.0 if p <= 8 else 18.0 if p <= 16 else 11.0 if p <= 32 else 7.0
    boxes: list[Box] = []
    for stage, events in enumerate(line.events):
        y = 8 + stage * (high + 2)
        for op, start, stop in events:
            if start >= end:
                break
            css = f"op{op.kind}" + (" odd" if op.chunk % 2 else "")
            chunk = f", chunk {op.chunk}" if plan.schedule.chunks > 1 else ""
            wide = (min(stop, end) - start) * per_ns
            boxes.append(Box(LEFT + start * per_ns, y, wide - min(0.7, wide / 8), high, css,
                             f"stage {stage}: {NAMES[op.kind]} of micro-batch {op.micro_batch}{chunk}, "
                             f"{duration((stop - start) / 1e9)}",
                             str(op.micro_batch) if wide > 13 and high > 15 else ""))
        at = events[-1].end_ns
        costs = line.costs[stage]
        for css, name, ns in (("sync", "synchronisation", costs.sync_ns), ("opt", "optimizer", costs.optimizer_ns)):
            if ns and at + ns <= end:
                boxes.append(Box(LEFT + at * per_ns, y, ns * per_ns * 0.9, high, css,
                                 f"stage {stage}: {name}, {duration(ns / 1e9)}"))
            at += ns
    bottom = 8 + p * (high + 2)
    note = "" if drawn.whole else (f"Drawn with {drawn.drawn} of {drawn.micro_batches} micro-batches; the middle of "
                                   "the step repeats.")
    if plan.schedule.chunks > 1:
        note = " ".join(filter(None, [note, "Fainter: odd chunks of a stage."]))
    rows = [Mark(LEFT - 8, 8 + s * (high + 2) + high / 2, f"stage {s}" if p <= 32 else str(s))
            for s in range(p) if p <= 32 or s % 4 == 0]
    shown = [k for k in ("F", "B", "W") if k in line.schedule.kinds]
    legend = [(f"op{k}", NAMES[k]) for k in shown]
    legend += [(css, name) for css, name, used in (
        ("sync", "gradient synchronisation", any(c.sync_ns for c in line.costs)),
        ("opt", "optimizer", any(c.optimizer_ns for c in line.costs))) if used]
    chart = Chart(bottom + 26, boxes, (), rows, _time_ticks(end / 1e6, per_ns * 1e6, bottom), (), (), legend, note)
    return chart if len(boxes) <= MOST_TITLES else _as_paths(chart)


NAMES = {"F": "forward", "B": "backward", "W": "weight gradient"}


def memory_chart(plan: Plan) -> Chart:
    """A bar per stage by category, in GiB, with the limit as a line."""
    stages = plan.predicted.stages
    names = keys(s.memory_bytes for s in stages)
    limits = [s.limit_bytes for s in stages]
    colors = {n: f"c{i % 12}" for i, n in enumerate(names)}
    return _bars(plan, lambda s: [(n, s.memory_bytes.get(n, 0) / GIB) for n in names], colors, gib,
                 max(limits) / GIB, [(min(limits) / GIB, f"limit {gib(min(limits) / GIB)}")])


def time_chart(plan: Plan) -> Chart:
    """A bar per stage: compute, optimizer, exposed communication by collective, bubble, in ms of a step."""
    names = keys(s.exposed_ns for s in plan.predicted.stages)

    def parts(s: StagePrediction) -> list[tuple[str, float]]:
        exposed = [(f"exposed {n}", s.exposed_ns.get(n, 0) / 1e9) for n in names]
        return [("compute", s.compute_ns / 1e9), ("optimizer", s.optimizer_ns / 1e9), *exposed,
                ("bubble", s.bubble_ns / 1e9)]

    warm = ("c4", "c3", "c8", "c1", "c6", "c7", "c9", "c10")
    colors = {"compute": "c0", "optimizer": "opt", "bubble": "bubble",
              **{f"exposed {n}": warm[i % len(warm)] for i, n in enumerate(names)}}
    return _bars(plan, parts, colors, duration, plan.predicted.step_time_ns / 1e9, [])


def gib(value: float) -> str:
    return f"{value:,.4g} GiB"


def search_chart(plan: Plan) -> Chart | None:
    """Every outer tuple: its lower bound to the right, the best plan found in it upward; tuples that were never entered
    because of their bound lie on a line of their own at the top. None without a certificate."""
    certificate = plan.certificate
    drawn = [t for t in certificate.tuples if t.bound_ns] if certificate else []
    if not drawn:
        return None
    step = plan.predicted.step_time_ns
    far = step * 20
    values = [v for t in drawn for v in (t.bound_ns, t.value_ns) if v] + [step]
    low, high = min(values) * 0.97, min(max(values), far) * 1.03
    top, bottom, span = 46.0, 330.0, math.log(high / low)

    def place(ns: float) -> float:
        return min(1.0, max(0.0, math.log(ns / low) / span))

    def x(ns: float) -> float:
        return LEFT + place(ns) * (WIDTH - LEFT - RIGHT)

    def y(ns: float) -> float:
        return bottom - place(ns) * (bottom - top)

    places: dict[tuple[int, int, str], list[TupleResult]] = {}
    for t in drawn:
        at = y(t.value_ns) if t.value_ns else 22.0
        places.setdefault((round(x(t.bound_ns or 0) * 2), round(at * 2), t.state), []).append(t)
    points = [Mark(a / 2, b / 2, _tuple_title(found), state, 4 + 2 * math.log10(len(found)))
              for (a, b, state), found in places.items()]
    points.sort(key=lambda m: -m.size)
    infeasible = len(certificate.tuples) - len(drawn) if certificate else 0
    note = f"Not drawn: {infeasible} in which no plan fits. " if infeasible else ""
    note += "Larger points are several tuples. " if len(points) < len(drawn) else ""
    note += "Slower than 20 times the plan: drawn at the edge." if max(values) > far else ""
    ticks = _log_ticks(low, high)
    count = {s: sum(t.state == s for t in drawn) for s in TUPLE_STATES}
    legend = [(s, f"{word} ({count[s]})") for s, word in (
        ("solved", "searched to the end"), ("searched", "searched by the heuristic"),
        ("bounded", "excluded by its bound")) if count[s]]
    rows = [Mark(LEFT - 8, 22, "not entered")] if any(t.value_ns is None for t in drawn) else []
    return Chart(bottom + 26 + TITLE, (), points, rows,
                 [Mark(x(ns), bottom, duration(ns / 1e9)) for ns in ticks],
                 [Mark(LEFT, y(ns), duration(ns / 1e9)) for ns in ticks],
                 [Mark(x(step), 0, "this plan", "v"), Mark(0, y(step), "", "h")], legend, note.strip(),
                 x_title="step time that every plan of the combination takes at least (log scale)",
                 y_title="step time of the best plan found in it")


def _tuple_title(found: Sequence[TupleResult]) -> str:
    lines = []
    for t in found[:6]:
        value = f", best plan {duration(t.value_ns / 1e9)}" if t.value_ns else ""
        lines.append(f"{t.title}: bound {duration((t.bound_ns or 0) / 1e9)}{value}")
    return "\n".join(lines + ([f"and {len(found) - 6} more"] if len(found) > 6 else []))


def shown_stages(count: int, tightest: int, most: int = MOST_ROWS) -> list[int]:
    """All stages, or the first, the last and the tightest where there are too many."""
    if count <= most:
        return list(range(count))
    half = most // 2
    return sorted({*range(half), tightest, *range(count - half + 1, count)})


def equal_runs(rows: Sequence[object]) -> list[tuple[int, int]]:
    """(first, last) of every stretch of equal rows."""
    found: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        if found and rows[found[-1][0]] == row:
            found[-1] = found[-1][0], i
        else:
            found.append((i, i))
    return found


def _bars(plan: Plan, parts: Callable[[StagePrediction], list[tuple[str, float]]], colors: dict[str, str],
          unit: Callable[[float], str], least: float, lines: list[tuple[float, str]]) -> Chart:
    """Neighbouring stages that are equal share a bar."""
    stages = plan.predicted.stages
    runs = equal_runs([parts(s) for s in stages])
    tightest = next(k for k, (a, b) in enumerate(runs) if a <= plan.predicted.tightest <= b)
    shown = [runs[k] for k in shown_stages(len(runs), tightest)]
    names = [name for name, _ in parts(stages[0])]
    most = max([least, *(sum(v for _, v in parts(s)) for s in stages)]) * 1.02 or 1.0
    per = (WIDTH - LEFT - RIGHT) / most
    high = 22.0 if len(shown) <= 16 else 12.0
    boxes, rows = [], []
    for row, (i, j) in enumerate(shown):
        y, x = 20 + row * (high + 3), LEFT
        label = f"stage {i}" if i == j else f"stages {i}–{j}"
        rows.append(Mark(LEFT - 8, y + high / 2, label))
        for name, value in parts(stages[i]):
            if value > 0:
                boxes.append(Box(x, y, value * per, high, colors[name], f"{label}: {name} {unit(value)}"))
                x += value * per
    bottom = 20 + len(shown) * (high + 3)
    used = {n for s in stages for n, v in parts(s) if v > 0}
    legend = [(colors[n], n) for n in names if n in used]
    note = "" if len(shown) == len(runs) else f"{len(shown)} of {len(runs)} rows: the first, the last, the tightest."
    ticks = [Mark(LEFT + v * per, bottom, unit(v) if v else "0") for v in nice(most)]
    return Chart(bottom + 26, boxes, (), rows, ticks, (),
                 [Mark(LEFT + value * per, 0, text, "v") for value, text in lines], legend, note)


def _time_ticks(end_ms: float, per_ms: float, bottom: float) -> list[Mark]:
    return [Mark(LEFT + v * per_ms, bottom, duration(v / 1e3) if v else "0") for v in nice(end_ms)]


def nice(most: float, about: int = 8) -> list[float]:
    """Round numbers from 0 up to `most`, about as many as asked for."""
    raw = most / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999) * size
    return [round(i * step, 12) for i in range(math.floor(most / step * 1.000001) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    if high / low < 4:
        return [v for v in nice(high, max(3, round(6 * high / (high - low)))) if v >= low]
    start = math.floor(math.log10(low))
    found = [m * 10.0 ** e for e in range(start, math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
    return [v for v in found if low <= v <= high]


def _as_paths(chart: Chart) -> Chart:
    """The boxes as one path per colour: thousands of them stay small, at the price of their titles."""
    paths: dict[str, list[str]] = {}
    for b in chart.boxes:
        paths.setdefault(b.css, []).append(f"M{b.x:.1f} {b.y:.1f}h{b.width:.1f}v{b.height:.1f}h-{b.width:.1f}z")
    return Chart(chart.height, (), chart.points, chart.rows, chart.ticks, chart.y_ticks, chart.lines, chart.legend,
                 chart.note, {css: "".join(found) for css, found in paths.items()})
