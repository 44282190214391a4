"""Prices of layers: closed forms, properties, and what each axis must change."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.cost_model.calibration import Calibration
from meshwright.cost_model.cluster import Cluster
from meshwright.cost_model.collectives import ring_bytes_per_rank
from meshwright.cost_model.layer_memory import ALLOCATOR_SHARE, allocator_bytes
from meshwright.cost_model.layer_price import (
    LayerPrice,
    hidden_bytes,
    price_layer,
    reshard_price,
    transfer_price,
)
from meshwright.cost_model.model import Saved
from meshwright.cost_model.strategy import LayerStrategy, Placement, StrategyError, Training

from .layers import (
    CALIBRATION,
    FFN,
    HIDDEN,
    PARAMETERS,
    SEQ,
    SOFTWARE,
    VOCABULARY,
    embedding,
    head,
    mixture,
    pointwise,
    priced,
    transformer,
)

LAYER = transformer()


def total_s(price: LayerPrice) -> float:
    return (price.forward_s + price.input_gradient_s + price.weight_gradient_s + price.sync_s + price.optimizer_s)


# -- closed forms ---------------------------------------------------------------------------------
@pytest.mark.parametrize(("zero", "expected"), [
    (0, (2, 4, 12)), (1, (2, 4, 12 / 8)), (2, (2, 4 / 8, 12 / 8)), (3, (2 / 8, 4 / 8, 12 / 8))])
def test_zero_memory(zero: int, expected: tuple[float, float, float]) -> None:
    m = priced(LAYER, zero=zero).memory
    assert (m.weights_bytes, m.gradients_bytes, m.optimizer_bytes) == tuple(PARAMETERS * b for b in expected)


def test_hsdp_shards_inside_its_group_only() -> None:
    whole, half = (priced(LAYER, zero=3, shard=s).memory for s in (8, 4))
    assert half.static_bytes == 2 * whole.static_bytes


def test_experts_shard_their_optimizer_over_edp() -> None:
    kind = mixture()
    m = priced(kind, zero=1, ep=4).memory
    dense, experts = 4 * HIDDEN**2, 2 * 8 * HIDDEN * FFN
    assert m.weights_bytes == 2 * (dense + experts / 4)
    assert m.optimizer_bytes == 12 * (dense / 8 + experts / 4 / 2)


def test_whole_gradients_live_until_they_are_scattered() -> None:
    transient = [priced(LAYER, zero=z).memory.transient_bytes for z in (1, 2, 3)]
    assert transient[1] - transient[0] == 4 * PARAMETERS  # in fp32
    assert transient[2] - transient[1] == 2 * 2 * PARAMETERS  # this layer's and the next one's parameters in bf16


@pytest.mark.parametrize(("degrees", "dense", "experts"), [
    ({"dp": 8, "ep": 8}, 1, 0), ({"tp": 8, "dp": 1}, 0, 1), ({"dp": 8, "ep": 4}, 1, 1)])
def test_experts_are_gathered_over_their_own_group(degrees: dict[str, int], dense: int, experts: int) -> None:
    """edp is 1, 8 and 2 here, and dense parameters are cut into 8, 1 and 8 parts."""
    kind = mixture()
    whole, plain = (priced(kind, zero=z, **degrees).memory.transient_bytes for z in (3, 1))
    own = (4 * HIDDEN**2 / degrees.get("tp", 1) * dense
           + 2 * 8 * HIDDEN * FFN / degrees.get("ep", 1) * experts)
    assert whole - plain == pytest.approx(own * (2 * 2 + 4))


def test_tensor_parallelism_divides_everything_that_is_saved() -> None:
    one, two = priced(LAYER, tp=1).memory, priced(LAYER, tp=2).memory
    assert two.saved_bytes == one.saved_bytes / 2
    assert two.weights_bytes == one.weights_bytes / 2


def test_tied_weights_are_kept_again_on_another_stage() -> None:
    tied = head(tied=True)
    assert priced(tied).memory.weights_bytes == 0
    assert priced(tied, p=2).memory.weights_bytes == 2 * VOCABULARY * HIDDEN


@pytest.mark.parametrize(("zero", "parameters", "gradients"), [(1, 0, 0), (2, 0, 4), (3, 2 * 2, 4)])
@pytest.mark.parametrize("p", [1, 2])
def test_a_tied_table_is_gathered_wherever_it_is_used(zero: int, parameters: int, gradients: int, p: int) -> None:
    """Whole for as long as the head runs, although at p 1 its shards are the embedding's."""
    own, plain = (priced(head(tied=True), p=p, zero=z).memory.transient_bytes for z in (zero, 0))
    assert own - plain == (parameters + gradients) * VOCABULARY * HIDDEN


