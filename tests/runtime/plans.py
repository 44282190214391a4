"""Plans made by hand, for tests: two stages of a small model, costs that add up, memory that fits."""

from __future__ import annotations

from typing import Any

from meshwright.cost_model.pipeline import StageCosts as Costs
from meshwright.cost_model.pipeline import simulate
from meshwright.cost_model.schedules import Schedule as Order
from meshwright.runtime.plan import Ask, Model, Plan, Training
from meshwright.runtime.plan_data import Fingerprint, Fingerprints
from meshwright.runtime.plan_layout import LayerOptions, LayerRange, Mesh, Part, Schedule
from meshwright.runtime.plan_predictions import (
    Beaten,
    Certificate,
    ErrorBand,
    Predicted,
    RangePrediction,
    Refusal,
    StageCosts,
    StagePrediction,
    TupleResult,
)

GIB = 2**30
MS = 10**6
NOT_YET = "plans are not executed yet"


def options(**changed: Any) -> LayerOptions:
    """tp 2, dp 2 of 4 GPUs, ZeRO-1 over both."""
    return LayerOptions(**{"tp": 2, "sequence_parallel": True, "dp": 2, "zero": 1, "zero_shard": 2,
                           "why_not_runnable": NOT_YET, **changed})


def fingerprints(**facts: Any) -> Fingerprints:
    """Of a model, cluster, profile and options; `facts` replace the cluster's."""
    cluster = {"gpus": 8, "device": "h100-sxm", **facts}
    return Fingerprints(model=Fingerprint.of({"layers": 8}, {"name": "tiny", "layers": 8}),
                        cluster=Fingerprint.of(cluster, cluster), profile=Fingerprint.of({"version": 1}),
                        options=Fingerprint.of([], {}))


def layer_names(count: int = 8) -> tuple[str, ...]:
    """Embedding, blocks, head."""
    return ("before model.layers.0", *(f"model.layers.{i}" for i in range(count)), f"after model.layers.{count - 1}")


def stage_prediction(costs: Costs, schedule: Order, step_ns: int, exposed_ns: int) -> StagePrediction:
    """A stage whose compute, exposed communication and bubble add up."""
    busy = costs.busy_ns(schedule.micro_batches)
    return StagePrediction(
        compute_ns=busy - costs.tail_ns - exposed_ns, optimizer_ns=costs.optimizer_ns,
        exposed_ns={"all-gather": exposed_ns, "reduce-scatter": costs.sync_ns}, bubble_ns=step_ns - busy,
        costs=StageCosts(**{name: getattr(costs, name) for name in StageCosts.model_fields}),
        memory_bytes={"weights": 10 * GIB, "gradients": 5 * GIB, "optimizer": 20 * GIB, "activations": 12 * GIB,
                      "context": GIB}, limit_bytes=72 * GIB)


def predicted(schedule: Order, costs: list[Costs], ranges: int, **changed: Any) -> Predicted:
    """Predictions that follow from the costs."""
    step_ns = simulate(schedule, costs).makespan_ns
    stages = tuple(stage_prediction(c, schedule, step_ns, exposed_ns=8 * MS) for c in costs)
    rows = tuple(RangePrediction(compute_ns=50 * MS, exposed_ns={"all-gather": 2 * MS},
                                 memory_bytes={"weights": 2 * GIB, "activations": 3 * GIB}) for _ in range(ranges))
    return Predicted(**{"writer": "0.1.0", "step_time_ns": step_ns, "tokens_per_s": 16 * 4096 / step_ns * 1e9,
                        "mfu": 0.41, "error_band": ErrorBand(low=0.05, high=0.08, source="12 published runs"),
                        "energy_joules": 1234.5, "cost_usd": 0.012, "stages": stages, "layers": rows, **changed})


def plan(**changed: Any) -> Plan:
    """pp 2 (1F1B, 8 micro-batches), tp 2, dp 2 on 8 GPUs; the last stage checkpoints."""
    names = layer_names()
    order = Order("1f1b", 2, 8)
    costs = [Costs((4 * MS,), (4 * MS,), (3 * MS,), MS, MS, 5 * MS, 2 * MS),
             Costs((5 * MS,), (5 * MS,), (4 * MS,), MS, MS, 5 * MS, 2 * MS)]
    ranges = (LayerRange(first=names[0], last=names[0], count=1, kind="embedding", options=options()),
              LayerRange(first=names[1], last=names[4], count=4, kind="Block", options=options()),
              LayerRange(first=names[5], last=names[8], count=4, kind="Block", options=options(recompute="full")),
              LayerRange(first=names[9], last=names[9], count=1, kind="head", options=options()))
    prices = predicted(order, costs, len(ranges))
    fields: dict[str, Any] = {
        "ask": Ask(model="tiny", cluster="1x8 h100-sxm", seq=4096, global_batch=16, options=("--cp 1",)),
        "model": Model(name="tiny", parameters=10**9, layers=names),
        "mesh": Mesh(gpus=8, gpus_per_node=8, pp=2),
        "parts": (Part(stage=0, first=names[0], last=names[4]), Part(stage=1, first=names[5], last=names[9])),
        "layers": ranges, "schedule": Schedule(name="1f1b", stages=2, micro_batches=8, micro_batch_samples=2),
        "training": Training(padded_batch=16), "predicted": prices, "certificate": certificate(prices.step_time_ns),
        "beaten": beaten(prices.step_time_ns), "fingerprints": fingerprints()}
    return Plan(**{**fields, **changed})


