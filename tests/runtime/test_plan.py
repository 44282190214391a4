"""The plan file: what is written is read, what is wrong is one line, changes since are named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from meshwright.cost_model import model as cost_model
from meshwright.cost_model import schedules
from meshwright.runtime import plan as module
from meshwright.runtime import plan_layout
from meshwright.runtime.errors import InvalidInputError
from meshwright.runtime.plan import Plan
from meshwright.runtime.plan_data import Fingerprint
from meshwright.runtime.plan_layout import LayerOptions, LayerRange, Mesh, Part, Schedule

from .plans import fingerprints, layer_names, options, plan, uniform

MADE = plan()


def refused(text: str | bytes, **how: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        Plan.from_json(text, "p.json", **how)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def changed(change: Callable[[dict[str, Any]], Any]) -> str:
    data = json.loads(MADE.to_json())
    change(data)
    return json.dumps(data)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no folder"):  # a slip in a path makes no folders
        MADE.save(tmp_path / "new" / "plan.json")
    (tmp_path / "new").mkdir()
    MADE.save(tmp_path / "new" / "plan.json")
    assert Plan.load(tmp_path / "new" / "plan.json") == MADE
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["plan.json"]
    assert Plan.from_json(MADE.to_json()).to_json() == MADE.to_json()


def test_names_are_those_of_the_cost_model() -> None:
    assert get_args(plan_layout.RecomputeMode) == cost_model.RECOMPUTE_MODES
    assert plan_layout.ScheduleName == schedules.ScheduleName


@pytest.mark.parametrize(("text", "message"), [
    ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deep"),
    ("[" * 10_000 + "]" * 10_000, "nested too deep"),
    ('{"a":' * 30 + "1" + "}" * 30, "nested too deep"),
    ("", "is not JSON"), ("{", "is not JSON"), (b"\xff\xfe", "is not JSON"), ("[]", "holds a JSON list"),
    ('{"format": "meshwright-plan", "version": NaN}', "is not JSON"),
    ("{}", "no Meshwright plan"), ('{"format": "meshwright-plan"}', "version 'None'"),
    ('{"format": "meshwright-plan", "version": true}', "version 'True'"),
    ('{"format": "meshwright-plan", "version": 0}', "version '0'"),
    ('{"format": "meshwright-plan", "version": 2}', "version 2; this release reads up to version 1"),
    ('{"format": "meshwright-plan", "version": 1}', "no checksums"),
])
def test_what_is_no_plan_is_one_line(text: str | bytes, message: str) -> None:
    assert message in refused(text)


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.runtime.plan_data.MAX_BYTES", 100)
    assert "at most 100" in refused(MADE.to_json())
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    MADE.save(tmp_path / "plan.json")
    with pytest.raises(InvalidInputError, match="at most 100"):
        Plan.load(tmp_path / "plan.json")


def test_a_newer_version_is_not_read_as_an_old_one() -> None:
    text = changed(lambda d: d.update(version=2, shiny={"new": 1}))
    assert "Install a newer Meshwright" in refused(text) and "newer" in refused(text, allow_edited=True)


@pytest.mark.parametrize(("change", "sections"), [
    (lambda d: d["predicted"].update(step_time_ns=1), "predicted"),
    (lambda d: d["ask"].update(seq=8192), "ask"),
    (lambda d: (d["layers"][0].update(kind="x"), d["mesh"].update(pp=4)), "mesh, layers"),
    (lambda d: d.pop("beaten"), "beaten (gone)"),
    (lambda d: d.update(code="print()"), "code"),
])
def test_a_changed_plan_says_where(change: Callable[[dict[str, Any]], Any], sections: str) -> None:
    assert f"was changed after it was written, in {sections};" in refused(changed(change))


def test_an_edited_plan_opens_when_allowed_and_is_still_checked() -> None:
    text = changed(lambda d: d["ask"].update(seq=8192))
    assert Plan.from_json(text, allow_edited=True).ask.seq == 8192
    text = changed(lambda d: d["layers"][0]["options"].update(dp=4))
    assert "tp · cp · dp = 8, but a stage has 4 GPUs" in refused(text, allow_edited=True)
    text = changed(lambda d: d.update(code="print()"))
    assert "code: Extra inputs are not permitted" in refused(text, allow_edited=True)
    text = changed(lambda d: d["layers"][0]["options"].update(tp="2"))
    assert "layers.0.options.tp: Input should be a valid integer" in refused(text, allow_edited=True)
    text = changed(lambda d: d["predicted"].update(step_time_ns=7))
    assert "the step 7 ns" in refused(text, allow_edited=True)


@pytest.mark.parametrize(("fields", "message"), [
    ({"cp": 2}, "a kind exactly where cp"), ({"cp_kind": "ring"}, "a kind exactly where cp"),
    ({"ep": 3}, "does not divide the stage's 4"), ({"tp": 1, "dp": 4}, "sequence_parallel with tp 1"),
    ({"zero_shard": 3}, "expected a divisor of dp"), ({"zero": 0}, "1 where nothing is sharded"),
    ({"runnable": True}, "a reason in why_not_runnable"), ({"tp": 0}, "greater than or equal to 1"),
    ({"tp": True}, "valid integer"), ({"tp": 2.0}, "valid integer"),
])
def test_options_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        options(**fields)


NAMES = layer_names()
EMBED, BLOCKS, LAST, HEAD = MADE.layers


@pytest.mark.parametrize(("fields", "message"), [
    ({"parts": (Part(stage=0, first=NAMES[0], last=NAMES[9]),)}, "expected 2 of them"),
    ({"parts": (Part(stage=1, first=NAMES[0], last=NAMES[4]), Part(stage=0, first=NAMES[5], last=NAMES[9]))},
     "part k being chunk"),
    ({"parts": (Part(stage=0, first=NAMES[0], last=NAMES[3]), Part(stage=1, first=NAMES[5], last=NAMES[9]))},
     "does not continue at layer 4"),
    ({"parts": (Part(stage=0, first=NAMES[0], last=NAMES[4]), Part(stage=1, first=NAMES[5], last=NAMES[8]))},
     "end at layer 9 of 10"),
    ({"layers": (EMBED, BLOCKS, LAST, HEAD.model_copy(update={"last": "lm_head"}))}, "'lm_head' is not among"),
    ({"layers": (EMBED, BLOCKS.model_copy(update={"count": 3}), LAST, HEAD)}, "are not 3"),
    ({"layers": (EMBED, LayerRange(first=NAMES[1], last=NAMES[8], count=8, kind="Block", options=options()), HEAD)},
     "lie in two parts"),
    ({"schedule": Schedule(name="1f1b", stages=2, micro_batches=8, micro_batch_samples=4)}, "not the 16"),
    ({"schedule": Schedule(name="1f1b", stages=2, micro_batches=16, micro_batch_samples=1)}, "dp 2 does not divide"),
    ({"schedule": Schedule(name="1f1b", stages=4, micro_batches=8, micro_batch_samples=2)}, "the mesh pp 2"),
    ({"schedule": Schedule(name="interleaved", stages=2, chunks=2, micro_batches=8, micro_batch_samples=2)},
     "expected 4 of them"),
    ({"mesh": Mesh(gpus=16, gpus_per_node=8, pp=2)}, "but a stage has 8 GPUs"),
    ({"predicted": MADE.predicted.model_copy(update={"stages": MADE.predicted.stages[:1]})}, "1 stages of 2"),
    ({"predicted": MADE.predicted.model_copy(update={"layers": MADE.predicted.layers[:1]})}, "1 layer ranges of 4"),
])
def test_plans_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        plan(**fields)


def test_stages_inside_of_replicas_need_equal_strides() -> None:
    inside = Mesh(gpus=8, gpus_per_node=8, pp=2, order=("tp", "cp", "pp", "dp"),
                  expert_order=("ep", "etp", "pp", "edp"))
    moe = options(ep=2)
    ranges = tuple(r.model_copy(update={"options": moe}) for r in MADE.layers)
    assert plan(mesh=inside, layers=ranges).mesh.axes(moe) == {"tp": (2, 1), "cp": (1, 2), "pp": (2, 2), "dp": (2, 4)}
    other = options(tp=4, dp=1, zero=0, zero_shard=1, ep=2)
    with pytest.raises(ValidationError, match="disagree on how far apart"):
        plan(mesh=inside, layers=(*ranges[:3], ranges[3].model_copy(update={"options": other})))
    with pytest.raises(ValidationError, match="every one of tp, cp, dp, pp once"):
        Mesh(gpus=8, gpus_per_node=8, order=("tp", "cp", "dp"))


def test_a_title_says_how_many_layers_it_is_true_of() -> None:
    assert MADE.title == "pp 2 1f1b, 8 micro-batches · tp 2 · sp · dp 2 · ZeRO-1 in 6 of 10 layers"
    assert uniform().title == "pp 2 1f1b, 8 micro-batches · tp 2 · sp · dp 2 · ZeRO-1"


def test_every_rank_has_one_coordinate() -> None:
    mesh = Mesh(gpus=24, gpus_per_node=8, pp=2, order=("cp", "tp", "dp", "pp"))
    axes = mesh.axes(LayerOptions(tp=2, cp=3, cp_kind="ring", dp=2, why_not_runnable="no"))
    found = {tuple(rank // stride % size for size, stride in axes.values()) for rank in range(24)}
    assert len(found) == 24


def test_differences_name_what_changed() -> None:
    now = fingerprints(gpus=16, power=700.5)
    assert MADE.fingerprints.differences(MADE.fingerprints) == []
    assert MADE.fingerprints.differences(now) == ["cluster: gpus was 8, is 16", "cluster: power was absent, is 700.5"]
    other = MADE.fingerprints.model_copy(update={"profile": Fingerprint.of({"version": 2})})
    assert MADE.fingerprints.differences(other) == ["profile: differs in something that no recorded fact names"]


def test_repriced_keeps_the_layout_and_drops_what_belongs_to_the_old_inputs() -> None:
    faster = MADE.predicted.model_copy(update={"tokens_per_s": 1.0})
    same = MADE.repriced(MADE.fingerprints, lambda p: faster)
    assert same.predicted.tokens_per_s == 1.0 and same.certificate == MADE.certificate and same.beaten
    now = fingerprints(gpus=16)
    stale = MADE.repriced(now, lambda p: faster)
    assert stale.layers == MADE.layers and stale.fingerprints == now and stale.certificate is None and not stale.beaten
    with pytest.raises(InvalidInputError, match="the new prices don't fit the plan: predicted: 1 stages of 2"):
        MADE.repriced(now, lambda p: faster.model_copy(update={"stages": faster.stages[:1]}))


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("before")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInputError, match="can't be written: No space left"):
        MADE.save(path)
    assert path.read_text() == "before" and [f.name for f in tmp_path.iterdir()] == ["plan.json"]
    monkeypatch.undo()
    for bad in (tmp_path, path / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InvalidInputError, match="can't be written"):
            MADE.save(bad)


def test_what_can_not_be_read(tmp_path: Path) -> None:
    for bad in (tmp_path, tmp_path / "none.json", "a\0b"):
        with pytest.raises(InvalidInputError, match="can't be read"):
            Plan.load(bad)


def test_importing_the_schema_is_light() -> None:
    code = ("import sys, meshwright.runtime.plan; "
            "print([m for m in ('torch', 'rich', 'ortools') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
