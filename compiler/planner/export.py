"""A plan as another trainer's configuration. What the target has no word for stands on a list, field by field.

    export(plan, "torchtitan")  TOML      export(plan, "megatron")   arguments, one a line
    export(plan, "deepspeed")   JSON      export(plan, "galvatron")  JSON

Every field of the plan's schema is in `Export.expressed` (with the place in the file) or in `Export.cannot` (with the
reason); a name there stands for everything below it too. Trainers give all layers the same options: where a plan mixes
them the file takes what most layers have (of recomputation and ZeRO: what needs least memory), and the list says what
was lost. What is expressed, `foreign.py` reads back.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Union, get_args, get_origin

from ...runtime.errors import UnknownNameError
from ...runtime.plan import Plan
from ...runtime.plan_data import PlanData
from ...runtime.plan_layout import LayerRange
from .foreign import Contents

NO_SETTING = {
    "format": "a mark of plan files", "version": "a mark of plan files", "predicted": "a prediction, no setting",
    "certificate": "about the search, no setting", "beaten": "about the search, no setting",
    "fingerprints": "about the plan's inputs, no setting", "ask.objective": "about the search, no setting",
    "ask.options": "about the search, no setting", "ask.price_usd_per_gpu_hour": "about the search, no setting",
    "ask.imbalance": "an assumption about the data, no setting",
    "ask.cluster": "the launcher decides where processes run",
    "ask.model": "the model is chosen and configured in the trainer",
    "model": "the model is chosen and configured in the trainer",
    "layers.kind": "the model is chosen and configured in the trainer",
    "layers.experts": "the model is chosen and configured in the trainer",
    "layers.options.runnable": "about Meshwright's own runtime",
    "layers.options.why_not_runnable": "about Meshwright's own runtime",
}


LEAST_MEMORY_LAST = ("none", "min-cut", "selective", "full")  # modes of recomputation


@dataclass(frozen=True)
class Export:
    """The file and what became of every field of the plan: `expressed` maps it to a place in the file, `cannot` to the
    reason why it has none."""

    target: str
    text: str
    expressed: Mapping[str, str]
    cannot: Mapping[str, str]

    @property
    def lost(self) -> dict[str, str]:
        """The part of `cannot` that changes how the model runs."""
        return {k: v for k, v in self.cannot.items() if NO_SETTING.get(k) != v}


@dataclass
class Draft:
    """An export in the making."""

    plan: Plan
    expressed: dict[str, str] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=lambda: dict(NO_SETTING))

    def put(self, where: str, *paths: str) -> None:
        """These fields are at `where` in the file (unless something of them was found lost before)."""
        self.expressed.update({p: where for p in paths if p not in self.cannot})

    def drop(self, reason: str, *paths: str) -> None:
        """These fields are not in the file."""
        for path in paths:
            self.expressed.pop(path, None)
            before = self.cannot.get(path, reason)
            self.cannot[path] = before if reason in before else f"{before}; {reason}"

    def option(self, name: str, where: str, ranges: Sequence[LayerRange] | None = None) -> Any:
        """The value that most layers have, but of recomputation and ZeRO the one that needs least memory: a file that
        is slower than the plan beats one that runs out of memory. The others' are noted as lost."""
        chosen = self.plan.layers if ranges is None else ranges
        counts: Counter[Any] = Counter()
        for r in chosen or self.plan.layers[:1]:
            counts[getattr(r.options, name)] += r.count
        value = counts.most_common(1)[0][0]
        if name == "recompute":
            value = max(counts, key=LEAST_MEMORY_LAST.index)
        elif name == "zero":
            value = max(counts)
        others = [(v, n) for v, n in counts.most_common() if v != value]
        if others:
            rest = ", ".join(f"{v} in {n}" for v, n in others[:4])
            self.drop(f"the file says {value} for all layers, the plan has {rest} of them", f"layers.options.{name}")
        elif where:
            self.put(where, f"layers.options.{name}")
        return value

    def finish(self, target: str, text: str, comment: str = "") -> Export:
        """The export; with a `comment` sign the list of what is lost stands at the top of the file."""
        for name in ("first", "last", "count"):
            if f"layers.{name}" not in self.expressed:
                self.cannot.setdefault(f"layers.{name}", "the file has one set of options for all layers")
        made = Export(target, text, dict(self.expressed), dict(self.cannot))
        notes = "".join(f"{comment} cannot express {line}\n" for line in listed(made.lost)) if comment else ""
        return replace(made, text=notes + text)


def export(plan: Plan, target: str) -> Export:
    """The configuration for `target`. Raises `UnknownNameError`."""
    if target not in TARGETS:
        raise UnknownNameError("export target", target, TARGETS)
    return TARGETS[target](plan)


def _torchtitan(plan: Plan) -> Export:
    from .export_torchtitan import to_torchtitan

    return to_torchtitan(plan)


def _megatron(plan: Plan) -> Export:
    from .export_megatron import to_megatron

    return to_megatron(plan)


def _deepspeed(plan: Plan) -> Export:
    from .export_deepspeed import to_deepspeed

    return to_deepspeed(plan)


def _galvatron(plan: Plan) -> Export:
    from .export_galvatron import to_galvatron

    return to_galvatron(plan)


TARGETS: dict[str, Callable[[Plan], Export]] = {
    "torchtitan": _torchtitan, "megatron": _megatron, "deepspeed": _deepspeed, "galvatron": _galvatron}


def schema_paths(kind: type[PlanData] = Plan, prefix: str = "") -> Iterator[str]:
    """Every field of a plan down to plain values, `layers.options.tp`; lists and tables of values are one field."""
    for name, info in kind.model_fields.items():
        inner = _model_in(info.annotation)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from schema_paths(inner, f"{prefix}{name}.")


def _model_in(annotation: Any) -> type[PlanData] | None:
    """The schema inside of `tuple[Part, ...]`, `Certificate | None` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, PlanData):
        return annotation
    if get_origin(annotation) in (tuple, Union, types.UnionType, Annotated):
        return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)
    return None


def is_block(name: str) -> bool:
    """Whether a layer is one of the model's own, and not what its `forward` computes around them."""
    return not name.startswith(("before ", "after ", "between "))


def blocks(plan: Plan) -> list[LayerRange]:
    """The ranges of transformer blocks."""
    return [r for r in plan.layers if is_block(r.first)]


def contents(plan: Plan) -> tuple[Contents, ...] | None:
    """What every part holds; None where the model is no embedding, one stack of blocks and a head."""
    names, found = plan.model.layers, []
    inner = [is_block(n) for n in names]
    if len(names) < 3 or inner != [False, *[True] * (len(names) - 2), False]:
        return None
    at = {name: i for i, name in enumerate(names)}
    for part in plan.parts:
        first, last = at[part.first], at[part.last]
        held = range(first, last + 1)
        found.append(Contents(0 in held, sum(inner[first:last + 1]), len(names) - 1 in held))
    return tuple(found)


def replica_micro_batch(plan: Plan, dp: int) -> int:
    """Samples of a micro-batch on one replica."""
    return plan.schedule.micro_batch_samples // dp


def listed(lost: Mapping[str, str]) -> list[str]:
    """`layers.options.tp: reason`, a line each, reasons that several fields share on one line."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in lost.items():
        by_reason.setdefault(reason, []).append(path)
    return [" ".join(f"{', '.join(paths)}: {reason}".split()) for reason, paths in by_reason.items()]
