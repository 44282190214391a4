"""From what a search found to the plan file of `runtime/plan.py`: names for positions, predictions that add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from ...cost_model.layer_price import FIXED_CONTEXT_BYTES, LayerPrice
from ...cost_model.op_price import UNFITTED_RECIPE
from ...cost_model.strategy import LayerStrategy, Training
from ...runtime import plan as schema
from ...runtime.plan_data import Fact, Fingerprint, Fingerprints
from ...runtime.plan_layout import LayerOptions, LayerRange, Mesh, Part, Schedule
from ...runtime.plan_predictions import (
    Certificate,
    Predicted,
    RangePrediction,
    Refusal,
    StageCosts,
    StagePrediction,
    TupleResult,
)
from .captured import ModelAtAnyBatch, digest_of
from .confidence import band_of, doubts
from .evaluate import Evaluation, evaluate
from .group_search import Searched
from .knapsack import INFINITE
from .pricing import Pricer
from .problem import Plan
from .search import Found, Outcome
from .space import Left
from .tables import Tables
from .tables_digest import tables_digest

NOT_RUNNABLE = "plans are not executed yet: export it to another trainer"
MOST_REFUSED = 2000
DTYPES = {2: "bfloat16", 4: "float32", 8: "float64", 1: "float8"}


@dataclass(frozen=True)
class _Layer:
    """A layer of the plan: where it is, its strategy and its price."""

    index: int
    part: int
    strategy: LayerStrategy
    price: LayerPrice


class PlanWriter:
    """Writes plans of one search. `writer`: the version that predicts."""

    def __init__(self, model: ModelAtAnyBatch, pricer: Pricer, searched: Searched, writer: str) -> None:
        self.model, self.pricer, self.searched, self.writer = model, pricer, searched, writer
        self.description, self.problem = model.one, searched.problem

    def write(self, plan: Plan, ask: schema.Ask, batch: int, *, certified: bool = True) -> schema.Plan:
        """The plan file of `plan`, for a global batch that is really `batch` samples."""
        evaluation = evaluate(self.problem, plan)
        layers, group = self._layers(plan), self.searched.tuples[plan.outer].tables.group
        outer, names, cluster = self.problem.outers[plan.outer], self.description.modules, self.pricer.space.cluster
        ranges = [list(own) for _, own in groupby(layers, key=lambda la: (
            la.part, self.problem.layers[la.index], la.strategy))]
        inner = group.order[0] == "pp"
        return schema.Plan(
            ask=ask,
            model=schema.Model(name=self.description.name, parameters=self.description.parameter_count, layers=names),
            mesh=Mesh(gpus=cluster.gpus, gpus_per_node=cluster.gpus_per_node, pp=outer.p,
                      order=group.order,  # type: ignore[arg-type]
                      expert_order=("pp", "etp", "ep", "edp") if inner else ("etp", "ep", "edp", "pp")),
            parts=tuple(Part(stage=k % outer.p, chunk=k // outer.p, first=names[a], last=names[b - 1])
                        for k, (a, b) in enumerate(pairwise((0, *plan.ends)))),
            layers=tuple(self._range(own) for own in ranges),
            schedule=Schedule(name=outer.schedule, stages=outer.p, chunks=outer.v, micro_batches=outer.m,
                              micro_batch_samples=batch // outer.m),
            training=self._training(batch), predicted=self._predicted(plan, evaluation, layers, ranges, ask),
            certificate=self._certificate() if certified else None,
            fingerprints=fingerprints(self.model, self.pricer, ask))

    def _layers(self, plan: Plan) -> list[_Layer]:
        group = self.searched.tuples[plan.outer].tables.group
        found = []
        for index, part in enumerate(plan.part_of_layer()):
            strategy = self.searched.choice(plan, index).strategy
            samples = self.pricer.space.global_batch // (group.m * strategy.dp)
            price = self.pricer.price(self.problem.layers[index], samples, strategy, self.pricer.placement(group))
            found.append(_Layer(index, part, strategy, price))
        return found

    def _range(self, own: Sequence[_Layer]) -> LayerRange:
        names, s = self.description.modules, own[0].strategy
        options = LayerOptions(
            tp=s.tp, sequence_parallel=s.tp > 1, cp=s.cp, cp_kind=s.cp_kind if s.cp > 1 else "none", dp=s.dp, ep=s.ep,
            etp=s.etp, zero=s.zero, zero_shard=s.shards if s.zero else 1, recompute=s.recompute,
            variant=s.variant or "none", runnable=False, why_not_runnable=NOT_RUNNABLE)
        kind = self.problem.layers[own[0].index]
        return LayerRange(first=names[own[0].index], last=names[own[-1].index], count=len(own),
                          kind=self.problem.kinds[kind], experts=self.description.kinds[kind].experts or 0,
                          options=options)

    def _training(self, batch: int) -> schema.Training:
        t = self.pricer.training
        return schema.Training(
            parameter_dtype=DTYPES.get(int(t.parameter_bytes), "bfloat16"),
            gradient_dtype=DTYPES.get(int(t.gradient_bytes), "float32"),
            reduce_dtype=DTYPES.get(int(t.reduce_bytes), "float32"), recipe=_recipe(t), fusion=t.fusion,
            flash_attention=t.flash_attention, async_tp=t.async_tp, optimizer=t.optimizer,
            optimizer_bytes_per_parameter=float(t.optimizer_bytes), padded_batch=batch)

    # -- predictions ------------------------------------------------------------------------------
    def _predicted(self, plan: Plan, evaluation: Evaluation, layers: Sequence[_Layer],
                   ranges: Sequence[Sequence[_Layer]], ask: schema.Ask) -> Predicted:
        cluster, step_ns = self.pricer.space.cluster, evaluation.step_ns
        step_s = step_ns / 1e9
        price, mfu = ask.price_usd_per_gpu_hour, self._mfu(ask.global_batch, step_s)
        return Predicted(
            writer=self.writer, step_time_ns=step_ns,
            tokens_per_s=ask.global_batch * self.description.seq / step_s, mfu=mfu if mfu is None or mfu <= 1 else None,
            energy_joules=cluster.power_w * cluster.gpus * step_s if cluster.power_w else None,
            cost_usd=price * cluster.gpus * step_s / 3600 if price is not None else None,
            stages=tuple(self._stage(plan, evaluation, stage, [la for la in layers if la.part % (
                self.problem.outers[plan.outer].p) == stage]) for stage in range(len(evaluation.costs))),
            layers=tuple(self._range_price(plan, own) for own in ranges),
            reshard_ns=sum(self._resharding(plan)) * self.problem.outers[plan.outer].m,
            error_band=band_of(self.pricer, self.description),
            low_confidence=tuple(self._doubts(plan, evaluation, layers, mfu)))

    def _doubts(self, plan: Plan, evaluation: Evaluation, layers: Sequence[_Layer], mfu: float | None) -> Iterator[str]:
        yield from doubts(self.pricer, self.description, self.problem.outers[plan.outer],
                          [la.strategy for la in layers], evaluation.costs, evaluation.step_ns)
        yield from self.pricer.origin.doubts
        training, device = self.pricer.training, self.pricer.space.cluster.device
        if training.fp8_recipe and training.fp8_recipe not in self.pricer.software.fp8:
            yield f"{training.fp8_recipe} products: {UNFITTED_RECIPE:g} of bf16's efficiency is assumed of their peak"
        if training.compute not in device.peak_flops_per_s:
            yield f"{device.name} has no {training.compute} products: they take as long as float32's (see --precision)"
        if mfu is not None and mfu > 1:
            yield f"the model's FLOPs would take {mfu:.0%} of the GPUs' bf16 peak: left out as an MFU"

    def _mfu(self, batch: int, step_s: float) -> float | None:
        """FLOPs of the model, half of what causal attention masks left out, over all GPUs' bf16 peak."""
        kinds = self.description.kinds
        flops = sum(kinds[k].flops_forward + kinds[k].flops_backward for k in self.description.order)
        masked = sum(kinds[k].causal_flops_forward + kinds[k].causal_flops_backward for k in self.description.order)
        peak = self.pricer.space.cluster.device.peak_flops_per_s.get("bfloat16")
        if not peak:
            return None
        return float((flops - masked / 2) * batch / step_s / (peak * self.pricer.space.cluster.gpus))

    def _stage(self, plan: Plan, evaluation: Evaluation, stage: int, own: Sequence[_Layer]) -> StagePrediction:
        outer, costs = self.problem.outers[plan.outer], evaluation.costs[stage]
        moved = outer.m * sum(ns for part, ns in enumerate(self._resharding(plan)) if part % outer.p == stage)
        exposed = _exposed([la.price for la in own], outer.m)
        if moved:
            exposed["re-sharding"] = moved
        busy = outer.m * (sum(costs.forward_ns) + sum(costs.input_gradient_ns) + sum(costs.weight_gradient_ns))
        compute = busy + costs.sync_ns - sum(exposed.values())
        return StagePrediction(
            compute_ns=max(0, compute), optimizer_ns=costs.optimizer_ns, exposed_ns=_fitted(exposed, -min(0, compute)),
            bubble_ns=evaluation.step_ns - busy - costs.sync_ns - costs.optimizer_ns,
            costs=StageCosts(**{name: getattr(costs, name) for name in StageCosts.model_fields}),
            memory_bytes=self._memory(evaluation, stage, own),
            limit_bytes=self.pricer.capacity_bytes + round(FIXED_CONTEXT_BYTES))

    def _memory(self, evaluation: Evaluation, stage: int, own: Sequence[_Layer]) -> dict[str, int]:
        held = evaluation.memory[stage]
        weights = int(sum(la.price.memory.weights_bytes for la in own))
        gradients = int(sum(la.price.memory.gradients_bytes for la in own))
        widest = max(own, key=lambda la: la.price.memory.transient_bytes + la.price.memory.communication_bytes)
        buffers = int(widest.price.memory.communication_bytes)
        share = self.pricer.allocator_share  # the tables hold every dynamic byte 1 + share times
        activations, widest_bytes = (int(n / (1 + share)) for n in (held.activation_bytes, held.transient_bytes))
        return {"weights": weights, "gradients": gradients,
                "optimizer": max(0, held.static_bytes - weights - gradients), "activations": activations,
                "working-set": max(0, widest_bytes - buffers), "communication": min(buffers, widest_bytes),
                "allocator": held.activation_bytes + held.transient_bytes - activations - widest_bytes,
                "context": round(FIXED_CONTEXT_BYTES)}

    def _range_price(self, plan: Plan, own: Sequence[_Layer]) -> RangePrediction:
        outer = self.problem.outers[plan.outer]
        moments = Tables(self.problem, outer).held(own[0].part % outer.p)
        moment = max(moments, key=lambda h: sum(h.until_b) + sum(h.until_w))
        chunk, one = own[0].part // outer.p, own[0].price
        exposed = _exposed([la.price for la in own], outer.m)
        seconds = one.forward_s + one.input_gradient_s + one.weight_gradient_s
        total = round((outer.m * seconds + one.sync_s) * len(own) * 1e9)
        m = one.memory
        saved = moment.until_b[chunk] * m.saved_until_b_bytes + moment.until_w[chunk] * m.saved_until_w_bytes
        sizes = {"weights": m.weights_bytes, "gradients": m.gradients_bytes, "optimizer": m.optimizer_bytes,
                 "activations": saved}
        return RangePrediction(compute_ns=max(0, total - sum(exposed.values())), exposed_ns=exposed,
                               memory_bytes={name: round(len(own) * size) for name, size in sizes.items()})

    def _resharding(self, plan: Plan) -> list[int]:
        """ns per micro-batch in every part."""
        outer = self.problem.outers[plan.outer]
        chosen = [outer.options[k][o] for k, o in zip(self.problem.layers, plan.options, strict=True)]
        return [sum(move.forward_ns + move.backward_ns for x, y in pairwise(chosen[a:b])
                    for move in (outer.reshard[x.layout_out][y.layout_in],)) for a, b in pairwise((0, *plan.ends))]

    # -- what it is worth -------------------------------------------------------------------------
    def _certificate(self) -> Certificate | None:
        result, space = self.searched.result, self.pricer.space
        if not isinstance(result, Found):
            return None
        left = list(space.left)[:MOST_REFUSED]
        if len(space.left) > MOST_REFUSED:
            left.append(Left("others", str(len(space.left) - MOST_REFUSED), "more than a plan file lists: meshwright "
                             "plan --json has all"))
        return Certificate(
            problem_sha256=tables_digest(self.problem), lower_bound_ns=result.lower_bound_ns, proof="bound",
            tuples=tuple(_tuple(self.problem.outers[o.index].title, o) for o in result.tuples),
            refused=tuple(Refusal(axis=x.axis[:200], value=x.value[:200] or "-", reason=x.reason[:2000]) for x in left),
            recheck="meshwright verify PLAN")