def certificate(step_ns: int) -> Certificate:
    """Four outer tuples, one of each state; a gap of 1 %."""
    return Certificate(
        problem_sha256="0" * 64, lower_bound_ns=step_ns * 99 // 100,
        tuples=(TupleResult(title="p=2 v=1 1f1b m=8", state="solved", bound_ns=step_ns * 99 // 100, value_ns=step_ns),
                TupleResult(title="p=4 v=1 1f1b m=8", state="searched", bound_ns=step_ns, value_ns=step_ns * 11 // 10),
                TupleResult(title="p=8 v=1 1f1b m=8", state="bounded", bound_ns=step_ns * 12 // 10),
                TupleResult(title="p=1 v=1 gpipe m=1", state="infeasible")),
        refused=(Refusal(axis="tp", value="3", reason="3 does not divide 32 heads"),),
        recheck="meshwright why plan.json --verify")


def beaten(step_ns: int) -> tuple[Beaten, ...]:
    """A slower one, a tie and one that does not fit."""
    return (Beaten(family="pure data parallel", title="dp 8", step_time_ns=None, missing_bytes=3 * GIB,
                   binding="memory of stage 0"),
            Beaten(family="interleaved", title="pp 2 × 2 chunks", step_time_ns=step_ns * 101 // 100,
                   binding="busy time of stage 1", near_tie=True),
            Beaten(family="pp 4", title="pp 4 · tp 2", step_time_ns=step_ns * 12 // 10, binding="bubble"))


def uniform(*, pp: int = 2, chunks: int = 1, schedule: str = "1f1b", micro_batches: int = 8, replica: int = 1,
            blocks: int = 8, experts: int = 0, mesh: dict[str, Any] | None = None,
            training: dict[str, Any] | None = None, seq: int = 4096, around: dict[str, Any] | None = None,
            batch: int | None = None, **changed: Any) -> Plan:
    """A plan whose layers share their options (`around`: those of embedding and head differ), blocks spread evenly."""
    shared = options(**changed)
    outer = shared.model_copy(update=around or {})
    names = layer_names(blocks)
    parts, ranges = [], []
    ends = [round(blocks * (k + 1) / (pp * chunks)) for k in range(pp * chunks)]
    for k, (a, b) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        first, last = names[a + 1] if k else names[0], names[b] if k + 1 < pp * chunks else names[-1]
        parts.append(Part(stage=k % pp, chunk=k // pp, first=first, last=last))
        if k == 0:
            ranges.append(LayerRange(first=names[0], last=names[0], count=1, kind="embedding", options=outer))
        ranges.append(LayerRange(first=names[a + 1], last=names[b], count=b - a, kind="Block", experts=experts,
                                 options=shared))
    ranges.append(LayerRange(first=names[-1], last=names[-1], count=1, kind="head", options=outer))
    order = Order(schedule, pp, micro_batches, chunks)  # type: ignore[arg-type]
    costs = [Costs((4 * MS,) * chunks, (4 * MS,) * chunks, (3 * MS,) * chunks, MS, MS, 5 * MS, 2 * MS)] * pp
    samples = replica * shared.dp
    return plan(
        model=Model(name="tiny", parameters=10**9, layers=names), parts=tuple(parts), layers=tuple(ranges),
        mesh=Mesh(**{"gpus": pp * shared.gpus, "gpus_per_node": 8, "pp": pp, **(mesh or {})}),
        ask=Ask(model="tiny", cluster="1x8 h100-sxm", seq=seq, global_batch=batch or micro_batches * samples),
        schedule=Schedule(name=schedule, stages=pp, chunks=chunks, micro_batches=micro_batches,
                          micro_batch_samples=samples),
        training=Training(**{"padded_batch": micro_batches * samples, **(training or {})}),
        predicted=predicted(order, costs, len(ranges)))
