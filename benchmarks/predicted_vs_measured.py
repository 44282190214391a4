"""The cost model against the clock, over every fused group of the benchmark models, forward and backward.

    python benchmarks/predicted_vs_measured.py            all models; writes benchmarks/results/predicted_vs_measured-*
    python benchmarks/predicted_vs_measured.py --quick    three models, fewer rounds, no training steps

For each group: the gain `cost_model.op_cost.predict` expects (seconds of its eager operators minus seconds of its
kernel) and the gain measured (the same operators on recorded inputs, the compiled C++ kernel on the same data,
interleaved, median over rounds). Printed: Spearman's rank correlation (goal ≥ 0.8) over distinct structures and over
all groups, and how far predicted times are off. Outputs of the two are compared too; a group that differs is named and
the exit code is 1. Slices are shorter than the system's time slice, so that most run undisturbed on a busy machine.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks._harness import Leg, goal_line, interleave, print_table, write_result  # noqa: E402
from benchmarks._models import MODELS, TRAINING, load, load_training  # noqa: E402
from benchmarks._regions import Region, capture  # noqa: E402
from meshwright.codegen.cpp import compile_kernels  # noqa: E402
from meshwright.cost_model.device import Device  # noqa: E402
from meshwright.cost_model.op_cost import predict  # noqa: E402
from meshwright.cost_model.this_machine import this_machine  # noqa: E402

GOAL = 0.8
QUICK = ("minilm", "llama_4x512", "resnet50")


@dataclass(frozen=True)
class Row:
    """One structure: predicted and measured seconds of its operators and of its kernel."""

    graph: str
    ops: str
    count: int
    predicted_before_s: float
    predicted_after_s: float
    measured_before_s: float
    measured_after_s: float
    measured_gain_s: float
    agrees: bool

    @property
    def predicted_gain_s(self) -> float:
        return self.predicted_before_s - self.predicted_after_s


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="only this (repeatable)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--slice", type=float, default=0.001, help="seconds a leg runs in one round")
    parser.add_argument("--quick", action="store_true", help=f"15 rounds, only {', '.join(QUICK)}, no training graphs")
    parser.add_argument("--worst", type=int, default=12, help="how many of the worst predictions to print")
    parser.add_argument("--no-write", action="store_true", help="print only")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.model = 15, given.model or list(QUICK)
    given.model = given.model or list(MODELS)
    return given


# -- capture --------------------------------------------------------------------------------------
def _inference_and_gradient(name: str) -> list[Region]:
    """Groups of the inference graph, and of the forward and backward graphs of a squared-mean loss."""
    model, inputs = load(name)

    def infer(backend: Callable[..., Any]) -> None:
        with torch.no_grad():
            torch.compile(model, backend=backend, dynamic=False)(**inputs)

    def differentiate(backend: Callable[..., Any]) -> None:
        out = torch.compile(model, backend=backend, dynamic=False)(**inputs)
        getattr(out, MODELS[name].output).square().mean().backward()

    return capture(infer, name) + capture(differentiate, name)


def _training(name: str) -> list[Region]:
    """Groups of a training step's graphs: dropout, loss, backward."""
    model, inputs = load_training(name)

    def step(backend: Callable[..., Any]) -> None:
        torch.compile(model, backend=backend, dynamic=False)(**inputs).loss.backward()

    return capture(step, f"{name} training")


# -- measure --------------------------------------------------------------------------------------
def _measure(regions: Sequence[Region], device: Device, rounds: int, slice_s: float) -> list[Row]:
    kernels = [r.group.built.kernel.renamed(f"region_{i}") for i, r in enumerate(regions)]
    compiled = compile_kernels(kernels)
    with torch.inference_mode():
        return [_measure_one(r, compiled[k.name], device, rounds, slice_s)
                for r, k in zip(regions, kernels, strict=True)]


def _measure_one(region: Region, kernel: Any, device: Device, rounds: int, slice_s: float) -> Row:
    launch, outs = region.launcher(kernel)
    launch()
    noise = 1e-5 * max((_scale(t) for t in region.kernel_inputs), default=0.0)
    agrees = all(_close(o, e, noise) for o, e in zip(outs, region.eager(*region.eager_inputs), strict=True))
    times = interleave([Leg("eager", lambda: region.eager(*region.eager_inputs)), Leg("kernel", launch)],
                       rounds=rounds, warmup=2, slice_s=slice_s, limit_s=5.0)
    eager, ours = times["eager"], times["kernel"]
    gain_s = statistics.median(e - k for e, k in zip(eager.seconds, ours.seconds, strict=True))
    before_s, after_s = predict(region.before, region.after, device)
    return Row(region.graph, region.ops, region.count, before_s, after_s, eager.median_s, ours.median_s, gain_s, agrees)


def _close(found: torch.Tensor, expected: torch.Tensor, noise: float) -> bool:
    """Equal within rounding, measured against the largest value of the result or, for sums that cancel to nothing (the
    gradient of a loss that a norm makes constant), against the inputs: `noise`. A check of the benchmark, not of the
    code generator: the tests hold that to float64."""
    if not expected.dtype.is_floating_point:
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-4, atol=max(1e-5 * _scale(expected), noise), equal_nan=True)


