"""A `Report` for people: a rich table for terminals, plain text, and an HTML page that stands alone."""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..codegen.program_cpp_packing import BehindProduct
    from .report import Note, PassReport, Report

Table = tuple[str, Sequence[str], list[Sequence[str]]]  # title, column heads, rows
WIDTH = 120
_SHOWN_REASONS = 6


def to_rich(report: Report) -> Any:
    """Something `rich.print` shows."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[Any] = [Text(_headline(report), style="bold")]
    for title, heads, rows in tables(report):
        table = RichTable(title=title, title_justify="left", title_style="bold cyan", show_edge=False, pad_edge=False)
        for i, head in enumerate(heads):
            table.add_column(head, overflow="fold", justify="left" if i == 0 or i == len(heads) - 1 else "right")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        parts += [Text(""), table]
    return Group(*parts)


def to_text(report: Report, width: int = WIDTH) -> str:
    """The same tables without colour."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(to_rich(report))
    return out.getvalue().rstrip() + "\n"


def to_html(report: Report) -> str:
    """A page without scripts or links; kernel sources are folded."""
    body = [f"<h1>{_escape(_headline(report))}</h1>"]
    for title, heads, rows in tables(report):
        head = "".join(f"<th>{_escape(h)}</th>" for h in heads)
        lines = "".join("<tr>" + "".join(f"<td>{_escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        body.append(f"<h2>{_escape(title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>")
    if report.kernels:
        body.append("<h2>Sources</h2>")
    for k in report.kernels:
        body.append(f"<details><summary>{_escape(k.name)} ({_escape(k.language)})</summary>"
                    f"<pre>{_escape(k.ir)}</pre><pre>{_escape(k.source)}</pre></details>")
    title = _escape(f"Meshwright: {report.name}")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n")


_STYLE = ("body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}"
          "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem;"
          "text-align:left;vertical-align:top}pre{background:#f6f6f6;padding:.8rem;overflow-x:auto;font-size:13px}"
          "@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}pre{background:#222}"
          "td,th{border-color:#444}}")


def tables(report: Report) -> Iterable[Table]:
    """Title, heads and rows of every table that has rows."""
    found: list[Table] = [
        ("Passes", ("pass", "matched", "rewritten", "refused", "dropped", "predicted gain", "measured gain", "seconds"),
         [_pass_row(p) for p in report.passes.values()]),
        ("Refused and dropped", ("pass", "times", "reason and first place"), _reason_rows(report)),
        ("Graphs", ("graph", "nodes", "kernels", "bytes in kernels", "state", "runs on"), [
            (g.name, str(g.nodes), str(g.kernels), _share(g.kernel_bytes, g.aten_bytes), g.state, g.chosen)
            for g in report.graphs]),
        ("Kernels behind products", ("kernel", "rows x K x columns", "threads", "products", "fastest way",
                                     "fastest behind it"), _behind_rows(report)),
        ("Regions that run eagerly", ("where", "kind", "reason"),
         [(f"{r.file}:{r.line}" if r.line else r.file, r.kind, r.reason) for r in report.regions]),
        ("Compile time", ("phase", "seconds"), [(k, f"{v:.2f}") for k, v in report.phases.items() if v >= 0.005]),
        ("Notes", ("where", "note"), [(n.where, n.reason) for n in report.notes]),
        ("Kernels", ("kernel", "language", "path"), [(k.name, k.language, k.path) for k in report.kernels]),
    ]
    return [t for t in found if t[2]]


def _headline(report: Report) -> str:
    if not report.graphs and not any(report.phases.values()):
        return f"{report.name}: nothing is compiled yet, the first call compiles"
    share = f", {report.coverage:.0%} of the bytes outside GEMM, convolution and attention move in them" \
        if report.coverage is not None else ""
    counts = ", ".join((_count(len(report.graphs), "graph"), _count(len(report.kernels), "emitted kernel")))
    eager = ", ".join((_count(len(report.graph_breaks), "graph break"), _count(len(report.fall_backs), "fall-back")))
    return f"{report.name}: {counts}{share}; {eager}; {sum(report.phases.values()):.2f} s to compile"


def _pass_row(p: PassReport) -> Sequence[str]:
    return (p.name, str(p.matched), str(p.rewritten), str(len(p.refused)), str(len(p.dropped)), _time(p.predicted_s),
            _time(p.measured_s), f"{p.seconds:.2f}")


def _reason_rows(report: Report) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for p in report.passes.values():
        for verdict, notes in (("refused", p.refused), ("dropped", p.dropped)):
            rows += [(f"{p.name} {verdict}", str(n), text) for text, n in _grouped(notes)]
    return rows


def _behind_rows(report: Report) -> list[Sequence[str]]:
    """Equal products in one row, with what product and kernel take together."""
    found: dict[tuple[object, ...], tuple[int, BehindProduct]] = {}
    for b in (b for g in report.graphs for b in g.behind_products):
        key = (b.kernel, b.sizes, b.threads, b.method)
        found[key] = (found[key][0] + 1 if key in found else 1, b)
    rows: list[Sequence[str]] = []
    for count, b in found.values():
        behind = {m: s for m, s in b.seconds.items() if not m.endswith("inside")}
        way = f"{b.method}: {_time(b.seconds[b.method])}" if b.seconds else b.method
        rows.append((b.kernel, " x ".join(map(str, b.sizes)), str(b.threads), str(count), way,
                     _time(min(behind.values(), default=None))))
    return rows


def _grouped(notes: Sequence[Note]) -> list[tuple[str, int]]:
    """The most frequent reasons, each with its first place."""
    counts = Counter(n.reason for n in notes)
    first = {n.reason: n.where for n in reversed(notes)}
    shown = [(f"{r} ({first[r]})" if first[r] else r, c) for r, c in counts.most_common(_SHOWN_REASONS)]
    left = sum(counts.values()) - sum(c for _, c in shown)
    return shown + ([("other reasons: see as_dict()", left)] if left else [])


def _share(part: int, rest: int) -> str:
    return f"{part / (part + rest):.0%}" if part + rest else "-"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    size = abs(seconds)
    unit, factor = ("s", 1.0) if size >= 1 else ("ms", 1e3) if size >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def _escape(text: object) -> str:
    return html.escape(str(text))
