"""Opening plans and comparing two of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from meshwright.compiler.plan_files import Shown, diff, open_plan
from meshwright.compiler.plan_page import plan_page
from meshwright.compiler.plan_timeline import step_fault
from meshwright.compiler.planner.export import TARGETS, export
from meshwright.runtime.errors import InvalidInputError
from meshwright.runtime.plan import Plan
from meshwright.runtime.plan_predictions import StageCosts

from ..runtime.plans import GIB, fingerprints, plan, uniform


def printed(value: object, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(value)
    return out.getvalue()


def compared(a: Plan, b: Plan):
    return diff(Shown("a.json", a), Shown("b.json", b))


def test_open(tmp_path: Path) -> None:
    plan().save(tmp_path / "p.json")
    shown = open_plan(tmp_path / "p.json")
    assert shown.fits and not shown.notes and json.loads(json.dumps(shown.as_dict()))["step_time_s"] == 0.132
    text = printed(shown)
    assert "model.layers.0 … model.layers.3" in text and "48.00" in text and "recompute full" in text


def test_costs_that_do_not_make_the_step_are_noted(tmp_path: Path) -> None:
    made = plan()
    one = made.predicted.stages[0].model_copy(update={"costs": StageCosts(
        forward_ns=(10**9,), input_gradient_ns=(1,), weight_gradient_ns=(1,))})
    stages = (one, made.predicted.stages[1])
    plan(predicted=made.predicted.model_copy(update={"stages": stages})).save(tmp_path / "p.json")
    assert "not the 0.132 s predicted: don't rely on it" in open_plan(tmp_path / "p.json").notes[0]


def test_edited_plans_need_a_word(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(plan().to_json().replace('"seq": 4096', '"seq": 8192'))
    with pytest.raises(InvalidInputError, match="changed after it was written, in ask"):
        open_plan(path)
    assert open_plan(path, allow_edited=True).plan.ask.seq == 8192


def test_equal_plans() -> None:
    found = compared(plan(), plan())
    assert found.same and not found.predictions and not found.inputs
    assert "both run the same way" in printed(found)


def test_differences_by_layer_and_field() -> None:
    found = compared(plan(), uniform(micro_batches=16))
    assert not found.same
    assert ("schedule.micro_batches", "8", "16") in [(d.what, d.a, d.b) for d in found.settings]
    [layers] = found.layers
    assert layers.what == "model.layers.4 … model.layers.7 (4)"
    assert layers.a.endswith("recompute full") and not layers.b.endswith("recompute full")
    assert {"step", "tokens/s", "busiest stage: bubble"} <= {d.what for d in found.predictions}
    assert "times as long a step as A" in printed(found)
    assert json.loads(json.dumps(found.as_dict()))["same_layout"] is False


def test_cuts_models_and_inputs() -> None:
    assert any(d.what == "cuts before" for d in compared(uniform(blocks=8), uniform(blocks=8, pp=4)).settings)
    other = compared(uniform(blocks=8), uniform(blocks=12))
    assert other.settings[0].what == "model" and other.settings[0].b == "tiny, 14 layers" and not other.layers
    assert compared(plan(), plan(fingerprints=fingerprints(gpus=16))).inputs == ("cluster: gpus was 8, is 16",)


def test_what_does_not_fit_is_a_difference() -> None:
    made = plan()
    stages = tuple(s.model_copy(update={"limit_bytes": 40 * GIB}) for s in made.predicted.stages)
    small = plan(predicted=made.predicted.model_copy(update={"stages": stages}))
    assert ("fits", "yes", "no") in [(d.what, d.a, d.b) for d in compared(made, small).predictions]
    assert not Shown("x", small).fits and "DOES NOT FIT: stage 0 lacks 8.00 GiB" in printed(Shown("x", small))


def leaves(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return [path]
    return [found for key, inner in items for found in leaves(inner, (*path, key))]


STRANGE = (None, True, -1, 0, 1, 2, 3, 7, 10**9, 10**18, 10**30, 0.5, 1e308, "", "x", "tp", "\x00\u202e<b>", [], {},
           [1])


def test_any_single_change_is_refused_in_one_line_or_shown(tmp_path: Path) -> None:
    """Whatever a value is replaced with: one clear error, or a plan that every command can show."""
    made = plan().model_dump(mode="json")
    places, random = leaves(made), Random(3)
    shown = 0
    for _ in range(600):
        data = json.loads(json.dumps(made))
        *way, last = random.choice(places)
        at = data
        for key in way:
            at = at[key]
        at[last] = random.choice(STRANGE)
        try:
            opened = Plan.from_json(json.dumps(data), "p.json", allow_edited=True)
        except InvalidInputError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            continue
        shown += 1
        if shown % 4 == 0:
            page, _ = plan_page(Shown("p.json", opened)), printed(Shown("p.json", opened))
            assert page.rstrip().endswith("</html>") and step_fault(opened) != ""
            compared(opened, plan()).as_dict()
            for target in TARGETS:
                export(opened, target)
    assert 60 < shown < 540
