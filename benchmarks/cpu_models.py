"""Speed on the CPU against eager, Inductor, Inductor with freezing and ONNX Runtime; compile times; training steps.

    python benchmarks/cpu_models.py                              everything; writes benchmarks/results/cpu_models-*.json
    python benchmarks/cpu_models.py --model bert_base_b1 --threads 1 --no-peers --no-compile-time --no-training

Each model runs in a process of its own that holds all of its legs. Our default legs are compiled first, with Inductor's
compiler blocked (`_isolation.py` says what that means). See `_harness.py` for how times become ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks._harness import (  # noqa: E402
    RESULTS,
    Leg,
    Timing,
    geometric_mean,
    goal_line,
    hardware_slug,
    interleave,
    print_table,
    speedup,
    write_result,
)
from benchmarks._legs import BACKEND, OURS, PEERS, PROBES, build, output_of, probes  # noqa: E402
from benchmarks._models import MODELS, TRAINING, load  # noqa: E402

GOALS = {"geomean": 1.05, "minimum": 0.97, "backend": 1 / 3, "first_call": 0.6, "training": 1.0}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted({*MODELS, *TRAINING}),
                        help="only this (repeatable); nothing is written")
    parser.add_argument("--threads", action="append", type=int, help="only this thread count (repeatable); default 1 2")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="7 rounds, no compile times, no training")
    parser.add_argument("--no-peers", action="store_true", help="eager is the only peer")
    parser.add_argument("--no-max", action="store_true", help='leave out mode="max"')
    parser.add_argument("--no-inference", action="store_true")
    parser.add_argument("--no-compile-time", action="store_true")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--child", choices=("inference", "training"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.threads = given.threads or [1, 2]
    if given.quick:
        given.rounds, given.no_compile_time, given.no_training = 7, True, True
    return given


# -- in the child: one model ----------------------------------------------------------------------
def _wanted_legs(given: argparse.Namespace) -> list[str]:
    """Ours first: nothing has imported Inductor's compiler yet."""
    names = [*OURS[:2], "eager"]
    names += [] if given.no_peers else [p for p in PEERS if p != "eager"]
    return names if given.no_max else [*names, OURS[2]]


def _agrees(leg: Leg, truth: Any, output: str) -> float:
    """Largest difference to eager over eager's largest value."""
    import torch

    found = output_of(leg.call(), output).float()
    with torch.no_grad():
        return float((found - truth).abs().max() / truth.abs().max())


def _inference(name: str, given: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(max(given.threads))
    model, inputs = load(name)
    missing: dict[str, str] = {}
    legs: list[Leg] = []
    with tempfile.TemporaryDirectory() as folder:
        for leg in _wanted_legs(given):
            try:
                legs.append(build(leg, model, inputs, Path(folder), MODELS[name].output))
            except Exception as error:  # a leg that can't be built is reported, the others are still worth timing
                missing[leg] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
                    :300
                ]
                print(f"    {leg}: MISSING, {missing[leg]}", flush=True)
        with torch.inference_mode():
            truth = output_of(model(**inputs), MODELS[name].output).float()
        errors = {leg.name: _agrees(leg, truth, MODELS[name].output) for leg in legs}
        runs = {threads: _time([*legs, *probes()], threads, given.rounds) for threads in given.threads}
    return {
        "model": name,
        "missing": missing,
        "relative_error": errors,
        "seconds": {t: {n: list(x.seconds) for n, x in found.items()} for t, found in runs.items()},
    }


def _time(legs: list[Leg], threads: int, rounds: int) -> dict[str, Timing]:
    import torch
    import torch._dynamo

    # Every leg compiles the same function, once per number of threads; at the limit of 8 the last would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    torch.set_num_threads(threads)
    for leg in legs:
        leg.prepare(threads)
    return interleave(legs, rounds=rounds)


