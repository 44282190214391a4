"""What `meshwright plan`, `why` and `verify` answer: plain data for JSON, tables for a terminal."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InvalidInputError, MeshwrightError, UnknownNameError
from ..runtime.plan import Ask, Plan
from ..runtime.plan_predictions import Beaten, Predicted
from ..runtime.plan_table import tight
from .plan_cuts import cuts_table
from .planner.bound import Bound
from .planner.evaluate import evaluate
from .planner.group_search import priced_in_full, rebuilt
from .planner.objectives import OBJECTIVES, best_for
from .planner.plan_model import Answer, Planner, Request, pins_from
from .planner.precision import training_from
from .planner.pricing import RELAXED, Relaxed
from .planner.prove import Proof, prove
from .planner.relocate import relocated
from .planner.search import Found
from .planner.space import MODES, Group
from .planner.tables_digest import tables_digest

if TYPE_CHECKING:
    from rich.console import Group as Tables

NEAR_TIE = 0.05  # plans this close are equal: the cost model's median error on published runs is about as large
GIB = 2**30


@dataclass(frozen=True)
class PlanAnswer:
    """A plan, or why there is none, with how the search went."""

    answer: Answer
    proof: Proof | None = None
    steps: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan | None:
        return self.answer.plan

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        a = self.answer
        found: dict[str, Any] = {"capture_s": a.capture_s, "search_s": a.search_s, "steps": list(self.steps),
                                 "left_out": [x._asdict() for x in a.planner.space.left]}
        if a.plan is None:
            assert a.why_not is not None
            return {**a.why_not.as_dict(), **found}
        proof = None if self.proof is None else {"verdict": self.proof.verdict, "sentence": self.proof.sentence(),
                                                 "lower_bound_ns": self.proof.lower_bound_ns}
        return {"fits": True, "gap": a.plan.gap, "title": a.plan.title, "step_time_s": a.plan.predicted.step_time_s,
                "tokens_per_s": a.plan.predicted.tokens_per_s, "mfu": a.plan.predicted.mfu, "proof": proof, **found,
                "tight": tight(a.plan.predicted), "plan": a.plan.model_dump(mode="json")}

    def __rich__(self) -> Any:
        from rich.console import Group as Rows
        from rich.text import Text

        a = self.answer
        if a.plan is None:
            assert a.why_not is not None
            return Text(f"meshwright: {a.why_not.sentence()}")
        certificate = a.plan.certificate
        assert certificate is not None and a.plan.gap is not None
        counts = ", ".join(f"{certificate.count(s)} {s}" for s in ("solved", "searched", "bounded", "infeasible")
                           if certificate.count(s))
        lines = [*self.steps, f"at most {a.plan.gap:.2%} above the best plan of the space: {len(certificate.tuples)} "
                 f"outer tuples, {counts}; {len(a.planner.space.left)} values of axes left out (--json lists each)"]
        if self.proof is not None:
            lines.append(f"CP-SAT: {self.proof.sentence()}")
        lines.append(f"captured in {a.capture_s:.1f} s, searched in {a.search_s:.1f} s")
        left = [cuts_table(a.planner.space.left)] if a.planner.space.left else []
        return Rows(a.plan.table(), *left, *(Text(line) for line in lines))


def plan_for(request: Request, objective: str, target_tokens_per_s: float | None, prove_s: float | None) -> PlanAnswer:
    """Plan for an objective; `prove_s`: seconds for CP-SAT on the same tables. Raises `MeshwrightError`."""
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    if prove_s is not None and not 0 < prove_s < 1e6:
        raise InvalidInputError(f"--prove {prove_s:g}", expected="seconds above 0")
    answer, steps = best_for(replace(request, objective=objective), target_tokens_per_s)  # type: ignore[arg-type]
    proof = None
    if prove_s is not None and answer.plan is not None:
        answer, proof = proved(answer, prove_s)
    return PlanAnswer(answer, proof, steps)


def proved(answer: Answer, limit_s: float) -> tuple[Answer, Proof]:
    """CP-SAT's verdict on the plan, and the answer: with its plan where that is faster. Groups whose relaxed tables
    leave room below the plan are priced in full first; what stays relaxed can bound plans, but be none."""
    started = time.monotonic()
    searched = priced_in_full(answer.planner.pricer, answer.searched, started + limit_s)
    proof = prove(searched.problem, answer.found.plan, started + limit_s - time.monotonic(),
                  relaxed={i for i, t in enumerate(searched.tuples) if t.tables.relaxed})
    if proof.verdict != "refuted" or proof.plan is None:
        return answer, proof
    price, index = evaluate(searched.problem, proof.plan), proof.plan.outer
    outcomes = tuple(replace(o, status="searched", step_ns=price.step_ns) if o.index == index else o
                     for o in answer.found.tuples)
    better = replace(searched, result=Found(proof.plan, price, outcomes, exact=False))
    return replace(answer, searched=better, plan=answer.planner.write(better)), proof


# -- why ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Why:
    """A plan, the families it beat, and where its time and memory go."""

    plan: Plan
    beaten: tuple[Beaten, ...]
    seconds: float

    @property
    def binding(self) -> str:
        """What limits the plan itself."""
        p = self.plan.predicted
        stage = p.stages[p.tightest]
        busiest = min(range(len(p.stages)), key=lambda i: p.stages[i].bubble_ns)
        return (f"stage {busiest} is the busiest: {_share(p, busiest)}; stage {p.tightest} has the least memory left: "
                f"{(stage.limit_bytes - stage.peak_bytes) / GIB:.1f} GiB of {stage.limit_bytes / GIB:.1f}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"title": self.plan.title, "step_time_s": self.plan.predicted.step_time_s, "binding": self.binding,
                "near_tie_share": NEAR_TIE, "seconds": self.seconds,
                "beaten": [b.model_dump(mode="json") for b in self.beaten]}

    def __rich__(self) -> Tables:
        from rich.console import Group as Rows
        from rich.table import Table
        from rich.text import Text

        step = self.plan.predicted.step_time_ns
        table = Table(title="the best plan of each family", title_justify="left")
        for name in ("family", "plan", "step", "against this plan", "what holds it back"):
            table.add_column(name, overflow="fold")
        for b in self.beaten:
            if b.step_time_ns is None:
                row = ("-", "does not fit" if b.missing_bytes == 0 else f"{b.missing_bytes / GIB:.1f} GiB missing")
            else:
                share = b.step_time_ns / step - 1
                row = (f"{b.step_time_ns / 1e9:.3f} s", f"{share:+.1%}" + (" (equal)" if b.near_tie else ""))
            table.add_row(Text(b.family), Text(b.title), *map(Text, row), Text(b.binding))
        equal = [b for b in self.beaten if b.near_tie]
        note = (f"within {NEAR_TIE:.0%}, which the cost model can't tell apart: {', '.join(b.family for b in equal)}; "
                "the simplest of them is as good a choice" if equal else "no other family comes near")
        return Rows(Text(self.plan.title), Text(self.binding), table, Text(note))


def why_of(path: Path, run_model_code: bool = False, profile: str | None = None) -> Why:
    """Search the families that a plan did not take. Raises `InvalidInputError`."""
    plan, started = Plan.load(path), time.perf_counter()
    planner = planner_of(plan, run_model_code, profile)
    searched = planner.search()
    now = planner.writer(searched)
    located = relocated(plan, searched.problem, searched.tuples)
    if located is not None:
        plan = now.write(located, plan.ask, plan.training.padded_batch, certified=False)
    beaten = [found for name, change in _families(plan, planner) if (found := _beaten(planner, plan, name, change))]
    return Why(plan, tuple(beaten), time.perf_counter() - started)


def _families(plan: Plan, planner: Planner) -> list[tuple[str, dict[str, Any]]]:
    """What the plan does, left out; what it does not do, put in."""
    main = max(plan.layers, key=lambda r: r.count).options
    used = {"tp": main.tp, "cp": main.cp, "pp": plan.mesh.pp, "ep": max(r.options.ep for r in plan.layers)}
    experts = any(kind.experts for kind in planner.space.kinds)
    found: list[tuple[str, dict[str, Any]]] = []
    for axis, degree in used.items():
        if axis != "ep" or experts:
            other = 1 if degree > 1 else 2
            found.append((f"without {axis}" if degree > 1 else f"{axis} 2", {axis: other}))
    zeros = {r.options.zero for r in plan.layers}
    found += [(f"ZeRO-{z}" if z else "no ZeRO", {"zero": z}) for z in range(4) if zeros != {z}]
    modes = {r.options.recompute for r in plan.layers}
    found += [(f"recompute {mode}", {"recompute": mode}) for mode in MODES if modes != {mode}]
    if plan.mesh.pp > 1:
        found += [(f"schedule {name}", {"schedule": name}) for name in ("1f1b", "interleaved", "zb-h1")
                  if name != plan.schedule.name]
    return found


def _beaten(planner: Planner, plan: Plan, name: str, change: dict[str, Any]) -> Beaten | None:
    pins = planner.request.pins
    if any(getattr(pins, axis) not in (None, value) for axis, value in change.items()):
        return None  # the plan was asked for without it
    try:
        other = planner.with_request(pins=replace(pins, **change), within=0.02)
        answer = other.solve(explain=False)
    except MeshwrightError as error:
        return Beaten(family=name, title="no such plan", step_time_ns=None, binding=str(error)[:500])
    if answer.plan is None:
        return Beaten(family=name, title="nothing fits", step_time_ns=None, binding="memory")
    share = answer.plan.predicted.step_time_ns / plan.predicted.step_time_ns - 1
    return Beaten(family=name, title=answer.plan.title, step_time_ns=answer.plan.predicted.step_time_ns,
                  binding=_costs_more(plan.predicted, answer.plan.predicted), near_tie=share <= NEAR_TIE)


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


# -- verify ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Verified:
    """What does not hold of a plan's certificate; empty when all does."""

    plan: Plan
    faults: tuple[str, ...]
    checked: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"holds": not self.faults, "faults": list(self.faults), "tuples": self.checked, "gap": self.plan.gap,
                "seconds": self.seconds}

    def __rich__(self) -> Any:
        from rich.console import Group as Rows
        from rich.text import Text

        if self.faults:
            return Rows(*(Text(f"does not hold: {fault}") for fault in self.faults))
        return Text(f"holds: {self.checked} outer tuples checked anew in {self.seconds:.1f} s, gap {self.plan.gap:.2%}")


