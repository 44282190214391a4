"""torchtitan's TOML configuration as a `Layout`: the tables [training], [parallelism], [activation_checkpoint].

Its rules: FSDP shards over dp_shard · cp, so ZeRO-3, or ZeRO-2 where parameters stay gathered after the forward pass
(`fsdp_reshard_after_forward`; "default" means that with a pipeline); replicas of that are HSDP. Tensor parallelism is
always sequence-parallel. Without experts' parallelism experts are split as tp splits everything.
"""

from __future__ import annotations

import difflib
import re
import sys
from typing import Any

from ...runtime.errors import InvalidInputError
from ...runtime.plan_layout import RecomputeMode, ScheduleName
from .foreign import Contents, Keys, Layout, limited

SCHEDULES: dict[str, ScheduleName] = {"1F1B": "1f1b", "GPipe": "gpipe", "Interleaved1F1B": "interleaved"}
RECOMPUTE: dict[str, RecomputeMode] = {"none": "none", "full": "full", "selective": "selective"}
WHAT = "torchtitan configuration"
_BLOCK = re.compile(r"layers\.(\d{1,5})")


def read(text: str) -> Layout:
    """The layout. Raises `InvalidInputError` for what is no such file, and for what can't be priced, by name."""
    keys = Keys(WHAT, _toml(text))
    pp = keys.whole("parallelism.pipeline_parallel_degree", 1)
    tp, cp = (keys.whole(f"parallelism.{name}_parallel_degree", 1) for name in ("tensor", "context"))
    replicate = keys.whole("parallelism.data_parallel_replicate_degree", 1)
    shard = keys.optional("parallelism.data_parallel_shard_degree")
    ep = keys.whole("parallelism.expert_parallel_degree", 1)
    etp = keys.whole("parallelism.expert_tensor_parallel_degree", 1)
    schedule = _schedule(keys, pp)
    parts = _parts(keys.get("parallelism.module_fqns_per_model_part"))
    chunks = _chunks(pp, schedule, parts)
    local, global_batch = keys.whole("training.local_batch_size", 8), keys.optional("training.global_batch_size")
    micro = keys.whole("parallelism.pipeline_parallel_microbatch_size", 1) if pp > 1 else local
    if local % micro:
        raise InvalidInputError(f"{WHAT}: local_batch_size {local} is no multiple of the micro-batch {micro}")
    recompute, compiled = _recompute(keys), keys.flag("compile.enable", False)
    if recompute == "none" and compiled:
        recompute = "min-cut"  # what torch.compile keeps
    return Layout(
        "torchtitan", tp=tp, sequence_parallel=tp > 1, cp=cp, cp_kind=_cp_kind(keys, cp),
        dp=None if shard is None else replicate * shard, dp_shard=shard, instances=replicate, ep=ep,
        etp=etp if ep > 1 else tp, zero=_zero(keys, pp, cp, shard), pp=pp, chunks=chunks, schedule=schedule,
        micro_batch=micro, micro_batches=local // micro if global_batch is None else None, global_batch=global_batch,
        seq=keys.whole("training.seq_len", 2048), recompute=recompute, parts=parts,
        blocks_per_part=keys.optional("parallelism.pipeline_parallel_layers_per_stage"),
        recipe=_recipe(keys), gradient_dtype=keys.text("training.dtype", "float32"),
        optimizer=(keys.text("optimizer.name", "AdamW") or "AdamW").lower(),
        fusion="compiled" if compiled else "none",
        async_tp=keys.flag("parallelism.enable_async_tensor_parallel", False) and compiled and tp > 1,
        ignored=_left(keys))


def _left(keys: Keys) -> tuple[str, ...]:
    """What was not read; what looks like a known key with a slip says so."""
    found = []
    for key in keys.left("parallelism", "activation_checkpoint", "quantize"):
        meant = difflib.get_close_matches(key, sorted(keys.asked), n=1, cutoff=0.9)
        found.append(f"{key[:120]} (unknown; did you mean {meant[0]}?)" if meant else key[:120])
    return tuple(found)


def _toml(text: str) -> dict[str, Any]:
    limited(text, WHAT)
    if sys.version_info >= (3, 11):
        import tomllib as reader
    else:
        import tomli as reader
    try:
        return reader.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{WHAT}: not TOML ({' '.join(str(error).split())[:200]})") from None


