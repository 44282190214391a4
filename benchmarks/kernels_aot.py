"""Every Triton kernel emitted for the benchmark models, compiled for three GPUs with no GPU, and interpreted.

    python benchmarks/kernels_aot.py                     all models; writes benchmarks/results/kernels_aot-*.json
    python benchmarks/kernels_aot.py --quick             two models, one target
    python benchmarks/kernels_aot.py --model resnet50 --no-write
    python benchmarks/kernels_aot.py --products          only the second part; writes products_aot-*.json

Kernels of inference, forward and backward graphs, in fp32 (interpreted against eager on the model's own activations, by
the rule of the acceptance check) and in bf16 (compiled only; ATen's bf16 matmuls are slow on CPUs). Wanted: 0 spills.
The second part: the products that the GEMM template could take over with the kernel behind them, with each of its
tiles. Which way is faster only a GPU can say.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks._collect import Collected, collect_into, collect_kernels, compare_with_eager  # noqa: E402
from benchmarks._harness import print_table, write_result  # noqa: E402
from benchmarks._models import MODELS, load  # noqa: E402
from benchmarks._products import FoundProduct, ProductCollector, interpret, product_rows  # noqa: E402
from meshwright.codegen.aot import TARGETS, AotReport, compile_ahead  # noqa: E402

QUICK_MODELS = ("minilm", "llama_4x512")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="only this (repeatable)")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this (repeatable)")
    parser.add_argument("--quick", action="store_true", help="two small models, sm_90, fp32")
    parser.add_argument("--products", action="store_true", help="only products with an epilogue")
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--no-interpret", action="store_true", help="compile only")
    parser.add_argument("--no-write", action="store_true", help="print only")
    given = parser.parse_args()
    # bert_base_b8 differs from bert_base_b1 in sizes alone: the same kernels with other launches
    given.model = given.model or (list(QUICK_MODELS) if given.quick else [m for m in MODELS if m != "bert_base_b8"])
    given.target = given.target or (["sm_90"] if given.quick else list(TARGETS))
    given.no_bf16 = given.no_bf16 or given.quick
    return given


def cast_model(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model and its inputs in `dtype`."""
    model, inputs = load(name)
    return model.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def collect(name: str, dtype: torch.dtype, interpret: bool) -> list[Collected]:
    """Kernels of the model's inference graph and of one training step."""
    judge = compare_with_eager if interpret else None
    found: dict[str, Collected] = {}
    for backward in (False, True):
        model, inputs = cast_model(name, dtype)
        for one in collect_kernels(model.train(backward), inputs, backward=backward, judge=judge):
            known = found.setdefault(str(one.kernel.renamed("kernel")), one)
            if known is not one:
                known.launches += one.launches
                known.graphs |= one.graphs
    return list(found.values())


def compile_all(kernels: Sequence[Collected], target: str) -> list[AotReport]:
    """One report per kernel; kernels with the same sizes compile in one go."""
    reports: dict[int, AotReport] = {}
    by_hints: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for i, one in enumerate(kernels):
        by_hints.setdefault(tuple(sorted(one.hints.items())), []).append(i)
    for hints, members in by_hints.items():
        compiled = compile_ahead([kernels[i].kernel for i in members], target, dict(hints))
        reports.update(zip(members, compiled, strict=True))
    return [reports[i] for i in range(len(kernels))]


def kernel_rows(model: str, dtype: str, kernels: Sequence[Collected], targets: Iterable[str]) -> list[dict[str, Any]]:
    compiled = {t: compile_all(kernels, t) for t in targets}
    rows = []
    for i, one in enumerate(kernels):
        costs = {t: {"registers": r[i].registers, "shared_bytes": r[i].shared_bytes, "spills": r[i].spills,
                     "fits": r[i].fits, "num_warps": r[i].num_warps} for t, r in compiled.items()}
        rows.append({"model": model, "dtype": dtype, "kernel": one.kernel.name, "graphs": sorted(one.graphs),
                     "launches": one.launches, "interpreted": one.interpreted, "targets": costs})
    return rows


