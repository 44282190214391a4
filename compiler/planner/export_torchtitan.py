"""A plan as a torchtitan TOML configuration (the format until February 2026, 9810191^)."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...runtime.plan import Plan
from .export import Draft, Export, blocks, contents, replica_micro_batch
from .foreign import Contents

Value = str | int | bool | list[str] | list[list[str]]
Tables = dict[str, dict[str, Value]]
SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B"}
RECIPES = {"fp8-tensorwise": ("quantize.linear.float8", "tensorwise"),
           "fp8-rowwise": ("quantize.linear.float8", "rowwise"), "mxfp8": ("quantize.linear.mx", "mxfp8_cublas")}


def to_torchtitan(plan: Plan) -> Export:
    """Tables [training], [optimizer], [parallelism], [activation_checkpoint], [compile] and the recipe's."""
    draft = Draft(plan)
    tables: Tables = {"training": {}, "optimizer": {}, "parallelism": {}, "activation_checkpoint": {}, "compile": {}}
    dp = _parallelism(draft, tables["parallelism"])
    _experts(draft, tables["parallelism"])
    _pipeline(draft, tables["parallelism"], dp)
    _training(draft, tables, dp)
    _recompute(draft, tables)
    draft.drop("its process mesh is always pp, dp, cp, tp from the outermost axis in", *_foreign_order(plan))
    draft.put("[parallelism]", "mesh.order", "mesh.expert_order", "mesh.gpus")
    draft.drop("the launcher decides: torchrun --nproc-per-node", "mesh.gpus_per_node", "mesh.idle_gpus")
    return draft.finish("torchtitan", f"# torchtitan configuration of a Meshwright plan\n\n{_toml(tables)}", "#")


def _parallelism(draft: Draft, table: dict[str, Value]) -> int:
    """Mesh and ZeRO; gives dp."""
    tp, cp = draft.option("tp", "tensor_parallel_degree"), draft.option("cp", "context_parallel_degree")
    dp = int(draft.option("dp", "data_parallel_replicate_degree · data_parallel_shard_degree"))
    if not draft.option("sequence_parallel", "tensor_parallel_degree") and tp > 1:
        draft.drop("tensor parallelism is always sequence-parallel there", "layers.options.sequence_parallel")
    kind = draft.option("cp_kind", "context_parallel_rotate_method")
    if kind == "ulysses":
        draft.drop("has ring and all-gather context parallelism, no Ulysses", "layers.options.cp_kind")
    table.update(tensor_parallel_degree=tp, context_parallel_degree=cp,
                 context_parallel_rotate_method="alltoall" if kind == "ring" else "allgather")
    zero, ranks = draft.option("zero", "fsdp_reshard_after_forward"), draft.option("zero_shard", "")
    if zero == 1 or (zero == 0 and cp > 1) or (zero and ranks == 1):
        draft.drop(f"FSDP shards gradients too and takes context-parallel ranks in: ZeRO-{zero} over {ranks} ranks is "
                   f"written as the nearest", "layers.options.zero")
    shard = 1 if zero == 0 else ranks // cp if ranks % cp == 0 and dp % max(1, ranks // cp) == 0 else dp
    if zero and shard * cp != ranks:
        draft.drop(f"shards over all context-parallel ranks and a part of dp: {ranks} of {dp} · {cp} is written as "
                   f"{shard * cp}", "layers.options.zero_shard")
    draft.put("data_parallel_shard_degree", "layers.options.zero_shard")
    table.update(data_parallel_replicate_degree=dp // shard, data_parallel_shard_degree=shard,
                 fsdp_reshard_after_forward="always" if zero == 3 else "never")
    return dp


def _experts(draft: Draft, table: dict[str, Value]) -> None:
    own = [r for r in draft.plan.layers if r.experts or r.options.ep * r.options.etp > 1]
    ep, etp = (draft.option(name, f"expert_{word}parallel_degree", own) for name, word in (("ep", ""),
                                                                                          ("etp", "tensor_")))
    tp = table["tensor_parallel_degree"]
    if own and etp not in ((1, tp) if ep > 1 else (tp,)):
        draft.drop("experts are split 1 or tp ways, and tp ways without expert parallelism", "layers.options.etp")
        etp = tp
    table.update(expert_parallel_degree=ep, expert_tensor_parallel_degree=etp)


def _pipeline(draft: Draft, table: dict[str, Value], dp: int) -> None:
    plan, schedule = draft.plan, draft.plan.schedule
    table["pipeline_parallel_degree"] = plan.mesh.pp
    draft.put("pipeline_parallel_degree", "mesh.pp", "schedule.stages")
    if schedule.name not in SCHEDULES:
        draft.drop("torch.distributed.pipelining has no ZB-H1; 1F1B is written", "schedule.name")
    elif plan.mesh.pp == 1 and schedule.name != "1f1b":
        draft.drop("there is no schedule without a pipeline", "schedule.name")
    draft.put("pipeline_parallel_schedule", "schedule.name")
    held = contents(plan)
    names = ("parts.stage", "parts.chunk", "parts.first", "parts.last", "schedule.chunks")
    if plan.mesh.pp > 1:
        table.update(pipeline_parallel_schedule=SCHEDULES.get(schedule.name, "1F1B"),
                     pipeline_parallel_microbatch_size=replica_micro_batch(plan, dp))
        if held is not None:
            table["module_fqns_per_model_part"] = _modules(held)
    if held is None and plan.mesh.pp > 1:
        draft.drop("module names are known for an embedding, one stack of blocks and a head only", *names)
    draft.put("module_fqns_per_model_part", *names)


