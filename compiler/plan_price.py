"""`meshwright price`: what a layout of the user's own costs. Nothing is searched: cuts are given or even."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..cost_model.cluster import ClusterError
from ..cost_model.layer_memory import ALLOCATOR_SHARE
from ..cost_model.model import LayerKind
from ..cost_model.strategy import LayerStrategy, StrategyError
from ..runtime.errors import InvalidInputError, UnknownNameError
from ..runtime.plan import Plan as PlanFile
from ..runtime.plan_table import confidence
from .planner.evaluate import evaluate
from .planner.foreign import Layout, read_foreign
from .planner.foreign_training import training_of
from .planner.group_search import GroupSearch, Searched, Tuple
from .planner.plan_model import Planner, Request
from .planner.precision import PRECISIONS, training_from
from .planner.pricing import Choice, GroupTables
from .planner.problem import Plan
from .planner.search import NothingFits
from .planner.space import Group
from .planner.space import Layout as SpaceLayout

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Priced:
    """A priced layout. `not_priced`: settings of the file that have no price of their own here."""

    plan: PlanFile
    not_priced: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        p = self.plan.predicted
        return {"fits": p.fits, "title": self.plan.title, "step_time_s": p.step_time_s, "tokens_per_s": p.tokens_per_s,
                "mfu": p.mfu, "missing_bytes": [s.missing_bytes for s in p.stages], "not_priced": list(self.not_priced),
                **confidence(p), "plan": self.plan.model_dump(mode="json")}

    def __rich__(self) -> Any:
        from rich.console import Group as Rows
        from rich.text import Text

        return Rows(self.plan.table(), *(Text(f"not priced: {what}") for what in self.not_priced))


def price_layout(model: str, cluster: str, seq: int | None, global_batch: int | None, path: Path | None,
                 given: dict[str, Any], precision: str | None = None, profile: str = "",
                 allocator_share: float = ALLOCATOR_SHARE) -> Priced:
    """Price the layout in a file, changed by what is given. Raises `InvalidInputError` where it can't be."""
    layout = _layout(path, given)
    if precision is not None:
        if precision not in PRECISIONS:
            raise UnknownNameError("precision", precision, PRECISIONS)
        layout = replace(layout, recipe=precision)
    training, not_priced = training_of(layout) if path is not None else (
        training_from(precision=precision or "bf16"), ())
    request = Request(model, cluster, seq or layout.seq or 4096, global_batch or layout.global_batch or 256,
                      training=training, profile=profile, allocator_share=allocator_share)
    planner = Planner(request)
    layout = replace(layout, global_batch=request.global_batch, seq=request.seq).on(planner.cluster.gpus)
    layout = _chunked(planner, layout)
    assert layout.dp is not None and layout.micro_batches is not None
    plan, searched = fixed(planner, layout)
    return Priced(planner.writer(searched).write(plan, planner.ask(), planner.batch, certified=False), not_priced)


def fixed(planner: Planner, layout: Layout) -> tuple[Plan, Searched]:
    """The one plan of a layout, in tables that hold nothing else."""
    space, pricer = planner.space, planner.pricer
    assert layout.dp is not None and layout.micro_batches is not None
    if set(layout.order) != {"tp", "cp", "dp", "pp"}:
        raise InvalidInputError(f"rank order {', '.join(layout.order)}", expected="tp, cp, dp and pp once each")
    group = Group(layout.pp, layout.micro_batches, layout.order)
    own = SpaceLayout(layout.tp, layout.cp, "ulysses" if layout.cp_kind == "ulysses" else "ring", layout.dp)
    v = layout.chunks
    if layout.pp * v > len(space.order):
        raise InvalidInputError(f"pp {layout.pp} · {v} chunks of {len(space.order)} layers",
                                expected="a layer for each")
    choices: list[tuple[Choice, ...]] = []
    for kind, layer in enumerate(space.kinds):
        reason = space.refusal(layer, own.tp, own.cp, own.cp_kind) or _experts_refusal(layer, layout)
        if reason is not None:
            raise InvalidInputError(f"this layout can't be: {reason}")
        modes = dict.fromkeys((layout.recompute if layer.vocabulary is None else "none", "none"))
        try:
            strategies = [_strategy(layout, own, mode, bool(layer.experts)) for mode in modes]
            choices.append(tuple(pricer.choice(kind, s, group, 0, "given", s.recompute) for s in strategies))
        except (StrategyError, ClusterError) as error:
            raise InvalidInputError(str(error)) from None
    reshard, transfer = pricer.moves((own,), group)
    tables = GroupTables(group, (own,), tuple(choices), reshard, transfer)
    try:
        outer = tables.outer(layout.schedule, v)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
    problem = GroupSearch(pricer).problem([outer])
    ends = _ends(planner, layout)
    recomputed = _recomputed(planner, layout, ends)
    plan = Plan(outer=0, ends=ends, options=tuple(
        0 if again or len(choices[kind]) == 1 else 1 for kind, again in zip(space.order, recomputed, strict=True)))
    fault = problem.plan_fault(plan)
    if fault and "differ by more than one layer" not in fault:
        raise InvalidInputError(f"this layout can't be: {fault}")
    if fault:
        raise InvalidInputError("interleaved parts that differ by more than one layer (embedding and head count as "
                                "layers) are not priced")
    evaluate(problem, plan)
    return plan, Searched(problem, (Tuple(tables, outer),), NothingFits((), True))


