"""What computation hides: each second once, narrow windows first, and never for nothing."""

from __future__ import annotations

import pytest

from meshwright.cost_model.calibration import Calibration, Software
from meshwright.cost_model.layer_compute import LayerSeconds, Seconds
from meshwright.cost_model.op_price import Rates, exposed_s
from meshwright.cost_model.overlap import Phase, Window, exposed_by_window
from meshwright.cost_model.presets import preset
from meshwright.cost_model.strategy import Training

RATES = Rates(preset("h100-sxm"), Calibration(overlap_loss=0.1), Software(async_tp=0.5), Training())


def compute(gemm_s: float = 4.0, column_s: float = 2.0) -> LayerSeconds:
    def part() -> Seconds:
        return Seconds(gemm_s=gemm_s, attention_s=1.0, memory_s=1.0, column_s=column_s)
    return LayerSeconds(part(), Seconds(), part(), part())


def exposed(seconds: dict[tuple[Phase, Window], float], **changes: float) -> list[float]:
    return list(exposed_by_window(seconds, compute(**changes), RATES).values())


@pytest.mark.parametrize(("communication_s", "expected"), [(0.0, 0.0), (1.0, 0.1), (2.0, 0.2), (5.0, 3.0)])
def test_one_collective(communication_s: float, expected: float) -> None:
    assert exposed_s(communication_s, 2.0, 0.1) == pytest.approx(expected)
    assert exposed({("backward", "input gradients of products"): communication_s}) == pytest.approx([expected])


def test_what_hides_nothing_is_exposed() -> None:
    assert exposed({("forward", "nothing"): 3.0}) == [3.0]


def test_a_wide_window_gets_what_narrow_ones_left() -> None:
    narrow = exposed({("backward", "attention"): 1.0, ("backward", "input gradients of products"): 2.0})
    assert narrow == pytest.approx([0.2, 0.1])  # in the order of windows, narrow first
    alone = exposed({("last backward", "the layer's backward"): 14.0})
    assert alone == pytest.approx([14.0 - 12.0])
    both = exposed({("last backward", "the layer's backward"): 14.0, ("backward", "attention"): 1.0})
    assert both == pytest.approx([0.1, 14.0 - (12.0 - 0.9)])


def test_asynchronous_products_hide_a_part_of_their_time() -> None:
    assert exposed({("forward", "products"): 4.0}) == pytest.approx([2.0])


def test_faster_computation_exposes_at_most_what_it_saves() -> None:
    seconds: dict[tuple[Phase, Window], float] = {
        ("backward", "input gradients of products"): 1.5, ("backward", "products"): 3.0,
        ("last backward", "the layer's backward"): 9.0}
    for saved in (0.1, 0.5, 1.5):
        slower, faster = sum(exposed(seconds)), sum(exposed(seconds, column_s=2.0 - saved, gemm_s=4.0 - saved))
        assert faster - slower <= 2 * saved + 1e-9  # of both gradients