def _modules(held: tuple[Contents, ...]) -> list[list[str]]:
    at, found = 0, []
    for part in held:
        inner = [f"layers.{i}" for i in range(at, at + part.blocks)]
        found.append(["tok_embeddings"] * part.embedding + inner + ["norm", "output"] * part.head)
        at += part.blocks
    return found


def _training(draft: Draft, tables: Tables, dp: int) -> None:
    plan, training = draft.plan, draft.plan.training
    replica = replica_micro_batch(plan, dp)
    local = replica * (plan.schedule.micro_batches if plan.mesh.pp > 1 else 1)
    tables["training"].update(local_batch_size=local, global_batch_size=training.padded_batch, seq_len=plan.ask.seq,
                              dtype="float32", mixed_precision_param=training.parameter_dtype,
                              mixed_precision_reduce=training.reduce_dtype)
    draft.put("[training] local_batch_size, global_batch_size", "training.padded_batch", "schedule.micro_batches",
              "schedule.micro_batch_samples")
    if training.padded_batch != plan.ask.global_batch:
        draft.drop("the batch is padded; what padding is has no word there", "ask.global_batch")
    draft.put("[training]", "ask.global_batch", "ask.seq", "training.parameter_dtype", "training.reduce_dtype")
    if training.parameter_dtype not in ("bfloat16", "float32"):
        draft.drop("computes in bfloat16 or float32", "training.parameter_dtype")
        tables["training"]["mixed_precision_param"] = "bfloat16"
    if training.reduce_dtype != "float32":
        draft.drop("reduces in float32", "training.reduce_dtype")
        tables["training"]["mixed_precision_reduce"] = "float32"
    if training.gradient_dtype != "float32":
        draft.drop("gradients have the dtype of the parameters, float32", "training.gradient_dtype")
    if training.optimizer_bytes_per_parameter != 12:
        draft.drop("float32 parameters and two moments, 12 bytes", "training.optimizer_bytes_per_parameter")
    draft.put("[training] dtype", "training.gradient_dtype", "training.optimizer_bytes_per_parameter")
    tables["optimizer"]["name"] = "Adam" if training.optimizer == "adam" else "AdamW"
    if training.optimizer not in ("adam", "adamw"):
        draft.drop("has Adam and AdamW", "training.optimizer")
    draft.put("[optimizer] name", "training.optimizer")
    _recipe(draft, tables)


def _recipe(draft: Draft, tables: Tables) -> None:
    recipe = draft.plan.training.recipe
    if recipe in RECIPES:
        converter, name = RECIPES[recipe]
        tables["model"] = {"converters": [converter]}
        tables[converter] = {"recipe_name": name}
    elif recipe != {"bfloat16": "bf16", "float32": "fp32"}.get(draft.plan.training.parameter_dtype):
        draft.drop(f"has no recipe {recipe!r}", "training.recipe")
    draft.put("[model] converters", "training.recipe")
    if draft.option("variant", "") != "none":
        draft.drop("rewrites of layers are Meshwright's own", "layers.options.variant")
    draft.put("[model] converters", "layers.options.variant")
    if not draft.plan.training.flash_attention:
        draft.drop("the trainer chooses the attention kernel", "training.flash_attention")
    draft.put("[model]", "training.flash_attention")


def _recompute(draft: Draft, tables: Tables) -> None:
    """Of blocks; embedding and head are never run again there."""
    plan, training = draft.plan, draft.plan.training
    mode = draft.option("recompute", "[activation_checkpoint] mode", blocks(plan))
    compiled = training.fusion == "compiled"
    if training.fusion == "kernels":
        draft.drop("element-wise operators run as written or compiled", "training.fusion")
    if mode == "min-cut" and not compiled:
        draft.drop("min-cut is what torch.compile does", "layers.options.recompute")
    if mode == "none" and compiled:
        draft.drop("under torch.compile the partitioner decides (min-cut)", "layers.options.recompute")
    if mode == "selective":
        draft.drop("its selective mode also runs every second product again; taken as the nearest",
                   "layers.options.recompute")
        tables["activation_checkpoint"]["selective_ac_option"] = "op"
    others = {r.options.recompute for r in plan.layers} - {mode, "none", "min-cut"}
    if others:
        draft.drop(f"{mode} for blocks, embedding and head are never run again; the plan also has "
                   f"{', '.join(sorted(others))}", "layers.options.recompute")
    tables["activation_checkpoint"]["mode"] = "none" if mode == "min-cut" else mode
    tables["compile"]["enable"] = compiled
    draft.put("[compile] enable", "training.fusion")
    tables["parallelism"]["enable_async_tensor_parallel"] = training.async_tp
    if training.async_tp and not (compiled and int(str(tables["parallelism"]["tensor_parallel_degree"])) > 1):
        draft.drop("asynchronous tensor parallelism needs torch.compile and tp", "training.async_tp")
    draft.put("enable_async_tensor_parallel", "training.async_tp")


def _foreign_order(plan: Plan) -> list[str]:
    mesh = plan.mesh
    bad = ["mesh.order"] if mesh.order != ("tp", "cp", "dp", "pp") else []
    return bad + (["mesh.expert_order"] if mesh.expert_order != ("etp", "ep", "edp", "pp") else [])


def _toml(tables: Mapping[str, Mapping[str, Value]]) -> str:
    lines = []
    for name, table in sorted(tables.items(), key=lambda t: (t[0].count("."), t[0])):
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)
