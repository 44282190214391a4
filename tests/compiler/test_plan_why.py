"""`meshwright why`: families to whatever degree is best, near ties by what predictions were off, the simplest
preferred, one wording for what does not fit."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from meshwright.compiler.plan_answers import planner_of
from meshwright.compiler.plan_files import open_plan
from meshwright.compiler.plan_page import plan_page
from meshwright.compiler.plan_why import Why, _complexity, _family, why, why_of
from meshwright.cost_model.error_band import committed_errors
from meshwright.runtime.plan import Plan
from meshwright.runtime.plan_predictions import Beaten
from meshwright.runtime.plan_table import beaten_by

from ..runtime.plans import plan as hand_made
from .planner.planning import plan, planner

BERT, FOUR = "bert-large", "1x4 a100-80"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan(BERT, FOUR, 512, 16, recompute="none", cp=1).save(path)
    return path


@pytest.fixture(scope="module")
def found(saved: Path) -> Why:
    return why_of(saved)


def printed(value: object) -> str:
    console = Console(width=200, record=True)
    console.print(value)
    return " ".join(console.export_text().split())


def test_an_unused_axis_is_tried_to_its_best_degree(found: Why) -> None:
    """The best plan with tensor parallelism is the best of all degrees above 1."""
    families = {b.family: b for b in found.beaten}
    assert "with tp" in families and "cp 2" not in families and "with cp" not in families  # cp was pinned
    best = min(plan(BERT, FOUR, 512, 16, recompute="none", cp=1, tp=tp).predicted.step_time_ns for tp in (2, 4))
    got = families["with tp"].step_time_ns
    assert got is not None and best * 0.98 <= got <= best * 1.02  # searches end within 2 %


def test_near_ties_are_within_the_error_band(found: Why) -> None:
    step = found.plan.predicted.step_time_ns
    assert found.near_tie == committed_errors()["a100-80"]["dense bf16"].p90
    for b in found.beaten:
        if b.step_time_ns is not None:
            assert b.near_tie == (b.step_time_ns <= step * (1 + found.near_tie)), b.family
    assert found.as_dict()["near_tie_share"] == found.near_tie and "were off by less" in found.verdict


def test_the_simplest_of_equals_is_preferred(saved: Path) -> None:
    """Asked with a layout that uses more axes than it needs, `why` prefers one that does not."""
    made = plan(BERT, FOUR, 512, 16, pp=2, schedule="1f1b", recompute="none", cp=1)
    assert made.mesh.pp == 2
    free = planner(BERT, FOUR, 512, 16, recompute="none", cp=1)
    answer = why(made, free, time.perf_counter())
    assert next(b for b in answer.beaten if b.family == "without pp").near_tie
    [best] = [b for b in answer.beaten if b.preferred]
    assert best.near_tie and best.title.startswith("pp 1, 1 micro-batch · dp 4") and "tp" not in best.title
    assert f"prefer {best.family!r}, the simplest of them: {best.title}" in answer.verdict
    assert "(equal within the error band, the simplest)" in printed(answer)
    assert answer.as_dict()["preferred"] == best.family


def test_a_plan_that_is_the_simplest_says_so(found: Why) -> None:
    if any(b.near_tie for b in found.beaten) and not any(b.preferred for b in found.beaten):
        assert "this plan is the simplest of them" in found.verdict
    else:
        assert any(b.preferred for b in found.beaten) or "no other family comes within" in found.verdict


def test_complexity_counts_axes_first_then_recomputation_then_chunks() -> None:
    base = hand_made()
    more = base.model_copy(update={"mesh": base.mesh.model_copy(update={"pp": 1})})
    assert _complexity(more) < _complexity(base)
    chunks = base.model_copy(update={"schedule": base.schedule.model_copy(update={"chunks": 2})})
    assert _complexity(base) < _complexity(chunks)
    again = tuple(r.model_copy(update={"options": r.options.model_copy(update={"recompute": "full"})})
                  for r in base.layers)
    assert _complexity(chunks) < _complexity(base.model_copy(update={"layers": again}))


def test_what_does_not_fit_is_worded_once(saved: Path, found: Why) -> None:
    """The terminal and the page take their words from one function."""
    short = Beaten(family="no ZeRO", title="nothing fits", step_time_ns=None, missing_bytes=5 << 30, binding="memory")
    answer = replace(found, beaten=(*found.beaten, short))
    page = plan_page(open_plan(saved).with_beaten(answer.beaten))
    for b in answer.beaten:
        for words in beaten_by(found.plan.predicted.step_time_ns, b):
            assert words in printed(answer) and words in page
    assert "5.00 GiB missing" in page
    nothing = Beaten(family="tp 3", title="no such plan", step_time_ns=None, binding="3 does not divide 32 heads")
    assert beaten_by(10, nothing) == ("-", "")
    assert beaten_by(10, nothing.model_copy(update={"missing_bytes": 3 << 30})) == ("does not fit", "3.00 GiB missing")


def test_families_that_were_asked_out_are_left_out(saved: Path, found: Why) -> None:
    one = planner_of(Plan.load(saved))
    assert one.request.pins.recompute == "none" and one.request.pins.cp == 1
    assert not [b for b in found.beaten if b.family.startswith("recompute") or b.family.endswith("cp")]


def test_a_family_that_does_not_fit_says_what_is_missing() -> None:
    one = planner("llama3-8b", "1x8 h100-sxm", 8192, 64, tp=1, pp=1, cp=1, ep=1, recompute="full", micro_batch=1)
    made = one.solve(explain=False).plan
    assert made is not None
    none = _family(one, made, "no ZeRO", {"zero": 0}, 0.1)
    assert none is not None and none.beaten.title == "nothing fits" and none.beaten.missing_bytes > 40 << 30
    assert none.beaten.binding == "memory of stage 0"
