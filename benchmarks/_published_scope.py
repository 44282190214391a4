"""What published runs say besides single errors: how far comparisons of two layouts are off, and what they reach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from benchmarks._published_price import description
from benchmarks._published_report import Judged, quantile
from benchmarks._published_rows import Row, Run
from meshwright.cost_model.error_band import error_class

NUMBERS = ("gpus", "seq", "tp", "pp", "cp", "ep")


def class_of(row: Row) -> str:
    """As `cost_model/error_band.py` has it."""
    return error_class(row.run.training, "mixture of experts" if row.moe else "dense")


def comparisons(judged: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """By class: |predicted ratio / measured ratio - 1| of two layouts of one model on one cluster, with equal batch,
    precision and software. What both have in common cancels."""
    groups: dict[Any, list[Judged]] = defaultdict(list)
    for j in judged:
        r = j.row.run
        groups[r.model, r.seq, r.gpu, r.gpus, r.global_batch, r.training.software, j.row.precision].append(j)
    found: dict[str, list[float]] = defaultdict(list)
    for own in groups.values():
        for a, b in combinations(own, 2):
            ratio = (a.predicted_s / b.predicted_s) / (a.measured_s / b.measured_s)
            found[class_of(a.row)].append(max(ratio, 1 / ratio) - 1)
    return {which: {"configurations": len(e), "median": round(quantile(e, 0.5), 4), "p90": round(quantile(e, 0.9), 4)}
            for which, e in sorted(found.items())}


def ranges(rows: Sequence[Row]) -> dict[str, dict[str, tuple[int, int]]]:
    """By class: the least and the most of what `cost_model/fitted_range.py` compares."""
    values: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        own = values[class_of(row)]
        for name in NUMBERS:
            own[name].append(getattr(row.run, name))
        own["parameters"].append(parameters(row.run))
    return {which: {name: (min(v), max(v)) for name, v in own.items()} for which, own in sorted(values.items())}


def parameters(run: Run) -> int:
    """Of its model."""
    return description(run.model, run.seq, 1).parameter_count


def recipes(rows: Sequence[Row]) -> list[str]:
    """Ways to scale eight-bit products."""
    return sorted({row.run.training.fp8_recipe for row in rows if row.run.training.fp8_recipe})
