"""Megatron-LM's arguments as a `Layout`. They come as a file of arguments, inside a launch script, or as YAML.

Its rules: data parallelism is what the world size leaves; the distributed optimizer is ZeRO-1, Megatron FSDP's
strategies are ZeRO-1 to 3; `--num-distributed-optimizer-instances` are copies of the shards. Ranks are laid out
tp-cp-dp-pp, or tp-cp-pp-dp. Experts' tensor parallelism is tp where it is not given. Selective recomputation runs the
core of attention again, whose large results flash attention never keeps: it is read as none.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from ...runtime.errors import InvalidInputError
from ...runtime.plan_layout import CpKind, RecomputeMode
from .foreign import Contents, Keys, Layout, limited

WHAT = "Megatron arguments"
STRATEGIES = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
CP_KINDS: dict[str, CpKind] = {"p2p": "ring", "a2a": "ulysses", "allgather": "all-gather", "all_gather": "all-gather"}
FP8_RECIPES = {"tensorwise": "fp8-tensorwise", "delayed": "fp8-delayed", "blockwise": "fp8-blockwise", "mxfp8": "mxfp8"}
RELEVANT = re.compile(r"parallel|recompute|pipeline|batch-size|seq-length|fsdp|distributed-opt|shard|fp8|fp4|offload|"
                      r"cp-comm|overlap|moe-|num-layers")
_LAYOUT_LETTERS = frozenset("EtL|")
_MAX_LAYOUT, _MAX_DEPTH = 20_000, 16
TOO_LONG = f"{WHAT}: --pipeline-model-parallel-layout has over {_MAX_LAYOUT} layers"


def read(text: str) -> Layout:
    """The layout. Raises `InvalidInputError` for what holds no arguments, and for what can't be priced, by name."""
    keys = Keys(WHAT, arguments(text))
    tp, cp, pp = (keys.whole(name, 1) for name in ("tensor-model-parallel-size", "context-parallel-size",
                                                   "pipeline-model-parallel-size"))
    zero = _zero(keys)
    parts = _parts(keys.text("pipeline-model-parallel-layout", None))
    per_part, chunks = keys.optional("num-layers-per-virtual-pipeline-stage"), _chunks(keys, pp, parts)
    interleaved = chunks > 1 or per_part is not None
    recompute, blocks = _recompute(keys)
    order = ("tp", "cp", "pp", "dp") if keys.flag("use-tp-pp-dp-mapping", False) else ("tp", "cp", "dp", "pp")
    recipe = _recipe(keys)
    return Layout(
        "megatron", tp=tp, sequence_parallel=keys.flag("sequence-parallel", False) and tp > 1, cp=cp,
        cp_kind=_cp_kind(keys, cp), instances=keys.whole("num-distributed-optimizer-instances", 1) if zero else 1,
        ep=keys.whole("expert-model-parallel-size", 1), etp=keys.whole("expert-tensor-parallel-size", tp), zero=zero,
        pp=pp, chunks=chunks, schedule="interleaved" if interleaved else "1f1b",
        micro_batch=keys.whole("micro-batch-size", 1), global_batch=keys.optional("global-batch-size"),
        seq=keys.optional("seq-length"), recompute=recompute, recompute_blocks=blocks, parts=parts,
        blocks_per_part=per_part, first_blocks=keys.optional("decoder-first-pipeline-num-layers"),
        last_blocks=keys.optional("decoder-last-pipeline-num-layers"), order=order, recipe=recipe,
        gradient_dtype=_gradient_dtype(keys, recipe),
        optimizer=_optimizer(keys), fusion="kernels", async_tp=keys.flag("tp-comm-overlap", False) and tp > 1,
        ignored=tuple(k for k in keys.left() if RELEVANT.search(k)))


def arguments(text: str) -> dict[str, object]:
    """Every `--name value` of a text, without the dashes; flags are True. Raises `InvalidInputError`."""
    limited(text, WHAT)
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        words = []
        if "--" in text:
            raise InvalidInputError(f"{WHAT}: the quotes don't match ({error})") from None
    found: dict[str, object] = {}
    name = ""
    for word in words:
        word = word.strip("()") if word in ("(", ")") or word.endswith("=(") else word
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            found[name] = _value(name, value) if given else True
        elif name and word and not re.match(r"[A-Za-z_]\w*=|&&|\|\||;|\|$", word):
            before = found[name]
            found[name] = _value(name, word) if before is True else [*_listed(before), _value(name, word)]
        else:
            name = ""
    return found or _yaml(text)


def _value(name: str, word: str) -> object:
    if "$" in word and RELEVANT.search(name):
        raise InvalidInputError(f"{WHAT}: --{name[:60]} is {word[:40]!r}", expected="a value",
                                do="Put the variable's value in its place; nothing is expanded.")
    if re.fullmatch(r"-?\d{1,15}", word):
        return int(word)
    return {"true": True, "false": False}.get(word.lower(), word)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _yaml(text: str) -> dict[str, object]:
    """YAML with Megatron's names, nested or not; anchors are refused."""
    import yaml

    fault = InvalidInputError(f"{WHAT}: none found", expected="--tensor-model-parallel-size and the like, or YAML")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InvalidInputError(f"{WHAT}: the YAML has an alias (*)", expected="plain fields")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise fault
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise fault from None
    if not isinstance(value, dict):
        raise fault
    flat = {k.rsplit(".", 1)[-1].replace("_", "-"): v for k, v in Keys(WHAT, _named(value)).values.items()}
    if not any(RELEVANT.search(k) for k in flat):
        raise fault
    return {k: v for k, v in flat.items() if v is not None}


