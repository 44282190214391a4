"""What published runs reach, as committed, and what lies outside of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.cost_model.fitted_range import Extent, committed_ranges, committed_recipes, outside, ranges_from_json

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "costmodel_published.json"
USUAL = Extent(gpus=64, seq=4096, parameters=8 * 10**9, tp=2, pp=2, cp=1, ep=1)


def test_the_committed_ranges_are_those_of_the_predicted_runs() -> None:
    lines = json.loads(RESULT.read_text())["predictions"]
    for which, own in committed_ranges().items():
        of_class = [line for line in lines if (line["precision"] != "bf16" or line["experts"]) == (
            which == "fp8 or experts")]
        assert of_class
        for name in ("gpus", "seq", "tp", "pp", "cp", "ep"):
            assert own[name] == (min(line[name] for line in of_class), max(line[name] for line in of_class))
        assert 10**8 < own["parameters"][0] < 10**11 < own["parameters"][1] < 2 * 10**12
    assert set(committed_ranges()) == {"dense bf16", "fp8 or experts"}
    assert set(committed_recipes()) == {"tensorwise", "rowwise", "delayed", "mxfp8"}


def test_inside_is_silent() -> None:
    assert outside(USUAL, "dense bf16") == ()
    assert outside(USUAL, "dense bf16", schedule="interleaved") == ()


@pytest.mark.parametrize(("changed", "words"), [
    ({"gpus": 98304}, "98,304 GPUs; published runs of dense bf16 have 8 to"),
    ({"seq": 1 << 20}, "1,048,576 tokens per sequence"), ({"parameters": 10**13}, "10,000,000,000,000 parameters"),
    ({"tp": 16}, "tp 16; published"), ({"cp": 64}, "cp 64; published"), ({"pp": 512}, "pp 512; published")])
def test_sizes_outside(changed: dict[str, int], words: str) -> None:
    [found] = outside(replace(USUAL, **changed), "dense bf16")
    assert words in found


def test_sorts_of_runs_that_nobody_published() -> None:
    def said(**options: object) -> str:
        return "; ".join(outside(USUAL, "dense bf16", **options))  # type: ignore[arg-type]

    assert "products in float32" in said(compute="float32")
    assert "schedule zb-h1" in said(schedule="zb-h1")
    assert outside(replace(USUAL, pp=1), "dense bf16", schedule="gpipe") == ()  # no pipeline, no schedule
    assert "Ulysses" in said(ulysses=True)
    assert "fp8 recipe blockwise; published runs have delayed" in said(fp8_recipe="blockwise")
    assert said(fp8_recipe="tensorwise") == ""


def test_files_of_older_benchmarks_have_none() -> None:
    assert ranges_from_json('{"errors": {}}') == ({}, ())


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"range": {"dense bf16": {"gpus": [8, 4]}}}', '{"range": 3}',
                                  '{"range": {"dense bf16": {"gpus": ["a", 4]}}}', '{"fp8_recipes": 3}'])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(ValueError, match="range|ranges"):
        ranges_from_json(text)
