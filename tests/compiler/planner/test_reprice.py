"""Plans from files are priced anew: the same numbers where nothing changed, others where something did, reasons where
they no longer lie in the model or the cluster, and no code run because a file names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshwright.compiler.plan_answers import planner_of
from meshwright.compiler.plan_files import priced_plan
from meshwright.compiler.planner.export import export
from meshwright.compiler.planner.foreign import read_foreign
from meshwright.compiler.planner.plan_model import Planner, Request
from meshwright.compiler.planner.reprice import reprice
from meshwright.compiler.planner.space import Pins
from meshwright.runtime.errors import InvalidInputError
from meshwright.runtime.plan import Plan

from ...runtime.plans import plan as hand_made

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
          "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 6, "vocab_size": 1024,
          "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planner, Plan]:
    """A searched plan of a small model on 8 GPUs, with a pipeline so that more can go wrong."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    planner = Planner(Request(str(path), "1x8 h100-sxm", 256, 32, Pins(pp=2)))
    answer = planner.solve()
    assert answer.plan is not None
    return planner, answer.plan


def test_experts_are_priced_and_exported_again(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 2,
              "num_local_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    planner = Planner(Request(str(tmp_path / "config.json"), "1x4 h100-sxm", 128, 8, Pins(ep=2)))
    made = planner.solve().plan
    assert made is not None
    block, *others = [r for r in made.layers if r.experts]
    assert all((r.experts, r.options.ep) == (4, 2) for r in (block, *others))
    assert reprice(made, planner).predicted == made.predicted
    for target in ("torchtitan", "megatron"):
        exported = export(made, target)
        layout = read_foreign(exported.text)
        assert layout.ep == 2 and exported.expressed["layers.options.ep"]
        assert "layers.options.etp" in exported.cannot or layout.etp == block.options.etp


def edited(made: Plan, change: Callable[[dict[str, Any]], Any]) -> Plan:
    data = json.loads(made.to_json())
    change(data)
    return Plan.from_json(json.dumps(data), allow_edited=True)


def test_nothing_changed(planned: tuple[Planner, Plan]) -> None:
    planner, made = planned
    again = reprice(made, planner)
    assert again.predicted == made.predicted and again.certificate == made.certificate and made.certificate


def test_stored_predictions_are_not_believed(planned: tuple[Planner, Plan]) -> None:
    planner, made = planned

    def flatter(data: dict[str, Any]) -> None:
        for stage in data["predicted"]["stages"]:
            stage["bubble_ns"] += 10**9
        data["predicted"]["step_time_ns"] += 10**9

    lied = edited(made, flatter)
    assert lied.predicted.step_time_ns != made.predicted.step_time_ns
    assert reprice(lied, planner).predicted == made.predicted


def test_a_changed_layout_gets_its_own_price(planned: tuple[Planner, Plan]) -> None:
    planner, made = planned

    def recompute(data: dict[str, Any]) -> None:
        for r in data["layers"]:
            if r["kind"] == "LlamaDecoderLayer":
                r["options"]["recompute"] = "full"

    slower = reprice(edited(made, recompute), planner)
    assert slower.predicted.step_time_ns > made.predicted.step_time_ns
    assert slower.predicted.stages[0].memory_bytes["activations"] < made.predicted.stages[0].memory_bytes["activations"]


def test_from_a_file_with_what_differs(planned: tuple[Planner, Plan], tmp_path: Path) -> None:
    _, made = planned
    made.save(tmp_path / "same.json")
    shown = priced_plan(tmp_path / "same.json")
    assert shown.priced and not shown.notes and not shown.differences and shown.plan == made
    other = made.model_copy(update={"ask": made.ask.model_copy(update={"cluster": "1x8 a100-80"})})
    other.save(tmp_path / "other.json")
    shown = priced_plan(tmp_path / "other.json")
    assert shown.priced and "cluster: device was h100-sxm, is a100-80" in shown.differences
    assert any(n.startswith("priced again: ") for n in shown.notes) and shown.plan.certificate is None
    assert shown.plan.predicted.step_time_ns != made.predicted.step_time_ns and shown.plan.layers == made.layers


@pytest.mark.parametrize(("section", "field", "value", "message"), [
    ("ask", "cluster", "2x8 h100-sxm", "the cluster has 16 GPUs, the plan uses 8"),
    ("ask", "cluster", "1x8 h100", "unknown device"), ("ask", "model", "no-such-model", "no-such-model"),
    ("ask", "model", "os:getcwd", "is code, which a plan does not run"),
    ("ask", "options", ["--tea 4"], "unknown axis 'tea'"),
])
def test_what_can_not_be_priced_keeps_the_files_predictions(
        planned: tuple[Planner, Plan], tmp_path: Path, section: str, field: str, value: Any, message: str) -> None:
    _, made = planned
    edited(made, lambda d: d[section].update({field: value})).save(tmp_path / "p.json")
    shown = priced_plan(tmp_path / "p.json")
    assert not shown.priced and shown.plan.predicted == made.predicted
    assert message in shown.notes[-1] and "the predictions are the file's" in shown.notes[-1]


def test_other_models_and_batches(planned: tuple[Planner, Plan]) -> None:
    planner, made = planned
    with pytest.raises(InvalidInputError, match="named otherwise"):
        reprice(hand_made(), planner)
    batch = planner.with_request(global_batch=64)
    with pytest.raises(InvalidInputError, match="the batch is 64 samples, the plan's 32"):
        reprice(made, batch)


def test_code_that_a_plan_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sneaky.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = hand_made()
    named = hand_made(ask=made.ask.model_copy(update={"model": "sneaky:model"}))
    with pytest.raises(InvalidInputError, match="--run-model-code"):
        planner_of(named)
    with pytest.raises(SystemExit, match="imported"):
        planner_of(named, run_model_code=True).model.one  # noqa: B018
