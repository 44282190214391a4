"""A plan as Megatron-LM arguments (d98e8a6), one a line; world size and data parallelism are the launcher's."""

from __future__ import annotations

from ...runtime.plan import Plan
from .export import Draft, Export, blocks, contents, is_block, replica_micro_batch
from .foreign import Contents

CP_KINDS = {"ring": "p2p", "ulysses": "a2a", "all-gather": "allgather"}
STRATEGIES = {1: "optim", 2: "optim_grads", 3: "optim_grads_params"}
FP8_RECIPES = {"fp8-tensorwise": "tensorwise", "fp8-delayed": "delayed", "fp8-blockwise": "blockwise", "mxfp8": "mxfp8"}
LAYOUT_LETTERS = 4000
LAUNCHER = "the launcher decides: torchrun --nnodes, --nproc-per-node"


def to_megatron(plan: Plan) -> Export:
    """Arguments of parallelism, pipeline, batch, precision and recomputation."""
    draft = Draft(plan)
    lines = [*_degrees(draft), *_zero(draft), *_pipeline(draft), *_recompute(draft), *_batch(draft),
             *_precision(draft)]
    if plan.mesh.order == ("tp", "cp", "pp", "dp"):
        lines.append("--use-tp-pp-dp-mapping")
    elif plan.mesh.order != ("tp", "cp", "dp", "pp"):
        draft.drop("ranks are laid out tp-cp-dp-pp or tp-cp-pp-dp", "mesh.order")
    wanted = ("etp", "ep", "pp", "edp") if plan.mesh.order[2] == "pp" else ("etp", "ep", "edp", "pp")
    if plan.mesh.expert_order != wanted:
        draft.drop(f"experts' ranks are laid out {'-'.join(wanted)}", "mesh.expert_order")
    draft.put("--use-tp-pp-dp-mapping", "mesh.order", "mesh.expert_order")
    draft.drop(LAUNCHER, "mesh.gpus", "mesh.gpus_per_node", "mesh.idle_gpus")
    launch = f"# torchrun --nproc-per-node {plan.mesh.gpus_per_node}, {plan.mesh.gpus} processes in all\n"
    text = "\n".join(lines)
    return draft.finish("megatron", f"# Megatron-LM arguments of a Meshwright plan\n{launch}{text}\n", "#")


def _degrees(draft: Draft) -> list[str]:
    tp = draft.option("tp", "--tensor-model-parallel-size")
    cp = draft.option("cp", "--context-parallel-size")
    if "layers.options.dp" not in draft.cannot:
        draft.option("dp", "")
        draft.cannot.setdefault("layers.options.dp", f"what the GPUs leave; {LAUNCHER}")
    lines = [f"--tensor-model-parallel-size {tp}", f"--context-parallel-size {cp}"]
    kind = draft.option("cp_kind", "--cp-comm-type")
    lines += [f"--cp-comm-type {CP_KINDS[kind]}"] if kind != "none" else []
    lines += ["--sequence-parallel"] if draft.option("sequence_parallel", "--sequence-parallel") else []
    own = [r for r in draft.plan.layers if r.experts or r.options.ep * r.options.etp > 1]
    ep, etp = draft.option("ep", "--expert-model-parallel-size", own), draft.option(
        "etp", "--expert-tensor-parallel-size", own)
    lines += [f"--expert-model-parallel-size {ep}", f"--expert-tensor-parallel-size {etp}"] if own else []
    return lines


def _zero(draft: Draft) -> list[str]:
    zero, shard = draft.option("zero", "--data-parallel-sharding-strategy"), draft.option("zero_shard", "")
    dp, cp = draft.option("dp", ""), draft.option("cp", "")
    copies = dp * cp // shard if zero else 1
    draft.put("--num-distributed-optimizer-instances", "layers.options.zero_shard")
    lines = ["--use-distributed-optimizer"] if zero else []
    if zero > 1:
        lines += ["--use-megatron-fsdp", f"--data-parallel-sharding-strategy {STRATEGIES[zero]}"]
    return lines + ([f"--num-distributed-optimizer-instances {copies}"] if copies > 1 else [])


def _pipeline(draft: Draft) -> list[str]:
    plan, schedule = draft.plan, draft.plan.schedule
    names = ("parts.stage", "parts.chunk", "parts.first", "parts.last", "schedule.chunks")
    draft.put("--pipeline-model-parallel-size", "mesh.pp", "schedule.stages")
    if schedule.name not in ("1f1b", "interleaved"):
        draft.drop("has 1F1B and interleaved 1F1B", "schedule.name")
    lines = [f"--pipeline-model-parallel-size {plan.mesh.pp}"]
    held = contents(plan)
    if held is None and plan.mesh.pp > 1:
        draft.drop("layouts are an embedding, one stack of blocks and a head only", *names)
    elif held is not None and plan.mesh.pp > 1:
        lines.append(f"--pipeline-model-parallel-layout '{_layout(held)}'")
    draft.put("--pipeline-model-parallel-layout", *names, "schedule.name")
    return lines


def _layout(held: tuple[Contents, ...]) -> str:
    inner = ["t" * p.blocks if p.blocks < 2 else f"t*{p.blocks}" for p in held]
    return "|".join("E" * p.embedding + t + "L" * p.head for p, t in zip(held, inner, strict=True))


