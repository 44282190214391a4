"""Problems from JSON, what is refused, and the price of a plan written out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks._planner_instances import enumerate_plans, instance
from meshwright.compiler.planner.evaluate import evaluate
from meshwright.compiler.planner.problem import Plan, Problem
from meshwright.runtime.errors import InvalidInputError

from .tiny import option, outer, problem


def test_json_and_back() -> None:
    asked = instance(7)
    assert Problem.from_json(asked.to_json()) == asked


def damaged(path: list[str | int], value: Any) -> str:
    document = json.loads(instance(7).to_json())
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(("path", "value", "named"), [
    (["capacity_bytes"], -1, "capacity_bytes"),
    (["capacity_bytes"], float("nan"), "planning problem"),
    (["capacity_bytes"], 1.5, "capacity_bytes"),
    (["capacity_bytes"], "10", "capacity_bytes"),
    (["outers", 0, "options", 0, 0, "forward_ns"], -5, "outers.0.options.0.0.forward_ns"),
    (["outers", 0, "options", 0, 0, "forward_ns"], 10**40, "outers.0.options.0.0.forward_ns"),
    (["outers", 0, "options", 0, 0, "layout_in"], 900, "layout outside"),
    (["outers", 0, "schedule"], "magic", "outers.0.schedule"),
    (["outers", 0, "p"], 5, "p must divide"),
    (["outers", 0, "m"], 7, "m the batch"),
    (["outers", 0, "reshard"], [], "layout"),
    (["layers", 0], 17, "layers"),
    (["layers"], [], "layers"),
    (["unknown"], 1, "unknown"),
])
def test_bad_documents_are_one_line(path: list[str | int], value: Any, named: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        Problem.from_json(damaged(path, value))
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "", "{", "null"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="planning problem"):
        Problem.from_json(text)


def test_sums_beyond_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="64-bit"):
        problem([0] * 100, [outer(1, 64, [[option("slow", 10**15)]])])


def test_price_by_hand() -> None:
    """2 stages, 2 micro-batches, GPipe. Stage 0: layers of 10 and 20 with a change of layout (3), stage 1: 30."""
    options = [[option("a", 10, 5, static_bytes=100, layout_out=0, optimizer_ns=7, transient_bytes=2),
                option("b", 20, 6, static_bytes=200, layout_in=1, layout_out=1, transient_bytes=9)],
               [option("c", 30, 7, saved_until_w_bytes=1, static_bytes=300, layout_in=1, layout_out=1, sync_ns=4)]]
    asked = problem([0, 0, 1], [outer(2, 2, options, "gpipe", reshard_ns=3, transfer_ns=2)], capacity_bytes=330,
                    mixing=True)
    priced = evaluate(asked, Plan(outer=0, ends=(2, 3), options=(0, 1, 0)))
    assert [c.forward_ns for c in priced.costs] == [(33,), (30,)]
    assert [c.input_gradient_ns for c in priced.costs] == [(33,), (30,)]
    assert [c.tail_ns for c in priced.costs] == [7, 4]
    assert priced.step_ns == (33 + 2 + 30 + 33) + (60 + 2 + 63 + 63) + 7
    held = [(s.static_bytes, s.activation_bytes, s.transient_bytes) for s in priced.memory]
    assert held == [(300, 22, 9), (300, 16, 0)]
    assert [s.missing_bytes for s in priced.memory] == [1, 0] and not priced.fits


@pytest.mark.parametrize(("plan", "named"), [
    (Plan(outer=1, ends=(1, 2), options=(0, 0)), "outer tuple"),
    (Plan(outer=0, ends=(2, 2), options=(0, 0)), "don't cut"),
    (Plan(outer=0, ends=(1, 2), options=(0,)), "options for"),
    (Plan(outer=0, ends=(1, 2), options=(0, 9)), "no option 9"),
])
def test_what_is_no_plan_is_refused(plan: Plan, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        evaluate(problem([0, 0], [outer(2, 1, [[option("only", 1)]])]), plan)


def test_families_hold_per_stage_and_kind() -> None:
    options = [[option("a", 1, family="x"), option("b", 1, family="y")]]
    one, two = problem([0, 0], [outer(1, 1, options)]), problem([0, 0], [outer(2, 1, options)])
    assert one.plan_fault(Plan(outer=0, ends=(2,), options=(0, 1))) is not None
    assert two.plan_fault(Plan(outer=0, ends=(1, 2), options=(0, 1))) is None


def test_enumeration_prices_as_evaluate_does() -> None:
    for seed in range(12):
        asked = instance(seed)
        for own in enumerate_plans(asked):
            if own.plan is not None:
                priced = evaluate(asked, own.plan)
                assert priced.fits and priced.step_ns == own.step_ns
