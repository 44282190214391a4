"""The exact search inside one outer tuple: a dynamic program over parts that keeps Pareto sets of the stage vector.

State: where the next part starts, the last layout, and, as long as a stage has chunks to come, its families. Value: all
costs of all stages so far. J only rises with each of them, so a state that another one is nowhere above is dropped; so
is one whose bound reaches the incumbent. The plans still alive at the end are priced by J, most promising first.

    column of stage s    F and B and W of each chunk, tail, transfers to both neighbours, and until the stage is
                         complete its memory: static, activations at every possible peak, transient
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from ...cost_model.pipeline import StageCosts
from ...cost_model.steady_state import steady_state_time_ns
from .fronts import Families, Front, Fronts, Key, Place, TooLarge, together
from .problem import Plan, part_sizes
from .tables import BACKWARD, FORWARD, STATIC, TAIL, TRANSIENT, UNTIL_B, UNTIL_W, WEIGHT, Ints

MOST_ROWS = 200_000  # sums of states and a front at a time


@dataclass(frozen=True)
class _States:
    """`values` [rows, columns] and per row the nodes of all parts so far and where they end."""

    values: Ints
    nodes: Ints
    ends: Ints


_Key = tuple[int, int, tuple[Families, ...]]  # next layer, last layout, families of every stage that has parts to come


class Layered:
    """`solve(below)` is the fastest plan of the tuple if it is faster than `below` ns, else None."""

    def __init__(self, fronts: Fronts, index: int) -> None:
        self.fronts, self.index = fronts, index
        self.tables, self.outer, self.layers = fronts.tables, fronts.tables.outer, fronts.tables.problem.layers
        v = self.outer.v
        self.held = [self.tables.held(s) for s in range(self.outer.p)]
        self.stages: dict[tuple[tuple[int, ...], int], dict[Key, Front]] = {}
        widths = [3 * v + 3 + len(h) + 2 for h in self.held]
        self.at = np.concatenate(([0], np.cumsum(widths))).tolist()
        self.work_left, self.turn_left = self._left(WEIGHT), self._left(BACKWARD)

    def _left(self, last: int) -> list[int]:
        """The least times of F up to the column `last` of all layers from each one on."""
        least = [int(t[:, FORWARD:last + 1].sum(axis=1).min()) if len(t) else 0 for t in self.tables.options]
        return list(accumulate((least[kind] for kind in reversed(self.layers)), initial=0))[::-1]

    def solve(self, below: int) -> tuple[int, Plan] | None:
        """Raises `TooLarge` when that would take too many comparisons or too much memory."""
        start = np.zeros((1, 0), np.int64)
        states: dict[_Key, _States] = {(0, -1, ((),) * self.outer.p): _States(
            np.zeros((1, self.at[-1]), np.int64), start, start)}
        low, high = part_sizes(len(self.layers), self.outer)
        for part in range(self.outer.parts):
            reached: dict[_Key, list[_States]] = {}
            after = self.outer.parts - part - 1
            for key, state in states.items():
                first = key[0]
                for end in range(max(first + low, len(self.layers) - after * high),
                                 min(first + high, len(self.layers) - after * low) + 1):
                    for new, extended in self._extended(key, state, part, end, below):
                        reached.setdefault(new, []).append(extended)
            states = self._pruned(reached)
        return self._best(states, below)

    def _extended(self, key: _Key, state: _States, part: int, end: int,
                  below: int) -> Iterator[tuple[_Key, _States]]:
        first, last, families = key
        stage, chunk = part % self.outer.p, part // self.outer.p
        for own, front in self._parts(first, end, stage).items():
            joint = together(families[stage], own.families)
            if joint is None or not len(front.costs):
                continue
            values, rows, picked = self._sums(state.values, front, stage, chunk, last, own)
            kept = np.flatnonzero(self._promising(values, stage, end, below))
            if len(kept) == 0:
                continue
            after = list(families)
            after[stage] = joint if chunk + 1 < self.outer.v else ()
            values = values[kept]
            if chunk + 1 == self.outer.v:  # complete: its memory no longer matters
                values[:, self.at[stage] + 3 * self.outer.v + 3:self.at[stage + 1]] = 0
            ends = np.full((len(kept), 1), end)
            yield (end, own.last, tuple(after)), _States(
                values, np.hstack([state.nodes[rows[kept]], front.nodes[picked[kept], None]]),
                np.hstack([state.ends[rows[kept]], ends]))

    def _parts(self, first: int, end: int, stage: int) -> dict[Key, Front]:
        """Fronts of a part. Where it is a whole stage, only what fits is left of it, and only its times matter."""
        kinds = self.layers[first:end]
        if self.outer.v > 1:
            return self.fronts.chain(kinds)
        if (kinds, stage) not in self.stages:
            found: dict[Key, list[Front]] = {}
            for key, front in self.fronts.chain(kinds).items():
                memory = Place(stage, 0, self.outer.m).memory(self.tables, front.costs)
                fits = np.flatnonzero(memory <= self.tables.problem.capacity_bytes)
                times = front.costs[fits]
                times[:, STATIC:] = 0
                found.setdefault(Key(key.first, key.last, ()), []).append(Front(times, front.nodes[fits]))
            self.stages[kinds, stage] = {key: self._merged(fronts) for key, fronts in found.items()}
        return self.stages[kinds, stage]

    def _merged(self, fronts: list[Front]) -> Front:
        costs, nodes = np.concatenate([f.costs for f in fronts]), np.concatenate([f.nodes for f in fronts])
        kept = self.fronts.undominated(costs)
        return Front(costs[kept], nodes[kept])

    def _sums(self, values: Ints, front: Front, stage: int, chunk: int, last: int,
              own: Key) -> tuple[Ints, Ints, Ints]:
        v, base, costs = self.outer.v, self.at[stage], front.costs
        self.fronts.work += len(values) * len(costs) * values.shape[1]
        if len(values) * len(costs) > MOST_ROWS or self.fronts.work > self.fronts.most_work:
            raise TooLarge
        rows, picked = np.divmod(np.arange(len(values) * len(costs)), len(costs))
        sums, added = values[rows], costs[picked]
        sums[:, base + chunk], sums[:, base + v + chunk] = added[:, FORWARD], added[:, BACKWARD]
        sums[:, base + 2 * v + chunk] = added[:, WEIGHT]
        sums[:, base + 3 * v] += added[:, TAIL]
        memory = base + 3 * v + 3
        sums[:, memory] += added[:, STATIC]
        for i, held in enumerate(self.held[stage], 1):
            sums[:, memory + i] += held.until_b[chunk] * added[:, UNTIL_B] + held.until_w[chunk] * added[:, UNTIL_W]
        transient = self.at[stage + 1] - 1
        sums[:, transient] = np.maximum(sums[:, transient], added[:, TRANSIENT])
        if last >= 0:
            move, before = self.outer.transfer[last][own.first], self.at[(stage - 1) % self.outer.p]
            for column, ns in ((before + 3 * v + 1, move.forward_ns), (base + 3 * v + 2, move.backward_ns)):
                sums[:, column] = np.maximum(sums[:, column], ns)
        return sums, rows, picked

    def _promising(self, sums: Ints, stage: int, end: int, below: int) -> npt.NDArray[np.bool_]:
        """Rows that fit and whose paths leave room below the incumbent, as does the mean of all stages' work."""
        base, v, m, p = self.at[stage], self.outer.v, self.outer.m, self.outer.p
        memory = base + 3 * v + 3
        peak = sums[:, memory + 1:self.at[stage + 1] - 1].max(axis=1)
        transient = sums[:, self.at[stage + 1] - 1]
        fits = sums[:, memory] + peak + transient <= self.tables.problem.capacity_bytes
        total = sum(sums[:, self.at[s]:self.at[s] + 3 * v].sum(axis=1) for s in range(p))
        mean = m * (total + self.work_left[end]) < below * p
        promising: npt.NDArray[np.bool_] = fits & mean & (self._bounds(sums, end) < below)
        return promising

    def _pruned(self, reached: dict[_Key, list[_States]]) -> dict[_Key, _States]:
        states: dict[_Key, _States] = {}
        for key, parts in reached.items():
            values = np.concatenate([s.values for s in parts])
            kept = self.fronts.undominated(values)
            states[key] = _States(values[kept], np.concatenate([s.nodes for s in parts])[kept],
                                  np.concatenate([s.ends for s in parts])[kept])
        return states

    def _best(self, states: dict[_Key, _States], below: int) -> tuple[int, Plan] | None:
        """The fastest complete state; J is computed where the busiest stage alone does not rule it out."""
        found: tuple[int, Plan] | None = None
        for state in states.values():
            bounds = self._bounds(state.values, len(self.layers))
            for row in np.argsort(bounds, kind="stable"):
                if bounds[row] >= below:
                    break
                step_ns = steady_state_time_ns(self.outer.order, self._costs(state.values[row]))
                if step_ns < below:
                    below, found = step_ns, (step_ns, self._plan(state, int(row)))
        return found

    def _bounds(self, values: Ints, end: int) -> Ints:
        """Paths through every stage, the first `end` layers decided: what comes before it and all it does; that, and
        the way back; one micro-batch around the whole pipeline, and what the stage then has left."""
        v, m, p, split = self.outer.v, self.outer.m, self.outer.p, self.outer.order.splits_backward
        stages = [(values[:, b:b + v], values[:, b + v:b + 2 * v], values[:, b + 2 * v:b + 3 * v], values[:, b + 3 * v],
                   values[:, b + 3 * v + 1], values[:, b + 3 * v + 2]) for b in self.at[:-1]]
        arrived = returned = np.zeros(len(values), np.int64)
        around = arrived + self.turn_left[end]
        for forward, backward, _, _, send, send_back in stages:
            around = around + forward[:, 0] + backward[:, 0] + send + send_back
        last = stages[0][3] + stages[0][2][:, 0]
        bounds = np.zeros(len(values), np.int64)
        for s, (forward, backward, weight, tail, send, _) in enumerate(stages):
            turn = m * (forward + backward).sum(axis=1)
            again = m - 1 if self.outer.schedule == "gpipe" else max(0, m - p + s)
            put_off = max(0, m - s - 1) * weight.sum(axis=1) if split else 0
            paths = [arrived + turn + m * weight.sum(axis=1) + tail, arrived + returned + turn + put_off + last]
            if v == 1:
                paths.append(around + (m - 1) * backward[:, 0] + again * forward[:, 0] + last)
            bounds = np.maximum(bounds, np.max(np.stack(paths), axis=0))
            arrived = arrived + forward[:, 0] + send
            returned = returned + backward[:, 0] + (stages[s + 1][5] if s + 1 < p else 0)
        return bounds

    def _costs(self, row: Ints) -> list[StageCosts]:
        v, found = self.outer.v, []
        for base in self.at[:-1]:
            forward, backward, weight = (tuple(map(int, row[base + i * v:base + (i + 1) * v])) for i in range(3))
            tail, send, send_back = map(int, row[base + 3 * v:base + 3 * v + 3])
            found.append(StageCosts(forward, backward, weight, send, send_back, tail))
        return found

    def _plan(self, state: _States, row: int) -> Plan:
        ends = tuple(map(int, state.ends[row]))
        options = [o for node, (a, b) in zip(state.nodes[row], pairwise((0, *ends)), strict=True)
                   for o in self.fronts.history.options(int(node), self.layers[a:b])]
        return Plan(outer=self.index, ends=ends, options=tuple(options))
