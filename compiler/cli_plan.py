"""The commands that make and question plans: `plan`, `why`, `price`, `verify`, `sweep`. `register` adds them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.errors import InvalidInputError

DOES_NOT_FIT = 3
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunCode = Annotated[bool, typer.Option("--run-model-code", help="Import the model where PLAN names it as "
                                                                "module:callable.")]
def _degree(help_text: str) -> Any:
    return typer.Option(min=1, help=help_text)


def _off(name: str, help_text: str) -> Any:
    return typer.Option(f"--no-{name}", help=help_text)


def _file(path: Path | None) -> Path | None:
    """Before anything is searched: whether the file can be there."""
    from ..runtime.plan import in_a_folder

    if path is not None:
        in_a_folder(path)
    return path


Tp = Annotated[int | None, _degree("Tensor parallelism: GPUs that share every matrix product.")]
Cp = Annotated[int | None, _degree("Context parallelism: GPUs that share every sequence.")]
Dp = Annotated[int | None, _degree("Data parallelism: replicas, each with samples of its own.")]
Pp = Annotated[int | None, _degree("Pipeline parallelism: stages, each with layers of its own.")]
Ep = Annotated[int | None, _degree("Expert parallelism: groups of GPUs that hold different experts; means something in "
                                   "mixture-of-experts layers only.")]
Etp = Annotated[int | None, _degree("Expert tensor parallelism: GPUs that share the products of one expert; 1 or tp.")]
Interleave = Annotated[int | None, _degree("Parts of the model on every pipeline stage (virtual stages): more of them "
                                           "make the bubble smaller and communication larger.")]
Zero = Annotated[int | None, typer.Option(min=0, max=3, help=(
    "Pin the ZeRO stage: 1 shards the optimizer over data-parallel GPUs, 2 gradients too, 3 parameters too."))]
Recompute = Annotated[str | None, typer.Option(help="Pin recomputation: none, selective or full.")]
Schedule = Annotated[str | None, typer.Option(help="Pin the schedule: 1f1b, gpipe, interleaved or zb-h1.")]
NoTp = Annotated[bool, _off("tp", "As --tp 1.")]
NoCp = Annotated[bool, _off("cp", "As --cp 1.")]
NoPp = Annotated[bool, _off("pp", "As --pp 1.")]
NoEp = Annotated[bool, _off("ep", "As --ep 1.")]
NoZero = Annotated[bool, _off("zero", "As --zero 0.")]
NoRecompute = Annotated[bool, _off("recompute", "As --recompute none.")]
NoInterleave = Annotated[bool, _off("interleave", "As --interleave 1.")]
NoHsdp = Annotated[bool, _off("hsdp", "Shard over all data-parallel GPUs or not at all: as --ban hsdp.")]
MicroBatches = Annotated[int | None, _degree("Micro-batches of a step.")]
MicroBatch = Annotated[int | None, _degree("Samples of one replica's micro-batch.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=(
    "A published model (llama3-8b, deepseek-v3, gpt3-175b, …), a Hugging Face config.json or its directory, or "
    "module:callable that returns (nn.Module, example_inputs)."))]
Cluster = Annotated[str, typer.Option(help='Nodes x GPUs per node and a device, such as "8x8 h100-sxm", or a cluster '
                                           "file (YAML).")]
Seq = Annotated[int, typer.Option(min=1, help="Tokens per sequence.")]
AllocatorShare = Annotated[float | None, typer.Option(min=0, max=10, help=(
    "Margin for fragmentation, as a share of activations, working set and buffers (default 0.12: what published peaks "
    "are above predicted ones in the median)."))]
Batch = Annotated[int, typer.Option(min=1, help="Samples of a step, over all GPUs.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", callback=_file, help="Write the plan.")]
Precision = Annotated[str, typer.Option(help="Number format of products: bf16, fp16, fp32, fp8-tensorwise, "
                                             "fp8-rowwise, fp8-blockwise, fp8-delayed, mxfp8 or nvfp4.")]
Optimizer = Annotated[str, typer.Option(help="Such as adamw-8bit, sgd-momentum.")]
TrainingWords = Annotated[list[str] | None, typer.Option("--training", help="field=value of how all layers train, such "
                                                         "as gradient_bytes=2, fusion=none, flash_attention=False or "
                                                         "async_tp=True (repeatable; docs/layer-costs.md).")]
Workload = Annotated[str, typer.Option(help="training; inference, lora and offload are not planned, and are refused "
                                            "with what to do instead.")]
Ban = Annotated[list[str] | None, typer.Option(help="Leave out hsdp, ring, ulysses, gpipe, interleaved, zb-h1, zero0 "
                                                    "to zero3, selective, full or pipeline-innermost; or tp1, cp1, "
                                                    "pp1, ep1: only plans that use the axis (repeatable).")]


WhyMixing = Annotated[bool, typer.Option("--mixing", help="Also search for what a layout of its own for every "
                                                          "layer would gain; takes long.")]
Profile = Annotated[Path | None, typer.Option(help="A file of meshwright profile: its measured numbers replace the "
                                                  "preset's.")]


def register(app: typer.Typer, show_value: Callable[[Any], None],
             progress: Callable[[str], AbstractContextManager[None]]) -> None:
    """Add the commands; `show_value` prints a value or plain data, `progress` shows that something runs."""
    _register_plan(app, show_value, progress)
    _register_questions(app, show_value, progress)
    _register_price(app, show_value, progress)


def _register_plan(app: typer.Typer, show_value: Callable[[Any], None],
                   progress: Callable[[str], AbstractContextManager[None]]) -> None:
    @app.command()
    def plan(model: Annotated[str | None, typer.Argument(metavar="MODEL", help="As for `meshwright model`.")] = None,
             cluster: Annotated[str | None, typer.Option(help='Such as "8x8 h100-sxm", or a file (YAML).')] = None,
             seq: Seq = 4096, global_batch: Batch = 256, output: Output = None,
             objective: Annotated[str, typer.Option(help="throughput, largest-batch, largest-sequence, fewest-gpus or "
                                                         "energy (at most: rated power x time).")] = "throughput",
             target_tokens_per_s: Annotated[float | None, typer.Option(help="For fewest-gpus; without it, the fewest "
                                                                       "that fit.")] = None,
             tp: Tp = None, cp: Cp = None, dp: Dp = None, pp: Pp = None, ep: Ep = None, etp: Etp = None,
             zero: Zero = None,
             recompute: Recompute = None, schedule: Schedule = None,
             interleave: Interleave = None, micro_batches: MicroBatches = None, micro_batch: MicroBatch = None,
             no_tp: NoTp = False, no_cp: NoCp = False, no_pp: NoPp = False, no_ep: NoEp = False,
             no_zero: NoZero = False, no_recompute: NoRecompute = False, no_interleave: NoInterleave = False,
             no_hsdp: NoHsdp = False, ban: Ban = None,
             mixing: Annotated[bool, typer.Option("--mixing", help="Let every layer take its own layout.")] = False,
             optimizer: Optimizer = "adamw", precision: Precision = "bf16", training: TrainingWords = None,
             workload: Workload = "training", allocator_share: AllocatorShare = None,
             imbalance: Annotated[float, typer.Option(help="Rows that experts get, over the mean.")] = 1.0,
             gpu_price: Annotated[float | None, typer.Option(help="USD per GPU and hour.")] = None,
             pad_batch: Annotated[bool, typer.Option("--pad-batch", help="Compute some samples more where the batch "
                                                     "can't be divided; the plan shows how many.")] = False,
             profile: Profile = None,
             runnable_only: Annotated[bool, typer.Option("--runnable-only", help="Only what can be run.")] = False,
             prove: Annotated[float | None, typer.Option(help="Seconds for CP-SAT to prove the plan optimal.")] = None,
             time_limit: Annotated[float | None, typer.Option(help="Seconds of search after which the best plan so far "
                                                              "is taken, with the gap that is then left.")] = None,
             galvatron_profiles: Annotated[Path | None, typer.Option(help="Search under Galvatron's formulas on this "
                                                                     "folder of its profile files instead.")] = None,
             layers: Annotated[int | None, typer.Option(min=1, help="Galvatron: transformer layers.")] = None,
             gpus: Annotated[int | None, typer.Option(min=1, help="Galvatron: GPUs, a power of two.")] = None,
             memory_gb: Annotated[float | None, typer.Option(help="Galvatron: memory of a GPU.")] = None,
             chunks: Annotated[int | None, typer.Option(help="Galvatron: micro-batches, else searched.")] = None,
             hidden: Annotated[int | None, typer.Option(min=1, help="Galvatron: hidden size.")] = None,
             as_json: Json = False) -> None:
        """Find the fastest parallel plan of MODEL on a cluster, and say how good it is. Exit code 3: none fits."""
        if galvatron_profiles is not None:
            needed = {"--layers": layers, "--gpus": gpus, "--memory-gb": memory_gb}
            missing = [name for name, value in needed.items() if value is None]
            if missing:
                raise InvalidInputError(f"--galvatron-profiles without {', '.join(missing)}")
            assert layers is not None and gpus is not None and memory_gb is not None
            _galvatron(show_value, progress, galvatron_profiles, layers, gpus, memory_gb, global_batch, chunks, hidden,
                       output, as_json)
            return
        if model is None or cluster is None:
            raise InvalidInputError("plan needs MODEL and --cluster", expected='such as: meshwright plan llama3-8b '
                                    '--cluster "8x8 h100-sxm" --seq 8192 --global-batch 1024')
        from .plan_answers import PlanAnswer, plan_for
        from .planner.plan_model import Request, pins_from, refuse_runnable_only, refuse_workload
        from .planner.precision import training_from

        if runnable_only:
            refuse_runnable_only()
        refuse_workload(workload)
        pins = _pins({"tp": tp, "cp": cp, "dp": dp, "pp": pp, "ep": ep, "etp": etp, "zero": zero,
                      "recompute": recompute, "schedule": schedule, "interleave": interleave,
                      "micro_batches": micro_batches, "micro_batch": micro_batch},
                     {"tp": (no_tp, 1), "cp": (no_cp, 1), "pp": (no_pp, 1), "ep": (no_ep, 1), "zero": (no_zero, 0),
                      "recompute": (no_recompute, "none"), "interleave": (no_interleave, 1)},
                     [*(ban or []), *(["hsdp"] if no_hsdp else [])])
        request = Request(model, cluster, seq, global_batch, pins_from(pins),
                          training_from(optimizer, precision, training or ()), mixing, imbalance, gpu_price, pad_batch,
                          profile=str(profile or ""), allocator_share=_margin(allocator_share),
                          time_limit_s=math.inf if time_limit is None else time_limit)
        with progress(f"planning {model}"):
            answer: PlanAnswer = plan_for(request, objective, target_tokens_per_s, prove)
        if answer.plan is not None and output is not None:
            answer.plan.save(output)
        if answer.plan is None and not as_json:
            print(f"meshwright: {answer.as_dict()['reason']}", file=sys.stderr)
        else:
            show_value(answer.as_dict() if as_json else answer)
        if answer.plan is None:
            raise typer.Exit(DOES_NOT_FIT)


def _register_questions(app: typer.Typer, show_value: Callable[[Any], None],
                        progress: Callable[[str], AbstractContextManager[None]]) -> None:
    @app.command()
    def why(plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file that meshwright saved.")],
            mixing: WhyMixing = False, profile: Profile = None, run_model_code: RunCode = False,
            as_json: Json = False) -> None:
        """Say why PLAN is as it is: the best plan of every family it beat, by how much, and what held that one back."""
        from .plan_why import why_of

        with progress(f"searching the families that {plan} beat"):
            found = why_of(plan, run_model_code, str(profile) if profile else None, mixing)
        show_value(found.as_dict() if as_json else found)

    @app.command()
    def verify(plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file with a certificate.")],
               run_model_code: RunCode = False, as_json: Json = False) -> None:
        """Check PLAN's certificate anew: tables, price and every bound. Exit code 1: something does not hold."""
        from .plan_answers import verified

        with progress(f"checking {plan}"):
            found = verified(plan, run_model_code)
        show_value(found.as_dict() if as_json else found)
        if found.faults:
            raise typer.Exit(1)

    @app.command()
    def sweep(model: ModelName, cluster: Cluster, seq: Seq = 4096, global_batch: Batch = 256,
              over: Annotated[str, typer.Option(help="gpus, seq or batch.")] = "gpus",
              values: Annotated[str | None, typer.Option(help="Comma-separated: nodes, tokens or samples.")] = None,
              gpu_price: Annotated[float | None, typer.Option(help="USD per GPU and hour.")] = None,
              tokens: Annotated[float | None, typer.Option(help="Tokens to train on, for days and money.")] = None,
              tp: Tp = None, cp: Cp = None, dp: Dp = None, pp: Pp = None, ep: Ep = None, zero: Zero = None,
              recompute: Recompute = None, schedule: Schedule = None, micro_batch: MicroBatch = None, ban: Ban = None,
              optimizer: Optimizer = "adamw", precision: Precision = "bf16", training: TrainingWords = None,
              profile: Profile = None, as_json: Json = False) -> None:
        """Plan MODEL for several cluster sizes, sequences or batches, as a Pareto table. Exit code 3: none fits."""
        from .plan_sweep import sweep as swept
        from .planner.plan_model import Request, pins_from
        from .planner.precision import training_from

        pins = _pins({"tp": tp, "cp": cp, "dp": dp, "pp": pp, "ep": ep, "zero": zero, "recompute": recompute,
                      "schedule": schedule, "micro_batch": micro_batch}, {}, ban or [])
        request = Request(model, cluster, seq, global_batch, pins_from(pins),
                          training_from(optimizer, precision, training or ()), price_usd_per_gpu_hour=gpu_price,
                          profile=str(profile or ""))
        with progress(f"planning {model} over {over}"):
            found = swept(request, over, values, tokens)
        show_value(found.as_dict() if as_json else found)
        if not any(row.plan for row in found.rows):
            raise typer.Exit(DOES_NOT_FIT)


