"""The cost model against training runs that others published.

    python benchmarks/costmodel_published.py            leave-one-out fits; writes results/costmodel_published.json
                                                        and cost_model/published-errors.json
    python benchmarks/costmodel_published.py --quick    the committed calibrations in sample; writes nothing
    python benchmarks/costmodel_published.py --refit    fits all rows and rewrites cost_model/calibration-*.json

Data and sources: benchmarks/data/published_runs. A prediction sees a model's configuration, a cluster, a layout and
what is documented about the training stack, never a table's or row's name. What was not published is filled in with
what the model itself finds cheapest among what fits; least and most over all that fits are reported beside it.

Headline: a row is predicted by numbers that were fitted without its source; where the other sources don't have its
chip (or, for a mixture of experts, no experts at all), without its model family; where neither leaves a row of the
chip, with the numbers of the nearest chip. Equal configurations count once, with the median of their measurements.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks._harness import RESULTS, goal_line, print_table, versions  # noqa: E402
from benchmarks._published_fit import DEVICE_PRIORS, Fitted, chip, committed, distinct, fit, write  # noqa: E402
from benchmarks._published_memory import memory_report  # noqa: E402
from benchmarks._published_price import predict  # noqa: E402
from benchmarks._published_report import (  # noqa: E402
    GOALS,
    Judged,
    constant_utilisation_s,
    drift,
    error_class,
    errors_by_chip,
    grouped,
    nearest_row_s,
    ordering,
    summary,
)
from benchmarks._published_rows import Row, all_rows  # noqa: E402
from benchmarks._published_scope import comparisons, ranges, recipes  # noqa: E402
from meshwright.cost_model.error_band import FILE as ERRORS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="committed calibrations, in sample, no result file")
    parser.add_argument("--refit", action="store_true", help="rewrite the committed calibrations")
    given = parser.parse_args()
    rows, excluded = all_rows()
    if given.refit:
        for path in write(fit(rows)):
            print(path.name)
        return 0
    unique = representatives(rows)
    if given.quick:
        made = committed()
        judged = [judge(r, rows, made, "in sample") for r in unique]
    else:
        judged = leave_one_out(unique, rows)
    payload = report(rows, unique, judged, Counter((e.table, e.rule) for e in excluded), committed())
    payload["memory"] = memory_report(committed())
    if not given.quick:
        path = RESULTS / "costmodel_published.json"
        path.write_text(json.dumps({"benchmark": "costmodel_published", "date": datetime.datetime.now(
            datetime.timezone.utc).isoformat(timespec="seconds"), "versions": versions(), **payload}, indent=1) + "\n")
        ERRORS.write_text(json.dumps({"written_by": "benchmarks/costmodel_published.py", "errors": payload["by_chip"],
                                      "range": ranges(rows), "fp8_recipes": recipes(rows)}, indent=1) + "\n")
    return 0


def representatives(rows: Sequence[Row]) -> list[Row]:
    """One row of each configuration, with the median of the measurements."""
    first: dict[Any, Row] = {}
    for row in rows:
        first.setdefault(row.run, row)
    runs, seconds = distinct(rows)
    return [replace(first[run], step_s=s) for run, s in zip(runs, seconds, strict=True)]


# -- protocol -------------------------------------------------------------------------------------
def leave_one_out(unique: Sequence[Row], rows: Sequence[Row]) -> list[Judged]:
    """Each row predicted without its source, or without its model family."""
    fits: dict[tuple[str, str], tuple[Fitted, list[Row]]] = {}
    judged = []
    for row in unique:
        others = [r for r in rows if r.source != row.source]
        key = ("source", row.source)
        if not _inform(others, row):
            strangers = [r for r in rows if r.family != row.family]
            if _inform(strangers, row):
                key, others = ("family", row.family), strangers
        if key not in fits:
            print(f"fitting without {key[0]} {key[1]}: {len(others)} rows", flush=True)
            fits[key] = fit(others), others
        made, known = fits[key]
        nearest = chip(row.run.gpu) not in made.calibrations
        judged.append(judge(row, known, made, "nearest chip" if nearest else f"leave one {key[0]} out"))
    return judged


def _inform(known: Sequence[Row], row: Row) -> bool:
    """Whether rows say something about the chip of another, and about experts where it has them."""
    return any(chip(r.run.gpu) == chip(row.run.gpu) for r in known) and any(r.moe >= row.moe for r in known)


def judge(row: Row, known: Sequence[Row], made: Fitted, protocol: str) -> Judged:
    """Predict a row with fitted numbers; `known` are the rows that the baselines may look at."""
    found = predict(row.run, made.of(row.run.gpu), made.software)
    assert found and row.step_s, "every adapter gives runs that can be priced"
    return Judged(row, row.step_s, found.step_s, found.low_s, found.high_s, protocol,
                  constant_utilisation_s(row, known), nearest_row_s(row, known), found.evaluation.fits)


# -- report ---------------------------------------------------------------------------------------
def report(rows: Sequence[Row], unique: Sequence[Row], judged: Sequence[Judged],
           excluded: Counter[tuple[str, str]], made: Fitted) -> dict[str, Any]:
    """Print everything and return it for the result file."""
    total = len(rows) + sum(excluded.values())
    print(f"{total} published rows with times: {len(rows)} predicted as {len(unique)} configurations "
          f"({len(rows) / total:.0%}); left out:")
    for (table, rule), n in sorted(excluded.items()):
        print(f"  {n:3d}  {table}: {rule}")
    print(f"fitted: {len(DEVICE_PRIORS)} numbers for each of {len(made.calibrations)} chips, "
          f"{made.parameters - len(DEVICE_PRIORS) * len(made.calibrations)} for software")
    classes = _classes(judged)
    for label, key in (("chip and precision", lambda j: f"{chip(j.row.run.gpu)} {j.row.precision}"),
                       ("source", lambda j: j.row.source), ("protocol", lambda j: j.protocol)):
        _table(f"by {label}", {k: summary([j.error for j in v]) for k, v in grouped(judged, key).items()})
    found = {"rows": len(rows), "configurations": len(unique), "excluded": [
        {"table": t, "rule": r, "rows": n} for (t, r), n in sorted(excluded.items())],
        "parameters": made.parameters, "classes": classes, "by_chip": errors_by_chip(judged),
        "ordering": ordering(judged), "comparisons": comparisons(judged), "drift": drift(rows),
        "predictions": [_line(j) for j in judged]}
    print(f"drift of one configuration across releases: {found['drift']}")
    print(f"ordering: {found['ordering']}")
    return found


def _classes(judged: Sequence[Judged]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, group in grouped(judged, lambda j: error_class(j.row)).items():
        out[name] = {**summary([j.error for j in group]),
                     "constant_utilisation": summary([j.utilisation_s / j.measured_s - 1 for j in group]),
                     "nearest_row": summary([j.nearest_s / j.measured_s - 1 for j in group]),
                     "span_median": statistics.median(j.high_s / j.low_s - 1 for j in group)}
    _table("step time: |error|", out)
    _table("baseline: constant utilisation", {k: v["constant_utilisation"] for k, v in out.items()})
    _table("baseline: nearest row", {k: v["nearest_row"] for k, v in out.items()})
    for name, (median, p90) in GOALS.items():
        if name in out:
            print(goal_line(f"{name}: median |error|", out[name]["median"], median, at_least=False))
            print(goal_line(f"{name}: 90th percentile", out[name]["p90"], p90, at_least=False))
    return out


def _table(title: str, found: dict[str, Any]) -> None:
    print_table(title, ("", "n", "median", "90 %", "signed median"),
                [(k, v["n"], v["median"], v["p90"], v["signed_median"]) for k, v in found.items()])


def _line(j: Judged) -> dict[str, Any]:
    r = j.row.run
    return {"table": j.row.table, "family": j.row.family, "precision": j.row.precision, "experts": j.row.moe,
            "gpu": r.gpu, "gpus": r.gpus, "seq": r.seq, "batch": r.global_batch, "micro_batch": r.micro_batch,
            "tp": r.tp, "pp": r.pp, "cp": r.cp, "ep": r.ep, "v": r.v,
            "protocol": j.protocol, "measured_s": round(j.measured_s, 5),
            "predicted_s": round(j.predicted_s, 5), "low_s": round(j.low_s, 5), "high_s": round(j.high_s, 5),
            "error": round(j.error, 4), "fits": j.fits}


if __name__ == "__main__":
    sys.exit(main())
