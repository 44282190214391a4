"""Layouts written for other trainers, as plain numbers: `meshwright price --from FILE` reads them, and exports are
tested by reading them back.

    read_foreign(text)     the format is recognised by its content
    read_torchtitan(text)  a TOML job configuration (up to February 2026, 9810191^; later ones are Python)
    read_megatron(text)    Megatron-LM arguments (d98e8a6): a file of them, a launch script, or YAML with the same names
    read_deepspeed(text)   a DeepSpeed JSON configuration

A `Layout` is what the file says and nothing more: `on(gpus)` fills in what the launcher decides (data parallelism is
mostly what is left). Nothing is run, imported or expanded; shell variables are refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...runtime.errors import InvalidInputError
from ...runtime.plan_layout import CpKind, RecomputeMode, ScheduleName

MAX_BYTES = 1 << 20
Source = Literal["torchtitan", "megatron", "deepspeed"]


@dataclass(frozen=True)
class Contents:
    """What a part of the pipeline holds: embedding, a number of transformer blocks, head."""

    embedding: bool
    blocks: int
    head: bool


@dataclass(frozen=True)
class Layout:
    """A uniform layout. None: not said by the file, and for `dp`, `zero_shard`, `micro_batches` filled by `on`.

    `dp_shard`: ranks of data parallelism that share one copy where the file says so (torchtitan); `instances`: copies
    of sharded states (Megatron). `micro_batch`: samples of one replica. `recompute_blocks`: how many blocks at the
    start of every part recompute (None: all). `overlap_gradients`, `overlap_parameters`: whether their reduction and
    gathering run beside computation. `parts`: contents of every part in model order; `blocks_per_part` where
    the file only counts. `seq`, `global_batch`, `optimizer`, `recipe` ("bf16", "fp8-…") as in a plan. `ignored`: keys
    that were read and mean nothing here. `ep` and `etp` mean nothing for a model without experts.
    """

    source: Source
    tp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    cp_kind: CpKind = "none"
    dp: int | None = None
    dp_shard: int | None = None
    instances: int = 1
    ep: int = 1
    etp: int = 1
    zero: int = 0
    zero_shard: int | None = None
    pp: int = 1
    chunks: int = 1
    schedule: ScheduleName = "1f1b"
    micro_batch: int = 1
    micro_batches: int | None = None
    global_batch: int | None = None
    seq: int | None = None
    recompute: RecomputeMode = "none"
    recompute_blocks: int | None = None
    parts: tuple[Contents, ...] | None = None
    blocks_per_part: int | None = None
    first_blocks: int | None = None
    last_blocks: int | None = None
    order: tuple[str, ...] = ("tp", "cp", "dp", "pp")
    recipe: str | None = None
    gradient_dtype: str | None = None
    optimizer: str | None = None
    fusion: Literal["none", "kernels", "compiled"] | None = None
    async_tp: bool = False
    flash_attention: bool = True
    overlap_gradients: bool = True
    overlap_parameters: bool = True
    ignored: tuple[str, ...] = ()

    def on(self, gpus: int) -> Layout:
        """With everything that follows from the number of GPUs. Raises `InvalidInputError` where the layout does not
        lie in them or the batch does not divide."""
        rest, over = divmod(gpus, self.tp * self.cp * self.pp)
        if over or rest < 1:
            raise InvalidInputError(f"tp {self.tp} · cp {self.cp} · pp {self.pp} do not divide {gpus} GPUs")
        if self.dp is not None and self.dp != rest:
            raise InvalidInputError(f"the {self.source} layout has dp {self.dp}; on {gpus} GPUs dp is {rest}")
        batch = self.global_batch or rest * self.micro_batch * (self.micro_batches or 1)
        count, over = divmod(batch, rest * self.micro_batch)
        if over or not count:
            raise InvalidInputError(f"dp {rest} · micro-batch {self.micro_batch} do not divide the batch of {batch}")
        if (rest * self.cp) % self.instances:
            raise InvalidInputError(f"{self.instances} copies of sharded states over {rest * self.cp} ranks")
        shard = rest * self.cp // self.instances if self.dp_shard is None else self.dp_shard * self.cp
        return replace(self, dp=rest, global_batch=batch, micro_batches=count, dp_shard=None, instances=1,
                       zero_shard=shard if self.zero else 1)


def read_foreign(text: str) -> Layout:
    """The layout in `text`, whatever of the three formats it is. Raises `InvalidInputError`."""
    limited(text, "the configuration")
    start = text.lstrip()
    if not start:
        raise InvalidInputError("the configuration is empty")
    if start.startswith("{"):
        return read_deepspeed(text)
    if any(line.lstrip().startswith("[") and line.rstrip().endswith("]") for line in text.splitlines()):
        return read_torchtitan(text)
    return read_megatron(text)


def read_torchtitan(text: str) -> Layout:
    """The layout of a torchtitan TOML configuration. Raises `InvalidInputError`, one line."""
    from .foreign_torchtitan import read

    return read(text)


def read_megatron(text: str) -> Layout:
    """The layout in Megatron-LM's arguments. Raises `InvalidInputError`, one line."""
    from .foreign_megatron import WHAT, arguments, read

    keys = Keys(WHAT, arguments(text))
    layout, always = read(text), keys.flag("use-torch-fsdp2", False)
    backend = "unfused" if keys.flag("use-local-attention", False) else keys.text("attention-backend", "auto")
    overlaps = [always or keys.flag(name, False) for name in ("overlap-grad-reduce", "overlap-param-gather")]
    return replace(layout, flash_attention=backend not in ("unfused", "local"), overlap_gradients=overlaps[0],
                   overlap_parameters=overlaps[1], ignored=tuple(k for k in layout.ignored if k not in keys.asked))


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON document. Raises `ValueError` for a name that stands in it twice: the last would win."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice[:60]!r} is given twice")
    return made


