"""Whose activations a stage holds: counts from a schedule's order, their closed forms, and the peak in bytes.

A forward's activations exist from its start. Part of them is released at the end of B; what W reads (the inputs of
matrix products) at the end of W, which is the same moment where B stands for both gradients. A stage runs one
operation after the other, so its peak follows from the order alone, whatever the costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import mul
from typing import Literal, NamedTuple

from .schedules import Schedule, stage_order, warm_up

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


@lru_cache(maxsize=1 << 16)
def held_at_peaks(schedule: Schedule, stage: int) -> tuple[Held, ...]:
    """The counts held at the moments that can be a stage's peak, whatever its chunks hold.

    Right after a forward most is held, and from the last forward ahead on each brings one more of one chunk while a
    backward took one of another: between the forwards at which either chunk changes, counts move on a straight line,
    so what they weigh is largest at one of its ends. Orders repeat after the warm-up: three times p micro-batches show
    every moment."""
    p, v, m = schedule.stages, schedule.chunks, schedule.micro_batches
    ahead = warm_up(schedule, stage)
    if v == 1:
        until_b = min(m, ahead + 1)
        return (Held((until_b,), (min(m, p) if schedule.splits_backward else until_b,)),)
    last = min(m, 3 * p) * v
    first = min(last, ahead + 1)
    ends = {first, last, *range(first - first % -p, last, p), *range(first, last, p)}
    moments: dict[Held, None] = {}
    for forwards in sorted(ends):
        done = _per_chunk(schedule, max(0, forwards - ahead - 1))[::-1]
        held = tuple(a - b for a, b in zip(_per_chunk(schedule, forwards), done, strict=True))
        moments[Held(held, held)] = None
    return tuple(moments)


def _per_chunk(schedule: Schedule, count: int) -> list[int]:
    """Of the first `count` forwards of a stage, how many belong to each chunk (of backwards: last chunk first)."""
    p, v = schedule.stages, schedule.chunks
    rounds, rest = divmod(count, p * v)
    return [rounds * p + min(p, max(0, rest - chunk * p)) for chunk in range(v)]


def peak_activation_bytes(schedule: Schedule, stage: int, until_b_bytes: Sequence[int],
                          until_w_bytes: Sequence[int]) -> int:
    """The most bytes of saved activations on a stage, given those of one micro-batch for each of its chunks: the part
    that B releases and the part that W releases. Raises `ValueError` unless both name every chunk."""
    if len(until_b_bytes) != schedule.chunks or len(until_w_bytes) != schedule.chunks:
        raise ValueError(f"expected activation bytes for {schedule.chunks} chunk(s), got {len(until_b_bytes)} and "
                         f"{len(until_w_bytes)}")
    found = 0
    for held in held_at_peaks(schedule, stage):
        total: int = sum(map(mul, held.until_b, until_b_bytes))
        found = max(found, total + sum(map(mul, held.until_w, until_w_bytes)))
    return found
