"""Every plan says how far its step may be off and what there was nothing to compare with, and holds a margin for the
allocator that search, price, table and file agree on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.compiler.plan_files import open_plan, priced_plan
from meshwright.compiler.plan_page import plan_page
from meshwright.compiler.planner.confidence import doubts, links_busy_ns
from meshwright.compiler.planner.evaluate import evaluate
from meshwright.compiler.planner.group_search import GroupSearch
from meshwright.compiler.planner.plan_file import PlanWriter
from meshwright.compiler.planner.plan_model import Planner
from meshwright.compiler.planner.pricing import DYNAMIC
from meshwright.compiler.planner.problem import Plan as SearchPlan
from meshwright.compiler.planner.search import Found
from meshwright.cost_model.error_band import published_errors
from meshwright.cost_model.layer_memory import ALLOCATOR_SHARE, allocator_bytes
from meshwright.cost_model.layer_price import price_layer
from meshwright.cost_model.strategy import LayerStrategy
from meshwright.runtime.errors import InvalidInputError
from meshwright.runtime.plan import Plan, checksums
from meshwright.runtime.plan_table import confidence, headline

from .planning import NODE, plan, planner

LLAMA = "llama3-8b"


@pytest.fixture(scope="module")
def usual() -> Plan:
    return plan(LLAMA, NODE, 8192, 32, pp=1)


def test_the_band_is_that_of_published_runs(usual: Plan) -> None:
    one = planner(LLAMA, NODE, 8192, 32, pp=1)
    found = published_errors(one.pricer.calibration, one.request.training, "dense", "h100-sxm")
    band = usual.predicted.error_band
    assert found is not None and band is not None
    assert (band.low, band.high) == found[0].band and band.source == found[1] and "h100-sxm" in band.source
    assert usual.predicted.low_confidence == ()
    [line] = [x for x in headline(usual) if x.startswith("error band: ")]
    assert f"(-{band.low:.0%} to +{band.high:.0%})" in line
    said = confidence(usual.predicted)
    assert said["error_band"]["high_s"] == pytest.approx(usual.predicted.step_time_s * (1 + band.high))


def test_show_and_report_have_it(usual: Plan, tmp_path: Path) -> None:
    usual.save(tmp_path / "p.json")
    for shown in (open_plan(tmp_path / "p.json"), priced_plan(tmp_path / "p.json")):
        assert shown.as_dict()["error_band"]["source"] in plan_page(shown)


def test_files_of_before_open(usual: Plan, tmp_path: Path) -> None:
    data = json.loads(usual.to_json())
    del data["predicted"]["error_band"], data["checksums"]
    (tmp_path / "old.json").write_text(json.dumps({**data, "checksums": checksums(data)}))
    old = open_plan(tmp_path / "old.json")
    assert old.plan.predicted.error_band is None and old.as_dict()["error_band"] is None
    assert not [x for x in headline(old.plan) if x.startswith("error band")]


@pytest.mark.parametrize(("cluster", "changed", "words"), [
    ("1x8 h100-pcie", {}, "uncalibrated: no published run of h100-pcie"),
    ("1x4 h100-sxm", {}, "outside the fitted range: 4 GPUs; published runs of dense bf16 have 8"),
    (NODE, {"compute": "float32"}, "products in float32"),
    (NODE, {"fp8_recipe": "blockwise"}, "fp8 recipe blockwise")])
def test_low_confidence_says_why(cluster: str, changed: dict[str, str], words: str) -> None:
    one = planner(LLAMA, cluster, 8192, 32, pp=1, tp=2)
    one = Planner(replace(one.request, training=replace(one.request.training, **changed)), one.model)
    found = one.solve().plan
    assert found is not None and any(words in text for text in found.predicted.low_confidence)
    assert (found.predicted.error_band is None) == ("uncalibrated" in words)


def test_a_step_above_the_gpus_peak_is_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs in eight bits may exceed the peak in sixteen."""
    monkeypatch.setattr(PlanWriter, "_mfu", lambda self, batch, step_s: 1.25)
    found = plan(LLAMA, NODE, 8192, 32, pp=1, tp=2)
    assert found.predicted.mfu is None
    assert any("125% of the GPUs' bf16 peak" in text for text in found.predicted.low_confidence)


