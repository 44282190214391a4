"""Pipeline schedules: in which order each stage runs its forwards and backwards, and what it holds meanwhile.

A pipeline has p stages (ranks) of v model chunks each; chunk c of stage s is the c·p + s-th part of the model. A
micro-batch goes forward (F) through all parts in order, then backward: B is the gradient of the input, which the part
before waits for, W the gradient of the weights, for which nobody waits. Only zero-bubble schedules run W on its own;
elsewhere B stands for both.

An order is static: a stage runs its operations one after the other as listed and waits where an input is missing.
`stage_order` writes the orders down, `first_violation` checks any order, `cost_model/pipeline.py` prices them.

    gpipe        Huang et al., "GPipe", NeurIPS 2019; backwards in the order of the forwards, as torch runs them
    1f1b         Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", ICML 2021 (PipeDream-Flush)
    interleaved  Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", SC 2021; the order
                 and the rule that p divides m are Megatron-LM's
    zb-h1        Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

Kind = Literal["F", "B", "W"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1"]


class Op(NamedTuple):
    """One operation of a stage: its kind, the stage's own chunk (0 to v-1), the micro-batch (0 to m-1)."""

    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch}, chunk {self.chunk}"


Order = tuple[Op, ...]


@dataclass(frozen=True)
class Schedule:
    """A named schedule with its sizes. Raises `ValueError` for sizes that the schedule does not allow: `chunks` above
    1 belong to "interleaved" and only there, and then `stages` must divide `micro_batches`."""

    name: ScheduleName
    stages: int
    micro_batches: int
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ValueError(f"unknown schedule {self.name!r}, expected one of {', '.join(get_args(ScheduleName))}")
        if min(self.stages, self.micro_batches, self.chunks) < 1:
            raise ValueError(f"schedule {self.name}: expected at least 1 stage, micro-batch and chunk, got "
                             f"{self.stages}, {self.micro_batches}, {self.chunks}")
        if (self.chunks > 1) != (self.name == "interleaved"):
            raise ValueError(f"schedule {self.name}: {self.chunks} chunk(s) per stage; expected "
                             f"{'at least 2' if self.name == 'interleaved' else '1'}")
        if self.name == "interleaved" and self.micro_batches % self.stages:
            raise ValueError(f"schedule interleaved: {self.micro_batches} micro-batches are no multiple of "
                             f"{self.stages} stages; change one of them, or take 1f1b")

    @property
    def splits_backward(self) -> bool:
        """Whether W runs on its own; otherwise B stands for both gradients."""
        return self.name == "zb-h1"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("F", "B", "W") if self.splits_backward else ("F", "B")


def warm_up(schedule: Schedule, stage: int) -> int:
    """How many forwards (of any chunk) a stage runs ahead, before forwards and backwards take turns."""
    p, v, m = schedule.stages, schedule.chunks, schedule.micro_batches
    ahead = {"gpipe": m, "1f1b": p - stage - 1, "zb-h1": p - stage - 1,
             "interleaved": 2 * (p - stage - 1) + (v - 1) * p}
    return min(m * v, ahead[schedule.name])


def stage_order(schedule: Schedule, stage: int) -> Iterator[Op]:
    """The operations of one stage, in the order in which it runs them."""
    _check_stage(schedule, stage)
    if schedule.name == "zb-h1":
        return _zero_bubble_h1(schedule, stage)
    return _one_forward_one_backward(schedule, stage)


def orders(schedule: Schedule) -> tuple[Order, ...]:
    """The order of every stage."""
    return tuple(tuple(stage_order(schedule, stage)) for stage in range(schedule.stages))


def _one_forward_one_backward(schedule: Schedule, stage: int) -> Iterator[Op]:
    """Some forwards ahead, then a forward and a backward in turn, then the backwards that are left. The schedules
    differ in how many forwards go ahead: GPipe runs all."""
    forwards, backwards = _forwards(schedule), _backwards(schedule)
    for _ in range(warm_up(schedule, stage)):
        yield next(forwards)
    for forward in forwards:
        yield forward
        yield next(backwards)
    yield from backwards


