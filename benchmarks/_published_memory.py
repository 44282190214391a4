"""Memory of published runs: what stays allocated between steps, and the peak of what torch allocated.

Megatron-LM's functional tests write both down, from the last rank, that is from the last pipeline stage. Rows are left
out by rules on their columns, and where the name of the case says that it uses something no column describes. Runs that
differ in nothing but the software image count once, with the median. Predictions take one number from the measurements:
`OTHER_WORKSPACES_BYTES`. The peak is not predicted for tensor parallelism without sequence parallelism.

`allocator`: by which share of the predicted dynamic memory (peak less static) measured peaks are above predicted ones,
in the median and at nine in ten of all rows with a peak; `refused`: of the runs with times and all fields published,
which did run, how many are said not to fit with such a share as margin. `cost_model/layer_memory.py` chose from these.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks._harness import goal_line, print_table
from benchmarks._published_fit import Fitted
from benchmarks._published_price import price
from benchmarks._published_report import quantile, summary
from benchmarks._published_rows import MEGATRON_CORE, Run, _read, all_rows, gpt
from meshwright.cost_model.layer_memory import ALLOCATOR_SHARE, allocator_bytes

OTHER_WORKSPACES_BYTES = 70e6
"""What else stays allocated in those tests beside cuBLAS' workspace: Transformer Engine's, the loader's batches."""
CUBLAS_WORKSPACE_BYTES = {"a100-80": 8.1e6, "h100-sxm": 33.6e6, "gb200": 33.6e6}  # torch's defaults by architecture
UNDESCRIBED = re.compile("mla|grpo|offload|fsdp|muon|frozen|swiglu|z3|lora|modelopt|mtp|account_for|untie|zp|inference"
                         "|quant|fp8|mxfp8|nvfp4|hybrid|release|rope|cross_entropy|dp_last|defer|memory_speed"
                         "|multi_dist|1node")
GPUS = {"a100": "a100-80", "h100": "h100-sxm", "gb200": "gb200"}
GIB = 2**30


def memory_report(made: Fitted) -> dict[str, Any]:
    """Print errors of static and peak memory and return them."""
    ci, excluded = _ci_rows()
    static, peak, above = [], [], []
    lines = []
    for run, measured_static, measured_peak in ci:
        s, p = _predicted(run, made, last=True)
        static.append(s / measured_static - 1)
        if run.tp == 1 or run.training.sequence_parallel:
            peak.append(p / measured_peak - 1)
            above.append((measured_peak - p) / (p - s))
        lines.append(_line("megatron_ci_golden.csv", run, s, measured_static, p, measured_peak))
    rows = {}
    for row in all_rows()[0]:
        if row.peak_bytes:
            rows.setdefault((row.table, row.run), row)
    published: dict[str, list[float]] = {}
    for row in rows.values():
        s, p = _predicted(row.run, made, last=False)
        above.append(((row.peak_bytes or 1) - p) / (p - s))
        published.setdefault(row.table, []).append(p / (row.peak_bytes or 1) - 1)
        lines.append(_line(row.table, row.run, None, None, p, row.peak_bytes))
    found = {"static megatron_ci_golden.csv": summary(static), "peak megatron_ci_golden.csv": summary(peak),
             **{f"peak {t}": summary(e) for t, e in published.items()}}
    print(f"{len(ci)} configurations of Megatron-LM's tests; left out: "
          + "; ".join(f"{n} {rule}" for rule, n in sorted(excluded.items())))
    print_table("memory: |error|", ("", "n", "median", "90 %", "signed median"),
                [(k, v["n"], v["median"], v["p90"], v["signed_median"]) for k, v in found.items()])
    print(goal_line("static memory: median |error|", statistics.median(map(abs, static)), 0.02, at_least=False))
    peaks = [*peak, *published.get("simumax_b200.csv", [])]
    print(goal_line("peak memory: median |error|", statistics.median(map(abs, peaks)), 0.05, at_least=False))
    margin: dict[str, Any] = {"n": len(above), "median": statistics.median(above), "p90": quantile(above, 0.9)}
    margin["refused"] = _refused(made, (0.0, ALLOCATOR_SHARE, round(margin["p90"], 2)))
    print(f"measured peaks above predicted ones, as shares of dynamic memory: {margin}")
    return {"errors": found, "allocator": margin, "excluded": dict(excluded), "predictions": lines}


