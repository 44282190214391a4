"""Error bands: from the committed benchmark result, by chip and class, and none where nothing was compared."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.cost_model.calibration import CHIP, Calibration, calibration_for
from meshwright.cost_model.error_band import (
    EVERY_CHIP,
    FEWEST,
    PublishedErrors,
    committed_errors,
    doubt,
    error_band,
    error_class,
    errors_from_json,
    near_tie,
    published_errors,
)
from meshwright.cost_model.presets import PRESETS
from meshwright.cost_model.strategy import Training

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "costmodel_published.json"
BF16, FP8 = Training(), Training(fp8_recipe="tensorwise")


def test_the_committed_figures_are_those_of_the_benchmark() -> None:
    """Counted again from its predictions."""
    lines = json.loads(RESULT.read_text())["predictions"]
    for where, classes in committed_errors().items():
        for which, found in classes.items():
            errors = sorted(abs(line["predicted_s"] / line["measured_s"] - 1) for line in lines
                            if where in (EVERY_CHIP, CHIP.get(line["gpu"], line["gpu"]))
                            and (line["precision"] != "bf16" or line["experts"]) == (which == "fp8 or experts"))
            assert found.configurations == len(errors)
            assert found.median == pytest.approx(statistics.median(errors), abs=2e-4)
            assert found.p90 == pytest.approx(errors[math.ceil(0.9 * len(errors)) - 1], abs=2e-4)
    assert committed_errors()[EVERY_CHIP]["dense bf16"].configurations > 100


def test_the_band_holds_nine_in_ten_of_the_runs_it_is_from() -> None:
    lines = [line for line in json.loads(RESULT.read_text())["predictions"]
             if line["gpu"] in ("a100-80", "a100-40") and line["precision"] == "bf16"]
    band = error_band(calibration_for("a100-80"), BF16, "dense")
    assert band
    inside = [1 - band[0] - 1e-3 <= line["measured_s"] / line["predicted_s"] <= 1 + band[1] + 1e-3 for line in lines]
    assert 0.9 <= statistics.mean(inside) < 1


def test_the_band_of_an_error_is_of_the_predicted_time() -> None:
    """Predictions 20 % too long are of 1 / 1.2 of their time, those 20 % too short of 1 / 0.8."""
    assert PublishedErrors(10, 0.1, 0.2).band == pytest.approx((1 - 1 / 1.2, 1 / 0.8 - 1))


def test_classes() -> None:
    assert error_class(BF16, "dense") == "dense bf16"
    assert error_class(FP8, "dense") == error_class(BF16, "mixture of experts") == "fp8 or experts"
    made = calibration_for("h100-sxm")
    assert error_band(made, BF16, "dense") != error_band(made, FP8, "dense")
    assert error_band(made, FP8, "dense") == error_band(made, BF16, "mixture of experts")


def test_few_runs_on_a_chip_take_those_of_every_chip() -> None:
    few = [(chip, which) for chip, classes in committed_errors().items() for which, e in classes.items()
           if e.configurations < FEWEST]
    assert few
    for chip, which in few:
        training = BF16 if which == "dense bf16" else FP8
        found = published_errors(calibration_for(chip), training, "dense")
        assert found and EVERY_CHIP in found[1] and found[0] == committed_errors()[EVERY_CHIP][which]


@pytest.mark.parametrize("device", ["h100-sxm", "h200", "a100-80", "a100-40", "b200"])
def test_fitted_devices_and_those_of_their_chip_have_a_band(device: str) -> None:
    made = calibration_for(device)
    assert doubt(made, device) == ""
    band = error_band(made, BF16, "dense", device)
    assert band and 0 < band[0] < band[1] < 1


def test_near_ties_are_those_of_the_chip_or_of_every_chip() -> None:
    errors = committed_errors()
    share, why = near_tie(calibration_for("h200"), BF16, "dense", "h200")
    assert share == errors["h100-sxm"]["dense bf16"].p90 and "h100-sxm: 90 % of predictions were off by less" in why
    share, why = near_tie(calibration_for("v100"), BF16, "mixture of experts", "v100")
    assert share == errors[EVERY_CHIP]["fp8 or experts"].p90 and why.startswith("v100 was not compared: ")


@pytest.mark.parametrize("device", ["v100", "rtx-4090", "h100-pcie"])
def test_a_familys_numbers_are_no_calibration(device: str) -> None:
    made = calibration_for(device)
    assert device in PRESETS
    assert doubt(made, device) == (f"uncalibrated: no published run of {device} was fitted; it takes the numbers of "
                                   f"{made.device}, of its family")
    assert error_band(made, BF16, "dense", device) is None


def test_defaults_are_no_calibration_although_they_bear_the_devices_name() -> None:
    made = calibration_for("some-accelerator")
    assert made.device == "some-accelerator"
    assert doubt(made, "some-accelerator") == (
        "uncalibrated: no published run of some-accelerator was fitted; it takes defaults")
    assert error_band(made, BF16, "dense") is None
    assert error_band(Calibration(), BF16, "dense") is None


def test_changed_numbers_were_not_compared() -> None:
    made = replace(calibration_for("h100-sxm"), gemm_efficiency=0.5)
    assert doubt(made, "h100-sxm").startswith("uncalibrated: the numbers for h100-sxm are not those")
    assert published_errors(made, BF16, "dense") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"errors": 3}', "[" * 20_000, '{"errors": {"x": {"y": {}}}}',
                                  '{"errors": {"x": {"y": {"configurations": 3, "median": 0.2, "p90": 0.1}}}}',
                                  '{"errors": {"x": {"y": {"configurations": 3, "median": 0.2, "p90": 1.5}}}}'])
def test_what_is_no_table_of_errors_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        errors_from_json(text)
    assert "\n" not in str(caught.value)
