"""The search against enumeration, its properties, closed forms, and large problems."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks._planner_instances import enumerate_plans, instance, large_instance, optimum_ns, sharpened
from benchmarks.planner_exact import FAULTS, Tally, caught, check
from meshwright.compiler.planner.evaluate import evaluate
from meshwright.compiler.planner.knapsack import Knapsack
from meshwright.compiler.planner.problem import Option, Problem
from meshwright.compiler.planner.search import Found, NothingFits, search
from meshwright.cost_model.schedules import ScheduleName

from .tiny import option, outer, problem


@pytest.mark.parametrize("first", range(1000, 1032, 8))
def test_equals_enumeration_and_cp_sat(first: int) -> None:
    """The benchmark's comparison on other seeds: search, bounds, certificate, CP-SAT, least capacity."""
    tally = Tally()
    for seed in range(first, first + 8):
        check(seed, tally)
    assert not tally.wrong
    assert tally.cp_sat == 8 and tally.infeasible >= 1


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_noticed(name: str) -> None:
    assert any(caught(name, seed) for seed in range(1000, 1016))


def step_ns(asked: Problem) -> float:
    found = search(asked)
    return found.evaluation.step_ns if isinstance(found, Found) else float("inf")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(2000, 10**6), more=st.integers(0, 200))
def test_more_capacity_never_makes_a_plan_slower(seed: int, more: int) -> None:
    asked = instance(seed)
    wider = asked.model_copy(update={"capacity_bytes": asked.capacity_bytes + more})
    assert step_ns(wider) <= step_ns(asked)


FIELDS = ("forward_ns", "input_gradient_ns", "weight_gradient_ns", "sync_ns", "optimizer_ns", "static_bytes",
          "saved_bytes", "saved_until_w_bytes", "transient_bytes")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(2000, 10**6), field=st.sampled_from(FIELDS), data=st.data())
