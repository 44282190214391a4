"""Degrees of a layer, properties of a training run, groups of a stage."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.cost_model.cluster import Cluster, ClusterError
from meshwright.cost_model.strategy import LayerStrategy, Placement, StrategyError, Training


@pytest.mark.parametrize(("fields", "named"), [
    ({"tp": 0}, "tp is 0"), ({"zero": 4}, "ZeRO stage 4"), ({"dp": 8, "shard": 3}, "3 of 8"),
    ({"dp": 4, "ep": 3}, "ep 3"), ({"cp_kind": "star"}, "star"), ({"recompute": "some"}, "some")])
def test_a_strategy_that_cannot_be_is_refused_by_its_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(StrategyError, match=named):
        LayerStrategy(**fields)


def test_degrees_follow_from_each_other() -> None:
    s = LayerStrategy(tp=2, cp=2, dp=4, ep=8, zero=1, shard=2)
    assert (s.gpus, s.edp, s.shards) == (16, 2, 4)
    assert LayerStrategy(dp=8).layout == LayerStrategy(dp=8, zero=3, recompute="full").layout
    assert LayerStrategy(tp=2, dp=4).layout != LayerStrategy(dp=8).layout


@pytest.mark.parametrize(("fields", "named"), [
    ({"optimizer": "adamm"}, "adamm"), ({"gradient_bytes": float("nan")}, "gradient_bytes"),
    ({"selective_every": 0}, "selective_every"), ({"selective_every": 1.5}, "selective_every")])
def test_a_training_that_cannot_be_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(StrategyError, match=named):
        Training(**fields)


def test_optimizer_bytes() -> None:
    assert Training().optimizer_bytes == 12
    assert Training(master_bytes=0).optimizer_bytes == 8
    assert Training(optimizer="sgd", master_bytes=0).optimizer_bytes == 0


def test_groups_lie_in_the_cluster_as_the_rank_order_says() -> None:
    cluster, s = Cluster.parse("4x8 h100-sxm"), LayerStrategy(tp=4, dp=4, ep=8, shard=2)
    place = Placement(cluster, 2)
    assert place.stage_gpus == 16
    tp, dp, pp = (place.group(s, axis) for axis in ("tp", "dp", "pp"))
    assert (tp.size, tp.outermost) == (4, 0)
    assert (dp.size, dp.members[0]) == (4, 2)  # two of four in each node
    assert (pp.size, pp.outermost) == (2, 1)
    assert place.group(s, "zero").size == 2 and place.group(s, "replicate").size == 2
    assert (place.group(s, "ep").size, place.group(s, "ep").outermost, place.group(s, "edp").size) == (8, 0, 2)
    outer_tp = Placement(cluster, 2, ("dp", "cp", "tp", "pp")).group(s, "tp")
    assert outer_tp.outermost == 1


def test_a_placement_that_cannot_be_is_refused() -> None:
    with pytest.raises(ClusterError, match="rank order"):
        Placement(Cluster.parse("1x8 h100-sxm"), 1, ("tp", "dp"))
    with pytest.raises(ClusterError, match="divisor"):
        Placement(Cluster.parse("1x8 h100-sxm"), 3).stage_gpus  # noqa: B018
