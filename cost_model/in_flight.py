"""Whose activations a stage holds: counts from a schedule's order, their closed forms, and the peak in bytes.

A forward's activations exist from its start. Part of them is released at the end of B; what W reads (the inputs of
matrix products) at the end of W, which is the same moment where B stands for both gradients. A stage runs one
operation after the other, so its peak follows from the order alone, whatever the costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from .schedules import Op, Schedule, stage_order, warm_up

Release = Literal["B", "W"]


class Held(NamedTuple):
    """Micro-batches whose activations are held at one moment, per chunk: of the part released by B, of that by W."""

    until_b: tuple[int, ...]
    until_w: tuple[int, ...]


def in_flight(schedule: Schedule, stage: int, chunk: int | None = None, until: Release = "B") -> int:
    """The most micro-batches (of one chunk, or chunk activations of all) that a stage holds, counted by its order."""
    if not schedule.splits_backward:
        until = "B"
    held = peak = 0
    for op in stage_order(schedule, stage):
        if chunk in (None, op.chunk):
            held += (op.kind == "F") - (op.kind == until)
            peak = max(peak, held)
    return peak


def closed_in_flight(schedule: Schedule, stage: int, chunk: int | None = None, until: Release = "B") -> int:
    """`in_flight` without walking the order: GPipe m; 1F1B min(m, p - s); interleaved min(m·v, 2(p-s-1) + (v-1)p + 1)
    over all chunks; zero-bubble H1 min(m, p - s) until B and min(m, p) until W (p·M_B at most on every stage: Table 2
    of the paper)."""
    total = schedule.micro_batches * schedule.chunks
    if schedule.chunks > 1 and chunk is not None:
        return _closed_chunk(schedule, stage, chunk)
    if schedule.splits_backward and until == "W":
        return min(total, schedule.stages)
    return min(total, warm_up(schedule, stage) + 1)


def _closed_chunk(schedule: Schedule, stage: int, chunk: int) -> int:
    """Interleaved: the count of a chunk rises while p of its forwards run and is largest after the last of them. With n
    forwards done before the next backward, the backwards done are n - warm-up - 1."""
    p, v = schedule.stages, schedule.chunks
    groups = schedule.micro_batches // p
    peak = 0
    for group in range(min(groups, 3)):  # warm-up spans less than two groups; later groups repeat the third
        forwards = (group * v + chunk + 1) * p
        backwards = max(0, forwards - warm_up(schedule, stage) - 1)
        full, rest = divmod(backwards, p * v)
        done = full * p + min(p, max(0, rest - (v - 1 - chunk) * p))
        peak = max(peak, (group + 1) * p - done)
    return peak


@lru_cache(maxsize=4096)
def held_at_peaks(schedule: Schedule, stage: int) -> tuple[Held, ...]:
    """The counts held at the moments that can be a stage's peak: those that no other moment exceeds in every count.

    Takes no longer for more micro-batches: orders repeat after the warm-up, so three times p show every moment."""
    if schedule.name == "gpipe":
        return (Held((schedule.micro_batches,), (schedule.micro_batches,)),)
    return _held_at_peaks(replace(schedule, micro_batches=min(schedule.micro_batches, 3 * schedule.stages)), stage)


@lru_cache(maxsize=1 << 15)
def _held_at_peaks(few: Schedule, stage: int) -> tuple[Held, ...]:
    until_b, until_w = [0] * few.chunks, [0] * few.chunks
    moments: dict[Held, None] = {}
    ahead = warm_up(few, stage)  # forwards before the first backward: the last of them holds most
    for number, op in enumerate(stage_order(few, stage)):
        _count(op, until_b, until_w, few.splits_backward)
        if op.kind == "F" and number >= ahead - 1:
            moments[Held(tuple(until_b), tuple(until_w))] = None
    largest: list[Held] = []  # what covers another moment holds more in all, and comes before it in this order
    for moment in sorted(moments, key=lambda held: -sum(held.until_b) - sum(held.until_w)):
        if not any(_covers(other, moment) for other in largest):
            largest.append(moment)
    return tuple(moment for moment in moments if moment in largest)


def peak_activation_bytes(schedule: Schedule, stage: int, until_b_bytes: Sequence[int],
                          until_w_bytes: Sequence[int]) -> int:
    """The most bytes of saved activations on a stage, given those of one micro-batch for each of its chunks: the part
    that B releases and the part that W releases. Raises `ValueError` unless both name every chunk."""
    if len(until_b_bytes) != schedule.chunks or len(until_w_bytes) != schedule.chunks:
        raise ValueError(f"expected activation bytes for {schedule.chunks} chunk(s), got {len(until_b_bytes)} and "
                         f"{len(until_w_bytes)}")
    return max(sum(n * size for n, size in zip(held.until_b, until_b_bytes, strict=True))
               + sum(n * size for n, size in zip(held.until_w, until_w_bytes, strict=True))
               for held in held_at_peaks(schedule, stage))


def _count(op: Op, until_b: list[int], until_w: list[int], splits_backward: bool) -> None:
    until_b[op.chunk] += (op.kind == "F") - (op.kind == "B")
    until_w[op.chunk] += (op.kind == "F") - (op.kind == ("W" if splits_backward else "B"))


def _covers(a: Held, b: Held) -> bool:
    return all(x >= y for x, y in zip(a.until_b + a.until_w, b.until_b + b.until_w, strict=True))