def _register_price(app: typer.Typer, show_value: Callable[[Any], None],
                    progress: Callable[[str], AbstractContextManager[None]]) -> None:
    @app.command()
    def price(model: ModelName, cluster: Cluster, seq: Annotated[int | None, typer.Option(min=1)] = None,
              global_batch: Annotated[int | None, typer.Option(min=1)] = None,
              layout: Annotated[Path | None, typer.Option("--from", help="A torchtitan TOML, Megatron-LM arguments "
                                                          "(or YAML) or a DeepSpeed JSON.")] = None,
              tp: Tp = None, cp: Cp = None, pp: Pp = None, ep: Ep = None, etp: Etp = None,
              zero: Annotated[int | None, typer.Option(min=0, max=3)] = None,
              recompute: Recompute = None, schedule: Schedule = None, interleave: Interleave = None,
              micro_batch: MicroBatch = None,
              precision: Annotated[str | None, typer.Option(help="As for plan; instead of what the file says.")] = None,
              profile: Profile = None, allocator_share: AllocatorShare = None, output: Output = None,
              as_json: Json = False) -> None:
        """Price your own layout of MODEL, without a search over others. Exit code 3: it does not fit."""
        from .plan_price import price_layout

        given = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp, "zero": zero, "recompute": recompute,
                 "schedule": schedule, "interleave": interleave, "micro_batch": micro_batch}
        with progress(f"pricing {model}"):
            answer = price_layout(model, cluster, seq, global_batch, layout, given, precision, str(profile or ""),
                                  _margin(allocator_share))
        if output is not None:
            answer.plan.save(output)
        show_value(answer.as_dict() if as_json else answer)
        if not answer.plan.predicted.fits:
            raise typer.Exit(DOES_NOT_FIT)