def test_a_tied_table_is_reduced_and_updated_once_where_its_owner_is() -> None:
    for zero in (0, 1, 2, 3):
        tied, own = priced(head(tied=True), zero=zero), priced(head(), zero=zero)
        moved = {c.name for c in tied.collectives if c.axis == "zero"}
        assert moved == ({"gather parameters"} if zero == 3 else set())
        assert {c.name for c in own.collectives if c.axis == "zero"} >= {"reduce gradients"}
        assert tied.optimizer_s == 0 < own.optimizer_s


@pytest.mark.parametrize(("zero", "shards"), [(0, 1), (1, 1), (2, 4), (3, 4)])
def test_both_ends_of_a_pipeline_add_up_the_gradients_of_a_tied_table(zero: int, shards: int) -> None:
    tied, own = priced(head(tied=True), p=2, zero=zero), priced(head(), p=2, zero=zero)
    (exchange,) = [c for c in tied.collectives if c.axis == "pp"]
    assert (exchange.kind, exchange.bytes) == ("all-reduce", 4 * VOCABULARY * HIDDEN / shards)
    assert exchange.exposed_s == exchange.seconds > 0
    assert tied.sync_s == pytest.approx(own.sync_s + exchange.seconds)
    assert tied.optimizer_s == own.optimizer_s
    assert not [c for c in own.collectives if c.axis == "pp"]


def test_the_ends_of_a_long_pipeline_are_two_ranks() -> None:
    """Four stages on four nodes move a tied table's gradients as two on two do, not as a ring of four."""
    two, four = (next(c for c in priced(head(tied=True), f"{p}x8 h100-sxm", p=p).collectives if c.axis == "pp")
                 for p in (2, 4))
    assert four.seconds == pytest.approx(two.seconds)


@pytest.mark.parametrize(("zero", "kind"), [(0, "all-reduce"), (1, "reduce-scatter")])
def test_gradients_move_the_bytes_of_a_ring(zero: int, kind: str) -> None:
    slow = replace(CALIBRATION, latency_factor=1e-9)
    training = Training(overlap_gradients=False)
    price = priced(LAYER, "2x1 h100-sxm", training=training, calibration=slow, zero=zero)
    reduction = next(c for c in price.collectives if c.phase == "last backward")
    cluster = slow.cluster(Cluster.parse("2x1 h100-sxm"))
    moved = ring_bytes_per_rank(kind, 2, PARAMETERS * 4)
    expected = moved / cluster.levels[-1].effective_bytes_per_s + cluster.collective_launch_s
    assert (reduction.kind, reduction.bytes) == (kind, PARAMETERS * 4)
    assert reduction.exposed_s == reduction.seconds == pytest.approx(expected, rel=1e-4)


def test_sequence_parallel_bytes() -> None:
    """Two blocks: each gathers and scatters the hidden states once forward, twice and once backward."""
    found = [c for c in priced(LAYER, tp=8, dp=1).collectives if c.axis == "tp"]
    size = SEQ * HIDDEN * 2
    assert {(c.phase, c.name): c.bytes / size for c in found} == {
        ("forward", "gather inputs"): 2, ("forward", "scatter outputs"): 2, ("backward", "gather gradients"): 2,
        ("backward", "gather saved inputs"): 2, ("backward", "scatter input gradients"): 2}


def test_the_loss_is_taken_over_the_divided_vocabulary() -> None:
    whole, divided = priced(head()), priced(head(), tp=8, dp=1)
    assert divided.memory.saved_bytes == whole.memory.saved_bytes / 8
    assert divided.forward_s < whole.forward_s
    assert {"loss", "gather inputs"} <= {c.name for c in divided.collectives}
    assert {c.name for c in priced(embedding(), tp=8, dp=1).collectives} == {"scatter outputs", "gather gradients"}


def test_the_allocators_margin_is_a_share_of_what_comes_and_goes() -> None:
    assert allocator_bytes(0) == 0
    assert allocator_bytes(1e9) == math.ceil(ALLOCATOR_SHARE * 1e9) > 0
    assert allocator_bytes(10, 0.25) == 3  # never below the share
    for dynamic, share in ((-1.0, 0.1), (float("nan"), 0.1), (1.0, -0.1), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="finite numbers from 0 up"):
            allocator_bytes(dynamic, share)


