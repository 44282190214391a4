"""A plan as a DeepSpeed JSON configuration; pipeline, recomputation and sequence parallelism are in scripts there."""

from __future__ import annotations

import json
from typing import Any

from ...runtime.plan import Plan
from .export import Draft, Export, replica_micro_batch

SCRIPT = "set up in the training script, not in the configuration"
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def to_deepspeed(plan: Plan) -> Export:
    """Batch, ZeRO, AutoTP, precision and optimizer."""
    draft = Draft(plan)
    tp, dp = draft.option("tp", "tensor_parallel.autotp_size"), draft.option("dp", "")
    cp = draft.option("cp", "")
    draft.cannot.setdefault("layers.options.dp", "what the GPUs leave; the launcher decides")
    data: dict[str, Any] = {
        "train_batch_size": plan.training.padded_batch,
        "train_micro_batch_size_per_gpu": replica_micro_batch(plan, dp),
        "gradient_accumulation_steps": plan.schedule.micro_batches, "zero_optimization": _zero(draft, tp)}
    if tp > 1:
        data["tensor_parallel"] = {"autotp_size": tp}
    if draft.option("sequence_parallel", "tensor_parallel.autotp_size"):
        draft.drop("AutoTP keeps whole sequences", "layers.options.sequence_parallel")
    data.update(_precision(draft))
    if cp > 1:
        draft.drop(SCRIPT, "layers.options.cp", "layers.options.cp_kind")
    draft.put("no sequence parallelism", "layers.options.cp", "layers.options.cp_kind")
    experts = [r for r in plan.layers if r.experts or r.options.ep * r.options.etp > 1]
    draft.drop(SCRIPT, *(["layers.options.ep", "layers.options.etp"] if experts else []))
    draft.put("no experts", "layers.options.ep", "layers.options.etp")
    _script(draft)
    if plan.training.padded_batch != plan.ask.global_batch:
        draft.drop("the batch is padded; what padding is has no word there", "ask.global_batch")
    draft.put("train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps", "ask.global_batch",
              "training.padded_batch", "schedule.micro_batches", "schedule.micro_batch_samples")
    return draft.finish("deepspeed", json.dumps(data, indent=2) + "\n")


def _script(draft: Draft) -> None:
    """What a DeepSpeed script decides itself; a value that is off needs no word."""
    plan = draft.plan
    draft.drop(SCRIPT, "ask.seq", "training.flash_attention", "training.fusion")
    names = ("mesh.pp", "schedule.name", "schedule.stages", "schedule.chunks", "parts.stage", "parts.chunk",
             "parts.first", "parts.last")
    draft.drop(SCRIPT, *(names if plan.mesh.pp > 1 else ()))
    draft.put("no pipeline", *names)
    for name in ("recompute", "variant"):
        if draft.option(name, "") != "none":
            draft.drop(SCRIPT, f"layers.options.{name}")
        draft.put("none of it", f"layers.options.{name}")
    draft.drop(SCRIPT, *(["training.async_tp"] if plan.training.async_tp else []))
    draft.put("none of it", "training.async_tp")
    draft.drop("the launcher decides", "mesh.gpus", "mesh.gpus_per_node", "mesh.idle_gpus", "mesh.order",
               "mesh.expert_order")


def _zero(draft: Draft, tp: int) -> dict[str, Any]:
    zero, shard = draft.option("zero", "zero_optimization.stage"), draft.option("zero_shard", "")
    dp, cp = draft.option("dp", ""), draft.option("cp", "")
    ranks = dp * cp
    if zero == 3 and tp > 1:
        draft.drop("AutoTP goes with ZeRO 0 to 2", "layers.options.tp")
    table: dict[str, Any] = {"stage": zero}
    if cp > 1:
        draft.drop("what context-parallel ranks share is the script's choice", "layers.options.zero_shard")
    if zero == 3 and shard < ranks:
        table["mics_shard_size"] = shard
    elif zero and shard < ranks:
        draft.drop("shards over a part of the ranks (MiCS) with stage 3 only", "layers.options.zero_shard")
    draft.put("zero_optimization.mics_shard_size", "layers.options.zero_shard")
    return table


def _precision(draft: Draft) -> dict[str, Any]:
    t = draft.plan.training
    data: dict[str, Any] = {"optimizer": {"type": {"adamw": "AdamW", "adam": "Adam"}.get(t.optimizer, "AdamW")}}
    if t.optimizer not in ("adamw", "adam"):
        draft.drop("written as AdamW", "training.optimizer")
    if t.parameter_dtype in ("bfloat16", "float16"):
        data[DTYPES[t.parameter_dtype]] = {"enabled": True}
    if t.gradient_dtype in DTYPES:
        data["data_types"] = {"grad_accum_dtype": DTYPES[t.gradient_dtype]}
    else:
        draft.drop("accumulates in fp32, bf16 or fp16", "training.gradient_dtype")
    if t.reduce_dtype in DTYPES:
        data["communication_data_type"] = DTYPES[t.reduce_dtype]
    else:
        draft.drop("reduces in fp32, bf16 or fp16", "training.reduce_dtype")
    if t.parameter_dtype not in DTYPES:
        draft.drop("computes in fp32, bf16 or fp16", "training.parameter_dtype")
    if t.recipe != {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(t.parameter_dtype):
        draft.drop(f"has no recipe {t.recipe!r}", "training.recipe")
    if t.optimizer_bytes_per_parameter != 12:
        draft.drop("float32 parameters and two moments, 12 bytes", "training.optimizer_bytes_per_parameter")
    draft.put("bf16, fp16", "training.parameter_dtype", "training.recipe")
    draft.put("data_types, communication_data_type", "training.gradient_dtype", "training.reduce_dtype")
    draft.put("optimizer.type", "training.optimizer", "training.optimizer_bytes_per_parameter")
    return data
