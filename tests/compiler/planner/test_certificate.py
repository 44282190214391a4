"""Certificates verify, changed ones don't; CP-SAT proves and refutes; the least capacity is the least."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from benchmarks._planner_instances import enumerate_plans, instance, large_instance, optimum_ns, sharpened
from meshwright.compiler.planner.certificate import Certificate, certify, nothing_below, verify
from meshwright.compiler.planner.evaluate import evaluate
from meshwright.compiler.planner.nearest import nearest
from meshwright.compiler.planner.problem import Plan
from meshwright.compiler.planner.prove import prove
from meshwright.compiler.planner.search import Found, NothingFits, search
from meshwright.runtime.errors import InvalidInputError

from .tiny import option, outer, problem

SEED = 5


def certificate() -> tuple[Any, Certificate]:
    asked = instance(SEED)
    found = search(asked)
    assert isinstance(found, Found)
    return asked, certify(asked, found.plan)


def test_closes_the_gap_and_verifies_after_a_round_trip() -> None:
    asked, own = certificate()
    assert own.gap == 0 and own.lower_bound_ns == optimum_ns(enumerate_plans(asked))
    assert verify(asked, Certificate.from_json(own.model_dump_json())) == []


def test_a_worse_plan_has_a_gap() -> None:
    """A certificate does not depend on how the plan was found: the optimum is never below its bound."""
    asked = instance(SEED)
    worst = max((own.plan for own in enumerate_plans(asked) if own.plan), key=lambda p: evaluate(asked, p).step_ns)
    own, best = certify(asked, worst), optimum_ns(enumerate_plans(asked))
    assert best is not None and best < own.step_ns and own.lower_bound_ns <= best and own.gap > 0


@pytest.mark.parametrize(("change", "named"), [
    ({"step_ns": 1}, "takes"), ({"problem_sha256": "0" * 64}, "another problem"), ({"tuples": ()}, "in order"),
    ({"plan": Plan(outer=0, ends=(1,), options=(0,))}, "plan"),
])
def test_a_changed_certificate_is_noticed(change: dict[str, Any], named: str) -> None:
    asked, own = certificate()
    assert named in " ".join(verify(asked, own.model_copy(update=change)))


def test_a_bound_claimed_too_high_is_noticed() -> None:
    asked, own = certificate()
    optimum = own.step_ns
    for how in ("path", "enumerated", "infeasible"):
        claim = own.tuples[own.plan.outer].model_copy(update={"how": how, "lower_bound_ns": optimum + 1})
        tuples = tuple(claim if t.index == own.plan.outer else t for t in own.tuples)
        assert "could not be shown" in " ".join(verify(asked, own.model_copy(update={"tuples": tuples})))


def test_nonsense_is_no_certificate() -> None:
    with pytest.raises(InvalidInputError, match="certificate"):
        Certificate.from_json('{"version": 2}')


def test_enumeration_finds_what_is_there() -> None:
    asked, own = certificate()
    assert nothing_below(asked, own.plan.outer, own.step_ns, nodes=10**6)
    assert not nothing_below(asked, own.plan.outer, own.step_ns + 1, nodes=10**6)


def test_large_certificate_verifies() -> None:
    asked = large_instance(128, gpus=512, stages=(4, 8), capacity_gib=10)
    found = search(asked, within=0.005)
    assert isinstance(found, Found)
    own = certify(asked, found.plan)
    assert own.gap <= 0.01 and verify(asked, own) == []


def test_cp_sat_proves_and_refutes() -> None:
    asked = instance(SEED)
    found = search(asked)
    assert isinstance(found, Found)
    assert prove(asked, found.plan).sentence() == "proven"
    worst = max((own.plan for own in enumerate_plans(asked) if own.plan), key=lambda p: evaluate(asked, p).step_ns)
    refuted = prove(asked, worst)
    assert refuted.verdict == "refuted" and refuted.step_ns == found.evaluation.step_ns
    assert prove(asked, found.plan, limit_s=0.0).verdict == "timed out"


def test_the_solver_loads_behind_a_compiled_program() -> None:
    """In a process of its own: the host library makes torch's symbols global, and the solver must not meet them."""
    code = ("from meshwright.codegen.program_cpp_run import host_library\n"
            "from meshwright.compiler.planner.prove import _cp_model\n"
            "host_library()\n"
            "assert _cp_model().CpSolver().solve(_cp_model().CpModel()) == _cp_model().OPTIMAL")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_cp_sat_has_a_limit_of_size() -> None:
    asked = large_instance(1000, stages=(16,))
    plan = search(asked, within=0.01)
    assert isinstance(plan, Found)
    assert prove(asked, plan.plan, limit_s=5.0).verdict == "timed out"


@pytest.mark.parametrize("seed", range(0, 40, 8))
def test_least_capacity_is_the_least(seed: int) -> None:
    """Seeds divisible by 8 have one byte too little: that byte is what is missing, and with it something fits."""
    asked = sharpened(seed)
    assert isinstance(search(asked), NothingFits)
    found = nearest(asked)
    assert found is not None and found.exact and found.missing_bytes(asked) == 1
    assert isinstance(search(asked.model_copy(update={"capacity_bytes": found.capacity_bytes})), Found)


def test_what_is_missing_is_said() -> None:
    gib = 2**30
    options = [[option("fast", 10, 6 * gib, static_bytes=gib), option("lean", 14, 2 * gib, static_bytes=gib)]]
    asked = problem([0, 0], [outer(1, 2, options), outer(2, 2, options)], capacity_bytes=4 * gib)
    found = nearest(asked)
    assert found is not None and found.capacity_bytes == 5 * gib and found.stage == 0
    assert found.sentence(asked) == (
        "no plan fits: the one of least memory (p=2 v=1 1f1b m=2) needs 5.00 GiB on stage 0, most of it saved "
        "activations (4.00 GiB); 1.00 GiB are missing per GPU")


def test_a_large_problem_that_does_not_fit() -> None:
    asked = large_instance(128, gpus=512, stages=(4, 8), capacity_gib=0.5)
    assert isinstance(search(asked), NothingFits)
    found = nearest(asked)
    assert found is not None and found.proven_bytes < found.capacity_bytes <= 1.1 * found.proven_bytes
    assert evaluate(asked.model_copy(update={"capacity_bytes": found.capacity_bytes}), found.plan).fits
