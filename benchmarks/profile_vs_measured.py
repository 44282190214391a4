"""What `meshwright profile` is worth on this machine: predicted against measured training steps of small real models.

    python benchmarks/profile_vs_measured.py            writes benchmarks/results/profile_vs_measured-*.json
    python benchmarks/profile_vs_measured.py --quick    a quick profile, fewer steps; prints only

Profiles the CPU with two processes, then measures fp32 training steps (forward, loss, backward, fused AdamW) in eager
torch: on one process, and on two with DistributedDataParallel over gloo, one thread each. The same steps are priced by
the planner's cost model under the profile, and under the preset (what `"1x2 cpu"` is without one). No number is fitted
to any of these steps. Dropout is 0, and attention is torch's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks._harness import print_table, write_result  # noqa: E402
from meshwright.compiler.plan_price import fixed  # noqa: E402
from meshwright.compiler.planner.captured import ModelAtAnyBatch  # noqa: E402
from meshwright.compiler.planner.foreign import Layout  # noqa: E402
from meshwright.compiler.planner.meta_model import build  # noqa: E402
from meshwright.compiler.planner.plan_model import Planner, Request  # noqa: E402
from meshwright.compiler.profile_command import measure_profile  # noqa: E402
from meshwright.cost_model.strategy import Training  # noqa: E402
from meshwright.runtime.plan import Plan  # noqa: E402

FP32 = Training(parameter_bytes=4, gradient_bytes=4, master_bytes=0, reduce_bytes=4, gather_bytes=4, compute="float32",
                fusion="none")
CONFIGS: dict[str, dict[str, Any]] = {
    "minilm": {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
               "intermediate_size": 1536, "vocab_size": 30522, "hidden_dropout_prob": 0.0,
               "attention_probs_dropout_prob": 0.0, "architectures": ["BertForMaskedLM"]},
    "gpt2-small": {"model_type": "gpt2", "n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 8192,
                   "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                   "architectures": ["GPT2LMHeadModel"]},
    "llama-small": {"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
                    "num_key_value_heads": 4, "intermediate_size": 1408, "vocab_size": 8192,
                    "max_position_embeddings": 1024, "architectures": ["LlamaForCausalLM"]},
}
SIZES = {"minilm": (8, 128), "gpt2-small": (4, 256), "llama-small": (4, 256)}  # samples of all processes, tokens
PROCESSES = (1, 2)


@dataclass(frozen=True)
class Row:
    """Seconds of a step of a model on some processes."""

    model: str
    processes: int
    measured_s: float
    profile_s: float
    preset_s: float

    def error(self, which: str) -> float:
        """predicted / measured - 1."""
        return float(getattr(self, f"{which}_s") / self.measured_s - 1)


# -- measure --------------------------------------------------------------------------------------
def step_seconds(spec: str, batch: int, seq: int, steps: int, wrap: Callable[[Any], Any], wait: Callable[[], Any]
                 ) -> list[float]:
    """Seconds of `steps` training steps after two to warm up."""
    described = build(spec, seq=seq, micro_batch=batch, dtype="float32")
    torch.manual_seed(0)
    model = type(described.model)(described.model.config).train()
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, model.config.vocab_size, (batch, seq))

    def step() -> None:
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    found = []
    for _ in range(steps + 2):
        wait()
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return found[2:]


def _rank(rank: int, processes: int, folder: str, spec: str, batch: int, seq: int, steps: int) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    wrap: Callable[[Any], Any] = lambda model: model  # noqa: E731
    wait: Callable[[], Any] = lambda: None  # noqa: E731
    if processes > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=processes)
        wrap, wait = torch.nn.parallel.DistributedDataParallel, dist.barrier
    seconds = step_seconds(spec, batch // processes, seq, steps, wrap, wait)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seconds))
    if processes > 1:
        dist.destroy_process_group()


def measured_s(spec: str, batch: int, seq: int, processes: int, steps: int) -> float:
    """The lower quartile of steps, of the slowest rank in each: others on this machine only make a step slower."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (processes, folder, spec, batch, seq, steps), nprocs=processes)
        each = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]
    slowest = sorted(map(max, zip(*each, strict=True)))
    return float(slowest[len(slowest) // 4])


# -- predict --------------------------------------------------------------------------------------
def predicted(spec: str, batch: int, seq: int, processes: int, profile: str) -> Plan:
    """The planner's price of plain data parallelism with one micro-batch."""
    request = Request(spec, f"1x{processes} cpu", seq, batch, training=FP32, profile=profile)
    planner = Planner(request, ModelAtAnyBatch(spec, seq, dtype="float32"))
    layout = Layout("megatron", micro_batch=batch // processes, micro_batches=1, global_batch=batch, seq=seq)
    plan, searched = fixed(planner, layout.on(processes))
    return planner.writer(searched).write(plan, planner.ask(), planner.batch, certified=False)


def rows(folder: Path, profile: str, steps: int) -> list[Row]:
    found = []
    for name, config in CONFIGS.items():
        spec, (batch, seq) = folder / name, SIZES[name]
        spec.mkdir()
        (spec / "config.json").write_text(json.dumps(config))
        for processes in PROCESSES:
            times = [predicted(str(spec), batch, seq, processes, which).predicted.step_time_s
                     for which in (profile, "")]
            found.append(Row(name, processes, measured_s(str(spec), batch, seq, processes, steps), *times))
            print(f"{name} on {processes}: measured {found[-1].measured_s:.3f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quick profile, fewer steps; prints only")
    parser.add_argument("--profile", help="use this profile instead of measuring one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.profile or str(Path(folder) / "profile.json")
        started = time.perf_counter()
        if given.profile is None:
            measure_profile(Path(path), "cpu", max(PROCESSES), 1, given.quick, None, lambda what: None)
        profile_seconds = time.perf_counter() - started
        found = rows(Path(folder), path, 5 if given.quick else 15)
        profile = json.loads(Path(path).read_text())
    print_table("seconds of a training step, fp32, one thread a process",
                ["model", "processes", "measured", "with profile", "error", "with preset", "error"],
                [[r.model, r.processes, f"{r.measured_s:.3f}", f"{r.profile_s:.3f}", f"{r.error('profile'):+.1%}",
                  f"{r.preset_s:.3f}", f"{r.error('preset'):+.1%}"] for r in found])
    medians = {which: statistics.median(abs(r.error(which)) for r in found) for which in ("profile", "preset")}
    print(f"median |error|: {medians['profile']:.1%} with the profile ({profile_seconds:.0f} s to measure), "
          f"{medians['preset']:.1%} with the preset")
    if not given.quick:
        profile.pop("tables")
        written = write_result("profile_vs_measured", {
            "load_average": os.getloadavg(), "profile_seconds": profile_seconds, "median_error": medians,
            "rows": [{**vars(r), "profile_error": r.error("profile"), "preset_error": r.error("preset")}
                     for r in found], "profile": profile})
        print(f"written: {written.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
