"""`meshwright plan`: the fastest plan under Galvatron's formulas, as tables, as JSON and as Galvatron's plan file."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost_model import galvatron as cost
from ..cost_model.galvatron_profile import Profile, ProfileError, read_profile
from ..runtime.errors import InvalidInputError
from .planner.galvatron import Ask, DoesNotFit, Found, galvatron_config, search

if TYPE_CHECKING:
    from rich.console import Group

_ZERO = {"ddp": "", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


@dataclass(frozen=True)
class Answer:
    """A plan, or the reason why there is none, with what was asked and the seconds that the search took."""

    profile: Profile
    ask: Ask
    result: Found | DoesNotFit
    search_s: float

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return isinstance(self.result, Found)

    def plan_file(self) -> str:
        """Galvatron's plan JSON. Only for an answer that fits."""
        assert isinstance(self.result, Found)
        return json.dumps(galvatron_config(self.result.plan), indent=4) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; memory in MB of 2^20 bytes per GPU, by stage."""
        usable = cost.usable_mb(self.ask.memory_gb)
        if isinstance(self.result, DoesNotFit):
            bad = self.result
            return {"fits": False, "reason": bad.sentence(), "needed_mb": bad.needed_mb, "usable_mb": usable,
                    "missing_gib": bad.missing_gib, "stage": bad.stage, "pp": bad.pp, "search_s": self.search_s,
                    "fits_with": {"memory_gb": bad.memory_gb, "layers": bad.layers, "chunks": bad.chunks}}
        price = self.result.price
        return {"fits": True, "step_time_s": price.time_s, "samples_per_s": price.samples_per_s,
                "stage_time_ms": price.plain_ms, "memory_mb": price.memory_mb, "used_mb": price.used_mb,
                "usable_mb": usable, "search_s": self.search_s, "cases": self.result.cases,
                "solved": self.result.solved, "plan": galvatron_config(self.result.plan)}

    def __rich__(self) -> Group:
        from rich.console import Group

        assert isinstance(self.result, Found)
        found, setting = self.result, self.result.plan.setting
        head = (f"{found.price.samples_per_s:.4f} samples/s, {found.price.time_s:.4f} s per step predicted · "
                f"pp {setting.pp} · {setting.chunks} chunks · embedding and head: {described(found.plan.embedding)}")
        foot = (f"fastest of all plans under Galvatron's formulas (no re-sharding time): {found.cases} cases, "
                f"{found.solved} searched, the others excluded by their bounds, {self.search_s:.2f} s")
        return Group(head, _layer_table(self.profile, found), _stage_table(self.profile, self.ask, found), foot)


def plan_from_galvatron_profiles(folder: Path, ask: Ask, gpus: int, hidden: int | None = None) -> Answer:
    """Read the profiles in `folder` and search. Raises `InvalidInputError` for what can't be used."""
    try:
        profile = read_profile(folder, gpus, hidden)
    except ProfileError as error:
        raise InvalidInputError(str(error)) from None
    started = time.perf_counter()
    return Answer(profile, ask, search(profile, ask), time.perf_counter() - started)


def described(strategy: cost.Strategy) -> str:
    """`tp 2 · dp 4 · ZeRO-3 · checkpoint`."""
    parts = [f"{name} {n}" for name, n in (("tp", strategy.tp), ("ulysses", strategy.sp), ("dp", strategy.dp)) if n > 1]
    parts += [_ZERO[strategy.zero]] if _ZERO[strategy.zero] else []
    parts += ["checkpoint"] if strategy.checkpoint else []
    return " · ".join(parts) or "one GPU"


def _layer_table(profile: Profile, found: Found) -> Any:
    from rich.table import Table

    table = Table(title="layers", title_justify="left")
    for name in ("stage", "layers", "strategy"):
        table.add_column(name)
    for name in ("ms each", "GiB each"):
        table.add_column(name, justify="right")
    setting, first = found.plan.setting, 0
    for stage in range(setting.pp):
        for strategy, group in itertools.groupby(found.plan.stage(stage)):
            count = len(list(group))
            used_mb = cost.layer_used_mb(cost.layer_memory_mb(profile, setting, strategy), setting, stage)
            table.add_row(str(stage), f"{first}–{first + count - 1} ({count})", described(strategy),
                          f"{cost.layer_time(profile, setting, strategy).plain_ms:.2f}", f"{used_mb / 1024:.2f}")
            first += count
    return table


def _stage_table(profile: Profile, ask: Ask, found: Found) -> Any:
    from rich.table import Table

    table = Table(title="stages: ms per micro-batch, GiB per GPU", title_justify="left")
    for name in ("stage", "time", "states", "activations", "embedding, head", "context, buffer", "used", "limit"):
        table.add_column(name, justify="right")
    plan, price = found.plan, found.price
    other = cost.embedding_memory_mb(profile, plan.setting, plan.embedding)
    rest = cost.CONTEXT_MB + cost.buffer_mb(profile, plan.setting, plan.buffer_degree)
    for i in range(plan.setting.pp):
        sizes = (price.states_mb[i], price.activation_mb[i], sum(other[i]), rest, price.used_mb[i],
                 cost.usable_mb(ask.memory_gb))
        table.add_row(str(i), f"{price.plain_ms[i]:.1f}", *(f"{mb / 1024:.2f}" for mb in sizes))
    return table
