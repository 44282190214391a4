"""One training step of a pipeline: the longest path through a schedule's static order.

    start(op) = max(end of the operation before it on its stage, end of what it waits for + transfer)
    step      = max over stages (end of the last operation + sync + optimizer)

Only maxima and sums of costs: raising any cost never makes a step shorter (a greedy scheduler has no such promise,
Graham 1966). Transfers delay the receiver and occupy nobody; contention belongs into the costs. Everything is in
integer nanoseconds. `simulate` visits every operation; `cost_model/steady_state.py` gives the same step time without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .schedules import Op, Order, Schedule, awaited, first_violation, orders


@dataclass(frozen=True)
class StageCosts:
    """What one stage takes, in nanoseconds: per micro-batch and chunk the forward and the two gradients, per transfer
    to the next and to the previous stage (the last stage's next is the first one, which matters with several chunks),
    and once, at its end, gradient synchronisation and optimizer. Raises `ValueError` for negative or fractional numbers
    and when the three lists differ in length."""

    forward_ns: tuple[int, ...]
    input_gradient_ns: tuple[int, ...]
    weight_gradient_ns: tuple[int, ...]
    send_forward_ns: int = 0
    send_backward_ns: int = 0
    sync_ns: int = 0
    optimizer_ns: int = 0

    def __post_init__(self) -> None:
        per_chunk = (self.forward_ns, self.input_gradient_ns, self.weight_gradient_ns)
        if len({len(costs) for costs in per_chunk}) != 1:
            raise ValueError(f"stage costs: expected one number per chunk in each list, got {per_chunk}")
        numbers = (*sum(per_chunk, ()), self.send_forward_ns, self.send_backward_ns, self.sync_ns, self.optimizer_ns)
        bad = [x for x in numbers if not isinstance(x, int) or isinstance(x, bool) or x < 0]
        if bad:
            raise ValueError(f"stage costs: expected integer nanoseconds of at least 0, got {bad[0]!r}")

    @property
    def tail_ns(self) -> int:
        return self.sync_ns + self.optimizer_ns

    def backward_ns(self, splits_backward: bool) -> tuple[int, ...]:
        """Duration of B per chunk: the input gradient, and with it the weight gradient where W does not run alone."""
        if splits_backward:
            return self.input_gradient_ns
        return tuple(a + b for a, b in zip(self.input_gradient_ns, self.weight_gradient_ns, strict=True))

    def busy_ns(self, micro_batches: int) -> int:
        """Time in which the stage does not wait: all its micro-batches and its tail."""
        return micro_batches * sum(map(sum, (self.forward_ns, self.input_gradient_ns, self.weight_gradient_ns))
                                   ) + self.tail_ns


class Event(NamedTuple):
    """An operation on the time line."""

    op: Op
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class Timeline:
    """A step: the events of every stage in the order they ran, and the costs they came from."""

    schedule: Schedule
    costs: tuple[StageCosts, ...]
    events: tuple[tuple[Event, ...], ...]

    @property
    def stage_end_ns(self) -> tuple[int, ...]:
        """When each stage has updated its weights."""
        return tuple(events[-1].end_ns + c.tail_ns for events, c in zip(self.events, self.costs, strict=True))

    @property
    def makespan_ns(self) -> int:
        """From the first operation to the last optimizer."""
        return max(self.stage_end_ns)

    @property
    def bubble_ns(self) -> tuple[int, ...]:
        """How long each stage idles within the step."""
        return tuple(self.makespan_ns - c.busy_ns(self.schedule.micro_batches) for c in self.costs)

    def activation_curve(self, stage: int, until_b_bytes: Sequence[int],
                         until_w_bytes: Sequence[int]) -> list[tuple[int, int]]:
        """(time in ns, bytes of activations held from then on) at every change on a stage; sizes are per chunk, as in
        `in_flight.peak_activation_bytes`, which is the maximum of this curve."""
        held, curve = 0, []
        for op, start_ns, end_ns in self.events[stage]:
            if op.kind == "F":
                held += until_b_bytes[op.chunk] + until_w_bytes[op.chunk]
                curve.append((start_ns, held))
                continue
            held -= until_b_bytes[op.chunk] if op.kind == "B" else 0
            held -= until_w_bytes[op.chunk] if op.kind == "W" or not self.schedule.splits_backward else 0
            curve.append((end_ns, held))
        return curve

    def chrome_trace(self) -> list[dict[str, Any]]:
        """Events for chrome://tracing or Perfetto, a thread per stage; their times are in microseconds."""
        return [record for stage in range(len(self.events)) for record in self._stage_trace(stage)]

    def _stage_trace(self, stage: int) -> Iterator[dict[str, Any]]:
        thread = {"pid": 0, "tid": stage}
        yield {"ph": "M", "name": "thread_name", "args": {"name": f"stage {stage}"}, **thread}
        for op, start_ns, end_ns in self.events[stage]:
            yield {"ph": "X", "name": f"{op.kind}{op.micro_batch}", "cat": op.kind, "ts": start_ns / 1000,
                   "dur": (end_ns - start_ns) / 1000, "args": op._asdict(), **thread}
        at_ns = self.events[stage][-1].end_ns
        for name, duration_ns in (("sync", self.costs[stage].sync_ns), ("optimizer", self.costs[stage].optimizer_ns)):
            if duration_ns:
                yield {"ph": "X", "name": name, "cat": name, "ts": at_ns / 1000, "dur": duration_ns / 1000, **thread}
            at_ns += duration_ns


def simulate(schedule: Schedule, costs: Sequence[StageCosts], candidate: Sequence[Order] | None = None) -> Timeline:
    """The time line of one step. `candidate` replaces the schedule's own orders. Raises `ValueError` when the costs
    don't fit the schedule or the candidate is no valid order, naming what is wrong first."""
    check_costs(schedule, costs)
    fault = first_violation(schedule, candidate) if candidate is not None else None
    if fault:
        raise ValueError(f"schedule {schedule.name}: {fault}")
    chosen = candidate if candidate is not None else orders(schedule)
    ends: dict[tuple[int, Op], int] = {}
    events: tuple[list[Event], ...] = tuple([] for _ in chosen)
    while any(len(done) < len(order) for done, order in zip(events, chosen, strict=True)):
        for stage, order in enumerate(chosen):
            _run_until_blocked(schedule, costs, stage, order, events[stage], ends)
    return Timeline(schedule, tuple(costs), tuple(map(tuple, events)))


def _run_until_blocked(schedule: Schedule, costs: Sequence[StageCosts], stage: int, order: Order, done: list[Event],
                       ends: dict[tuple[int, Op], int]) -> None:
    duration = _durations(costs[stage], schedule.splits_backward)
    while len(done) < len(order):
        op = order[len(done)]
        start = done[-1].end_ns if done else 0
        needed = awaited(schedule, stage, op)
        if needed:
            if needed not in ends:
                return
            sender = costs[needed[0]]
            start = max(start, ends[needed] + (sender.send_forward_ns if op.kind == "F" else sender.send_backward_ns))
        done.append(Event(op, start, start + duration[op.kind][op.chunk]))
        ends[stage, op] = done[-1].end_ns


def _durations(costs: StageCosts, splits_backward: bool) -> dict[str, tuple[int, ...]]:
    return {"F": costs.forward_ns, "B": costs.backward_ns(splits_backward), "W": costs.weight_gradient_ns}


def check_costs(schedule: Schedule, costs: Sequence[StageCosts]) -> None:
    """Raises `ValueError` unless there are costs for every stage and chunk."""
    if len(costs) != schedule.stages:
        raise ValueError(f"schedule {schedule.name}: expected costs of {schedule.stages} stages, got {len(costs)}")
    for stage, c in enumerate(costs):
        if len(c.forward_ns) != schedule.chunks:
            raise ValueError(f"schedule {schedule.name}: expected costs of {schedule.chunks} chunk(s) on stage "
                             f"{stage}, got {len(c.forward_ns)}")