def _named(table: dict[Any, Any]) -> dict[str, object]:
    return {str(k): v for k, v in table.items()}


def _zero(keys: Keys) -> int:
    strategy = keys.text("data-parallel-sharding-strategy", "optim_grads_params")
    optimizer = keys.flag("use-distributed-optimizer", False)
    if keys.flag("use-megatron-fsdp", False) or keys.flag("use-torch-fsdp2", False):
        if strategy not in STRATEGIES:
            raise InvalidInputError(f"{WHAT}: --data-parallel-sharding-strategy is {str(strategy)[:40]!r}",
                                    expected=f"one of {', '.join(STRATEGIES)}")
        return STRATEGIES[strategy]
    return int(optimizer)


def _cp_kind(keys: Keys, cp: int) -> CpKind:
    kinds = set(map(str, _listed(keys.get("cp-comm-type") or "p2p")))
    if cp == 1:
        return "none"
    if len(kinds) > 1 or not kinds <= set(CP_KINDS):
        raise InvalidInputError(f"{WHAT}: --cp-comm-type {' '.join(sorted(kinds))[:60]}",
                                expected="one kind for all layers: p2p, a2a or allgather")
    return CP_KINDS[kinds.pop()]


def _recompute(keys: Keys) -> tuple[RecomputeMode, int | None]:
    granularity, method = keys.text("recompute-granularity", None), keys.text("recompute-method", None)
    if keys.flag("recompute-activations", False):
        granularity = granularity or "selective"
    count = keys.optional("recompute-num-layers")
    if granularity not in (None, "full", "selective"):
        raise InvalidInputError(f"{WHAT}: --recompute-granularity is {granularity[:40]!r}",
                                expected="full or selective")
    modes = keys.get("recompute-modules")
    if granularity == "selective" and modes not in (None, "core_attn", ["core_attn"]):
        raise InvalidInputError(f"{WHAT}: --recompute-modules {str(modes)[:60]}",
                                expected="core_attn, or full recomputation")
    mode: RecomputeMode = "full" if granularity == "full" else "none"
    if mode == "full" and method == "uniform" and (count or 1) > 1:
        raise InvalidInputError(f"{WHAT}: units of {count} layers are recomputed together", expected="units of 1")
    return mode, count if mode == "full" and method == "block" else None


def _recipe(keys: Keys) -> str:
    fp8 = keys.text("fp8-format", None) or keys.text("fp8", None)
    recipe = keys.text("fp8-recipe", "delayed")
    if keys.text("fp4-format", None):
        four = keys.text("fp4-recipe", "nvfp4")
        if four != "nvfp4":
            raise InvalidInputError(f"{WHAT}: --fp4-recipe is {str(four)[:40]!r}", expected="nvfp4")
        return "nvfp4"
    if fp8 is not None:
        if recipe not in FP8_RECIPES:
            raise InvalidInputError(f"{WHAT}: --fp8-recipe is {str(recipe)[:40]!r}",
                                    expected=f"one of {', '.join(FP8_RECIPES)}")
        return FP8_RECIPES[recipe]
    return "bf16" if keys.flag("bf16", False) else "fp16" if keys.flag("fp16", False) else "fp32"


def _gradient_dtype(keys: Keys, recipe: str) -> str:
    if keys.flag("accumulate-allreduce-grads-in-fp32", False) or recipe == "fp32":
        return "float32"
    return "float16" if recipe == "fp16" else "bfloat16"


def _optimizer(keys: Keys) -> str:
    """Its Adam decouples weight decay."""
    name = (keys.text("optimizer", "adam") or "adam").lower()
    return "adamw" if name == "adam" else name


def _parts(layout: str | None) -> tuple[Contents, ...] | None:
    """`Et*3|(tt|)*29,L`: E embedding, t block, L head, | between parts."""
    if layout is None:
        return None
    if len(layout) > _MAX_LAYOUT:
        raise InvalidInputError(TOO_LONG)
    text = layout.replace(",", "")
    for pattern in (r"\(([^()]+)\)\*(\d{1,4})", r"([EtmL|])\*(\d{1,4})"):
        while match := re.search(pattern, text):
            times = int(match[2])
            if len(text) + len(match[1]) * times > _MAX_LAYOUT + len(match[0]):  # before it takes any memory
                raise InvalidInputError(TOO_LONG)
            text = text[:match.start()] + match[1] * times + text[match.end():]
    if not set(text) <= _LAYOUT_LETTERS:
        raise InvalidInputError(f"{WHAT}: --pipeline-model-parallel-layout {layout[:60]!r}",
                                expected="E, t and L between |, with *n for repetition (no m: multi-token prediction)")
    return tuple(Contents("E" in part, part.count("t"), "L" in part) for part in text.split("|"))


def _chunks(keys: Keys, pp: int, parts: tuple[Contents, ...] | None) -> int:
    """Parts of a stage; 1 also where it follows from the layers of a part, which only the model can tell."""
    chunks = keys.whole("num-virtual-stages-per-pipeline-rank", 1)
    if parts is None:
        return chunks
    if len(parts) % pp:
        raise InvalidInputError(f"{WHAT}: a layout of {len(parts)} parts for {pp} stages", expected="a multiple")
    return len(parts) // pp