def test_the_default_margin_is_the_published_median() -> None:
    result = Path(__file__).parents[2] / "benchmarks" / "results" / "costmodel_published.json"
    found = json.loads(result.read_text())["memory"]["allocator"]
    assert found["median"] == pytest.approx(ALLOCATOR_SHARE, abs=0.005)
    assert found["n"] > 50


# -- what each axis does --------------------------------------------------------------------------
def test_ring_and_ulysses_have_their_own_communication() -> None:
    ring, ulysses = (priced(LAYER, cp=4, cp_kind=kind).collectives for kind in ("ring", "ulysses"))
    assert {c.kind for c in ring if c.axis == "cp"} == {"point-to-point"}
    assert {c.window for c in ring if c.axis == "cp"} == {"attention"}
    assert {c.kind for c in ulysses if c.axis == "cp"} == {"all-to-all"}


def test_rows_travel_to_experts_once_per_node() -> None:
    copies, once = (priced(mixture(top_k=8, experts=16), "4x8 h100-sxm", ep=16, zero=1,
                           training=Training(dispatch=d)) for d in ("all-to-all", "once per node"))
    a, b = (next(c.seconds for c in p.collectives if c.axis == "ep") for p in (copies, once))
    assert b < a / 2


def test_rows_travel_beside_another_micro_batch_where_the_stack_says_so() -> None:
    alone, beside = (priced(mixture(), "1x8 h100-sxm", ep=8, zero=1, training=Training(overlap_experts=o))
                     for o in (False, True))
    one, two = ([c for c in p.collectives if c.axis == "ep"] for p in (alone, beside))
    assert all(c.exposed_s == c.seconds > 0 for c in one)
    assert all(c.exposed_s < c.seconds for c in two) and [c.seconds for c in one] == [c.seconds for c in two]


def test_recorded_graphs_cost_the_host_nothing() -> None:
    kind = mixture()
    eager, router, step = (priced(kind, "1x8 h100-sxm", ep=8, zero=1, training=Training(fusion="none", cuda_graphs=g))
                           .compute.forward for g in ("none", "router", "step"))
    assert eager.launch_s - router.launch_s == pytest.approx(SOFTWARE.expert_pass_s)
    assert step.launch_s == 0 and step.gpu_s == router.gpu_s == eager.gpu_s


def test_a_fused_loss_is_of_the_head_alone() -> None:
    loss = pointwise(SEQ * VOCABULARY)
    kind = replace(head(), forward=(*head().forward, loss), fused_forward=(head().forward[0].bytes_moved, 0),
                   backward=head().backward, fused_backward=tuple(r.bytes_moved for r in head().backward))
    written, fused = (priced(kind, training=Training(fusion="none", fused_loss=f)) for f in (False, True))
    assert written.compute.forward.memory_s > fused.compute.forward.memory_s == 0
    layers = [priced(LAYER, training=Training(fusion="none", fused_loss=f)) for f in (False, True)]
    assert layers[0].integers() == layers[1].integers()


def test_selective_recomputation_may_keep_fewer_products() -> None:
    """Of four products the second one runs again; the last one's result is the layer's."""
    all_kept, some = (priced(LAYER, recompute="selective", training=Training(selective_every=n)) for n in (1, 2))
    again = LAYER.forward[3]
    assert all_kept.memory.saved_bytes - some.memory.saved_bytes == again.bytes_written
    more = some.compute.again.gemm_s - all_kept.compute.again.gemm_s
    assert more > 0 == all_kept.compute.again.gemm_s
    assert priced(LAYER, training=Training(selective_every=2)).integers() == priced(LAYER).integers()


def test_a_step_clears_scales_and_measures_gradients() -> None:
    """Under ZeRO 1 of eight: moments and master copy in and out, parameters out, gradients read for norm and update, of
    an eighth; all gradients are cleared and divided."""
    moved = PARAMETERS * ((2 * 12 + 2 * 4 + 2) / 8 + 3 * 4)
    device = Cluster.parse("1x8 h100-sxm").device
    expected = moved / (device.memory_bandwidth_bytes_per_s * CALIBRATION.memory_efficiency)
    assert priced(LAYER, zero=1).optimizer_s == pytest.approx(expected)
    assert priced(LAYER, zero=2).optimizer_s == pytest.approx(expected * (34 / 8 + 12 / 8) / (34 / 8 + 12))
    assert priced(LAYER, "1x1 h100-sxm").optimizer_s == pytest.approx(expected * (34 + 4) / (34 / 8 + 12))