def _forwards(schedule: Schedule) -> Iterator[Op]:
    """Interleaved: p micro-batches go through chunk 0, the same ones through chunk 1, and so on; then the next p."""
    p, v, m = schedule.stages, schedule.chunks, schedule.micro_batches
    group = p if v > 1 else m
    for first in range(0, m, group):
        for chunk in range(v):
            for micro_batch in range(first, first + group):
                yield Op("F", chunk, micro_batch)


def _backwards(schedule: Schedule) -> Iterator[Op]:
    """As the forwards, the last chunk first."""
    return (Op("B", schedule.chunks - 1 - chunk, micro_batch) for _, chunk, micro_batch in _forwards(schedule))


def _zero_bubble_h1(schedule: Schedule, stage: int) -> Iterator[Op]:
    """1F1B with the weight gradients of stage s put off by s micro-batches: every stage then holds the activations of p
    micro-batches, which is what stage 0 holds in 1F1B, and the put-off work fills the end of the step."""
    without_w = _one_forward_one_backward(replace(schedule, name="1f1b"), stage)
    for op in without_w:
        yield op
        if op.kind == "B" and op.micro_batch >= stage:
            yield Op("W", 0, op.micro_batch - stage)
    for micro_batch in range(max(0, schedule.micro_batches - stage), schedule.micro_batches):
        yield Op("W", 0, micro_batch)


def awaited(schedule: Schedule, stage: int, op: Op) -> tuple[int, Op] | None:
    """The stage and operation whose result `op` waits for from another part of the model; None when it waits for
    nothing but its own stage."""
    p, v = schedule.stages, schedule.chunks
    part = op.chunk * p + stage
    if op.kind == "F" and part > 0:
        return (part - 1) % p, op._replace(chunk=(part - 1) // p)
    if op.kind == "B" and part < p * v - 1:
        return (part + 1) % p, op._replace(chunk=(part + 1) // p)
    return None


def first_violation(schedule: Schedule, candidate: Sequence[Sequence[Op]]) -> str | None:
    """What is wrong first with an order of every stage, or None: an operation missing, unknown or repeated, a backward
    before its forward or a weight gradient before its input gradient, or stages that wait for one another for ever."""
    if len(candidate) != schedule.stages:
        return f"expected an order for each of {schedule.stages} stages, got {len(candidate)}"
    for stage, order in enumerate(candidate):
        fault = _fault_in_stage(schedule, order)
        if fault:
            return f"stage {stage}: {fault}"
    return _first_deadlock(schedule, candidate)


def _fault_in_stage(schedule: Schedule, order: Sequence[Op]) -> str | None:
    before: dict[Kind, Kind] = {"B": "F", "W": "B"}
    expected = {Op(k, c, i) for k in schedule.kinds for c in range(schedule.chunks)
                for i in range(schedule.micro_batches)}
    seen: set[Op] = set()
    for op in order:
        if op not in expected:
            return f"{op} is no operation of this schedule"
        if op in seen:
            return f"{op} runs twice"
        if op.kind in before and op._replace(kind=before[op.kind]) not in seen:
            return f"{op} runs before {op._replace(kind=before[op.kind])}"
        seen.add(op)
    missing = sorted(expected - seen, key=lambda op: (op.micro_batch, op.chunk, op.kind))
    return f"{missing[0]} is missing" if missing else None


def _first_deadlock(schedule: Schedule, candidate: Sequence[Sequence[Op]]) -> str | None:
    """Runs the orders without looking at time; reports the first stage that can't go on."""
    done: set[tuple[int, Op]] = set()
    position = [0] * schedule.stages
    progress = True
    while progress:
        progress = False
        for stage, order in enumerate(candidate):
            while position[stage] < len(order):
                op = order[position[stage]]
                needed = awaited(schedule, stage, op)
                if needed and needed not in done:
                    break
                done.add((stage, op))
                position[stage] += 1
                progress = True
    for stage, order in enumerate(candidate):
        if position[stage] < len(order):
            op = order[position[stage]]
            needed = awaited(schedule, stage, op)
            assert needed is not None
            return f"stage {stage}: {op} waits for {needed[1]} on stage {needed[0]}, which never runs"
    return None


def _check_stage(schedule: Schedule, stage: int) -> None:
    if not 0 <= stage < schedule.stages:
        raise ValueError(f"schedule {schedule.name}: stage {stage}, expected 0 to {schedule.stages - 1}")
