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

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import neg

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
        forward = [c.forward_ns for c in costs]
        backward = [c.backward_ns(schedule.splits_backward) for c in costs]
        received = [costs[s - 1].send_forward_ns for s in range(p)]
        returned = [costs[s + 1 - p].send_backward_ns for s in range(p)]
        self.forward_rows, self.backward_rows = [], []
        for phase in range(self.round):
            chunks = [(phase - first) // p % v for first in self.forward_start]
            waits = received.copy()
            if chunks[0] == 0:
                waits[0] = _NEVER
            self.forward_rows.append((waits, [own[c] for own, c in zip(forward, chunks, strict=True)]))
            chunks = [v - 1 - (phase - first) // p % v for first in self.backward_start]
            waits = returned.copy()
            if chunks[-1] == v - 1:
                waits[-1] = _NEVER
            self.backward_rows.append((waits, [own[c] for own, c in zip(backward, chunks, strict=True)]))

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
        """Runs step t on every stage that still has, or already has, something to do in it: stages side by side."""
        end, p, last = self.end, self.stages, self.count - 1
        low, high = bisect_left(self.forward_start, t - last), bisect_right(self.forward_start, t)
        if low < high:
            transfers, durations = self.forward_rows[t % self.round]
            before = [self.forward[low - 1], *self.forward[low:high - 1]]
            self.forward[low:high] = end[low:high] = [
                (a + b if a + b > c else c) + d for a, b, c, d in zip(
                    before, transfers[low:high], end[low:high], durations[low:high], strict=True)]
        transfers, durations = self.backward_rows[t % self.round]
        if self.lockstep:
            backward = self.backward
            low, high = bisect_left(self.backward_start, t - last), bisect_right(self.backward_start, t)
            arrived = backward[high] if high < p else _NEVER
            for s in range(high - 1, low - 1, -1):
                start = arrived + transfers[s]
                arrived = backward[s] = end[s] = (start if start > end[s] else end[s]) + durations[s]
        else:
            low = bisect_left(self.backward_start, -t, key=neg)  # stage 0 starts last
            high = bisect_right(self.backward_start, last - t, key=neg)
            if low < high:
                behind = [*self.backward[low + 1:high], self.backward[high % p]]
                self.backward[low:high] = end[low:high] = [
                    (a + b if a + b > c else c) + d for a, b, c, d in zip(
                        behind, transfers[low:high], end[low:high], durations[low:high], strict=True)]
        if self.weight_ns:
            for s in range(bisect_left(self.weight_start, t - last), bisect_right(self.weight_start, t)):
                end[s] += self.weight_ns[s]

    def _shape(self) -> tuple[tuple[int, ...], int]:
        """The end times relative to the last stage's, and the last stage's."""
        base = self.end[-1]
        return tuple([x - base for x in (*self.forward, *self.backward, *self.end)]), base

    def _shift(self, by: int) -> None:
        for times in (self.forward, self.backward, self.end):
            times[:] = [x + by for x in times]