def test_recomputation_trades_time_for_memory() -> None:
    none, selective, full = (priced(LAYER, recompute=m) for m in ("none", "selective", "full"))
    assert none.memory.saved_bytes > selective.memory.saved_bytes > full.memory.saved_bytes
    assert none.input_gradient_s < selective.input_gradient_s < full.input_gradient_s
    assert full.input_gradient_s - none.input_gradient_s == pytest.approx(none.forward_s, rel=0.01)


def test_full_recomputation_repeats_tensor_parallel_communication() -> None:
    again = [c for c in priced(LAYER, tp=8, dp=1, recompute="full").collectives if c.phase == "again"]
    assert {c.name for c in again} == {"gather inputs", "scatter outputs"}


def test_a_recomputed_head_gathers_its_input_and_reduces_its_loss_again() -> None:
    kind = head()
    again = replace(kind, saved={**kind.saved, "full": Saved(0, (0,))})
    found = {m: [(c.name, c.bytes) for c in priced(again, tp=8, dp=1, recompute=m).collectives if c.phase == p]
             for m, p in (("none", "forward"), ("full", "again"))}
    assert found["full"] == found["none"] != []
    assert not [c for c in priced(kind, tp=8, dp=1, recompute="full").collectives if c.phase == "again"]


@pytest.mark.parametrize(("degrees", "given"), [({"ep": 16}, "ep 16 of 8 experts"), ({"ep": 3, "dp": 6}, "ep 3 of 8"),
                                                ({"etp": 3, "dp": 6}, "etp 3 of experts 4096 wide")])
def test_experts_that_cannot_be_divided_are_refused(degrees: dict[str, int], given: str) -> None:
    gpus = degrees.get("dp", 16)
    with pytest.raises(StrategyError, match=given):
        priced(mixture(), f"1x{gpus} h100-sxm", **degrees)
    assert total_s(priced(LAYER, f"1x{gpus} h100-sxm", **degrees)) > 0  # no experts to divide


def test_experts_hold_and_sync_what_their_own_replicas_say() -> None:
    """tp 8 and etp 1: dense parameters are on one replica of eight parts, experts on eight replicas."""
    price = priced(mixture(), zero=1, tp=8, dp=1)
    experts = 2 * 8 * HIDDEN * FFN
    assert price.memory.optimizer_bytes == 12 * (4 * HIDDEN**2 / 8 + experts / 8)
    assert price.memory.weights_bytes == 2 * (4 * HIDDEN**2 / 8 + experts)
    reduced = {c.axis: c.bytes for c in price.collectives if c.phase == "last backward"}
    assert reduced == {"edp": 4 * experts}


def test_asynchronous_tensor_parallelism_hides_communication_at_a_price() -> None:
    plain, hidden = (priced(LAYER, tp=8, dp=1, training=Training(async_tp=a)) for a in (False, True))
    assert hidden.exposed_s("forward") < plain.exposed_s("forward")
    assert hidden.exposed_s("forward") >= CALIBRATION.overlap_loss * sum(
        c.seconds for c in hidden.collectives if c.phase == "forward") * 0.999


def test_smaller_parts_are_less_efficient() -> None:
    one, eight = (priced(LAYER, tp=t, dp=8 // t).compute.forward.gemm_s for t in (1, 8))
    assert one / 8 < eight < one


def test_fp8_products_are_faster_and_the_head_stays_as_it_was() -> None:
    kind = transformer(16)
    wide, narrow = (priced(kind, training=Training(fp8_recipe=r)) for r in ("", "tensorwise"))
    assert narrow.compute.forward.gemm_s < wide.compute.forward.gemm_s
    assert narrow.compute.forward.attention_s == wide.compute.forward.attention_s
    assert priced(head(), training=Training(fp8_recipe="tensorwise")).forward_s == priced(head()).forward_s


def test_attention_without_a_fused_kernel_is_slower() -> None:
    fused, written = (priced(LAYER, training=Training(flash_attention=f)) for f in (True, False))
    assert written.compute.forward.attention_s > 2 * fused.compute.forward.attention_s


def test_products_of_experts_have_an_efficiency_of_their_own() -> None:
    half = replace(SOFTWARE, expert_product=0.5)
    one, two = (price_layer(mixture(16), LayerStrategy(dp=8, ep=8, zero=1), Training(),
                            Placement(Cluster.parse("1x8 h100-sxm")), CALIBRATION, s).compute for s in (SOFTWARE, half))
    assert one.forward.gemm_s < two.forward.gemm_s < 2 * one.forward.gemm_s
    assert one.forward.attention_s == two.forward.attention_s


def test_an_eager_host_limits_small_layers() -> None:
    kind = transformer()
    assert priced(kind, tp=8, dp=1, training=Training(fusion="none")).compute.forward.total_s >= (
        len(kind.forward) * SOFTWARE.eager_op_s)


# -- properties -----------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", [
    {"tp": 8, "dp": 2}, {"zero": 3}, {"zero": 1, "recompute": "full"}, {"cp": 4}, {"ep": 8, "zero": 1}])