def _scale(t: torch.Tensor) -> float:
    """The largest magnitude that is no mask value."""
    if not t.dtype.is_floating_point or not t.numel():
        return 0.0
    magnitude = t.abs().nan_to_num(0.0, 0.0, 0.0)
    return float(magnitude.where(magnitude < 1e6, 0.0).max())


# -- compare --------------------------------------------------------------------------------------
def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; ties get their mean rank. NaN when either side is constant or shorter than two."""
    return _pearson(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    out, i = [0.0] * len(values), 0
    while i < len(order):
        j = i
        while j < len(order) and values[order[j]] == values[order[i]]:
            j += 1
        for k in order[i:j]:
            out[k] = (i + j - 1) / 2
        i = j
    return out


def _pearson(a: Sequence[float], b: Sequence[float]) -> float:
    try:
        return statistics.correlation(a, b)
    except statistics.StatisticsError:
        return math.nan


def _rank_correlation(rows: Sequence[Row], repeat: bool = False) -> float:
    many = [r for r in rows for _ in range(r.count if repeat else 1)]
    return spearman([r.predicted_gain_s for r in many], [r.measured_gain_s for r in many])


def _off(rows: Sequence[Row], which: str) -> float:
    """Median factor by which predicted and measured seconds differ (1 is perfect)."""
    pairs = [(getattr(r, f"predicted_{which}_s"), getattr(r, f"measured_{which}_s")) for r in rows]
    return math.exp(statistics.median(abs(math.log(p / m)) for p, m in pairs)) if pairs else math.nan


def _summary(name: str, rows: Sequence[Row]) -> list[Any]:
    return [name, len(rows), sum(r.count for r in rows), _rank_correlation(rows), _rank_correlation(rows, True),
            _off(rows, "before"), _off(rows, "after"), sum(r.predicted_gain_s * r.count for r in rows) * 1e3,
            sum(r.measured_gain_s * r.count for r in rows) * 1e3]


COLUMNS = ("model", "structures", "groups", "rank corr.", "over groups", "eager off ×", "kernel off ×",
           "predicted gain ms", "measured gain ms")


def _print_worst(rows: Sequence[Row], count: int) -> None:
    def factor(r: Row) -> float:
        return max(abs(math.log(r.predicted_before_s / r.measured_before_s)),
                   abs(math.log(r.predicted_after_s / r.measured_after_s)))

    worst = sorted(rows, key=factor, reverse=True)[:count]
    print_table("Worst predictions (µs)", ("graph", "eager pred.", "meas.", "kernel pred.", "meas.", "operators"),
                [(r.graph, r.predicted_before_s * 1e6, r.measured_before_s * 1e6, r.predicted_after_s * 1e6,
                  r.measured_after_s * 1e6, r.ops[:60]) for r in worst])


def main() -> int:
    given = _arguments()
    torch.set_num_threads(given.threads)
    device = this_machine(given.threads)
    _settle_allocator()
    rows: list[Row] = []
    sources = [(n, lambda n=n: _inference_and_gradient(n)) for n in given.model]
    if not given.quick:
        sources += [(f"{n} training", lambda n=n: _training(n)) for n in TRAINING]
    for name, regions in sources:
        started = time.perf_counter()
        found = _measure(regions(), device, given.rounds, given.slice)
        rows += found
        print(f"{name}: {len(found)} structures, {time.perf_counter() - started:.0f} s", flush=True)
    return _report(given, device, rows)


def _settle_allocator() -> None:
    """Free one block just below glibc's largest mmap threshold, as a process that has run a model did: until then every
    operator's result of more than 128 KB is fresh memory, full of page faults."""
    torch.empty(31 << 20, dtype=torch.uint8)


def _report(given: argparse.Namespace, device: Device, rows: Sequence[Row]) -> int:
    models = list(dict.fromkeys(r.graph.rpartition(" ")[0] for r in rows))
    table = [_summary(m, [r for r in rows if r.graph.rpartition(" ")[0] == m]) for m in models]
    table.append(_summary("all", rows))
    print_table(f"Predicted against measured, {given.threads} thread(s)", COLUMNS, table)
    if given.worst:
        _print_worst(rows, given.worst)
    wrong = [r for r in rows if not r.agrees]
    for r in wrong:
        print(f"differs from eager: {r.graph}: {r.ops}")
    correlation = _rank_correlation(rows)
    print(goal_line("rank correlation of predicted and measured gain", correlation, GOAL))
    if not given.no_write:
        path = write_result("predicted_vs_measured" + ("_quick" if given.quick else ""), {
            "threads": given.threads, "rounds": given.rounds, "load_average": os.getloadavg(),
            "rank_correlation": correlation, "goal": GOAL,
            "device": device.as_dict(), "columns": COLUMNS, "table": table,
            "rows": [{k: round(v, 9) if isinstance(v, float) else v for k, v in vars(r).items()} for r in rows]})
        print(f"written: {path.relative_to(ROOT)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