def _training(name: str, given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks._training import legs

    torch.set_num_threads(max(given.threads))
    built = legs(name, peers=not given.no_peers, extra=not given.no_max)
    runs = {threads: _time(built, threads, given.rounds) for threads in given.threads}
    return {"model": name, "seconds": {t: {n: list(x.seconds) for n, x in found.items()} for t, found in runs.items()}}


def _child(given: argparse.Namespace) -> None:
    work = _inference if given.child == "inference" else _training
    given.out.write_text(json.dumps(work(given.model[0], given)))


# -- in the parent --------------------------------------------------------------------------------
def _run_child(kind: str, name: str, given: argparse.Namespace) -> dict[str, Any]:
    print(f"  {kind}: {name}", flush=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [
            sys.executable,
            __file__,
            "--child",
            kind,
            "--model",
            name,
            "--out",
            out.name,
            "--rounds",
            str(given.rounds),
            *(x for t in given.threads for x in ("--threads", str(t))),
        ]
        command += [f for f, on in (("--no-peers", given.no_peers), ("--no-max", given.no_max)) if on]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "MESHWRIGHT_STRICT": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, check=False, env=env)
        if done.returncode:
            return {"model": name, "failed": f"exit status {done.returncode}", "seconds": {}}
        return dict(json.loads(Path(out.name).read_text()))


def _timings(found: dict[str, Any], threads: int) -> dict[str, Timing]:
    return {n: Timing(n, tuple(s)) for n, s in found["seconds"].get(str(threads), {}).items()}


def _peer_names(timings: dict[str, Timing]) -> list[str]:
    return [p for p in PEERS if p in timings]


def _best_peer(timings: dict[str, Timing], ours: str) -> tuple[str, float]:
    """The peer that is hardest to beat, and how many times faster than it we are."""
    return min(((p, speedup(timings, ours, p)) for p in _peer_names(timings)), key=lambda found: found[1])


def _rows(results: list[dict[str, Any]], threads: list[int]) -> list[list[Any]]:
    rows = []
    for found in results:
        for t in threads:
            timings = _timings(found, t)
            for ours in (o for o in OURS if o in timings):
                best, ratio = _best_peer(timings, ours)
                cells = [speedup(timings, ours, p) if p in timings else None for p in PEERS]
                rows.append([found["model"], t, ours, timings[ours].median_s * 1e3, *cells, best, ratio])
    return rows


def _show_inference(results: list[dict[str, Any]], threads: list[int]) -> dict[str, Any]:
    rows = _rows(results, threads)
    columns = ["model", "threads", "ours", "ms", *(f"× {p}" for p in PEERS), "best peer", "× best"]
    print_table("Speed-up of our legs (above 1: we are faster)", columns, rows)
    summary = {}
    for ours in OURS:
        ratios = [r[-1] for r in rows if r[2] == ours]
        if ratios:
            summary[ours] = {"geomean": geometric_mean(ratios), "minimum": min(ratios), "cases": len(ratios)}
            print(ours, goal_line("geometric mean against the best peer", summary[ours]["geomean"], GOALS["geomean"]))
            print(ours, goal_line("worst case against the best peer", summary[ours]["minimum"], GOALS["minimum"]))
    _show_steadiness(results, threads)
    for found in results:
        for leg, why in found.get("missing", {}).items():
            print(f"{found['model']}: no {leg} leg ({why})")
        if "failed" in found:
            print(f"{found['model']}: FAILED, {found['failed']}")
    return summary


def _show_steadiness(results: list[dict[str, Any]], threads: list[int]) -> None:
    """What the machine's other tenants took: median over fastest time of one product, the same in every round."""
    rows = []
    for found in results:
        for t in threads:
            timings = _timings(found, t)
            if all(probe in timings for probe in PROBES):
                rows.append([found["model"], t, *(timings[p].median_s / min(timings[p].seconds) for p in PROBES)])
    if rows:
        print_table("Steadiness: median over fastest (1: left alone)", ["model", "threads", *PROBES], rows)


def _show_training(results: list[dict[str, Any]], threads: list[int]) -> None:
    rows = _rows(results, threads)
    peers = ["model", "threads", "ours", "ms", *(f"× {p}" for p in PEERS), "best peer", "× best"]
    print_table("Training step: forward, backward, SGD", peers, rows)
    at = peers.index("× inductor")
    ratios = [r[at] for r in rows if r[2] == OURS[0] and r[at] is not None]
    if ratios:
        print(goal_line("worst training step against Inductor", min(ratios), GOALS["training"]))


def _compile_times(names: list[str], threads: int) -> list[dict[str, Any]]:
    from benchmarks._compile_time import in_fresh_processes

    out = []
    for name in names:
        for backend in (BACKEND, "inductor"):
            print(f"  compile time: {name}, {backend}", flush=True)
            try:
                out.append({"model": name, "backend": backend, **in_fresh_processes(name, backend, threads)})
            except RuntimeError as error:
                out.append({"model": name, "backend": backend, "failed": str(error)})
                print(f"    {error}")
    return out


def _show_compile_times(found: list[dict[str, Any]]) -> None:
    by_key = {(f["model"], f["backend"]): f for f in found if "cold" in f}
    rows, shares = [], []
    for name in dict.fromkeys(f["model"] for f in found):
        ours, peer = by_key.get((name, BACKEND)), by_key.get((name, "inductor"))
        if ours is None or peer is None:
            continue
        for state in ("cold", "warm"):
            a, b = ours[state], peer[state]
            shares.append((state, a["backend_s"] / b["backend_s"], a["first_call_s"] / b["first_call_s"]))
            rows.append(
                [
                    name,
                    state,
                    a["backend_s"],
                    b["backend_s"],
                    shares[-1][1],
                    a["first_call_s"],
                    b["first_call_s"],
                    shares[-1][2],
                ]
            )
    print_table(
        "Compile time in seconds",
        ["model", "cache", "backend: ours", "Inductor", "share", "first call: ours", "Inductor", "share"],
        rows,
    )
    for state in ("cold", "warm"):
        inside = geometric_mean([s[1] for s in shares if s[0] == state])
        whole = geometric_mean([s[2] for s in shares if s[0] == state])
        if not math.isnan(inside):
            print(
                goal_line(f"{state}, inside the backend, share of Inductor's", inside, GOALS["backend"], at_least=False)
            )
            print(
                goal_line(f"{state}, whole first call, share of Inductor's", whole, GOALS["first_call"], at_least=False)
            )


def main() -> None:
    given = _arguments()
    if given.child:
        _child(given)
        return
    names = [n for n in MODELS if not given.model or n in given.model]
    training = [n for n in TRAINING if not given.model or n in given.model]
    document: dict[str, Any] = {"threads": given.threads, "rounds": given.rounds, "goals": GOALS}
    if not given.no_inference and names:
        document["inference"] = [_run_child("inference", n, given) for n in names]
        document["summary"] = _show_inference(document["inference"], given.threads)
    if not given.no_training and training:
        document["training"] = [_run_child("training", n, given) for n in training]
        _show_training(document["training"], given.threads)
    if not given.no_compile_time and names:
        document["compile_time"] = _compile_times(names, max(given.threads))
        _show_compile_times(document["compile_time"])
    if not given.no_write and not given.model:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        parts = [part for part in ("inference", "training", "compile_time") if part in document]
        document["measured"] = {part: {"date": now, "rounds": given.rounds} for part in parts}
        print(f"written to {write_result('cpu_models', _with_earlier_parts(document))}")


def _with_earlier_parts(document: dict[str, Any]) -> dict[str, Any]:
    """`document` beside the parts that an earlier run on this hardware measured and this one left out."""
    path = RESULTS / f"cpu_models-{hardware_slug()}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    parts = {k: v for k, v in before.items() if k in ("inference", "training", "compile_time", "summary")}
    return {**parts, **document, "measured": {**before.get("measured", {}), **document["measured"]}}


if __name__ == "__main__":
    main()