@pytest.mark.parametrize("better", ["gemm_efficiency", "attention_efficiency", "memory_efficiency", "inner_efficiency",
                                    "network_efficiency"])
def test_a_faster_part_never_makes_a_layer_slower(strategy: dict[str, object], better: str) -> None:
    fast = replace(CALIBRATION, **{better: 0.95})
    for kind in (LAYER, mixture(), embedding(), head()):
        slow_price = priced(kind, "2x8 h100-sxm", **strategy)
        fast_price = priced(kind, "2x8 h100-sxm", calibration=fast, **strategy)
        assert total_s(fast_price) <= total_s(slow_price) * (1 + 1e-12)


def test_more_memory_changes_no_price() -> None:
    small, large = Cluster.parse("1x8 a100-40"), Cluster.parse("1x8 a100-80")
    large = replace(large, device=replace(large.device, levels=small.device.levels))  # the larger one is faster too
    prices = [price_layer(LAYER, LayerStrategy(dp=8, zero=1), Training(), Placement(c), CALIBRATION, SOFTWARE)
              for c in (small, large)]
    assert prices[0].integers() == prices[1].integers()


def test_more_samples_never_take_less() -> None:
    prices = [priced(transformer(b)) for b in (1, 2, 4)]
    assert all(a.forward_s < b.forward_s <= 2 * a.forward_s for a, b in zip(prices, prices[1:], strict=False))


def test_integers_are_never_below_the_price() -> None:
    price = priced(LAYER, zero=1)
    found = price.integers()
    assert found["forward_ns"] == math.ceil(price.forward_s * 1e9)
    assert found["static_bytes"] >= price.memory.static_bytes
    assert all(isinstance(v, int) for v in found.values())


# -- moves ----------------------------------------------------------------------------------------
def test_moving_between_layouts() -> None:
    place, size = Placement(Cluster.parse("2x8 h100-sxm"), 2), hidden_bytes(LAYER)
    a, b, c = LayerStrategy(dp=8), LayerStrategy(tp=8), LayerStrategy(tp=2, dp=4)
    assert reshard_price(size, a, replace(a, zero=3), place, CALIBRATION).forward_s == 0
    assert all(reshard_price(size, x, y, place, CALIBRATION).forward_s > 0 for x, y in ((a, b), (b, c), (c, a)))


def test_moves_cost_the_same_both_ways_and_add_up_over_axes() -> None:
    place, size = Placement(Cluster.parse("2x8 h100-sxm")), 1e9
    apart, mixed = LayerStrategy(dp=16), LayerStrategy(tp=8, cp=2)
    there = reshard_price(size, apart, mixed, place, CALIBRATION).forward_s
    back = reshard_price(size * apart.dp, mixed, apart, place, CALIBRATION).forward_s
    ulysses = reshard_price(size * apart.dp, mixed, replace(mixed, cp_kind="ulysses"), place, CALIBRATION).forward_s
    one_axis = reshard_price(size, apart, LayerStrategy(tp=8, dp=2), place, CALIBRATION).forward_s
    assert there == back == ulysses > one_axis
    with pytest.raises(StrategyError, match="8 and 16 GPUs"):
        reshard_price(size, LayerStrategy(tp=8), mixed, place, CALIBRATION)


def test_a_stage_sends_its_share_of_the_sequence() -> None:
    place, size = Placement(Cluster.parse("2x8 h100-sxm"), 2), 1e9
    one, eight = (transfer_price(size, LayerStrategy(tp=t, dp=8 // t), place, CALIBRATION).forward_s for t in (1, 8))
    assert one > 4 * eight
    assert transfer_price(size, LayerStrategy(dp=16), Placement(Cluster.parse("2x8 h100-sxm")), CALIBRATION) == (
        transfer_price(0.0, LayerStrategy(dp=16), Placement(Cluster.parse("2x8 h100-sxm")), CALIBRATION))


def test_a_calibration_with_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="gemm_efficiency"):
        Calibration("x", gemm_efficiency=1.2)
    with pytest.raises(ValueError, match="kernel_s"):
        Calibration("x", kernel_s=float("nan"))