def fingerprints(model: ModelAtAnyBatch, pricer: Pricer, ask: schema.Ask) -> Fingerprints:
    """Of everything that the predictions depend on."""
    d, cluster = model.one, pricer.space.cluster
    facts: dict[str, Fact] = {"name": d.name, "layers": len(d.order), "parameters": d.parameter_count, "seq": d.seq}
    described = d.as_dict()
    for kind in described["kinds"]:
        kind.pop("capture_s", None)
    links: dict[str, Fact] = {"name": cluster.name, "nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node,
                              "device": cluster.device.name, "memory_bytes": cluster.device.memory_bytes}
    scalars: dict[str, Fact] = {**pricer.origin.facts, **pricer.calibration.scalars(),
                                "allocator_share": pricer.allocator_share}
    options: dict[str, Fact] = {"seq": ask.seq, "global_batch": ask.global_batch, "options": " ".join(ask.options)}
    return Fingerprints(model=Fingerprint(sha256=digest_of(described), facts=facts),
                        cluster=Fingerprint.of(cluster.as_dict(), links),
                        profile=Fingerprint.of(scalars, dict(scalars)),
                        options=Fingerprint.of([list(ask.options), vars(pricer.training)], options))


def _recipe(training: Training) -> str:
    """How products run, in a plan's words: bf16, fp8-tensorwise, mxfp8, nvfp4."""
    if training.fp8_recipe:
        return training.fp8_recipe if "fp" in training.fp8_recipe else f"fp8-{training.fp8_recipe}"
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(training.compute, training.compute)


def _exposed(prices: Sequence[LayerPrice], m: int) -> dict[str, int]:
    """ns of a step by collective."""
    found: dict[str, float] = {}
    for price in prices:
        for c in price.collectives:
            times = 1 if c.phase in ("last backward", "first forward") else m
            found[c.kind] = found.get(c.kind, 0.0) + times * c.exposed_s
    return {name: int(s * 1e9) for name, s in sorted(found.items()) if s * 1e9 >= 1}


def _fitted(exposed: dict[str, int], excess: int) -> dict[str, int]:
    """Rounded sums that exceed what there is by a few ns give them back."""
    found = dict(exposed)
    for name in found:
        taken = min(found[name], excess)
        found[name] -= taken
        excess -= taken
    return found


def _tuple(title: str, outcome: Outcome) -> TupleResult:
    bound = outcome.lower_bound_ns if outcome.lower_bound_ns < INFINITE else None
    return TupleResult(title=title, state=outcome.status, bound_ns=bound, value_ns=outcome.step_ns)

