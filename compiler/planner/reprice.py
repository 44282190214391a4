"""A plan file priced by today's model, cluster and cost model, without a search: its own strategies are all there are.
"""

from __future__ import annotations

from ...cost_model.cluster import ClusterError
from ...cost_model.strategy import LayerStrategy, StrategyError
from ...runtime import plan as schema
from ...runtime.errors import InvalidInputError
from ...runtime.plan_layout import LayerOptions
from .evaluate import evaluate
from .group_search import GroupSearch, Searched, Tuple
from .plan_model import Planner
from .pricing import Choice, GroupTables
from .problem import Plan
from .search import NothingFits
from .space import Group, Layout


def reprice(plan: schema.Plan, planner: Planner) -> schema.Plan:
    """The same layout with predictions of today, and, where nothing has changed, with its certificate. Raises
    `InvalidInputError` where it no longer lies in the model or the cluster."""
    names = planner.model.one.modules
    if names != plan.model.layers:
        raise InvalidInputError(f"the model has {len(names)} layers named otherwise than the plan's "
                                f"{len(plan.model.layers)}")
    if planner.cluster.gpus != plan.mesh.gpus + plan.mesh.idle_gpus or plan.mesh.idle_gpus:
        raise InvalidInputError(f"the cluster has {planner.cluster.gpus} GPUs, the plan uses {plan.mesh.gpus}")
    if planner.batch != plan.training.padded_batch:
        raise InvalidInputError(f"the batch is {planner.batch} samples, the plan's {plan.training.padded_batch}")
    try:
        tables, choices = _tables(plan, planner)
        outer = tables.outer(plan.schedule.name, plan.schedule.chunks)
    except (ClusterError, StrategyError, ValueError) as error:
        raise InvalidInputError(f"the plan can't be priced: {error}") from None
    problem = GroupSearch(planner.pricer, mixing=True).problem([outer])
    at = {name: i for i, name in enumerate(names)}
    located = Plan(outer=0, ends=tuple(at[p.last] + 1 for p in plan.parts), options=choices)
    evaluate(problem, located)  # its faults are worded for people
    made = planner.writer(Searched(problem, (Tuple(tables, outer),), NothingFits((), True))).write(
        located, plan.ask, planner.batch, certified=False)
    if len(made.layers) != len(plan.layers):
        return made
    return plan.repriced(made.fingerprints, lambda _: made.predicted)


def _tables(plan: schema.Plan, planner: Planner) -> tuple[GroupTables, tuple[int, ...]]:
    """Tables that hold the plan's strategies and nothing else, and which of them each layer takes."""
    group = Group(plan.mesh.pp, plan.schedule.micro_batches, plan.mesh.order)
    strategies = [strategy_of(r.options) for r in plan.layers for _ in range(r.count)]
    layouts = list(dict.fromkeys(Layout.of(s) for s in strategies))
    found: list[list[Choice]] = [[] for _ in planner.space.kinds]
    chosen = []
    for kind, strategy in zip(planner.space.order, strategies, strict=True):
        known = [c.strategy for c in found[kind]]
        if strategy not in known:
            found[kind].append(planner.pricer.choice(kind, strategy, group, layouts.index(Layout.of(strategy))))
            known.append(strategy)
        chosen.append(known.index(strategy))
    moves = planner.pricer.moves(layouts, group)
    return GroupTables(group, tuple(layouts), tuple(map(tuple, found)), *moves), tuple(chosen)


def strategy_of(o: LayerOptions) -> LayerStrategy:
    """A plan file's options as the cost model's. Ranks of cp share dense states, so `zero_shard` counts them."""
    shard = o.zero_shard // o.cp if o.zero and o.zero_shard < o.dp * o.cp else 0
    kind = o.cp_kind if o.cp_kind == "ulysses" else "ring"
    return LayerStrategy(o.tp, o.cp, o.dp, o.ep, o.etp, kind, o.zero, shard, o.recompute,
                         "" if o.variant == "none" else o.variant)
