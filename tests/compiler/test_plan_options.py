"""`meshwright plan --mixing`, `--prove` and every `--objective`, on four GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from meshwright.compiler import cli
from meshwright.compiler.plan_answers import plan_for, proved, verified
from meshwright.compiler.planner import objectives
from meshwright.compiler.planner.evaluate import evaluate
from meshwright.compiler.planner.objectives import _largest, resized
from meshwright.compiler.planner.plan_model import Planner, Request
from meshwright.compiler.planner.prove import prove
from meshwright.compiler.planner.space import Pins
from meshwright.cost_model.cluster import Cluster
from meshwright.runtime.errors import InvalidInputError
from meshwright.runtime.plan_table import footnotes

from .planner.planning import model, planner

BERT, FOUR = "bert-large", "1x4 a100-80"
ASK = (BERT, "--cluster", FOUR, "--seq", "512", "--global-batch", "16", "--pp", "1")


def planned(path: Path, *words: str) -> dict[str, Any]:
    """The JSON of a plan, whose saved file was checked anew."""
    done = CliRunner().invoke(cli.app, ["plan", *ASK, *words, "-o", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert verified(path).faults == ()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return planned(tmp_path_factory.mktemp("uniform") / "plan.json")


def test_mixing_takes_what_is_faster(uniform: dict[str, Any], tmp_path: Path) -> None:
    """Layers on both sides of a change of layout; the change is paid for in the step."""
    mixed = planned(tmp_path / "plan.json", "--mixing")
    layouts = {tuple(r["options"][name] for name in ("tp", "cp", "dp")) for r in mixed["plan"]["layers"]}
    assert len(layouts) > 1 and mixed["plan"]["predicted"]["reshard_ns"] > 0
    assert mixed["step_time_s"] <= uniform["step_time_s"] * 1.0075  # both searches stop within that of the best
    assert mixed["plan"]["ask"]["options"] == ["--pp 1", "--mixing"]


def test_prove_says_proven_or_takes_the_faster_plan(uniform: dict[str, Any], tmp_path: Path) -> None:
    found = planned(tmp_path / "plan.json", "--prove", "60")
    assert found["proof"]["verdict"] in ("proven", "refuted")
    assert found["step_time_s"] <= uniform["step_time_s"]
    assert found["proof"]["lower_bound_ns"] <= found["plan"]["predicted"]["step_time_ns"]


def test_a_plan_that_cp_sat_beats_is_replaced() -> None:
    one = planner(BERT, FOUR, 512, 16, pp=1, tp=1, micro_batches=1)
    answer = one.solve()
    tables = answer.searched.problem.outers[answer.found.plan.outer]
    slower = answer.found.plan.model_copy(update={"options": tuple(
        max(range(len(tables.options[kind])), key=lambda o: tables.options[kind][o].forward_ns)
        for kind in answer.searched.problem.layers)})
    price = evaluate(answer.searched.problem, slower)
    assert price.fits and price.step_ns > answer.found.evaluation.step_ns
    result = replace(answer.found, plan=slower, evaluation=price)
    better, proof = proved(replace(answer, searched=replace(answer.searched, result=result)), 60)
    assert proof.verdict == "refuted" and better.plan is not None
    assert better.plan.predicted.step_time_ns == proof.step_ns < price.step_ns
    assert "a faster plan" in proof.sentence()


def test_relaxed_tuples_are_never_plans() -> None:
    """The relaxed tables hold something faster than any plan: it bounds, but does not refute."""
    one = planner(BERT, FOUR, 512, 16, pp=1, tp=1, micro_batches=1)
    answer = one.solve()
    [group] = list(one.space.groups())
    least = one.pricer.relaxed(group)
    outers = (*answer.searched.problem.outers, *least.outers(one.space))
    both = answer.searched.problem.model_copy(update={"outers": outers})
    real = prove(both, answer.found.plan, 60, relaxed={1})
    assert real.verdict == "bound" and real.step_ns == answer.found.evaluation.step_ns and real.plan is not None
    assert real.plan.outer == 0 and real.lower_bound_ns < answer.found.evaluation.step_ns
    assert prove(both, answer.found.plan, 60).verdict == "refuted"  # what it would say without being told


def test_prove_wants_seconds() -> None:
    with pytest.raises(InvalidInputError, match="--prove 0"):
        plan_for(Request(BERT, FOUR, 512, 16), "throughput", None, 0)


def test_largest_batch_is_the_largest_divisor_that_fits(tmp_path: Path) -> None:
    found = planned(tmp_path / "plan.json", "--objective", "largest-batch")
    assert found["steps"] == ["micro-batch 16, the whole global batch: fits"]
    assert found["plan"]["ask"]["options"] == ["--pp 1", "--micro-batch 16"]
    assert found["plan"]["ask"]["objective"] == "largest-batch"
    small = Planner(Request(BERT, FOUR, 512, 4096, Pins(pp=1, tp=1, cp=1, recompute="none")), model(BERT, 512))
    best, steps = objectives.best_for(replace(small.request, objective="largest-batch"), None)
    assert best.plan is not None and steps[0].startswith("micro-batch 4096: ") and steps[-1].endswith(": fits")
    taken = int(steps[-1].split()[1].rstrip(":"))
    assert 1 < taken < 1024 and "no plan found fits" in steps[-2]
    with pytest.raises(InvalidInputError, match="largest-batch"):
        objectives.best_for(replace(small.request, objective="largest-batch", pins=Pins(micro_batch=2)), None)


def test_largest_sequence_claims_what_was_tried(tmp_path: Path) -> None:
    found = planned(tmp_path / "plan.json", "--objective", "largest-sequence")
    assert found["steps"] == ["512 tokens: fits",
                              "1024 tokens: seq 1024 for bert-large; expected at most 512, its max_position_embeddings",
                              "512 tokens are the most that were tried and fit"]
    assert found["plan"]["ask"]["seq"] == 512
    with pytest.raises(InvalidInputError, match="max_position_embeddings"):  # not "does not fit"
        objectives.best_for(Request(BERT, FOUR, 1024, 16, objective="largest-sequence"), None)


@pytest.mark.parametrize(("fits_to", "most", "expected"), [(0, 64, None), (5, 64, 5), (37, 64, 36), (100, 64, 64)])
def test_largest_halves_to_an_eighth_and_keeps_to_its_limit(fits_to: int, most: int, expected: int | None) -> None:
    tried: list[int] = []

    def attempt(units: int) -> Any:
        tried.append(units)
        return units if units <= fits_to else None

    assert _largest(attempt, 1, most) == expected
    assert max(tried) <= most


def test_fewest_gpus_goes_below_a_node_and_between_divisors(tmp_path: Path) -> None:
    found = planned(tmp_path / "plan.json", "--objective", "fewest-gpus", "--target-tokens-per-s", "100000")
    assert found["plan"]["mesh"]["gpus"] == 2 and found["plan"]["ask"]["cluster"] == "1x2 a100-80"
    assert found["steps"][0].startswith("1 GPUs: ") and found["tokens_per_s"] >= 100000
    sizes = list(objectives._sizes(Cluster.parse("4x8 a100-80")))
    assert sizes == [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (3, 8), (4, 8)]
    small = Request(BERT, FOUR, 512, 16, Pins(pp=1), objective="fewest-gpus")
    fitting, steps = objectives.best_for(small, None)
    assert fitting.plan is not None and fitting.plan.mesh.gpus == 1 and len(steps) == 1
    with pytest.raises(InvalidInputError, match="does not reach 1,000,000,000"):
        objectives.best_for(small, 1e9)


def test_fewest_gpus_skips_only_what_can_not_reach_the_target() -> None:
    """The rate at the GPUs' peak is above that of every plan."""
    base = planner(BERT, FOUR, 512, 16, pp=1)
    for gpus in (1, 2, 4):
        answer = base.with_request(**vars(resized(base.request, 1, gpus))).solve()
        most = objectives._most_tokens_per_s(base, gpus)
        assert answer.plan is not None and most is not None and answer.plan.predicted.tokens_per_s < most