def _layout(path: Path | None, given: dict[str, Any]) -> Layout:
    layout = Layout("megatron")
    if path is not None:
        try:
            if path.stat().st_size > MAX_BYTES:
                raise InvalidInputError(f"{path} has {path.stat().st_size} bytes", expected=f"at most {MAX_BYTES}")
            layout = read_foreign(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    names = {"interleave": "chunks"}
    if given.get("tp") is not None and layout.tp == 1:
        layout = replace(layout, sequence_parallel=True)  # the file had none to switch off
    if given.get("interleave") is not None:
        layout = replace(layout, blocks_per_part=None)
    changed = {names.get(k, k): v for k, v in given.items() if v is not None}
    if changed.get("cp", 1) > 1 and layout.cp_kind == "none":
        changed["cp_kind"] = "ring"
    if changed.get("chunks", 1) > 1 and "schedule" not in changed:
        changed["schedule"] = "interleaved"
    if changed.get("recompute") not in (None, "none", "selective", "full"):
        raise InvalidInputError(f"recomputation {changed['recompute']!r}", expected="none, selective or full")
    return replace(layout, **changed)


def _chunked(planner: Planner, layout: Layout) -> Layout:
    """With chunks and schedule as they follow from the blocks of a part. Raises `InvalidInputError`."""
    per_part = layout.blocks_per_part
    if per_part is None or layout.parts is not None:
        return layout
    blocks = sum(planner.space.kinds[k].vocabulary is None for k in planner.space.order)
    counted = blocks + 2 * (layout.source == "torchtitan")  # it counts embedding and head as a layer each
    parts, over = -(-counted // per_part), counted % per_part
    if (over and layout.source != "torchtitan") or parts % layout.pp:
        raise InvalidInputError(f"parts of {per_part} layers in {counted} layers and {layout.pp} stages",
                                expected="a whole number of parts for every stage")
    chunks = parts // layout.pp
    if chunks > 1 and layout.schedule != "interleaved":
        raise InvalidInputError(f"schedule {layout.schedule} with {chunks} parts for each stage",
                                expected=f"one part of {counted // layout.pp} layers, or an interleaved schedule")
    return replace(layout, chunks=chunks, schedule=layout.schedule if chunks > 1 else "1f1b")


def _experts_refusal(kind: LayerKind, layout: Layout) -> str | None:
    if not kind.experts:
        return None
    if kind.experts % layout.ep:
        return f"ep {layout.ep} does not divide {kind.experts} experts of {kind.name}"
    if layout.etp > 1 and layout.etp != layout.tp:
        return f"etp {layout.etp} with tp {layout.tp}: 1 and tp are priced"
    if kind.expert_ffn is not None and kind.expert_ffn % layout.etp:
        return f"etp {layout.etp} does not divide {kind.expert_ffn} feed-forward columns of an expert"
    return None


def _strategy(layout: Layout, own: SpaceLayout, mode: Any, experts: bool) -> LayerStrategy:
    shard = (layout.zero_shard or own.dp * own.cp) // own.cp if layout.zero else 0
    return LayerStrategy(own.tp, own.cp, own.dp, layout.ep if experts else 1, layout.etp if experts else 1, own.cp_kind,
                         layout.zero, 0 if shard == own.dp else shard, mode)


def _ends(planner: Planner, layout: Layout) -> tuple[int, ...]:
    """Where parts end: as the file says, else blocks shared out evenly, embedding first and head last."""
    kinds, order = planner.space.kinds, planner.space.order
    blocks = [i for i, k in enumerate(order) if kinds[k].vocabulary is None]
    parts, before = layout.pp * layout.chunks, blocks[0] if blocks else 0
    if layout.parts is not None:
        counts = [part.blocks for part in layout.parts]
    elif layout.first_blocks is not None or layout.last_blocks is not None:
        rest = len(blocks) - (layout.first_blocks or 0) - (layout.last_blocks or 0)
        inner = parts - (layout.first_blocks is not None) - (layout.last_blocks is not None)
        counts = [rest // inner + (i < rest % inner) for i in range(inner)] if inner else []
        counts = [*([layout.first_blocks] if layout.first_blocks is not None else []), *counts,
                  *([layout.last_blocks] if layout.last_blocks is not None else [])]
    elif layout.source == "torchtitan" and parts > 1:  # shares out embedding and head as layers
        every = len(blocks) + 2
        counts = [every // parts + (i < every % parts) - (i in (0, parts - 1)) for i in range(parts)]
    else:
        counts = [len(blocks) // parts + (i < len(blocks) % parts) for i in range(parts)]
    if sum(counts) != len(blocks) or len(counts) != parts:
        raise InvalidInputError(f"the layout's {len(counts)} parts hold {sum(counts)} blocks",
                                expected=f"{parts} parts of the model's {len(blocks)}")
    ends = [before + n for n in accumulate(counts)]
    return (*ends[:-1], len(order))


def _recomputed(planner: Planner, layout: Layout, ends: tuple[int, ...]) -> list[bool]:
    """Which layers recompute: all blocks, or so many at the start of every part."""
    found, start = list[bool](), 0
    for end in ends:
        blocks = 0
        for layer in range(start, end):
            block = planner.space.kinds[planner.space.order[layer]].vocabulary is None
            found.append(block and (layout.recompute_blocks is None or blocks < layout.recompute_blocks))
            blocks += block
        start = end
    return found
