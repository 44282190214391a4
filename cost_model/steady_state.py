"""The step time of a schedule without simulating every micro-batch: equal to `pipeline.simulate`, in integers.

GPipe has a closed form: a pipeline whose parts take the same time for every micro-batch is a flow shop, in which the
slowest part is paid for every micro-batch and the others once.

The others have none for uneven stages: the longest path zigzags between stages. But their orders are regular. In
*steps* t = 0, 1, … the n-th forward of stage s belongs to step n + s, the n-th backward to

    1f1b, zb-h1   step n + p - 1                      (waits for a forward of step t - 1, a backward of step t)
    interleaved   step n + (p - 1 - s) + (v·p - 1)    (waits for a backward of step t - 1)

and the n-th weight gradient to step n + s + p - 1; in a step a stage runs its forward, then its backward, then its
weight gradient. So a step is a map of maxima and sums from the last end times to the next, and between warm-up and
cool-down it is the same map in every step (interleaved: in every p·v steps, a round). Such a map commutes with adding a
constant to all times. When the end times after two rounds differ by one constant, every later pair of rounds that far
apart does too, and whole periods may be skipped *exactly*. All stages wait for one another, so this always happens some
day (Baccelli, Cohen, Olsder, Quadrat, "Synchronization and Linearity", 1992, Theorem 3.112), mostly after a few rounds.
Where two stages are almost equally slow it can take until m; then every step is walked, and the result is as exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from .pipeline import StageCosts, check_costs
from .schedules import Schedule

_NEVER = -(1 << 80)  # "waits for nothing": an arrival before every other time, as an integer


def steady_state_time_ns(schedule: Schedule, costs: Sequence[StageCosts]) -> int:
    """`simulate(schedule, costs).makespan_ns`. Raises `ValueError` when the costs don't fit the schedule."""
    return max(stage_ends_ns(schedule, costs))


def stage_ends_ns(schedule: Schedule, costs: Sequence[StageCosts]) -> tuple[int, ...]:
    """`simulate(schedule, costs).stage_end_ns`: when each stage has updated its weights."""
    check_costs(schedule, costs)
    ends = _gpipe_ends(schedule, costs) if schedule.name == "gpipe" else _Walk(schedule, costs).ends()
    return tuple(end + c.tail_ns for end, c in zip(ends, costs, strict=True))


def _gpipe_ends(schedule: Schedule, costs: Sequence[StageCosts]) -> list[int]:
    """Forwards reach the last stage, then backwards return; a stage is done with its m-th backward."""
    again = schedule.micro_batches - 1
    forward = [c.forward_ns[0] for c in costs]
    backward = [c.backward_ns(False)[0] for c in reversed(costs)]
    turn = sum(forward) + sum(c.send_forward_ns for c in costs[:-1]) + again * max(forward)
    returned = accumulate(backward)
    sent = accumulate((c.send_backward_ns for c in reversed(costs[1:])), initial=0)
    slowest = accumulate(backward, max)
    ends = [turn + a + b + again * c for a, b, c in zip(returned, sent, slowest, strict=True)]
    return ends[::-1]


class _Walk:
    """End times after a step: of each stage's last forward, last backward and last operation."""

    def __init__(self, schedule: Schedule, costs: Sequence[StageCosts]) -> None:
        p, v = schedule.stages, schedule.chunks
        self.stages, self.count = p, schedule.micro_batches * v
        self.lockstep = v == 1  # a backward waits for one of the same step
        self.round = 1 if self.lockstep else p * v
        self.forward, self.backward, self.end = [0] * p, [0] * p, [0] * p
        self.forward_start = list(range(p))
        self.backward_start = [p - 1] * p if self.lockstep else [p - 1 - s + v * p - 1 for s in range(p)]
        self.weight_start = [s + p - 1 for s in range(p)]
        self.weight_ns = [c.weight_gradient_ns[0] for c in costs] if schedule.splits_backward else []
        self.forward_rows = [self._row(schedule, costs, phase, forward=True) for phase in range(self.round)]
        self.backward_rows = [self._row(schedule, costs, phase, forward=False) for phase in range(self.round)]

    def _row(self, schedule: Schedule, costs: Sequence[StageCosts], phase: int,
             forward: bool) -> list[tuple[int, int]]:
        """(transfer before, duration) for every stage in a step t with t mod round = phase."""
        p, v = schedule.stages, schedule.chunks
        row = []
        for s, c in enumerate(costs):
            if forward:
                chunk = (phase - self.forward_start[s]) // p % v
                waits, sender = (s, chunk) != (0, 0), costs[s - 1].send_forward_ns
                duration = c.forward_ns[chunk]
            else:
                chunk = v - 1 - (phase - self.backward_start[s]) // p % v
                waits, sender = (s, chunk) != (p - 1, v - 1), costs[s + 1 - p].send_backward_ns
                duration = c.backward_ns(schedule.splits_backward)[chunk]
            row.append((sender if waits else _NEVER, duration))
        return row

    def ends(self) -> list[int]:
        """Walks all steps, skipping whole periods between warm-up and cool-down."""
        starts = [*self.forward_start, *self.backward_start, *(self.weight_start if self.weight_ns else [])]
        regular, cool_down, stop = max(starts), self.count + min(starts), self.count + max(starts)
        seen: dict[tuple[int, ...], tuple[int, int]] | None = {}
        t = 0
        while t < stop:
            self.step(t)
            if seen is not None and regular <= t < cool_down and t % self.round == 0:
                key, base = self._shape()
                then, base_then = seen.setdefault(key, (t, base))
                if then != t:
                    periods = (cool_down - 1 - t) // (t - then)
                    self._shift(periods * (base - base_then))
                    t += periods * (t - then)
                    seen = None
            t += 1
        return self.end

    def step(self, t: int) -> None:
        """Runs step t on every stage that still has, or already has, something to do in it."""
        end, row, before = self.end, self.forward_rows[t % self.round], self.forward.copy()
        for s in self._active(self.forward_start, t):
            transfer, duration = row[s]
            start = before[s - 1] + transfer
            self.forward[s] = end[s] = (start if start > end[s] else end[s]) + duration
        row, before = self.backward_rows[t % self.round], self.backward if self.lockstep else self.backward.copy()
        for s in self._active(self.backward_start, t)[::-1]:
            transfer, duration = row[s]
            start = before[s + 1 - self.stages] + transfer
            self.backward[s] = end[s] = (start if start > end[s] else end[s]) + duration
        if self.weight_ns:
            for s in self._active(self.weight_start, t):
                end[s] += self.weight_ns[s]

    def _active(self, starts: list[int], t: int) -> Sequence[int]:
        if starts[0] <= t < starts[0] + self.count and starts[-1] <= t < starts[-1] + self.count:
            return range(self.stages)
        return [s for s, first in enumerate(starts) if first <= t < first + self.count]

    def _shape(self) -> tuple[tuple[int, ...], int]:
        """The end times relative to the last stage's, and the last stage's."""
        base = self.end[-1]
        return tuple([x - base for x in (*self.forward, *self.backward, *self.end)]), base

    def _shift(self, by: int) -> None:
        for times in (self.forward, self.backward, self.end):
            times[:] = [x + by for x in times]