def _refused(made: Fitted, shares: Sequence[float]) -> dict[str, int]:
    """Complete runs (`runs`) that don't fit with each share of their dynamic memory on top."""
    runs = list(dict.fromkeys(row.run for row in all_rows()[0] if row.complete))
    found = {"runs": len(runs), **{f"{share:.2f}": 0 for share in shares}}
    for run in runs:
        priced = price(run, made.of(run.gpu), made.software)
        assert priced, "rows without a layer per part are not in the tables"
        for share in shares:
            found[f"{share:.2f}"] += any(
                s.total_bytes + allocator_bytes(s.activation_bytes + s.transient_bytes, share) > s.capacity_bytes
                for s in priced[0].memory)
    return found


def _ci_rows() -> tuple[list[tuple[Run, float, float]], Counter[str]]:
    """(run, static bytes, peak bytes) of each configuration, and what was left out."""
    found: dict[Run, list[tuple[float, float]]] = {}
    excluded: Counter[str] = Counter()
    for r in _read("megatron_ci_golden.csv"):
        rule = _rule(r)
        if rule:
            excluded[rule] += 1
            continue
        number = {k: int(r[k] or 1) for k in ("tp", "pp", "cp")}
        shards, dp = number["tp"] * number["pp"] * number["cp"], int(r["dp_derived"])
        unit = 128 * number["tp"]
        model = gpt(int(r["layers"]), int(r["hidden"]), int(r["heads"]), int(r["seq"]), -(-50257 // unit) * unit, 0.1)
        sharded = r["dist_opt"] == "true"
        gpus = shards * dp
        run = Run(model, int(r["seq"]), GPUS[r["platform"]], 1, gpus, int(r["global_batch"]),
                  replace(MEGATRON_CORE, sequence_parallel=r["sequence_parallel"] == "true"), int(r["microbatch"]),
                  number["tp"], number["pp"], number["cp"], v=int(r["vpp"] or 1), zero=1 if sharded else 0,
                  recompute="full" if r["recompute"] == "full" else "none")
        found.setdefault(run, []).append((float(r["mem_allocated_bytes"]), float(r["mem_max_allocated_bytes"])))
    return [(run, statistics.median(a for a, _ in v), statistics.median(b for _, b in v))
            for run, v in found.items()], excluded


def _rule(r: dict[str, str]) -> str | None:
    """Why a row of the tests is not predicted."""
    family, name = r["case"].split("/")[0], r["case"].split("/")[1]
    if family != "gpt" or int(r["num_experts"] or 0) > 0:
        return "not a dense GPT"
    if UNDESCRIBED.search(name):
        return "the case's name says more than its columns"
    if "_te_" not in name:
        return "attention without a fused kernel"
    if r["platform"] not in GPUS:
        return "platform not stated"
    if r["bf16"] != "true":
        return "fp16"
    needed = ("layers", "hidden", "heads", "seq", "microbatch", "global_batch", "dp_derived", "mem_allocated_bytes",
              "mem_max_allocated_bytes")
    if any(not r[k] for k in needed):
        return "a field is missing"
    gpus = int(r["tp"] or 1) * int(r["pp"] or 1) * int(r["cp"] or 1) * int(r["dp_derived"])
    return None if r["gpus_from_recipe"] in ("", str(gpus)) else "GPUs are not tp · pp · cp · dp"


def _predicted(run: Run, made: Fitted, *, last: bool) -> tuple[float, float]:
    """Static bytes and peak: of the last stage, or of the fullest."""
    priced = price(run, made.of(run.gpu), made.software)
    assert priced, "rows without a layer per part are not in the tables"
    stages = priced[0].memory
    stage = stages[-1] if last else max(stages, key=lambda s: s.total_bytes)
    workspace = OTHER_WORKSPACES_BYTES + CUBLAS_WORKSPACE_BYTES.get(run.gpu, 33.6e6)
    return stage.static_bytes + workspace, stage.total_bytes + workspace


def _line(table: str, run: Run, static: float | None, measured_static: float | None, peak: float,
          measured_peak: float | None) -> dict[str, Any]:
    def gib(value: float | None) -> float | None:
        return None if value is None else round(value / GIB, 3)

    return {"table": table, "gpu": run.gpu, "gpus": run.gpus, "seq": run.seq, "tp": run.tp, "pp": run.pp, "cp": run.cp,
            "v": run.v, "zero": run.zero, "recompute": run.recompute, "static_gib": gib(static),
            "measured_static_gib": gib(measured_static), "peak_gib": gib(peak), "measured_peak_gib": gib(measured_peak)}