def read_deepspeed(text: str) -> Layout:
    """The layout of a DeepSpeed JSON configuration; its pipeline is in the script and not seen. Raises
    `InvalidInputError`."""
    limited(text, "DeepSpeed configuration")
    try:
        data = json.loads(text, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"DeepSpeed configuration: not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise InvalidInputError("DeepSpeed configuration: no JSON object")
    if data.get("format") == "meshwright-plan":
        raise InvalidInputError("this is a Meshwright plan", expected="another trainer's configuration",
                                do="meshwright show PLAN prices it.")
    keys = Keys("DeepSpeed configuration", data)
    zero = keys.whole("zero_optimization.stage", 0, least=0)
    if zero > 3:
        raise InvalidInputError(f"DeepSpeed configuration: zero_optimization.stage is {zero}", expected="0 to 3")
    shard = keys.whole("zero_optimization.mics_shard_size", -1, least=-1)
    bf16, fp16 = keys.flag("bf16.enabled", False), keys.flag("fp16.enabled", False)
    gradient = keys.text("data_types.grad_accum_dtype", None)
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", None: None}
    if gradient not in names:
        raise InvalidInputError(f"DeepSpeed configuration: data_types.grad_accum_dtype is {str(gradient)[:40]!r}",
                                expected="fp32, bf16 or fp16")
    name = keys.text("optimizer.type", None)
    layout = Layout(
        "deepspeed", tp=keys.whole("tensor_parallel.autotp_size", 1), zero=zero,
        dp_shard=shard if shard > 0 else None, micro_batch=keys.whole("train_micro_batch_size_per_gpu", 1),
        micro_batches=keys.optional("gradient_accumulation_steps"), global_batch=keys.optional("train_batch_size"),
        recipe="bf16" if bf16 else "fp16" if fp16 else "fp32",
        gradient_dtype=names[gradient], optimizer=name.lower() if name else None)
    return replace(layout, ignored=keys.left())


class Keys:
    """A nested table, read key by key: `parallelism.tensor_parallel_degree`. What was not asked for is `left`."""

    def __init__(self, what: str, table: dict[str, object]) -> None:
        self.what, self.values = what, dict(_flat(table))
        self.asked: set[str] = set()

    def get(self, key: str) -> object:
        self.asked.add(key)
        return self.values.get(key)

    def whole(self, key: str, default: int, least: int = 1) -> int:
        """A whole number, at least `least`."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1 << 40:
            raise InvalidInputError(f"{self.what}: {key} is {str(value)[:40]!r}",
                                    expected=f"a whole number from {least}")
        return value

    def optional(self, key: str) -> int | None:
        """A whole number from 1, or None where it is absent or -1."""
        if self.get(key) in (None, -1):
            return None
        return self.whole(key, 1)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidInputError(f"{self.what}: {key} is {str(value)[:40]!r}", expected="true or false")
        return value

    def text(self, key: str, default: str | None) -> str | None:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise InvalidInputError(f"{self.what}: {key} is {str(value)[:40]!r}", expected="a text")
        return value

    def left(self, *sections: str) -> tuple[str, ...]:
        """Keys nobody asked for, of some sections or of all."""
        return tuple(sorted(k for k in self.values if k not in self.asked and
                            (not sections or k.split(".")[0] in sections)))


def limited(text: str, what: str) -> None:
    """Raises `InvalidInputError` for a text that no configuration is as long as."""
    if len(text) > MAX_BYTES:
        raise InvalidInputError(f"{what} has {len(text)} characters", expected=f"at most {MAX_BYTES}")


def _flat(table: dict[str, object]) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    todo: list[tuple[str, dict[str, object]]] = [("", table)]
    while todo:
        prefix, inner = todo.pop()
        for key, value in inner.items():
            if isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value))
            else:
                found.append((f"{prefix}{key}", value))
    return found
