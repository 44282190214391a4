"""The benchmark on published runs: what a prediction may see, and that fits repeat."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from benchmarks._published_fit import fit
from benchmarks._published_price import _windowed, cuts, description, predict, price, ways
from benchmarks._published_recipes import with_recipe
from benchmarks._published_report import ordering
from benchmarks._published_rows import Row, Run, all_rows
from benchmarks.costmodel_published import judge, representatives
from meshwright.cost_model.calibration import calibration_for, committed_software
from meshwright.cost_model.strategy import Training

pytest.importorskip("transformers")
ROWS, EXCLUDED = all_rows()
LABELS = {"table": "x.csv", "source": "somewhere", "family": "something", "generation": "sometime"}


def small_rows(count: int = 3) -> list[Row]:
    """Rows of the smallest models: their captures take a second each."""
    found = [r for r in ROWS if '"n_embd": 768' in r.run.model and r.run.micro_batch in (1, 2)]
    return found[:count]


def test_every_row_is_predicted_or_left_out_by_a_rule() -> None:
    assert len(ROWS) > 200
    assert all(e.rule and e.table for e in EXCLUDED)
    assert all(r.step_s and r.step_s > 0 for r in ROWS)


def test_a_run_holds_no_label() -> None:
    assert not {f.name for f in fields(Run)} & {"source", "table", "row", "case", "family", "name"}
    config = json.loads(small_rows(1)[0].run.model)
    assert not {"name", "_name_or_path", "source"} & set(config)


def test_renaming_everything_changes_no_prediction() -> None:
    rows = small_rows(2)
    software = committed_software()
    for row in rows:
        made = calibration_for(row.run.gpu)
        before = predict(row.run, made, software)
        renamed = replace(row, **LABELS)
        after = predict(renamed.run, made, software)
        assert before and after and before.step_s == after.step_s


def test_software_names_are_only_keys_of_coefficients() -> None:
    """An unknown stack is priced like the reference, whatever it is called."""
    run, software = small_rows(1)[0].run, committed_software()
    made = calibration_for(run.gpu)
    a, b = (predict(replace(run, training=replace(run.training, software=name)), made, software)
            for name in ("", "never heard of"))
    assert a and b and a.step_s == b.step_s


def test_a_fit_repeats_to_the_last_digit() -> None:
    first, second = fit(small_rows()), fit(small_rows())
    assert {k: asdict(v) for k, v in first.calibrations.items()} == {
        k: asdict(v) for k, v in second.calibrations.items()}
    assert first.software == second.software


def test_equal_configurations_count_once() -> None:
    row = small_rows(1)[0]
    (one,) = representatives([row, replace(row, step_s=3 * row.step_s), replace(row, step_s=2 * row.step_s)])
    assert one.step_s == 2 * row.step_s


def test_unpublished_fields_are_filled_in_and_the_span_is_shown() -> None:
    row = next(r for r in ROWS if r.run.micro_batch is None and r.run.pp == 1 and '"n_embd": 2304' in r.run.model)
    assert len(list(ways(row.run))) > 1
    found = predict(row.run, calibration_for(row.run.gpu), committed_software())
    assert found and found.low_s == found.step_s < found.high_s
    assert None not in (found.run.micro_batch, found.run.v)


def test_unpublished_recomputation_is_the_least_that_fits() -> None:
    row = next(r for r in ROWS if '"n_embd": 1024' in r.run.model and r.run.gpu == "a100-40" or
               '"n_embd": 2304' in r.run.model)
    run = replace(row.run, micro_batch=4, v=1, gpu="a100-80")
    made, software = calibration_for("a100-80"), committed_software()
    def step_ns(mode: str | None, micro_batch: int) -> int:
        found = price(replace(run, recompute=mode, micro_batch=micro_batch), made, software)
        assert found
        return found[0].step_ns
    assert step_ns(None, 4) == step_ns("none", 4) < step_ns("full", 4)
    assert step_ns("none", 16) < step_ns(None, 16) < step_ns("full", 16)


def test_ordering_counts_pairs_that_differ() -> None:
    rows = small_rows(1)
    made = fit(rows)
    a = judge(rows[0], rows, made, "x")
    faster = replace(a, measured_s=a.measured_s / 2, predicted_s=a.predicted_s * 2)
    found = ordering([a, faster])
    assert (found["pairs"], found["right"], found["top1_regret_max"]) == (1, 0, 1.0)


@pytest.mark.parametrize(("layers", "p", "v", "expected"), [
    (10, 1, 1, (10,)), (10, 2, 1, (5, 10)), (10, 2, 2, (3, 5, 7, 10)), (14, 4, 1, (4, 7, 10, 14)),
    (63, 2, 1, (32, 63))])
def test_cuts(layers: int, p: int, v: int, expected: tuple[int, ...]) -> None:
    assert cuts(layers, p, v) == expected


def test_every_other_block_may_see_a_window() -> None:
    """Its scores are a band of 128 keys: time and FLOPs of attention fall, products stay."""
    whole = description(small_rows(1)[0].run.model, 2048, 1)
    (block,) = (k for k in whole.kinds if k.vocabulary is None)
    made = _windowed(whole, 128)
    narrow = made.kinds[-1]
    changed = {i for i, (a, b) in enumerate(zip(block.forward, narrow.forward, strict=True)) if a != b}
    assert {block.forward[i].kind for i in changed} == {"attention"}
    (i,) = changed
    assert narrow.forward[i].flops == block.forward[i].flops * 128 // 2048 and narrow.causal_flops_forward == 0
    blocks = [k for k in made.order if made.kinds[k].vocabulary is None]
    assert blocks[::2] == [len(made.kinds) - 1] * (len(blocks) // 2) and blocks[1::2] == [1] * (len(blocks) // 2)


@pytest.mark.parametrize(("family", "size", "gpu", "container", "ep", "expected"), [
    ("llama3", "8b", "b200", "25.11 x", 1, ("all-to-all", False, "step")),
    ("llama3", "8b", "h100-sxm", "25.11 x", 1, ("all-to-all", False, "none")),
    ("qwen3", "30b", "h100-sxm", "26.02 x", 8, ("once per node", True, "none")),
    ("qwen3", "30b", "h100-sxm", "26.02.01 x", 8, ("once per node", False, "none")),
    ("deepseek", "", "b200", "26.04.01 x", 32, ("once per node", True, "router")),
    ("gpt-oss", "120b", "gb200", "26.06 x", 64, ("once per node", True, "step"))])
def test_recipes_of_a_release(family: str, size: str, gpu: str, container: str, ep: int,
                              expected: tuple[str, bool, str]) -> None:
    made = with_recipe(Training(fp8_recipe="mxfp8"), family, size, gpu, container, ep)
    assert (made.dispatch, made.overlap_experts, made.cuda_graphs) == expected
    assert (made.gradient_bytes, made.reduce_bytes, made.gather_bytes) == (2, 2, 1)