def _margin(share: float | None) -> float:
    from ..cost_model.layer_memory import ALLOCATOR_SHARE

    return ALLOCATOR_SHARE if share is None else share


def _pins(values: dict[str, Any], off: dict[str, tuple[bool, Any]], banned: list[str]) -> dict[str, Any]:
    for name, (given, value) in off.items():
        if given and values.get(name) not in (None, value):
            raise InvalidInputError(f"--no-{name} and --{name} {values[name]}", expected="one of them")
        if given:
            values[name] = value
    return {**{name: value for name, value in values.items() if value is not None}, "banned": banned}


def _galvatron(show_value: Callable[[Any], None], progress: Callable[[str], AbstractContextManager[None]],
               profiles: Path, layers: int, gpus: int, memory_gb: float, global_batch: int, chunks: int | None,
               hidden: int | None, output: Path | None, as_json: bool) -> None:
    from ..runtime.plan import write_atomically
    from .plan_command import plan_from_galvatron_profiles
    from .planner.galvatron import Ask

    with progress("searching for a plan"):
        answer = plan_from_galvatron_profiles(profiles, Ask(layers, memory_gb, global_batch, chunks), gpus, hidden)
    if answer.fits and output is not None:
        write_atomically(output, answer.plan_file())
    if as_json:
        show_value(answer.as_dict())
    elif answer.fits:
        show_value(answer)
    else:
        print(f"meshwright: {answer.as_dict()['reason']}", file=sys.stderr)
    if not answer.fits:
        raise typer.Exit(DOES_NOT_FIT)
