"""A plan as Galvatron's plan JSON. It has options per layer: tensor parallelism or Ulysses, ZeRO-2 or ZeRO-3, and
checkpointing; embedding and head share one choice. `galvatron.galvatron_config` writes it, as for its own mode."""

from __future__ import annotations

import json
from collections.abc import Callable

from ...cost_model import galvatron as cost
from ...runtime.plan import Plan
from ...runtime.plan_layout import LayerOptions
from .export import Draft, Export, blocks, contents, is_block
from .galvatron import galvatron_config

OPTIONS = "layers.options"


def to_galvatron(plan: Plan) -> Export:
    """The nearest plan that Galvatron has words for."""
    draft = Draft(plan)
    held = contents(plan)
    if held is None or plan.schedule.chunks > 1:
        draft.drop("stages are one stretch of one stack of blocks each", "parts.stage", "parts.chunk", "parts.first",
                   "parts.last", "schedule.chunks")
    per_layer = [r.options for r in blocks(plan) for _ in range(r.count)]
    around = [r.options for r in plan.layers if not is_block(r.first)]
    _check_options(draft, per_layer, around)
    _check_rest(draft)
    counts = [sum(p.blocks for p in held[stage::plan.mesh.pp]) for stage in range(plan.mesh.pp)] if held else [
        len(per_layer)]
    setting = cost.Setting(plan.mesh.pp, len(per_layer), plan.training.padded_batch, plan.schedule.micro_batches,
                           schedule="gpipe" if plan.schedule.name == "gpipe" else "pipedream_flush")
    outer = _strategy(around[0]) if around else cost.Strategy(dp=plan.mesh.stage_gpus, zero="zero2")
    made = cost.Plan(setting, tuple(counts), tuple(map(_strategy, per_layer)), outer, None)
    return draft.finish("galvatron", json.dumps(galvatron_config(made), indent=4) + "\n")


def _strategy(o: LayerOptions) -> cost.Strategy:
    ulysses = o.cp > 1 and o.tp == 1
    zero: cost.Zero = "zero3" if o.zero == 3 else "zero2" if o.dp * o.cp > 1 else "ddp"
    return cost.Strategy(o.tp, o.cp if ulysses else 1, o.dp, zero, o.recompute != "none")


def _check_options(draft: Draft, per_layer: list[LayerOptions], around: list[LayerOptions]) -> None:
    """Notes every option that some layer has and Galvatron has no word for."""
    every = [*per_layer, *around]
    rules: tuple[tuple[str, str, Callable[[LayerOptions], bool]], ...] = (
        ("sequence_parallel", "its tensor parallelism is always sequence-parallel",
         lambda o: o.tp > 1 and not o.sequence_parallel),
        ("cp", "has Ulysses, without tensor parallelism in the same layer", lambda o: o.cp > 1 and o.tp > 1),
        ("cp_kind", "has Ulysses only", lambda o: o.cp_kind not in ("none", "ulysses")),
        ("ep", "has no experts", lambda o: o.ep > 1), ("etp", "has no experts", lambda o: o.etp > 1),
        ("zero", "shards by ZeRO-2 or ZeRO-3", lambda o: o.zero < 2 and o.dp * o.cp > 1),
        ("zero_shard", "shards over all ranks that share a batch",
         lambda o: o.zero > 0 and o.zero_shard != o.dp * o.cp),
        ("recompute", "recomputes whole blocks or nothing; written as whole blocks",
         lambda o: o.recompute not in ("none", "full")),
        ("variant", "rewrites of layers are Meshwright's own", lambda o: o.variant != "none"))
    for name, reason, bad in rules:
        if any(map(bad, every)):
            draft.drop(reason, f"{OPTIONS}.{name}")
    if any(o.recompute != "none" for o in around):
        draft.drop("embedding and head are never run again", f"{OPTIONS}.recompute")
    if len({_strategy(o) for o in around}) > 1:
        draft.drop("embedding and head share one choice", f"{OPTIONS}.tp", f"{OPTIONS}.dp", f"{OPTIONS}.cp",
                   f"{OPTIONS}.zero")
    draft.put("tp_sizes_enc, use_sp, dp_types_enc, checkpoint, vtp, vsp, embed_sdp",
              *(f"{OPTIONS}.{name}" for name, _, _ in rules), f"{OPTIONS}.tp")
    draft.cannot.setdefault(f"{OPTIONS}.dp", "what the GPUs leave")
    draft.put("tp_sizes_enc", "layers.first", "layers.last", "layers.count")


def _check_rest(draft: Draft) -> None:
    plan, training = draft.plan, draft.plan.training
    if plan.schedule.name not in ("1f1b", "gpipe"):
        draft.drop("has 1F1B (pipedream_flush) and GPipe", "schedule.name")
    draft.put("pipeline_type", "schedule.name")
    draft.put("pp_deg, pp_division", "mesh.pp", "schedule.stages", "schedule.chunks", "parts.stage", "parts.chunk",
              "parts.first", "parts.last")
    if training.padded_batch != plan.ask.global_batch:
        draft.drop("the batch is padded; what padding is has no word there", "ask.global_batch")
    draft.put("global_bsz, chunks", "ask.global_batch", "training.padded_batch", "schedule.micro_batches",
              "schedule.micro_batch_samples")
    draft.drop("the launcher decides", "mesh.gpus", "mesh.gpus_per_node", "mesh.idle_gpus")
    if plan.mesh.order != ("tp", "cp", "dp", "pp"):
        draft.drop("ranks are laid out tp, dp, pp (tp_consecutive_flags 1)", "mesh.order")
    draft.put("tp_consecutive_flags", "mesh.order")
    draft.drop("has no experts", "mesh.expert_order")
    draft.drop("set in the training script", "ask.seq", *(f"training.{name}" for name in type(training).model_fields
                                                          if name != "padded_batch"))