def verified(path: Path, run_model_code: bool = False) -> Verified:
    """Fill the tables again and check price and bounds. Raises `InvalidInputError` for a plan without a certificate."""
    plan, started = Plan.load(path), time.perf_counter()
    certificate = plan.certificate
    if certificate is None:
        raise InvalidInputError(f"{path} has no certificate", expected="a plan as meshwright plan writes it")
    planner = planner_of(plan, run_model_code)
    titles = {t.title for t in certificate.tuples}

    def relaxed(group: Group) -> Relaxed:
        for how in RELAXED:
            label = ", ".join(word for word in (group.label, how) if word)
            own = f" {label}" if label else ""
            if any(f"p={group.p} v={v} {name} m={group.m}{own}" in titles
                   for name, v in planner.space.schedules(group)):
                return how
        return "relaxed"

    problem, tuples = rebuilt(planner.pricer, relaxed, mixing=planner.request.mixing)
    faults = [f"since it was made, {line}" for line in plan.fingerprints.differences(
        planner.fingerprints(plan.ask))]
    if tables_digest(problem) != certificate.problem_sha256 and not faults:
        faults.append("the tables are not those of the certificate")
    if [o.title for o in problem.outers] != [t.title for t in certificate.tuples]:
        faults.append("the outer tuples are not those of the space")
        return Verified(plan, tuple(faults), 0, time.perf_counter() - started)
    located = relocated(plan, problem, tuples)
    price = None if located is None else evaluate(problem, located)
    if price is None or not price.fits or price.step_ns != plan.predicted.step_time_ns:
        faults.append(f"the plan is priced at {price.step_ns if price else 'nothing'} ns, not at "
                      f"{plan.predicted.step_time_ns}" if price is None or price.fits else "the plan does not fit")
    for outer, claim in zip(problem.outers, certificate.tuples, strict=True):
        bound = Bound(problem, outer)
        holds = not bound.fits() if claim.bound_ns is None else (
            bound.quick() >= claim.bound_ns or not bound.reaches(claim.bound_ns - 1))
        if not holds:
            faults.append(f"{claim.title}: {claim.bound_ns} ns could not be shown again")
    lower = min([plan.predicted.step_time_ns, *(t.bound_ns for t in certificate.tuples if t.bound_ns is not None)])
    if certificate.lower_bound_ns > lower:
        faults.append(f"the lower bound is {lower} ns, not {certificate.lower_bound_ns}")
    return Verified(plan, tuple(faults), len(certificate.tuples), time.perf_counter() - started)


