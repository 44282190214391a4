"""A plan file's layout as positions in tables, to price it again."""

from __future__ import annotations

from collections.abc import Sequence

from ...cost_model.strategy import LayerStrategy
from ...runtime import plan as schema
from ...runtime.plan_layout import LayerOptions
from .group_search import Tuple
from .problem import Plan, Problem


def relocated(plan: schema.Plan, problem: Problem, tuples: Sequence[Tuple]) -> Plan | None:
    """The same plan in these tables; None where they don't have it."""
    s = plan.schedule
    wanted = s.stages, s.chunks, s.name, s.micro_batches, plan.mesh.order
    index = next((i for i, t in enumerate(tuples) if not t.tables.relaxed and wanted == (
        t.outer.p, t.outer.v, t.outer.schedule, t.outer.m, t.tables.group.order)), None)
    if index is None or len(plan.model.layers) != len(problem.layers):
        return None
    at = {name: i for i, name in enumerate(plan.model.layers)}
    options: list[int] = []
    for own in plan.layers:
        strategy = strategy_of(own.options)
        for layer in range(at[own.first], at[own.last] + 1):
            choices = tuples[index].tables.choices[problem.layers[layer]]
            found = next((i for i, c in enumerate(choices) if same(c.strategy, strategy)), None)
            if found is None:
                return None
            options.append(found)
    return Plan(outer=index, ends=tuple(at[p.last] + 1 for p in plan.parts), options=tuple(options))


def strategy_of(o: LayerOptions) -> LayerStrategy:
    """A plan file's options as the cost model's. Ranks of cp share dense states, so `zero_shard` counts them."""
    shard = o.zero_shard // o.cp if o.zero and o.zero_shard < o.dp * o.cp else 0
    kind = o.cp_kind if o.cp_kind == "ulysses" else "ring"
    return LayerStrategy(o.tp, o.cp, o.dp, o.ep, o.etp, kind, o.zero, shard, o.recompute,
                         "" if o.variant == "none" else o.variant)


def same(a: LayerStrategy, b: LayerStrategy) -> bool:
    """Equal in what they do: the kind of cp matters only above 1."""
    def key(s: LayerStrategy) -> tuple[object, ...]:
        return s.tp, s.cp, s.dp, s.ep, s.etp, s.cp_kind if s.cp > 1 else "", s.zero, s.shard, s.recompute, s.variant

    return key(a) == key(b)
