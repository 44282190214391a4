"""`meshwright why`: the best plan of every family that a plan beat, what held that one back, and which are as good.

Two plans are near ties where their predicted steps differ by less than predictions of published runs were off by
(`cost_model.error_band.near_tie`): the cost model can't tell them apart. Of these the simplest is preferred: the fewest
parallel axes in most layers, then the least recomputation, then no interleaving, then the faster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost_model.error_band import near_tie
from ..runtime.errors import InvalidInputError, MeshwrightError
from ..runtime.plan import Plan
from ..runtime.plan_predictions import Beaten, Predicted
from ..runtime.plan_table import GIB, beaten_by
from .plan_answers import planner_of
from .planner.confidence import model_class
from .planner.infeasible import least_memory
from .planner.plan_model import Planner
from .planner.reprice import reprice
from .planner.space import MODES

if TYPE_CHECKING:
    from rich.console import Group as Tables

AXES = ("tp", "cp", "pp", "ep")
MIXED = "every layer its own layout (--mixing)"

Complexity = tuple[int, int, int, int]


@dataclass(frozen=True)
class Family:
    """Plans that do something which the plan does not: their best one and how simple it is, None where none is."""

    beaten: Beaten
    complexity: Complexity | None = None


@dataclass(frozen=True)
class Why:
    """A plan, the families it beat, and where its time and memory go. `near_tie`: the share within which steps are
    equal, for the reason in `near_tie_source`."""

    plan: Plan
    beaten: tuple[Beaten, ...]
    seconds: float
    near_tie: float
    near_tie_source: str

    @property
    def binding(self) -> str:
        """What limits the plan itself."""
        p = self.plan.predicted
        stage = p.stages[p.tightest]
        busiest = min(range(len(p.stages)), key=lambda i: p.stages[i].bubble_ns)
        return (f"stage {busiest} is the busiest: {_share(p, busiest)}; stage {p.tightest} has the least memory left: "
                f"{(stage.limit_bytes - stage.peak_bytes) / GIB:.1f} GiB of {stage.limit_bytes / GIB:.1f}")

    @property
    def verdict(self) -> str:
        """Which plans are equal, and which of them is preferred."""
        equal = [b for b in self.beaten if b.near_tie]
        if not equal:
            return f"no other family comes within {self.near_tie:.0%} ({self.near_tie_source})"
        best = next((b for b in equal if b.preferred), None)
        names = ", ".join(b.family for b in equal)
        rest = ("this plan is the simplest of them" if best is None else
                f"prefer {best.family!r}, the simplest of them: {best.title}")
        return f"within {self.near_tie:.0%} ({self.near_tie_source}), so equal: {names}; {rest}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"title": self.plan.title, "step_time_s": self.plan.predicted.step_time_s, "binding": self.binding,
                "near_tie_share": self.near_tie, "near_tie_source": self.near_tie_source, "verdict": self.verdict,
                "preferred": next((b.family for b in self.beaten if b.preferred), None), "seconds": self.seconds,
                "beaten": [b.model_dump(mode="json") for b in self.beaten]}

    def __rich__(self) -> Tables:
        from rich.console import Group as Rows
        from rich.table import Table
        from rich.text import Text

        table = Table(title="the best plan of each family", title_justify="left")
        for name in ("family", "plan", "step", "against this plan", "what holds it back"):
            table.add_column(name, overflow="fold")
        for b in self.beaten:
            row = (b.family, b.title, *beaten_by(self.plan.predicted.step_time_ns, b), b.binding)
            table.add_row(*map(Text, row))
        return Rows(Text(self.plan.title), Text(self.binding), table, Text(self.verdict))


def why_of(path: Path, run_model_code: bool = False, profile: str | None = None, mixing: bool = False) -> Why:
    """Search the families that a plan did not take; with `mixing` also what a layout of its own for every layer would
    gain, which takes long. Raises `InvalidInputError`."""
    plan, started = Plan.load(path), time.perf_counter()
    planner = planner_of(plan, run_model_code, profile)
    try:
        plan = reprice(plan, planner)
    except InvalidInputError:
        pass  # a model or cluster that changed: its families are searched against the file's own step
    return why(plan, planner, started, mixing)


def why(plan: Plan, planner: Planner, started: float, mixing: bool = False) -> Why:
    """The families of a plan that is priced as today."""
    share, source = near_tie(planner.pricer.calibration, planner.request.training, model_class(planner.model.one),
                             planner.cluster.device.name)
    mixed = [(MIXED, {"mixing": True})] if mixing and not planner.request.mixing else []
    families = [found for name, change in [*_families(plan, planner), *mixed]
                if (found := _family(planner, plan, name, change, share))]
    own = _complexity(plan)
    simplest = min((f for f in families if f.beaten.near_tie and f.complexity is not None),
                   key=lambda f: (f.complexity, f.beaten.step_time_ns), default=None)
    if simplest is not None and simplest.complexity is not None and simplest.complexity >= own:
        simplest = None
    beaten = tuple(f.beaten.model_copy(update={"preferred": f is simplest}) for f in families)
    return Why(plan, beaten, time.perf_counter() - started, share, source)


def _families(plan: Plan, planner: Planner) -> list[tuple[str, dict[str, Any]]]:
    """What the plan does, left out; what it does not do, put in, to whatever degree is best."""
    main = max(plan.layers, key=lambda r: r.count).options
    experts = any(kind.experts for kind in planner.space.kinds)
    found: list[tuple[str, dict[str, Any]]] = []
    for axis in AXES:
        if axis == "ep" and not experts:
            continue
        if _degree(plan, axis) > 1:
            found.append((f"without {axis}", {axis: 1}))
        if axis in ("tp", "cp") and getattr(main, axis) == 1 or _degree(plan, axis) == 1:  # embedding and head may
            found.append((f"with {axis}", {"banned": f"{axis}1"}))
    zeros = {r.options.zero for r in plan.layers}
    found += [(f"ZeRO-{z}" if z else "no ZeRO", {"zero": z}) for z in range(4) if zeros != {z}]
    modes = {r.options.recompute for r in plan.layers}
    found += [(f"recompute {mode}", {"recompute": mode}) for mode in MODES if modes != {mode}]
    if plan.mesh.pp > 1:
        found += [(f"schedule {name}", {"schedule": name}) for name in ("1f1b", "interleaved", "zb-h1")
                  if name != plan.schedule.name]
    return found


def _family(planner: Planner, plan: Plan, name: str, change: dict[str, Any], near: float) -> Family | None:
    pins = planner.request.pins
    banned, mixed = change.get("banned"), "mixing" in change
    if banned is not None:
        axis = banned[:-1]
        if getattr(pins, axis) is not None:
            return None  # the plan was asked for without it
        change = {"banned": pins.banned | {banned}}
    elif not mixed and any(getattr(pins, axis) not in (None, value) for axis, value in change.items()):
        return None
    try:
        other = planner.with_request(within=0.02, **(change if mixed else {"pins": replace(pins, **change)}))
        answer = other.solve(explain=False)
    except MeshwrightError as error:
        return Family(Beaten(family=name, title="no such plan", step_time_ns=None, binding=str(error)[:500]))
    if answer.plan is None:
        problem, least = least_memory(other)
        missing = 0 if least is None else max(0, least.missing_bytes(problem))
        stage = f"memory of stage {least.stage}" if least is not None else "no layout has options for all layers"
        return Family(Beaten(family=name, title="nothing fits", step_time_ns=None, missing_bytes=missing,
                             binding=stage))
    share = answer.plan.predicted.step_time_ns / plan.predicted.step_time_ns - 1
    return Family(Beaten(family=name, title=answer.plan.title, step_time_ns=answer.plan.predicted.step_time_ns,
                         binding=_costs_more(plan.predicted, answer.plan.predicted), near_tie=share <= near),
                  None if mixed else _complexity(answer.plan))  # the least simple of all


def _degree(plan: Plan, axis: str) -> int:
    return plan.mesh.pp if axis == "pp" else max(getattr(r.options, axis) for r in plan.layers)


def _complexity(plan: Plan) -> Complexity:
    """Parallel axes in use by most layers (sharded states are one), recomputed layers (full ones count double), chunks,
    schedule."""
    main = max(plan.layers, key=lambda r: r.count).options
    degrees = main.tp, main.cp, main.dp, _degree(plan, "pp"), _degree(plan, "ep")
    axes = sum(degree > 1 for degree in degrees) + any(r.options.zero > 0 for r in plan.layers)
    again = sum(r.count * MODES.index(r.options.recompute) for r in plan.layers)
    return axes, again, plan.schedule.chunks, ("1f1b", "gpipe", "interleaved", "zb-h1").index(plan.schedule.name)


def _busiest(p: Predicted) -> dict[str, int]:
    stage = min(p.stages, key=lambda s: s.bubble_ns)
    return {"compute": stage.compute_ns, "optimizer": stage.optimizer_ns, "bubble": stage.bubble_ns,
            **{f"exposed {k}": v for k, v in stage.exposed_ns.items()}}


def _costs_more(plan: Predicted, other: Predicted) -> str:
    """What grows most on the busiest stage."""
    a, b = _busiest(plan), _busiest(other)
    grows = max(b, key=lambda k: b[k] - a.get(k, 0))
    more = b[grows] - a.get(grows, 0)
    return f"{grows} +{more / 1e6:.0f} ms" if more > 0 else "nothing in particular"


def _share(p: Predicted, stage: int) -> str:
    parts = {"compute": p.stages[stage].compute_ns, "exposed communication": sum(p.stages[stage].exposed_ns.values()),
             "optimizer": p.stages[stage].optimizer_ns, "bubble": p.stages[stage].bubble_ns}
    return ", ".join(f"{name} {ns / p.step_time_ns:.0%}" for name, ns in parts.items())
