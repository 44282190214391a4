"""How long the planner takes: against layers, GPUs, memory, and for two published sizes.

    python benchmarks/planner_scale.py            every case, results in benchmarks/results/planner_scale.json
    python benchmarks/planner_scale.py --quick    the smaller half

Each case runs in a process of its own, which captures the model first (kept in the cache directory) and then searches.
`search_s` is wall time, `search_cpu_s` the process's CPU time, `peak_mib` its largest memory. `command` rows time the
whole command line: from an empty cache directory, and again. `slowdown` says how much slower than usual the machine was
while it ran: the wall time over the CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from meshwright.compiler.planner.plan_model import Planner, Request

RESULTS = Path(__file__).parent / "results" / "planner_scale.json"
PUBLISHED = [("llama3-405b", "2048x8 h100-sxm", 8192, 2048), ("deepseek-v3", "256x8 h100-sxm", 4096, 15360)]
GPUS = [("llama3-70b", f"{nodes}x8 h100-sxm", 8192, 8 * nodes) for nodes in (1, 8, 64, 512, 4096, 12288)]
LAYERS = [("gpt:24", "16x8 h100-sxm", 2048, 512), ("gpt:96", "16x8 h100-sxm", 2048, 512),
          ("gpt:250", "16x8 h100-sxm", 2048, 512), ("gpt:500", "16x8 h100-sxm", 2048, 512),
          ("gpt:1000", "16x8 h100-sxm", 2048, 512)]
BUDGETS = [("llama3-70b", f"8x8 {device}", 8192, 256) for device in ("a100-40", "a100-80", "h200", "b200")]
COMMANDS = [("llama3-8b", "8x8 h100-sxm", 8192, 1024), *PUBLISHED]
LIMIT_S = 900.0


def one(model: str, cluster: str, seq: int, batch: int) -> dict[str, Any]:
    """Capture and plan in this process."""
    started = time.perf_counter()
    planner = Planner(Request(model, cluster, seq, batch))
    for samples in (1, 2, 4):
        planner.model.at(samples)
    captured, cpu = time.perf_counter(), time.process_time()
    searched = planner.search()
    done, used = time.perf_counter(), time.process_time()
    plan = planner.write(searched) if hasattr(searched.result, "plan") else None
    states = [t.status for t in searched.result.tuples]
    return {"capture_s": captured - started, "search_s": done - captured, "search_cpu_s": used - cpu,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "gap": plan.gap if plan else None,
            "title": plan.title if plan else None, "step_time_s": plan.predicted.step_time_s if plan else None,
            "mfu": plan.predicted.mfu if plan else None, "layers": len(planner.space.order),
            "outer_tuples": len(states), "searched": sum(s in ("solved", "searched") for s in states),
            "options_priced": planner.pricer.priced, "options_dominated": planner.pricer.dominated}


def config(name: str, folder: Path) -> str:
    """`gpt:96` is a GPT of width 2048 with that many layers, as a configuration file."""
    if not name.startswith("gpt:"):
        return name
    own = folder / name.replace(":", "-")
    own.mkdir(exist_ok=True)
    (own / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "n_layer": int(name[4:]), "n_embd": 2048, "n_head": 16, "n_positions": 2048,
        "vocab_size": 50257}))
    return str(own)


def measured(case: tuple[str, str, int, int], folder: Path) -> dict[str, Any]:
    """`one` in a process of its own."""
    model, cluster, seq, batch = case
    done = subprocess.run([sys.executable, __file__, "--one", config(model, folder), cluster, str(seq), str(batch)],
                          capture_output=True, text=True, timeout=LIMIT_S, check=False)
    row: dict[str, Any] = {"model": model, "cluster": cluster, "seq": seq, "global_batch": batch}
    if done.returncode:
        return {**row, "error": done.stderr.strip().splitlines()[-1][:300]}
    return {**row, **json.loads(done.stdout)}


def command(case: tuple[str, str, int, int]) -> dict[str, Any]:
    """The command line, from an empty cache directory and again."""
    model, cluster, seq, batch = case
    words = [sys.executable, "-m", "meshwright", "plan", model, "--cluster", cluster, "--seq", str(seq),
             "--global-batch", str(batch), "--json"]
    row: dict[str, Any] = {"model": model, "cluster": cluster, "seq": seq, "global_batch": batch}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first", "again"):
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(words, capture_output=True, check=True, timeout=LIMIT_S,
                           env={**os.environ, "MESHWRIGHT_CACHE_DIR": cache})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            row[f"{name}_s"] = time.perf_counter() - started
            row[f"{name}_cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return row


def show(row: dict[str, Any]) -> None:
    """One line."""
    if "error" in row:
        print(f"{row['model']:12} {row['cluster']:18} {row['error']}", flush=True)
    elif "first_s" in row:
        print(f"{row['model']:12} {row['cluster']:18} command {row['first_s']:.1f} s (CPU {row['first_cpu_s']:.1f}), "
              f"again {row['again_s']:.1f} s (CPU {row['again_cpu_s']:.1f})", flush=True)
    else:
        gap = "-" if row["gap"] is None else f"{row['gap']:.2%}"
        print(f"{row['model']:12} {row['cluster']:18} {row['layers']:5} layers, search {row['search_s']:6.2f} s (CPU "
              f"{row['search_cpu_s']:6.2f}), {row['peak_mib']:.0f} MiB, gap {gap}, {row['outer_tuples']} tuples, "
              f"{row['title']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "CLUSTER", "SEQ", "BATCH"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.one:
        model, cluster, seq, batch = asked.one
        print(json.dumps(one(model, cluster, int(seq), int(batch))))
        return
    cases = [*PUBLISHED, *(LAYERS[:2] if asked.quick else LAYERS), *(GPUS[:3] if asked.quick else GPUS),
             *([] if asked.quick else BUDGETS)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            rows.append(measured(case, Path(folder)))
            show(rows[-1])
        commands = [command(case) for case in (COMMANDS[:1] if asked.quick else COMMANDS)]
    for row in commands:
        show(row)
    asked.output.write_text(json.dumps({"quick": asked.quick, "cpus": os.cpu_count(), "load": os.getloadavg(),
                                        "searches": rows, "commands": commands}, indent=1) + "\n")


if __name__ == "__main__":
    main()