def _recompute(draft: Draft) -> list[str]:
    """All blocks, or the first n of every part."""
    path, plan = "layers.options.recompute", draft.plan
    modes = {r.options.recompute for r in plan.layers if not is_block(r.first)} - {"none"}
    used = {r.options.recompute for r in blocks(plan)}
    full = _full_at_start(plan)
    if "selective" in used or "min-cut" in used or modes:
        kinds = ", ".join(sorted((used | modes) - {"none", "full"})) or "that of embedding and head"
        draft.drop(f"recomputes whole blocks or attention alone, not {kinds}; of blocks it is written as whole ones, "
                   "which needs less memory and more time", path)
    if used & {"selective", "min-cut"}:
        return ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    if used <= {"none"} or full == 0:
        draft.put("no --recompute-granularity", path)
        return []
    if full is None and used != {"full"}:
        draft.drop("recomputes as many blocks at the start of every part; written for all blocks", path)
    draft.put("--recompute-granularity", path)
    if used == {"full"} or full is None:
        return ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    return ["--recompute-granularity full", "--recompute-method block", f"--recompute-num-layers {full}"]


def _full_at_start(plan: Plan) -> int | None:
    """How many blocks are recomputed in full, the same number at the start of every part that has that many; None
    where they lie otherwise."""
    at = {name: i for i, name in enumerate(plan.model.layers)}
    flags = [r.options.recompute == "full" for r in plan.layers for _ in range(r.count)]
    counts = []
    for part in plan.parts:
        own = [flags[i] for i in range(at[part.first], at[part.last] + 1) if is_block(plan.model.layers[i])]
        if own != sorted(own, reverse=True):
            return None
        counts.append((sum(own), len(own)))
    most = max(n for n, _ in counts)
    return most if all(n == min(most, size) for n, size in counts) else None


def _batch(draft: Draft) -> list[str]:
    plan = draft.plan
    if plan.training.padded_batch != plan.ask.global_batch:
        draft.drop("the batch is padded; what padding is has no word there", "ask.global_batch")
    draft.put("--global-batch-size, --micro-batch-size", "ask.global_batch", "training.padded_batch",
              "schedule.micro_batches", "schedule.micro_batch_samples")
    draft.put("--seq-length", "ask.seq")
    return [f"--micro-batch-size {replica_micro_batch(plan, draft.option('dp', ''))}",
            f"--global-batch-size {plan.training.padded_batch}", f"--seq-length {plan.ask.seq}"]


def _precision(draft: Draft) -> list[str]:
    t, lines = draft.plan.training, []
    dtype = {"bfloat16": "--bf16", "float16": "--fp16", "float32": ""}.get(t.parameter_dtype)
    if dtype is None:
        draft.drop("computes in bfloat16, float16 or float32", "training.parameter_dtype")
    lines += [dtype] if dtype else []
    fp32 = t.gradient_dtype == "float32"
    lines += ["--accumulate-allreduce-grads-in-fp32"] if fp32 and dtype else []
    if t.reduce_dtype != t.gradient_dtype:
        draft.drop("reduces gradients as it accumulates them", "training.reduce_dtype")
    if t.gradient_dtype not in ("float32", t.parameter_dtype):
        draft.drop("accumulates in float32 or the parameters' dtype", "training.gradient_dtype")
    if t.recipe in FP8_RECIPES:
        lines += ["--fp8-format hybrid", f"--fp8-recipe {FP8_RECIPES[t.recipe]}"]
    elif t.recipe == "nvfp4":
        lines += ["--fp4-format e2m1", "--fp4-recipe nvfp4"]
    elif t.recipe != {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(t.parameter_dtype):
        draft.drop(f"has no recipe {t.recipe!r}", "training.recipe")
    if t.optimizer not in ("adamw", "sgd"):
        draft.drop("has AdamW (by the name of adam) and SGD", "training.optimizer")
    if t.optimizer_bytes_per_parameter != (4 if t.optimizer == "sgd" else 12):
        draft.drop("keeps float32 parameters and moments", "training.optimizer_bytes_per_parameter")
    lines.append(f"--optimizer {'sgd' if t.optimizer == 'sgd' else 'adam'}")
    lines += _kernels(draft)
    draft.put("--bf16, --fp8-format, --fp4-format, --accumulate-allreduce-grads-in-fp32", "training.parameter_dtype",
              "training.gradient_dtype", "training.reduce_dtype", "training.recipe")
    draft.put("--optimizer", "training.optimizer", "training.optimizer_bytes_per_parameter")
    return lines


def _kernels(draft: Draft) -> list[str]:
    t = draft.plan.training
    if draft.option("variant", "") != "none":
        draft.drop("rewrites of layers are Meshwright's own", "layers.options.variant")
    if t.fusion != "kernels":
        draft.drop("has hand-written fused kernels", "training.fusion")
    tp = draft.option("tp", "")
    if t.async_tp and tp == 1:
        draft.drop("asynchronous tensor parallelism needs tp", "training.async_tp")
    draft.put("--tp-comm-overlap", "training.async_tp")
    draft.put("--attention-backend", "training.flash_attention")
    draft.put("no argument: as written", "layers.options.variant", "training.fusion")
    backend = "--attention-backend flash" if t.flash_attention else "--attention-backend unfused"
    return (["--tp-comm-overlap"] if t.async_tp and tp > 1 else []) + [backend]
