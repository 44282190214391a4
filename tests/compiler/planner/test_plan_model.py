"""`mw.plan` end to end: the plan file, its price, its certificate, what planners get wrong, asks that can't be met."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import meshwright as mw
from meshwright.compiler.plan_answers import planner_of, request_of, verified
from meshwright.compiler.planner.evaluate import evaluate
from meshwright.compiler.planner.group_search import GroupSearch
from meshwright.compiler.planner.infeasible import applied, fits
from meshwright.compiler.planner.plan_model import Planner, Request
from meshwright.compiler.planner.problem import Option, Problem
from meshwright.compiler.planner.problem import Plan as SearchPlan
from meshwright.compiler.planner.search import Found
from meshwright.cost_model.pipeline import StageCosts
from meshwright.cost_model.schedules import Schedule
from meshwright.cost_model.steady_state import steady_state_time_ns
from meshwright.runtime.errors import DoesNotFitError, InvalidInputError, UnknownNameError
from meshwright.runtime.plan import Plan, checksums

from .planning import NODE, answer, model, plan, planner

LLAMA = "llama3-8b"


@pytest.fixture(scope="module")
def two_stages() -> Plan:
    return plan(LLAMA, NODE, 8192, 32, pp=2, schedule="1f1b")


def test_public_names() -> None:
    found = mw.plan(LLAMA, NODE, seq=8192, global_batch=64, pp=1, tp=1)
    assert found.predicted.fits and found.mesh.gpus == mw.Cluster.parse(NODE).gpus == 8
    assert found.title.startswith("pp 1, ")


def test_every_gpu_is_used_and_the_batch_divides(two_stages: Plan) -> None:
    for r in two_stages.layers:
        assert r.options.tp * r.options.cp * r.options.dp * two_stages.mesh.pp == 8
        assert two_stages.schedule.micro_batch_samples % r.options.dp == 0
    assert two_stages.mesh.idle_gpus == 0
    assert two_stages.schedule.micro_batches * two_stages.schedule.micro_batch_samples == 32


def test_predictions_are_those_of_the_tables(two_stages: Plan) -> None:
    """The step, every stage's costs and its memory are J's, re-sharding included: what was searched is reported."""
    one = planner_of(two_stages)
    searched = one.search()
    assert isinstance(searched.result, Found)
    located = searched.result.plan
    price = evaluate(searched.problem, located)
    assert price.step_ns == two_stages.predicted.step_time_ns
    outer = searched.problem.outers[located.outer]
    chosen = [outer.options[k][o] for k, o in zip(searched.problem.layers, located.options, strict=True)]
    moves = [outer.reshard[a.layout_out][b.layout_in] for start, end in pairwise((0, *located.ends))
             for a, b in pairwise(chosen[start:end])]
    moved = sum(move.forward_ns + move.backward_ns for move in moves)
    assert two_stages.predicted.reshard_ns == outer.m * moved
    for stage, costs, memory in zip(two_stages.predicted.stages, price.costs, price.memory, strict=True):
        assert stage.costs.forward_ns == costs.forward_ns and stage.costs.sync_ns == costs.sync_ns
        used = stage.peak_bytes - stage.memory_bytes["context"]
        assert used == memory.total_bytes and stage.limit_bytes - stage.memory_bytes["context"] == memory.capacity_bytes
        assert stage.total_ns == price.step_ns


def uneven(end: int) -> tuple[Problem, SearchPlan]:
    """Two stages of an 8B Llama cut at that layer of 34, 16 micro-batches."""
    one = planner(LLAMA, NODE, 8192, 32, pp=2, micro_batches=16)
    group = next(iter(one.space.groups()))
    found = GroupSearch(one.pricer).problem([one.pricer.full(group).outer("1f1b", 1)])
    return found, SearchPlan(outer=0, ends=(end, 34), options=(0,) * 34)


def closed_form_ns(costs: Sequence[StageCosts], m: int) -> int:
    """Two stages of 1F1B, r the way to the other stage and back. A slow last stage works without a break, between the
    first forward to reach it and the last backward to leave it. A slow first stage waits twice: for its first backward,
    while it has but one more forward to run, and for its last one, while it has but one other backward."""
    (f, b), (f1, b1) = ((c.forward_ns[0], c.input_gradient_ns[0] + c.weight_gradient_ns[0]) for c in costs)
    way, back = costs[0].send_forward_ns, costs[1].send_backward_ns
    r = way + f1 + b1 + back
    if f + b >= r:
        return m * (f + b) + max(0, r - f) + max(0, r - b) + costs[0].tail_ns
    last = f + way + m * (f1 + b1)
    return max(last + costs[1].tail_ns, last + back + b + costs[0].tail_ns)


@pytest.mark.parametrize("end", [24, 10])
def test_a_plan_is_priced_by_its_slowest_stage(end: int) -> None:
    """16 · slow + fast holds where the last stage is the slow one; a slow first one hides most of the other."""
    price = evaluate(*uneven(end))
    slow, fast = sorted((sum(c.forward_ns) + sum(c.input_gradient_ns) + sum(c.weight_gradient_ns)
                         for c in price.costs), reverse=True)
    assert slow > 1.5 * fast
    assert price.step_ns == closed_form_ns(price.costs, 16)
    assert (price.step_ns - price.costs[0].tail_ns == pytest.approx(16 * slow + fast, rel=0.005)) == (end == 10)


def test_stages_priced_by_their_mean_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(schedule: Schedule, costs: Sequence[StageCosts]) -> int:
        both = [tuple(sum(getattr(c, name)[0] for c in costs) // 2 for name in (
            "forward_ns", "input_gradient_ns", "weight_gradient_ns")) for _ in costs]
        return steady_state_time_ns(schedule, [replace(c, forward_ns=(f,), input_gradient_ns=(i,),
                                                       weight_gradient_ns=(w,))
                                               for c, (f, i, w) in zip(costs, both, strict=True)])

    monkeypatch.setattr("meshwright.compiler.planner.evaluate.steady_state_time_ns", mean)
    price = evaluate(*uneven(24))
    assert price.step_ns < 0.8 * closed_form_ns(price.costs, 16)


def test_certificate_accounts_for_every_tuple_and_is_checked_anew(two_stages: Plan, tmp_path: Path) -> None:
    certificate = two_stages.certificate
    assert certificate is not None and two_stages.gap is not None and 0 <= two_stages.gap < 0.05
    assert {t.state for t in certificate.tuples} <= {"solved", "searched", "bounded", "infeasible"}
    assert all((t.bound_ns is None) == (t.state == "infeasible") for t in certificate.tuples)
    two_stages.save(tmp_path / "plan.json")
    found = verified(tmp_path / "plan.json")
    assert found.faults == () and found.checked == len(certificate.tuples) > 5


def test_a_bound_that_is_too_good_is_found(two_stages: Plan, tmp_path: Path) -> None:
    data = json.loads(two_stages.to_json())
    claim = next(t for t in data["certificate"]["tuples"] if t["state"] in ("bounded", "searched"))
    claim["bound_ns"] = 10 * two_stages.predicted.step_time_ns
    data.pop("checksums")
    (tmp_path / "plan.json").write_text(json.dumps({**data, "checksums": checksums(data)}))
    assert any(claim["title"] in fault for fault in verified(tmp_path / "plan.json").faults)


def test_a_stale_plan_says_what_changed(two_stages: Plan, tmp_path: Path) -> None:
    facts = {**two_stages.fingerprints.profile.facts, "gemm_efficiency": 0.1}
    old = two_stages.fingerprints.profile.model_copy(update={"sha256": "0" * 64, "facts": facts})
    stale = two_stages.model_copy(update={"fingerprints": two_stages.fingerprints.model_copy(update={"profile": old})})
    stale.save(tmp_path / "plan.json")
    assert any("gemm_efficiency was 0.1" in fault for fault in verified(tmp_path / "plan.json").faults)


def test_relaxed_tables_are_below_full_ones() -> None:
    """What closes a group without its full tables must hold for them: no option takes less or holds less."""
    experts = planner("mixtral-8x7b", "2x8 h200", 4096, 64, tp=8, pp=2, ep=1, etp=1)  # dp 1, but edp 8
    for one in (planner(LLAMA, NODE, 8192, 32), experts, planner("mixtral-8x7b", NODE, 4096, 16, pp=1)):
        for group in one.space.groups():
            full, least, half = one.pricer.full(group), one.pricer.relaxed(group), one.pricer.half_relaxed(group)
            for own, bounds, halves in zip(full.choices, least.choices, half.choices, strict=True):
                floor = {c.option.layout_in: c.option for c in bounds}
                for choice in own:
                    assert _below(floor[choice.option.layout_in], choice.option), (group, choice.option.name)
                    assert any(_below(c.option, choice.option) for c in halves
                               if c.option.family == choice.option.family), (group, choice.option.name)


def _below(low: Option, option: Option) -> bool:
    times = all(getattr(low, name) <= getattr(option, name)
                for name in ("forward_ns", "input_gradient_ns", "weight_gradient_ns", "static_bytes"))
    return times and low.saved_bytes + low.saved_until_w_bytes <= option.saved_bytes + option.saved_until_w_bytes


def test_a_cut_context_parallel_layout_is_never_cheaper() -> None:
    """The layout with more replicas instead has an option that is no slower for each of its options."""
    one = planner(LLAMA, NODE, 8192, 64, cp=2, pp=1, micro_batches=8)
    more = planner(LLAMA, NODE, 8192, 64, cp=1, pp=1, micro_batches=8)
    [group] = list(one.space.groups())
    layers = [k for k, kind in enumerate(one.space.kinds) if kind.vocabulary is None]
    for kind in layers:
        cut = [c for c in one.pricer.full(group).choices[kind] if c.strategy.tp == 1]
        kept = [c for c in more.pricer.full(group).choices[kind] if c.strategy.tp == 1]
        for choice in cut:
            assert any(k.option.forward_ns <= choice.option.forward_ns
                       and k.option.saved_until_w_bytes <= choice.option.saved_until_w_bytes * 1.01 for k in kept)


def test_more_memory_or_faster_links_are_never_slower() -> None:
    def best(cluster: mw.Cluster) -> float:
        one = planner(LLAMA, NODE, 8192, 32, pp=1)
        one.cluster = cluster
        found = GroupSearch(one.pricer, within=0.0).run().result
        assert isinstance(found, Found)
        return found.evaluation.step_ns

    base = mw.Cluster.parse(NODE)
    larger = replace(base, device=replace(base.device, memory_bytes=base.device.memory_bytes * 1.5))
    faster = replace(base, levels=tuple(replace(v, bandwidth_bytes_per_s=2 * v.bandwidth_bytes_per_s)
                                        for v in base.levels))
    assert best(larger) <= best(base) * 1.0005  # the heuristic's own grain
    assert best(faster) <= best(base) * 1.0005


def test_a_batch_that_does_not_divide_is_refused_or_padded() -> None:
    with pytest.raises(InvalidInputError, match="dp 8: does not divide the global batch of 60"):
        planner(LLAMA, NODE, 8192, 60, tp=1, pp=1, cp=1).search()
    found = Planner(replace(planner(LLAMA, NODE, 8192, 60, tp=1, pp=1, cp=1).request, pad_batch=True),
                    model(LLAMA, 8192)).solve().plan
    assert found is not None and found.training.padded_batch == 64 and found.ask.global_batch == 60
    free = Planner(replace(planner(LLAMA, NODE, 8192, 20).request, pad_batch=True), model(LLAMA, 8192))
    assert free.batch == 20  # some layout divides it: nothing to pad
    assert found.predicted.tokens_per_s == pytest.approx(60 * 8192 / found.predicted.step_time_s)


def test_what_does_not_fit_names_a_change_that_fits() -> None:
    one = planner(LLAMA, "1x1 h100-sxm", 8192, 4)
    found = one.solve()
    assert found.plan is None and found.why_not is not None
    near = found.why_not
    assert near.nearest is not None and 40 < near.missing_bytes / 2**30 < 100
    assert "GiB are missing" in near.sentence()
    larger = next(c for c in near.changes if "cluster" in c.request)
    assert fits(one.with_request(cluster=larger.request["cluster"]))
    memory = next(c for c in near.changes if "memory_bytes_per_gpu" in c.request).request["memory_bytes_per_gpu"]
    assert _fits_into(one, memory) and not _fits_into(one, memory - 2**28)
    with pytest.raises(DoesNotFitError, match="What fits"):
        mw.plan(LLAMA, "1x1 h100-sxm", seq=8192, global_batch=4)


def _fits_into(one: Planner, bytes_per_gpu: float) -> bool:
    other = Planner(one.request, one.model)
    usable = one.cluster.device.memory_bytes - one.cluster.reserved_memory_bytes
    device = replace(one.cluster.device, memory_bytes=one.cluster.device.memory_bytes + bytes_per_gpu - usable)
    other.cluster = replace(one.cluster, device=device)
    return fits(other)


def test_a_pin_that_makes_it_too_large_is_named() -> None:
    found = answer(LLAMA, NODE, 8192, 64, zero=0, tp=1, pp=1)
    assert found.plan is None
    explained = planner(LLAMA, NODE, 8192, 64, zero=0, tp=1, pp=1).solve().why_not
    assert explained is not None
    assert "--zero 1 instead of --zero 0" in [c.what for c in explained.changes]
    assert all(fits(applied(planner(LLAMA, NODE, 8192, 64, zero=0, tp=1, pp=1), c)) for c in explained.changes)


def test_a_budget_of_21_gb_allows_no_less_than_one_of_20() -> None:
    """Usable memory grows with the budget: no step in it."""
    base = mw.Cluster.parse(NODE)

    def capacity(gb: float) -> int:
        one = planner(LLAMA, NODE, 8192, 32)
        one.cluster = replace(base, device=replace(base.device, memory_bytes=gb * 1e9))
        return one.pricer.capacity_bytes

    sizes = [capacity(gb) for gb in (16, 19.9, 20, 20.1, 21, 24, 80)]
    assert sizes == sorted(sizes) and capacity(21) - capacity(20) == 10**9


@pytest.mark.parametrize("option", ["--tp x", "--tp ²", "--micro-batches 1.5", "--zero x", "--tp 0", "--tpp 2"])
def test_options_in_a_plan_file_are_checked(two_stages: Plan, option: str) -> None:
    ask = two_stages.ask.model_copy(update={"options": (option,)})
    with pytest.raises(InvalidInputError):
        request_of(ask)


def test_bad_asks_are_one_line() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'llama3-8b'"):
        mw.plan("lama3-8b", NODE, seq=8192, global_batch=8)
    for changed, message in (({"seq": 0}, "seq 0"), ({"global_batch": -1}, "global_batch -1")):
        with pytest.raises(InvalidInputError, match=message):
            Request(**{"model": LLAMA, "cluster": NODE, "seq": 8192, "global_batch": 8, **changed})
    with pytest.raises(InvalidInputError, match="unknown device"):
        mw.plan(LLAMA, "1x8 h100-sxn", seq=8192, global_batch=8)
    with pytest.raises(InvalidInputError, match="mixed GPU types"):
        mw.plan(LLAMA, "4x8 h100-sxm + 4x8 a100-80", seq=8192, global_batch=8)
    with pytest.raises(UnknownNameError, match="unknown axis 'tpp'"):
        mw.plan(LLAMA, NODE, seq=8192, global_batch=8, tpp=2)
    with pytest.raises(InvalidInputError, match="no option is runnable"):
        mw.plan(LLAMA, NODE, seq=8192, global_batch=8, runnable_only=True)
