"""What is said about predictions of published runs: errors by class, baselines, ordering, drift."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

from benchmarks._published_fit import chip
from benchmarks._published_price import description
from benchmarks._published_rows import Row, Run
from meshwright.cost_model import error_band
from meshwright.cost_model.op_price import FP8
from meshwright.cost_model.presets import PRESETS


@dataclass(frozen=True)
class Judged:
    """A distinct configuration: what was predicted for it, by which protocol, and what the baselines say."""

    row: Row
    measured_s: float
    predicted_s: float
    low_s: float
    high_s: float
    protocol: str
    utilisation_s: float
    nearest_s: float
    fits: bool

    @property
    def error(self) -> float:
        """Signed and relative."""
        return self.predicted_s / self.measured_s - 1


def error_class(row: Row) -> str:
    """The class that a goal is set for."""
    if row.moe or row.precision != "bf16":
        return "fp8 and MoE"
    return "dense bf16, all fields published" if row.complete else "dense bf16, fields missing"


GOALS = {"dense bf16, all fields published": (0.05, 0.15), "fp8 and MoE": (0.10, 0.25)}


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value with at least `share` of all at or below it."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(errors: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile of |error|, and the median of the signed error."""
    return {"n": len(errors), "median": statistics.median(map(abs, errors)),
            "p90": quantile(map(abs, errors), 0.9), "signed_median": statistics.median(errors)}


def errors_by_chip(judged: Sequence[Judged]) -> dict[str, dict[str, dict[str, float]]]:
    """What `cost_model/error_band.py` reads: by chip, and over all of them, and by class of run."""
    def kind(j: Judged) -> str:
        return error_band.error_class(j.row.run.training, "mixture of experts" if j.row.moe else "dense")

    out: dict[str, dict[str, dict[str, float]]] = {}
    for where, of_chip in (*grouped(judged, lambda j: chip(j.row.run.gpu)).items(), (error_band.EVERY_CHIP, judged)):
        for which, own in grouped(of_chip, kind).items():
            found = summary([j.error for j in own])
            out.setdefault(where, {})[which] = {"configurations": found["n"], "median": round(found["median"], 4),
                                                "p90": round(found["p90"], 4)}
    return out


# -- baselines ------------------------------------------------------------------------------------
@lru_cache(maxsize=4096)
def model_flops(run: Run) -> float:
    """FLOPs of a step without recomputation, masked blocks of causal attention left out."""
    model = description(run.model, run.seq, 1)
    kinds = [model.kinds[k] for k in model.order]
    per_sample = sum(k.flops_forward + k.flops_backward - 0.5 * (k.causal_flops_forward + k.causal_flops_backward)
                     for k in kinds)
    return per_sample * run.global_batch


def utilisation(row: Row, seconds: float) -> float:
    """Model FLOP/s over the peak of the precision."""
    device = PRESETS[row.run.gpu]
    peak = device.peak(FP8 if row.run.training.fp8_recipe else row.run.training.compute)
    return model_flops(row.run) / (seconds * peak * row.run.gpus)


def constant_utilisation_s(row: Row, known: Sequence[Row]) -> float:
    """Baseline: the median utilisation of the same chip and precision, else of the same precision."""
    alike = [r for r in known if r.precision == row.precision and chip(r.run.gpu) == chip(row.run.gpu)]
    return _at_utilisation(row, statistics.median(
        utilisation(r, r.step_s or 1.0) for r in alike or [r for r in known if r.precision == row.precision] or known))


def nearest_row_s(row: Row, known: Sequence[Row]) -> float:
    """Baseline: the utilisation of the most similar row in the logarithms of size, sequence, GPUs and batch."""
    def distance(r: Row) -> tuple[bool, bool, float]:
        return (r.precision != row.precision, chip(r.run.gpu) != chip(row.run.gpu),
                sum((math.log(a) - math.log(b)) ** 2 for a, b in zip(_features(row), _features(r), strict=True)))

    best = min(known, key=distance)
    return _at_utilisation(row, utilisation(best, best.step_s or 1.0))


def _at_utilisation(row: Row, share: float) -> float:
    return utilisation(row, 1.0) / share


def _features(row: Row) -> tuple[float, ...]:
    run = row.run
    return (model_flops(run) / run.global_batch / run.seq, run.seq, run.gpus, run.global_batch * run.seq)


# -- ordering and drift ---------------------------------------------------------------------------
def ordering(judged: Sequence[Judged], differ: float = 0.03) -> dict[str, Any]:
    """Among pairs of one model, cluster, batch and software whose times differ by more than `differ`: how often the one
    predicted faster is faster; and by how much the predicted best of a group is slower than its best."""
    groups: dict[Any, list[Judged]] = defaultdict(list)
    for j in judged:
        r = j.row.run
        groups[r.model, r.seq, r.gpu, r.gpus, r.global_batch, r.training.software, j.row.precision].append(j)
    pairs = [(a, b) for g in groups.values() for a, b in combinations(g, 2)
             if abs(a.measured_s / b.measured_s - 1) > differ]
    right = sum((a.measured_s < b.measured_s) == (a.predicted_s < b.predicted_s) for a, b in pairs)
    choices = [g for g in groups.values() if len(g) > 1]
    regrets = [min(g, key=lambda j: j.predicted_s).measured_s / min(j.measured_s for j in g) - 1 for g in choices]
    return {"pairs": len(pairs), "right": right, "share_right": right / len(pairs) if pairs else None,
            "groups": len(choices), "top1_regret_mean": statistics.mean(regrets) if regrets else None,
            "top1_regret_max": max(regrets, default=None)}


def drift(rows: Sequence[Row]) -> dict[str, float]:
    """How far measurements of one configuration lie apart across releases: no model can be better than half of it."""
    found: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        if row.step_s:
            key = (row.run.model, row.run.seq, row.run.gpu, row.run.gpus, row.run.global_batch, row.run.micro_batch,
                   row.run.tp, row.run.pp, row.run.cp, row.run.ep, row.run.v, row.run.zero,
                   row.run.training.fp8_recipe, row.run.training.async_tp, row.table.split("_")[0])
            found[key].append(row.step_s)
    spread = [max(v) / min(v) - 1 for v in found.values() if len(v) > 1]
    return {"configurations": len(spread), "median": statistics.median(spread), "p90": quantile(spread, 0.9)}


def grouped(judged: Sequence[Judged], key: Callable[[Judged], str]) -> Mapping[str, list[Judged]]:
    """Judged rows by a label, sorted by it."""
    out: dict[str, list[Judged]] = defaultdict(list)
    for j in judged:
        out[key(j)].append(j)
    return dict(sorted(out.items()))
