"""`meshwright report`: a plan as one HTML page that needs nothing else: no script, no network, light and dark.

The template is beside this file; jinja2 escapes every text of the plan. A content security policy in the page forbids
whatever would load or run.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ..runtime.plan import Plan
from ..runtime.plan_predictions import TupleResult
from ..runtime.plan_table import (
    GIB,
    beaten_by,
    duration,
    energy,
    error_band,
    footnotes,
    headline,
    keys,
    layer_groups,
    meanings,
    missing,
)
from .plan_charts import memory_chart, search_chart, time_chart, timeline_charts
from .plan_files import Shown

TEMPLATE = Path(__file__).with_name("plan_page.jinja")


def plan_page(shown: Shown) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["n"] = lambda value: f"{value:.1f}".rstrip("0").rstrip(".")
    plan = shown.plan
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        plan=plan, lines=headline(plan), cards=_cards(plan), notes=[*shown.notes, *footnotes(plan)],
        missing=missing(plan.predicted), tight=_is_tight(plan), strategy=_strategy(plan),
        timelines=timeline_charts(plan), memory=memory_chart(plan), time=time_chart(plan), search=search_chart(plan),
        memory_table=_memory(plan), time_table=_times(plan), meanings=meanings(plan.predicted),
        families=_families(plan), settings=_settings(plan),
        beaten=[(b, *beaten_by(plan.predicted.step_time_ns, b)) for b in plan.beaten])


TIGHT = 0.97  # of the limit: above it the number is shown in the colour of warnings


def _is_tight(plan: Plan) -> bool:
    return any(s.peak_bytes > TIGHT * s.limit_bytes for s in plan.predicted.stages)


def _cards(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, value, small print)."""
    p = plan.predicted
    tight = p.stages[p.tightest]
    band = f"{error_band(p)}: {p.error_band.source}" if p.error_band else ""
    cards = [("step", duration(p.step_time_s), band or "predicted"), ("tokens per second", f"{p.tokens_per_s:,.0f}",
              f"MFU {p.mfu:.1%}" if p.mfu is not None else "")]
    share = tight.peak_bytes / tight.limit_bytes if tight.limit_bytes else 0.0
    cards.append(("memory", f"{tight.peak_bytes / GIB:.1f} GiB",
                  f"{share:.0%} of {tight.limit_bytes / GIB:.1f} GiB on stage {p.tightest}, the tightest"))
    if plan.certificate is not None and plan.gap is not None:
        least = duration(plan.certificate.lower_bound_ns / 1e9)
        cards.append(("gap", f"{plan.gap:.2%}", f"to the proven bound: no plan takes less than {least}"))
    if p.cost_usd is not None:
        tokens = plan.ask.global_batch * plan.ask.seq
        cards.append(("cost", f"{p.cost_usd / tokens * 1e6:.3g} USD", "per million tokens"))
    if p.energy_joules is not None:
        cards.append(("energy", energy(p.energy_joules), "per step at most: rated power × time"))
    return cards


MOST_FAMILIES = 24
_TITLE = re.compile(r"p=(\d+) v=\d+ (\S+) m=")


def _families(plan: Plan) -> list[list[str]]:
    """Outer tuples by pipeline degree and schedule, as their titles say, least bound first: how many, the least bound
    of those in which a plan fits, the best plan that was found."""
    found: dict[tuple[int, str], list[TupleResult]] = {}
    for t in plan.certificate.tuples if plan.certificate else ():
        title = _TITLE.match(t.title)
        if title:
            found.setdefault((int(title[1]), title[2]), []).append(t)
    rows = []
    for (p, schedule), own in found.items():
        bound = min((t.bound_ns for t in own if t.bound_ns is not None), default=None)
        best = min((t.value_ns for t in own if t.value_ns is not None), default=None)
        ratio = "" if best is None else f"{best / plan.predicted.step_time_ns - 1:+.1%}"
        rows.append((math.inf if bound is None else bound, p, [
            str(p), schedule, str(len(own)), "nothing fits" if bound is None else duration(bound / 1e9),
            "-" if best is None else duration(best / 1e9), ratio]))
    return [row for *_, row in sorted(rows)[:MOST_FAMILIES]]


def _strategy(plan: Plan) -> tuple[list[str], list[list[str]], list[int]]:
    """Heads, rows, and which columns are text."""
    heads = ["stage", "layers", "count", "kind", "runs as", "compute ms", "exposed ms", "GiB"]
    groups = layer_groups(plan)
    doubt = any(g.low_confidence for g in groups)
    rows = [[g.where, g.layers, str(g.count), g.kind, g.options.title, f"{g.compute_ns / g.count / 1e6:,.2f}",
             f"{g.exposed_ns / g.count / 1e6:,.2f}", f"{g.memory_bytes / g.count / GIB:.2f}",
             *([g.low_confidence] if doubt else [])] for g in groups]
    return [*heads, *(["low confidence"] if doubt else [])], rows, [0, 1, 3, 4, 8]


def _memory(plan: Plan) -> tuple[list[str], list[list[str]]]:
    names = keys(s.memory_bytes for s in plan.predicted.stages)
    rows = [[str(i), *(f"{s.memory_bytes.get(n, 0) / GIB:.2f}" for n in names), f"{s.peak_bytes / GIB:.2f}",
             f"{s.limit_bytes / GIB:.2f}"] for i, s in enumerate(plan.predicted.stages)]
    return ["stage", *names, "total", "limit"], rows


def _times(plan: Plan) -> tuple[list[str], list[list[str]]]:
    names = keys(s.exposed_ns for s in plan.predicted.stages)
    rows = [[str(i), *(f"{ns / 1e6:,.1f}" for ns in (s.compute_ns, s.optimizer_ns,
                                                     *(s.exposed_ns.get(n, 0) for n in names), s.bubble_ns,
                                                     s.total_ns))] for i, s in enumerate(plan.predicted.stages)]
    return ["stage", "compute", "optimizer", *(f"exposed {n}" for n in names), "bubble", "step"], rows


def _settings(plan: Plan) -> list[tuple[str, Any]]:
    """Everything small that was asked or decided, as (name, value)."""
    found: list[tuple[str, Any]] = []
    for section in ("ask", "mesh", "schedule", "training"):
        value = getattr(plan, section)
        found += [(f"{section}.{name}", getattr(value, name)) for name in type(value).model_fields]
    rows = [(name, ", ".join(map(str, v)) if isinstance(v, tuple) else v) for name, v in found]
    prints = [(f"fingerprint of {name}", getattr(plan.fingerprints, name).sha256[:16])
              for name in type(plan.fingerprints).model_fields]
    return [(name, "-" if v in (None, "") else v) for name, v in rows] + prints
