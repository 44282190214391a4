"""Bounds that are tight: paths around the pipeline, transfers of every micro-batch, transients, tails."""

from __future__ import annotations

import math

import pytest

from meshwright.compiler.planner.bound import Bound
from meshwright.compiler.planner.evaluate import evaluate
from meshwright.compiler.planner.group_search import GroupSearch
from meshwright.compiler.planner.knapsack import FREE, INFINITE, LINEAR, WHOLE, Knapsack, Pool, Weights
from meshwright.compiler.planner.plan_model import Request
from meshwright.compiler.planner.problem import Plan
from meshwright.compiler.planner.search import Found
from meshwright.compiler.planner.tables import Tables
from meshwright.cost_model.schedules import ScheduleName
from meshwright.runtime.errors import InvalidInputError

from .planning import NODE, planner
from .tiny import option, outer, problem


@pytest.mark.parametrize(("schedule", "p", "v", "m"), [
    ("interleaved", 4, 2, 4), ("interleaved", 4, 4, 16), ("interleaved", 2, 4, 16), ("1f1b", 4, 1, 4),
    ("gpipe", 4, 1, 4), ("gpipe", 2, 1, 8)])
def test_equal_layers_are_bounded_by_what_they_take(schedule: ScheduleName, p: int, v: int, m: int) -> None:
    """Transfers are on the path of the first micro-batch in every round of an interleaved pipeline: a bound that leaves
    them out falls short."""
    bound_ns, step_ns = bound_and_step_ns(schedule, p, v, m)
    assert bound_ns == step_ns


def test_in_1f1b_every_pth_micro_batch_waits_for_transfers() -> None:
    """Without the paths that go round with them 480 + 90 + 18 ns are left of 654."""
    bound_ns, step_ns = bound_and_step_ns("1f1b", 4, 1, 16)
    assert 0.99 * step_ns < bound_ns <= step_ns


def bound_and_step_ns(schedule: ScheduleName, p: int, v: int, m: int) -> tuple[int, int]:
    """For as many equal layers as parts."""
    own = outer(p, m, [[option("only", 10)]], schedule=schedule, v=v, transfer_ns=3)
    asked = problem([0] * (p * v), [own])
    plan = Plan(outer=0, ends=tuple(range(1, p * v + 1)), options=(0,) * (p * v))
    return Bound(asked, own).lower_bound(relative=0.0), evaluate(asked, plan).step_ns


def test_levels_rise() -> None:
    """2 layers and 3 options within 7 bytes: memory aside 2 · 1; divisible 1.5 layers of the second; whole 1 + 1."""
    options = [[option("fast", 1, static_bytes=5), option("small", 5, static_bytes=1),
                option("middle", 4, static_bytes=4)]]
    asked = problem([0, 0], [outer(1, 1, options)], capacity_bytes=7)
    knapsack = Knapsack(Tables(asked, asked.outers[0]))
    pools = (Pool(0, 1, 1, Weights(1, 1, 1, 1), 2),)
    free, linear, whole = (knapsack.least(pools, level) for level in (FREE, LINEAR, WHOLE))
    cost = [sum(row[:4]) for row in knapsack.tables.rows[0]]
    assert free == 2 * cost[0]
    assert linear == math.ceil(2 * cost[1] - 5 * (cost[1] - cost[0]) / 4)
    assert whole == cost[0] + cost[1]
    assert free < linear < whole


def test_the_largest_transient_is_that_of_the_options_taken() -> None:
    """The fast option needs 6 bytes while it runs; beside one of it the other layer has no room."""
    options = [[option("fast", 1, static_bytes=3, transient_bytes=6), option("slow", 3, static_bytes=3)]]
    asked = problem([0, 0], [outer(1, 1, options)], capacity_bytes=11)
    slow = 2 * sum(Tables(asked, asked.outers[0]).rows[0][1][:4])
    assert Bound(asked, asked.outers[0]).lower_bound(relative=0.0) == slow


def test_nothing_fits_is_seen_at_every_level_but_the_first() -> None:
    asked = problem([0, 0], [outer(1, 1, [[option("only", 1, static_bytes=5)]])], capacity_bytes=9)
    knapsack = Knapsack(Tables(asked, asked.outers[0]))
    pools = (Pool(0, 1, 1, Weights(1, 1, 1, 1), 2),)
    assert [knapsack.least(pools, level) == INFINITE for level in (FREE, LINEAR, WHOLE)] == [False, True, True]


def test_a_search_out_of_time_says_what_it_left() -> None:
    """After one group the rest is closed with bounds that cost nothing: the gap is larger, and still a bound."""
    whole, short = (GroupSearch(planner("llama3-8b", NODE, 2048, 64).pricer, time_limit_s=s).run().result
                    for s in (math.inf, 1e-9))
    assert isinstance(whole, Found) and isinstance(short, Found)
    assert short.evaluation.fits and len(short.tuples) == len(whole.tuples)
    assert short.lower_bound_ns <= whole.evaluation.step_ns <= short.evaluation.step_ns
    assert short.gap > whole.gap and not short.exact


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_a_time_limit_is_above_0(seconds: float) -> None:
    with pytest.raises(InvalidInputError, match="time limit"):
        Request("llama3-8b", NODE, 2048, 64, time_limit_s=seconds)
