"""The heuristic of `large.py` where options come in many layouts: one layout for all layers first, then rarer kinds
may leave it.

Between layouts activations move, so plans of one layout are mostly the best ones, and the embedding or the head are
what gains from another. Layouts are tried from the one on whose mean stage is the least busy under stage 0's memory.
Which options a stage may take is all that this decides; the bound knows nothing of it.
"""

from __future__ import annotations

import math
from collections import Counter

from .bound import Bound
from .fronts import Fronts
from .knapsack import Weights
from .large import Large
from .problem import Plan
from .tables import Tables

MOST_LAYOUTS = 12
BUBBLE = 0.6  # at least so much of 1F1B's bubble is left in every schedule
MOST_UNEVEN = 3  # layouts tried with others for rarer kinds where none fits alone
MOST_OTHER = 4  # layouts of a rarer kind, besides the one of most layers

Best = tuple[int, Plan] | None


def best_of_layouts(tables: Tables, bound: Bound, index: int, lower: int, below: int) -> Best:
    """A plan faster than `below` ns, or None."""
    costs = ranked(tables, bound)
    layouts = list(costs)
    everything = [frozenset(range(len(own))) for own in tables.outer.options]
    if len(layouts) <= 1 or tables.problem.mixing:
        return Large(Fronts(tables), bound, index).best(lower, below)
    best: Best = None
    chosen = None
    outer = tables.outer
    filling = 1 + BUBBLE * (outer.p - 1) / (outer.m * outer.v)
    for layout in layouts[:MOST_LAYOUTS]:
        if costs[layout] * filling > below:
            break  # its mean stage alone is busier
        own = [_in_layout(tables, kind, layout) or everything[kind] for kind in range(len(everything))]
        found = Large(Fronts(tables, allowed=own), bound, index).best(lower, below)
        if found is not None and found[0] < below:
            best, below, chosen = found, found[0], layout
    if chosen is None or best is None:  # rarer kinds may fit in another layout only
        tries = (Large(Fronts(tables, allowed=_wider(tables, bound, layout, layouts)), bound, index).best(lower, below)
                 for layout in layouts[:MOST_UNEVEN] if costs[layout] <= below)
        return next((found for found in tries if found is not None), None)
    wider = Large(Fronts(tables, allowed=_wider(tables, bound, chosen, layouts)), bound, index)
    return wider.improved(best, lower, below) or best


def ranked(tables: Tables, bound: Bound) -> dict[int, float]:
    """Layouts of the kinds of most layers with the busy time of their mean stage, the least busy one first."""
    counts, p = Counter(tables.problem.layers), tables.outer.p
    common = [kind for kind, n in counts.items() if n >= p] or list(counts)
    found = sorted({(o.layout_in, o.layout_out) for kind in common for o in tables.outer.options[kind]})
    costs = dict[int, float]()
    for layout, last in found:
        if layout == last:
            parts = [(kind, max(1, counts[kind] // p), tuple(sorted(_in_layout(tables, kind, layout))))
                     for kind in common]
            costs[layout] = bound.least_among([part for part in parts if part[2]])
    if any(a != b for a, b in found):
        return {}  # layers that change the layout: nothing to restrict
    return dict(sorted(costs.items(), key=lambda one: (one[1], one[0])))


def _in_layout(tables: Tables, kind: int, layout: int) -> frozenset[int]:
    return frozenset(i for i, o in enumerate(tables.outer.options[kind]) if o.layout_in == o.layout_out == layout)


def _wider(tables: Tables, bound: Bound, chosen: int, layouts: list[int]) -> list[frozenset[int]]:
    counts, p, m = Counter(tables.problem.layers), tables.outer.p, tables.outer.m
    wider = []
    for kind in range(len(tables.outer.options)):
        own = _in_layout(tables, kind, chosen)
        if counts[kind] < p or counts[kind] * 4 < len(tables.problem.layers) or not own:
            cost = bound.knapsack.costs(kind, Weights(m, m, m, 1))
            least = {layout: min((cost[i] for i in _in_layout(tables, kind, layout)), default=math.inf)
                     for layout in layouts}
            near = sorted(least, key=lambda layout: (least[layout], layout))[:MOST_OTHER]
            own = own.union(*(_in_layout(tables, kind, layout) for layout in near))
        wider.append(own)
    return wider