def _one_of(keys: Keys, key: str, known: dict[str, Any], default: str) -> Any:
    value = keys.text(key, default)
    if value not in known:
        raise InvalidInputError(f"{WHAT}: {key} is {str(value)[:40]!r}", expected=f"one of {', '.join(known)}")
    return known[value]


def _schedule(keys: Keys, pp: int) -> ScheduleName:
    found: ScheduleName = _one_of(keys, "parallelism.pipeline_parallel_schedule", SCHEDULES, "1F1B")
    return found if pp > 1 else "1f1b"


def _zero(keys: Keys, pp: int, cp: int, shard: int | None) -> int:
    reshard = keys.text("parallelism.fsdp_reshard_after_forward", "default")
    if reshard not in ("default", "always", "never"):
        raise InvalidInputError(f"{WHAT}: parallelism.fsdp_reshard_after_forward is {str(reshard)[:40]!r}",
                                expected="default, always or never")
    if shard == 1 and cp == 1:
        return 0
    return 3 if reshard == "always" or (reshard == "default" and pp == 1) else 2


def _cp_kind(keys: Keys, cp: int) -> Any:
    method = _one_of(keys, "parallelism.context_parallel_rotate_method",
                     {"allgather": "all-gather", "alltoall": "ring"}, "allgather")
    return method if cp > 1 else "none"


def _recompute(keys: Keys) -> RecomputeMode:
    """ "selective" there also runs every second product again: the nearest is ours, which keeps all products."""
    mode: RecomputeMode = _one_of(keys, "activation_checkpoint.mode", RECOMPUTE, "selective")
    option = keys.get("activation_checkpoint.selective_ac_option")
    if mode == "selective" and option not in (None, "op", "1", 1):
        if option in ("2", 2) or str(option).isdigit():
            raise InvalidInputError(f"{WHAT}: activation_checkpoint recomputes every {option}th layer",
                                    expected='mode "none", "full", or "selective" with selective_ac_option "op"')
        raise InvalidInputError(f"{WHAT}: activation_checkpoint.selective_ac_option is {str(option)[:40]!r}",
                                expected='"op" or a number')
    if mode == "selective" and option in ("1", 1):
        return "full"
    return mode


def _recipe(keys: Keys) -> str | None:
    """"fp8-tensorwise", "fp8-rowwise", "mxfp8", else the dtype of matrix products."""
    converters = keys.get("model.converters")
    names = converters if isinstance(converters, list) else []
    if "quantize.linear.mx" in names:
        keys.get("quantize.linear.mx.recipe_name")
        return "mxfp8"
    if "quantize.linear.float8" in names:
        return "fp8-" + (keys.text("quantize.linear.float8.recipe_name", None) or "tensorwise").split("_")[0]
    return {"bfloat16": "bf16", "float32": "fp32"}.get(keys.text("training.mixed_precision_param", "bfloat16") or "")


def _parts(value: object) -> tuple[Contents, ...] | None:
    if value is None:
        return None
    fault = InvalidInputError(f"{WHAT}: parallelism.module_fqns_per_model_part is not understood",
                              expected="lists of tok_embeddings, layers.N in order, norm, output")
    if not isinstance(value, list) or not all(isinstance(p, list) and p for p in value):
        raise fault
    found, at = [], 0
    for part in value:
        blocks = [_BLOCK.fullmatch(str(name)) for name in part]
        numbers = [int(b[1]) for b in blocks if b]
        others = {str(name) for name, b in zip(part, blocks, strict=True) if not b}
        if numbers != list(range(at, at + len(numbers))) or others - {"tok_embeddings", "norm", "output"}:
            raise fault
        at += len(numbers)
        found.append(Contents("tok_embeddings" in others, len(numbers), "output" in others))
    return tuple(found)


def _chunks(pp: int, schedule: ScheduleName, parts: tuple[Contents, ...] | None) -> int:
    if parts is None:
        return 2 if schedule == "interleaved" else 1
    if len(parts) % pp:
        raise InvalidInputError(f"{WHAT}: {len(parts)} model parts for {pp} stages", expected="a multiple")
    return len(parts) // pp
