"""What `meshwright plan` and `verify` answer: plain data for JSON, tables for a terminal."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cost_model.layer_memory import ALLOCATOR_SHARE
from ..runtime.errors import InvalidInputError, UnknownNameError
from ..runtime.plan import Ask, Plan
from ..runtime.plan_table import confidence, tight
from .plan_cuts import cuts_table
from .planner.bound import Bound
from .planner.evaluate import evaluate
from .planner.group_search import priced_in_full, rebuilt
from .planner.objectives import OBJECTIVES, best_for
from .planner.plan_model import Answer, Planner, Request, pins_from
from .planner.precision import training_from
from .planner.pricing import RELAXED, Relaxed
from .planner.prove import Proof, prove
from .planner.reprice import reprice
from .planner.search import Found
from .planner.space import Group
from .planner.tables_digest import tables_digest


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
                **confidence(a.plan.predicted),
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
    faults += _price_faults(plan, planner)
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


def _price_faults(plan: Plan, planner: Planner) -> list[str]:
    try:
        now = reprice(plan, planner).predicted
    except InvalidInputError as error:
        return [f"the plan can't be priced: {error}"]
    if not now.fits:
        return ["the plan does not fit"]
    if now.step_time_ns != plan.predicted.step_time_ns:
        return [f"the plan is priced at {now.step_time_ns} ns, not at {plan.predicted.step_time_ns}"]
    return []


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
    share = ALLOCATOR_SHARE
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
        elif name == "allocator_share":
            share = _number(word, value)
        else:
            pins[name] = int(value) if re.fullmatch("[0-9]{1,9}", value) else value
    return Request(ask.model, ask.cluster, ask.seq, ask.global_batch, pins_from({**pins, "banned": banned}),
                   training_from(optimizer, words=training), mixing, ask.imbalance, ask.price_usd_per_gpu_hour, pad,
                   ask.objective, profile=profile, allocator_share=share)


def _number(word: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InvalidInputError(f"option {word[:60]!r}", expected="a number") from None
