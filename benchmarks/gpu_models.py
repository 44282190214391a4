"""Speed on a GPU in bf16 against eager, Inductor and its max-autotune; memory-bound kernels against copy bandwidth.

    python benchmarks/gpu_models.py                  all models; writes benchmarks/results/gpu_models-*.json
    python benchmarks/gpu_models.py --model gpt2_small --no-kernels --no-write

Every call waits for the device. Legs of a model are interleaved and compared by the median ratio within a round. For
products with a kernel behind them, or of one tensor, the choice made at the first call is printed with the times that
decided it. A kernel's bandwidth is the bytes of the tensors it reads and writes over its time, caches flushed, as a
fraction of what a copy of 1 GiB reaches on the same device (goal: at least 0.9). Exits with one sentence where there is
no GPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks._collect import collect_kernels  # noqa: E402
from benchmarks._harness import (  # noqa: E402
    Leg,
    geometric_mean,
    goal_line,
    interleave,
    print_table,
    speedup,
    write_result,
)
from benchmarks._models import MODELS, load  # noqa: E402
from meshwright.codegen.group import Group  # noqa: E402
from meshwright.compiler.acceptance import Verdict, empty_outputs  # noqa: E402

BANDWIDTH_GOAL = 0.9
SMALL_BYTES = 8 << 20  # a kernel that moves less is bound by its launch, not by memory
COPY_BYTES = 1 << 30
PEERS = ("eager", "inductor", "max-autotune")


def main() -> int:
    given = _arguments()
    if not torch.cuda.is_available():
        print("gpu_models needs a GPU and a torch built for it (CUDA or ROCm); there is none here, so nothing was run.")
        return 2
    device = torch.device(given.device)
    torch.cuda.set_device(device)
    models = [] if given.no_models else [time_model(name, device, given.rounds) for name in given.model]
    copy_speed = copy_bandwidth(device)
    kernels = [] if given.no_kernels else [k for name in given.model for k in kernel_rows(name, device, copy_speed)]
    report(models, kernels, copy_speed)
    if not given.no_write:
        payload = {"dtype": "bfloat16", "models": models, "kernels": kernels, "copy_bytes_per_s": copy_speed}
        print(write_result("gpu_models", payload))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="only this (repeatable)")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-models", action="store_true", help="kernels only")
    parser.add_argument("--no-kernels", action="store_true", help="models only")
    parser.add_argument("--no-write", action="store_true", help="print only")
    given = parser.parse_args()
    given.model = given.model or list(MODELS)
    return given


# -- models ---------------------------------------------------------------------------------------
def model_on(name: str, device: torch.device) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model in bf16 on `device`, with its inputs."""
    model, inputs = load(name)
    moved = {k: v.to(device, torch.bfloat16 if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    return model.to(device, torch.bfloat16), moved


def time_model(name: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds per call of every leg and our speed-up over each peer; a leg that fails is named with its reason."""
    model, inputs = model_on(name, device)
    legs, failed, products = [], {}, []
    for leg_name, make in _makers(model, inputs).items():
        try:
            made = make()
            legs.append(_leg(leg_name, made, inputs, device))
            products += product_choices(made) if leg_name == "meshwright" else []
        except Exception as error:  # a peer may not support a model; its absence is reported
            failed[leg_name] = f"{type(error).__name__}: {error}"[:300]
    timings = interleave(legs, rounds=rounds)
    ours = {p: speedup(timings, "meshwright", p) for p in PEERS if "meshwright" in timings and p in timings}
    seconds = {n: t.median_s for n, t in timings.items()}
    return {"model": name, "seconds": seconds, "speedup_over": ours, "failed": failed, "products": products}


def product_choices(compiled: Any) -> list[dict[str, Any]]:
    """What was chosen for products that may take an epilogue or share a stacked weight, and the times behind it."""
    found = compiled.report.passes["fuse"].candidates
    return [{"product": c.region, "verdict": c.verdict, "reason": c.reason, "count": c.count,
             "library_s": c.measured_before_s, "rewritten_s": c.measured_after_s} for c in found if "→" in c.region]


def _makers(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, Callable[[], Callable[..., Any]]]:
    import meshwright as mw

    def compiled() -> Callable[..., Any]:
        with torch.inference_mode():
            return mw.compile(copy.copy(model), dict(inputs))

    return {
        "eager": lambda: model,
        "meshwright": compiled,
        "inductor": lambda: torch.compile(copy.copy(model), backend="inductor"),
        "max-autotune": lambda: torch.compile(copy.copy(model), backend="inductor", mode="max-autotune"),
    }


def _leg(name: str, function: Callable[..., Any], inputs: Mapping[str, torch.Tensor], device: torch.device) -> Leg:
    def call() -> Any:
        with torch.inference_mode():
            result = function(**inputs)
        torch.cuda.synchronize(device)
        return result

    for _ in range(4):  # compile, warm up, capture
        call()
    return Leg(name, call)


# -- kernels --------------------------------------------------------------------------------------
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second by a large device-to-device copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / device_seconds(lambda: target.copy_(source), device, flush=False)


def device_seconds(run: Callable[[], Any], device: torch.device, *, repeats: int = 20, flush: bool = True) -> float:
    """Median seconds of `run` by device events; `flush` empties the caches in between by writing 256 MiB."""
    filler = torch.empty(256 << 20, dtype=torch.uint8, device=device) if flush else None
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        if filler is not None:
            filler.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@dataclass
class Bandwidth:
    """Looks at each kernel once, with the values of its inputs at hand, and times it."""

    kernels: Mapping[str, Any]
    names: Mapping[str, str]
    symbols: Mapping[str, int]
    rows: list[dict[str, Any]]
    model: str

    def __post_init__(self) -> None:
        self.verdicts: dict[str, Verdict] = {}

    def judge(self, group: Group, env: Mapping[Any, Any], eager: Sequence[torch.Tensor]) -> None:
        inputs = [env[n] for n in group.built.inputs]
        outputs = empty_outputs(group.built.outputs, lambda e: e.evaluate(self.symbols), eager[0].device)
        sizes = [e.evaluate(self.symbols) for e in group.built.sizes]
        name = self.names[group.built.key]
        kernel = self.kernels[name]
        buffers = [*inputs, *outputs]
        seconds = device_seconds(lambda: kernel(buffers, sizes), eager[0].device)
        self.rows.append({"model": self.model, "kernel": name, "seconds": seconds,
                          "bytes": sum(map(moved_bytes, buffers)), "reduces": bool(group.built.kernel.reduce)})


def moved_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements of a tensor (an expanded dimension is read once)."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return torch.Size(sizes).numel() * tensor.element_size()


def kernel_rows(name: str, device: torch.device, copy_speed: float) -> list[dict[str, Any]]:
    """One row per kernel of the model's inference and training graphs, with its fraction of the copy bandwidth."""
    rows: list[dict[str, Any]] = []
    for backward in (False, True):
        model, inputs = model_on(name, device)
        collect_kernels(model.train(backward), inputs, backward=backward,
                        judge=lambda kernels, names, symbols: Bandwidth(kernels, names, symbols, rows, name))
    for row in rows:
        row["fraction_of_copy"] = row["bytes"] / row["seconds"] / copy_speed
        row["memory_bound"] = row["bytes"] >= SMALL_BYTES
    return rows


# -- report ---------------------------------------------------------------------------------------
def report(models: Sequence[dict[str, Any]], kernels: Sequence[dict[str, Any]], copy_speed: float) -> None:
    table = [[m["model"], *[m["seconds"].get(n) for n in ("meshwright", *PEERS)],
              *[m["speedup_over"].get(p) for p in PEERS]] for m in models]
    columns = ("model", "meshwright", *PEERS, *[f"over {p}" for p in PEERS])
    print_table("bf16, seconds per call and our speed-up", columns, table)
    for m in models:
        for leg, reason in m["failed"].items():
            print(f"no {leg} leg for {m['model']}: {reason}")
    print_table("products: the library against an epilogue or stacked weights, microseconds",
                ("model", "product", "count", "library", "rewritten", "verdict", "reason"),
                [[m["model"], p["product"], p["count"], *(s and s * 1e6 for s in (p["library_s"], p["rewritten_s"])),
                  p["verdict"], p["reason"]] for m in models for p in m["products"]])
    for peer in PEERS:
        found = [m["speedup_over"][peer] for m in models if peer in m["speedup_over"]]
        if found:
            print(f"geometric mean over {peer}: {geometric_mean(found):.3f} ({len(found)} models)")
    bound = sorted((k for k in kernels if k["memory_bound"]), key=lambda k: k["fraction_of_copy"])
    print_table(f"memory-bound kernels (a copy reaches {copy_speed / 1e9:.0f} GB/s)",
                ("model", "kernel", "MB", "microseconds", "fraction of copy"),
                [[k["model"], k["kernel"], k["bytes"] / 1e6, k["seconds"] * 1e6, k["fraction_of_copy"]] for k in bound])
    if bound:
        print(goal_line("median fraction of copy bandwidth",
                        statistics.median(k["fraction_of_copy"] for k in bound), BANDWIDTH_GOAL))


if __name__ == "__main__":
    sys.exit(main())
