"""Calibrations: the committed files, what stands in for a missing one, what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from meshwright.cost_model.calibration import (
    FOLDER,
    Calibration,
    Software,
    calibration_for,
    calibration_from_json,
    committed_software,
    file_of,
    power_share,
    software_from_json,
)
from meshwright.cost_model.cluster import Cluster
from meshwright.cost_model.presets import PRESETS

NAMES = sorted(p.stem.removeprefix("calibration-") for p in FOLDER.glob("calibration-*.json"))


def test_every_committed_file_is_a_device_with_at_most_ten_numbers() -> None:
    assert {"a100-80", "h100-sxm", "b200", "software"} <= set(NAMES)
    for name in (n for n in NAMES if n != "software"):
        found = calibration_from_json(file_of(name).read_text())
        assert name in PRESETS and found.device == name
        assert len(found.scalars()) <= 10


def test_a_device_without_a_file_takes_its_family() -> None:
    assert calibration_for("h200") == calibration_for("h100-sxm")
    assert calibration_for("cpu") == Calibration("cpu")


def test_a_lower_power_limit_makes_products_slower() -> None:
    """The same chip at half the watts per peak FLOP/s: the cube root of a half; the A100's own share is the most."""
    own, card = calibration_for("h100-sxm"), calibration_for("h100-pcie")
    assert own.gemm_efficiency * (350 / 756.5 / (700 / 989.4)) ** (1 / 3) == pytest.approx(card.gemm_efficiency)
    assert replace(card, gemm_efficiency=own.gemm_efficiency) == own
    assert power_share("a100-80") == power_share("v100") == power_share("no such device") == 1
    assert power_share("b200") < power_share("gb200") < power_share("h100-sxm") < 1


def test_software_is_committed_too() -> None:
    assert committed_software() != Software()
    assert software_from_json(json.dumps({"software": asdict(Software(async_tp=0.5))})).async_tp == 0.5


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"calibration": {"gemm_efficiency": -1}}', "[" * 20_000,
                                  '{"calibration": {"kernel_s": NaN}}', '{"calibration": 3}'])
def test_what_is_no_calibration_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        calibration_from_json(text)
    assert "\n" not in str(caught.value)


def test_links_reach_what_was_fitted() -> None:
    cluster = Cluster.parse("2x8 h100-sxm")
    found = Calibration("x", inner_efficiency=0.5, network_efficiency=0.25, latency_factor=2.0).cluster(cluster)
    assert [level.efficiency for level in found.levels] == [0.5, 0.25]
    assert [b.latency_s / a.latency_s for a, b in zip(cluster.levels, found.levels, strict=True)] == [2, 2]


def test_a_described_link_stays_as_much_slower_as_its_owner_says() -> None:
    """A level at half of the preset's efficiency reaches half of what was fitted."""
    cluster, made = Cluster.parse("2x8 h100-sxm"), Calibration("x", inner_efficiency=0.6, network_efficiency=0.4)
    half = replace(cluster, levels=tuple(replace(v, efficiency=v.efficiency / 2) for v in cluster.levels))
    assert [v.efficiency for v in made.cluster(cluster).levels] == [0.6, 0.4]
    assert [v.efficiency for v in made.cluster(half).levels] == pytest.approx([0.3, 0.2])