def test_energy_takes_the_least(tmp_path: Path) -> None:
    found = planned(tmp_path / "plan.json", "--objective", "energy")
    assert [step.split(":")[0] for step in found["steps"]] == ["1 GPUs", "2 GPUs", "4 GPUs"]
    joules = [float(step.split(": ")[1].split()[0]) for step in found["steps"]]
    assert found["plan"]["predicted"]["energy_joules"] / 1e3 == pytest.approx(min(joules), rel=0.01)
    with pytest.raises(InvalidInputError, match="--target-tokens-per-s"):
        plan_for(Request(BERT, FOUR, 512, 16), "energy", 1e5, None)


def test_a_plan_with_little_left_is_tight() -> None:
    one = planner(BERT, FOUR, 512, 16, pp=1, tp=1, micro_batches=1)
    used = one.solve().plan
    assert used is not None and "tight" not in " ".join(footnotes(used))
    peak = max(s.peak_bytes for s in used.predicted.stages)
    usable = one.cluster.device.memory_bytes - one.cluster.reserved_memory_bytes
    for spare, expected in ((1 << 30, True), (3 << 30, False)):
        near = planner(BERT, FOUR, 512, 16, pp=1, tp=1, micro_batches=1)
        near.cluster = replace(one.cluster, device=replace(
            one.cluster.device, memory_bytes=one.cluster.device.memory_bytes - usable + peak + spare))
        answer = near.solve()
        assert answer.plan is not None
        assert any(note.startswith("tight: stage 0 has 1.00 GiB free") for note in footnotes(answer.plan)) == expected
