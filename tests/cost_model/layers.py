"""A transformer layer, an embedding and a head written by hand: sizes that can be followed on paper."""

from __future__ import annotations

import dataclasses
from typing import Any

from meshwright.cost_model.calibration import Calibration, Software
from meshwright.cost_model.cluster import Cluster
from meshwright.cost_model.layer_price import LayerPrice, price_layer
from meshwright.cost_model.model import Boundary, LayerKind, ParameterGroup, Saved
from meshwright.cost_model.records import OpRecord
from meshwright.cost_model.strategy import LayerStrategy, Placement, Training

HIDDEN, FFN, HEADS, SEQ, VOCABULARY = 1024, 4096, 16, 2048, 32000
PARAMETERS = 4 * HIDDEN**2 + 2 * HIDDEN * FFN
CALIBRATION, SOFTWARE = Calibration("test"), Software()


def product(m: int, k: int, n: int, op: str = "mm") -> OpRecord:
    return OpRecord(op, "gemm", "bfloat16", 2 * m * k * n, 2 * (m * k + k * n), 2 * m * n, m * n, shape=(1, m, k, n))


def grouped(experts: int, rows: int, k: int, n: int, op: str = "grouped_mm") -> OpRecord:
    return OpRecord(op, "gemm", "bfloat16", 2 * rows * k * n, 2 * (rows * k + experts * k * n), 2 * rows * n, rows * n,
                    shape=(experts, rows, k, n))


def pointwise(elements: int) -> OpRecord:
    return OpRecord("add", "pointwise", "bfloat16", 0, 4 * elements, 2 * elements, elements)


def attention(batch: int, backward: bool = False) -> OpRecord:
    flops = (5 if backward else 2) * 2 * batch * SEQ * SEQ * HIDDEN
    return OpRecord("attention", "attention", "bfloat16", flops, 6 * batch * SEQ * HIDDEN, 2 * batch * SEQ * HIDDEN,
                    batch * SEQ * HIDDEN, shape=(batch, HEADS, SEQ, SEQ, HIDDEN // HEADS, HEADS))


def chain(batch: int) -> Boundary:
    return Boundary("hidden", "chain", "bfloat16", (batch, SEQ, HIDDEN), 2 * batch * SEQ * HIDDEN)


def transformer(batch: int = 1) -> LayerKind:
    """Attention with three inputs of one width, an output product, and two products around an activation."""
    t = batch * SEQ
    weights = [(HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, FFN), (FFN, HIDDEN)]
    forward = (pointwise(t * HIDDEN), product(t, *weights[0]), attention(batch), product(t, *weights[1]),
               pointwise(t * HIDDEN), product(t, *weights[2]), pointwise(t * FFN), product(t, *weights[3]))
    backward: list[OpRecord] = [pointwise(t * FFN), attention(batch, backward=True)]
    for k, n in weights:
        backward += [product(t, n, k), product(k, t, n)]
    saved = 2 * t * (6 * HIDDEN + 2 * FFN)
    return LayerKind(
        "layer", forward, tuple(backward), (ParameterGroup("bfloat16", True, PARAMETERS, 2 * PARAMETERS),), (),
        {"none": Saved(saved, (), saved // 2), "min-cut": Saved(saved, (), saved // 2),
         "selective": Saved(saved // 2, (0, 4, 6)), "full": Saved(2 * t * HIDDEN, tuple(range(8)))},
        (chain(batch),), causal_flops_forward=forward[2].flops, causal_flops_backward=backward[1].flops,
        weight_only=(3, 5, 7, 9), heads=HEADS, kv_heads=HEADS, ffn=FFN)


def mixture(batch: int = 1, experts: int = 8, top_k: int = 2) -> LayerKind:
    """The same with experts in place of the feed-forward products."""
    dense, rows = transformer(batch), batch * SEQ * top_k
    up, down = grouped(experts, rows, HIDDEN, FFN), grouped(experts, rows, FFN, HIDDEN)
    gradients = (grouped(experts, rows, HIDDEN, FFN), grouped(experts, rows, HIDDEN, FFN, "grouped_mm_weights"),
                 grouped(experts, rows, FFN, HIDDEN), grouped(experts, rows, FFN, HIDDEN, "grouped_mm_weights"))
    count = 2 * experts * HIDDEN * FFN
    total = 4 * HIDDEN**2 + count
    return dataclasses.replace(
        dense, forward=(*dense.forward[:5], up, dense.forward[6], down), backward=(*dense.backward[:6], *gradients),
        parameters=(ParameterGroup("bfloat16", True, total, 2 * total),), expert_parameters=count, ffn=None,
        experts=experts, top_k=top_k, expert_ffn=FFN)


def embedding(batch: int = 1) -> LayerKind:
    gather = OpRecord("embedding", "gather", "bfloat16", 0, 2 * batch * SEQ * HIDDEN, 2 * batch * SEQ * HIDDEN)
    count = VOCABULARY * HIDDEN
    modes = {m: Saved(0) for m in ("none", "min-cut", "selective", "full")}
    group = ParameterGroup("bfloat16", True, count, 2 * count)
    return LayerKind("embedding", (gather,), (gather,), (group,), (), modes, (
                     Boundary("ids", "constant", "int64", (batch, SEQ), 8 * batch * SEQ),), weight_only=(0,),
                     vocabulary=VOCABULARY)


def head(batch: int = 1, tied: bool = False) -> LayerKind:
    t, count = batch * SEQ, VOCABULARY * HIDDEN
    group = ParameterGroup("bfloat16", True, count, 2 * count)
    modes = {m: Saved(4 * t * VOCABULARY) for m in ("none", "min-cut", "selective", "full")}
    return LayerKind("head", (product(t, HIDDEN, VOCABULARY),), (product(t, VOCABULARY, HIDDEN),
                                                                 product(HIDDEN, t, VOCABULARY)),
                     () if tied else (group,), (group,) if tied else (), modes, (chain(batch),), weight_only=(1,),
                     vocabulary=VOCABULARY)


def priced(kind: LayerKind, cluster: str = "1x8 h100-sxm", p: int = 1, training: Training | None = None,
           calibration: Calibration = CALIBRATION, **strategy: Any) -> LayerPrice:
    """A layer on a whole cluster; dp takes what tp, cp and p leave."""
    made = Cluster.parse(cluster)
    rest = made.gpus // p // strategy.get("tp", 1) // strategy.get("cp", 1)
    return price_layer(kind, LayerStrategy(**{"dp": rest, **strategy}), training or Training(), Placement(made, p),
                       calibration, SOFTWARE)