def test_busy_links_between_stages_are_a_doubt() -> None:
    """Transfers delay the next stage and take nobody's time; where they are long a plan says so."""
    one = planner(LLAMA, "2x8 h100-sxm", 8192, 32, pp=2, tp=1, micro_batches=16)
    group = next(iter(one.space.groups()))
    outer = one.pricer.full(group).outer("1f1b", 1)
    price = evaluate(GroupSearch(one.pricer).problem([outer]), SearchPlan(outer=0, ends=(17, 34), options=(0,) * 34))
    busy = max(links_busy_ns(c, outer) for c in price.costs)
    assert busy == 16 * max(c.send_forward_ns + c.send_backward_ns for c in price.costs) > 0
    assert busy < 0.05 * price.step_ns  # usual links: a model with ports would say the same

    def said(step_ns: int) -> Iterator[str]:
        return doubts(one.pricer, one.model.one, outer, [LayerStrategy(dp=8)], price.costs, step_ns)

    assert not [text for text in said(price.step_ns) if "links busy" in text]
    assert [text for text in said(busy * 2) if "links busy for 50% of the step" in text]


# -- the allocator's margin -----------------------------------------------------------------------
def test_every_table_holds_the_margin() -> None:
    one = planner("mixtral-8x7b", NODE, 4096, 16, pp=2)
    group = next(iter(one.space.groups()))
    for kind, own in enumerate(one.pricer.full(group).choices):
        for choice in own[:40]:
            samples = one.space.global_batch // (group.m * choice.strategy.dp)
            plain = price_layer(one.model.kinds(samples)[kind], choice.strategy, one.request.training,
                                one.pricer.placement(group), one.pricer.calibration).integers()
            for name in DYNAMIC:
                assert getattr(choice.option, name) == plain[name] + allocator_bytes(plain[name])
            assert choice.option.static_bytes == plain["static_bytes"]


def test_the_margin_is_a_category_of_its_own(usual: Plan) -> None:
    for stage in usual.predicted.stages:
        held = stage.memory_bytes
        dynamic = held["activations"] + held["working-set"] + held["communication"]
        assert held["allocator"] == pytest.approx(ALLOCATOR_SHARE * dynamic, rel=1e-3)
        assert stage.peak_bytes <= stage.limit_bytes


def test_a_plan_that_fits_without_the_margin_only_is_not_taken() -> None:
    """Search, price and file agree: on GPUs on which the only plan fits without the margin, none does with it."""
    one = planner(LLAMA, NODE, 8192, 64, tp=1, pp=1, cp=1, zero=3, recompute="none", micro_batch=1)
    bare = Planner(replace(one.request, allocator_share=0.0), one.model)
    found, with_margin = bare.solve(explain=False).plan, one.solve(explain=False).plan
    assert found is not None and with_margin is not None and found.layers == with_margin.layers
    stage, more = found.predicted.stages[0], with_margin.predicted.stages[0]
    assert stage.memory_bytes["allocator"] == 0 < more.memory_bytes["allocator"]
    assert {k: v for k, v in stage.memory_bytes.items() if k != "allocator"} == pytest.approx(
        {k: v for k, v in more.memory_bytes.items() if k != "allocator"}, abs=4)
    needed = stage.peak_bytes + more.memory_bytes["allocator"] // 2
    for tried, fits in ((bare, True), (one, False)):
        other = Planner(tried.request, tried.model)
        device = tried.cluster.device
        other.cluster = replace(tried.cluster, device=replace(device, memory_bytes=float(needed)))
        assert isinstance(other.search().result, Found) == fits


def test_a_share_of_ones_own_is_kept_in_the_file(tmp_path: Path) -> None:
    one = planner(LLAMA, NODE, 8192, 32, pp=1, tp=2)
    made = Planner(replace(one.request, allocator_share=0.3), one.model).solve(explain=False).plan
    assert made is not None and "--allocator-share 0.3" in made.ask.options
    made.save(tmp_path / "p.json")
    assert priced_plan(tmp_path / "p.json").plan == made
    assert made.fingerprints.profile.facts["allocator_share"] == 0.3
    with pytest.raises(InvalidInputError, match="allocator share"):
        replace(one.request, allocator_share=float("nan"))