def summary(rows: Sequence[dict[str, Any]], targets: Sequence[str]) -> list[list[Any]]:
    """One table row per model, dtype and target."""
    table = []
    for model, dtype in dict.fromkeys((r["model"], r["dtype"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["dtype"]) == (model, dtype)]
        ran = [r for r in mine if r["interpreted"]]
        agree = f"{sum(r['interpreted'] == 'agrees' for r in ran)}/{len(ran)}" if ran else None
        for target in targets:
            costs = [r["targets"][target] for r in mine]
            registers = [c["registers"] for c in costs]
            table.append([model, dtype, target, len(mine), int(statistics.median(registers)), max(registers),
                          max(c["shared_bytes"] for c in costs), sum(c["spills"] > 0 for c in costs),
                          sum(not c["fits"] for c in costs), agree])
    return table


def collect_products(name: str, dtype: torch.dtype, interpreted: bool) -> list[FoundProduct]:
    """Products of the model's inference graph and of one training step that could take an epilogue."""
    found: dict[str, FoundProduct] = {}
    for backward in (False, True):
        model, inputs = cast_model(name, dtype)
        for key, one in collect_into(ProductCollector(), model.train(backward), inputs,
                                     backward=backward).products.items():
            known = found.setdefault(key, one)
            if known is not one:
                known.count += one.count
                known.graphs |= one.graphs
    for one in found.values() if interpreted else ():
        one.interpreted = interpret(one)
    return list(found.values())


def main() -> int:
    given = _arguments()
    torch.set_num_threads(2)
    return (0 if given.products else _part(given, "kernels")) | _part(given, "products")


def _part(given: argparse.Namespace, part: str) -> int:
    """One half: a table, a result file; 1 where something spills, is too large or differs."""
    rows: list[dict[str, Any]] = []
    for name in given.model:
        for dtype in ("float32",) if given.no_bf16 else ("float32", "bfloat16"):
            started = time.perf_counter()
            interpreted = dtype == "float32" and not given.no_interpret
            if part == "kernels":
                rows += kernel_rows(name, dtype, collect(name, getattr(torch, dtype), interpreted), given.target)
            else:
                products = collect_products(name, getattr(torch, dtype), interpreted)
                rows += product_rows(name, dtype, products, given.target)
            count = sum((r["model"], r["dtype"]) == (name, dtype) for r in rows)
            print(f"{name} {dtype}: {count} {part}, {time.perf_counter() - started:.0f} s", flush=True)
            if not given.no_write and not given.quick:  # after every model: a run may take long and be cut short
                path = write_result(f"{part}_aot", {"targets": given.target, part: rows})
    columns = ("model", "dtype", "target", part, "registers (median)", "registers (most)", "shared bytes (most)",
               "with spills", "too much shared", "interpreted = eager")
    title = {"kernels": "Triton kernels", "products": "Triton products with an epilogue, every tile"}[part]
    print_table(f"{title}, compiled ahead of time", columns, summary(rows, given.target))
    wrong = [r for r in rows if r["interpreted"] not in ("", "agrees")]
    for r in wrong:
        print(f"differs: {r['model']} {r['kernel']}: {r['interpreted']}")
    spilled = [(r["model"], r["dtype"], f"{r['kernel']} {r.get('tile', '')}".strip(), t, c["spills"], c["shared_bytes"])
               for r in rows for t, c in r["targets"].items() if c["spills"] or not c["fits"]]
    for model, dtype, kernel, target, spills, shared in spilled:
        print(f"spills: {model} {dtype} {kernel} on {target}: {spills} bytes, {shared} bytes of shared memory")
    if not given.no_write and not given.quick:
        print(path)
    return 1 if wrong or spilled else 0


if __name__ == "__main__":
    sys.exit(main())