def test_a_cheaper_option_never_hurts(seed: int, field: str, data: st.DataObject) -> None:
    asked = instance(seed)
    at = data.draw(st.integers(0, len(asked.outers) - 1))
    kind = data.draw(st.integers(0, len(asked.kinds) - 1))
    which = data.draw(st.integers(0, 7))

    def cheaper(own: Option) -> Option:
        return own.model_copy(update={field: getattr(own, field) // 2})

    changed = asked.outers[at]
    options = [[cheaper(o) if (k, i) == (kind, which) else o for i, o in enumerate(own)]
               for k, own in enumerate(changed.options)]
    outers = list(asked.outers)
    outers[at] = changed.model_copy(update={"options": tuple(map(tuple, options))})
    assert step_ns(asked.model_copy(update={"outers": tuple(outers)})) <= step_ns(asked)


def test_allowing_to_mix_never_hurts() -> None:
    """Families restrict; the layer that needs to save alone does so when it may."""
    options = [[option("fast", 10, 8, family="a"), option("lean", 14, 1, family="b")]]
    asked = problem([0, 0, 0], [outer(1, 1, options)], capacity_bytes=17)
    assert step_ns(asked) == 3 * 3 * 14
    assert step_ns(asked.model_copy(update={"mixing": True})) == 2 * 3 * 10 + 3 * 14


@pytest.mark.parametrize(("schedule", "v", "bubble"), [("1f1b", 1, 3 * 30), ("gpipe", 1, 3 * 30), ("zb-h1", 1, 3 * 10),
                                                      ("interleaved", 2, 3 * 15)])
def test_closed_forms_of_equal_layers(schedule: ScheduleName, v: int, bubble: int) -> None:
    """8 equal layers on 4 stages: m·t + (p - 1)·(what each schedule leaves of t = 60). ZB-H1 leaves F + B - W."""
    asked = problem([0] * 8, [outer(4, 8, [[option("only", 10)]], schedule, v)])
    found = search(asked)
    assert isinstance(found, Found) and found.exact
    assert found.evaluation.step_ns == 8 * 60 + 2 * bubble
    assert found.plan.ends == tuple(range(2 // v, 9, 2 // v))
    assert found.lower_bound_ns == found.evaluation.step_ns


def test_uneven_layers_are_priced_by_the_slowest_stage() -> None:
    """7 layers on 2 stages: 4 and 3. The first stage paces all micro-batches; it waits 130 - 80 ns for its first B and
    90 - 80 ns for its last."""
    found = search(problem([0] * 7, [outer(2, 16, [[option("only", 10)]])]))
    assert isinstance(found, Found)
    assert found.plan.ends == (4, 7)
    assert found.evaluation.step_ns == 16 * 4 * 30 + 50 + 10


def test_resharding_found_is_the_resharding_reported() -> None:
    """Two kinds whose fastest options lie in different layouts: worth changing at 4 ns, not at 6."""
    def asked(reshard_ns: int) -> Problem:
        kinds = [[option("here", 10), option("there", 20, layout_in=1, layout_out=1)],
                 [option("here", 13), option("there", 10, layout_in=1, layout_out=1)]]
        return problem([0, 1], [outer(1, 1, kinds, reshard_ns=reshard_ns)])

    dear, cheap = search(asked(6)), search(asked(4))
    assert isinstance(dear, Found) and dear.plan.options == (0, 0) and dear.evaluation.step_ns == 69
    assert isinstance(cheap, Found) and cheap.plan.options == (0, 1) and cheap.evaluation.step_ns == 60 + 2 * 4


def test_ties_go_to_the_simplest() -> None:
    """Equal options and outer tuples: the first of each. Slower options off the critical path count as equal."""
    same = [[option("first", 10), option("second", 10)]]
    found = search(problem([0, 0], [outer(1, 4, same), outer(1, 4, same)]))
    assert isinstance(found, Found) and found.plan.outer == 0 and found.plan.options == (0, 0)
    hidden = [[option("simple", 10), option("tuned", 9)], [option("only", 10, optimizer_ns=1000)]]
    found = search(problem([0, 1], [outer(2, 1, hidden, transfer_ns=0)]))
    assert isinstance(found, Found) and found.evaluation.step_ns == 9 + 30 + 1000
    late = [[option("simple", 10, optimizer_ns=5), option("tuned", 10)], [option("only", 10, optimizer_ns=1000)]]
    found = search(problem([0, 1], [outer(2, 1, late)]))
    assert isinstance(found, Found) and found.plan.options == (0, 0)


def test_every_outer_tuple_is_accounted_for() -> None:
    for seed in range(16):
        asked = sharpened(seed)
        found = search(asked)
        assert [t.index for t in found.tuples] == list(range(len(asked.outers)))
        for own, truth in zip(found.tuples, enumerate_plans(asked), strict=True):
            if own.status == "infeasible":
                assert truth.step_ns is None
            elif truth.step_ns is not None:
                assert own.lower_bound_ns <= truth.step_ns
                assert own.step_ns is None or own.step_ns >= truth.step_ns
        assert isinstance(found, NothingFits) == (optimum_ns(enumerate_plans(asked)) is None)


def test_a_kind_without_options_leaves_the_tuple_out() -> None:
    whole = [[option("a", 9)], [option("b", 9)]]
    asked = problem([0, 1], [outer(1, 1, [[option("only", 10)], []]), outer(2, 1, whole)])
    found = search(asked)
    assert isinstance(found, Found) and found.plan.outer == 1
    assert found.tuples[0].status == "infeasible"


@pytest.mark.parametrize("more", [{}, {"gpus": 8192}])
def test_a_thousand_layers_in_seconds(more: dict[str, object]) -> None:
    """4 kinds, 30 options, 39 outer tuples, p up to 16. The limit is CPU time with room for a slow machine: measured
    were 8.4 and 11.7 s."""
    asked = large_instance(1000, **more)  # type: ignore[arg-type]
    started = time.process_time()
    found = search(asked, within=0.005)
    assert time.process_time() - started < 60
    assert isinstance(found, Found) and evaluate(asked, found.plan).fits
    assert found.gap <= 0.01


def test_depth_hardly_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times as many layers, less than three times as many stages solved."""
    def solved(layers: int) -> int:
        count = 0
        own = Knapsack._solve

        def counted(self: Knapsack, *args: object) -> int:
            nonlocal count
            count += 1
            return own(self, *args)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Knapsack, "_solve", counted)
            search(large_instance(layers, stages=(8, 16)), within=0.005)
        return count

    assert solved(1000) < 3 * solved(125)