def planner_of(plan: Plan, run_model_code: bool = False, profile: str | None = None) -> Planner:
    """The planner of what a plan's file says was asked. Code that a plan names as its model is imported with
    `run_model_code` only. `profile`: another one than the plan's, "" for the presets. Raises `InvalidInputError`."""
    if ":" in plan.ask.model and not run_model_code:
        raise InvalidInputError(f"its model {plan.ask.model!r} is code, which a plan does not run",
                                do="Use --run-model-code where you trust it.")
    request = request_of(plan.ask)
    return Planner(request if profile is None else replace(request, profile=profile))


def request_of(ask: Ask) -> Request:
    """The request in an `Ask`. Raises `InvalidInputError` for options that this release does not know."""
    pins: dict[str, Any] = {}
    banned: list[str] = []
    mixing = pad = False
    optimizer, profile, training = "adamw", "", list[str]()
    for word in ask.options:
        name, _, value = word.removeprefix("--").partition(" ")
        name = name.replace("-", "_")
        if name == "ban":
            banned.append(value)
        elif name == "mixing":
            mixing = True
        elif name == "pad_batch":
            pad = True
        elif name == "optimizer":
            optimizer = value
        elif name == "training":
            training.append(value)
        elif name == "profile":
            profile = value
        else:
            pins[name] = int(value) if re.fullmatch("[0-9]{1,9}", value) else value
    return Request(ask.model, ask.cluster, ask.seq, ask.global_batch, pins_from({**pins, "banned": banned}),
                   training_from(optimizer, words=training), mixing,
                   ask.imbalance, ask.price_usd_per_gpu_hour, pad, ask.objective, profile=profile)
