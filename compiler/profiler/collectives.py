"""Several ranks: collectives over message sizes, and how much products and an all-reduce slow each other down.

Everything goes through `torch.distributed`: gloo on a CPU, NCCL on a GPU. A collective that a backend does not have is
left out; every rank finds that out at the same place, before anything was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist

from ...cost_model.machine_profile import CollectiveName, CollectivePoint, Dtype, Level, OverlapPoint
from .clock import Clock

KIB, MIB = 1 << 10, 1 << 20
CPU_SIZES = (KIB, 16 * KIB, 128 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
GPU_SIZES = (KIB, 32 * KIB, 256 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)
OVERLAP_SIZES = {"cpu": (4 * MIB, 16 * MIB), "cuda": (64 * MIB, 256 * MIB)}
OVERLAP_PRODUCT = {"cpu": 512, "cuda": 4096}
LONGER = 1.5  # products beside an all-reduce last this much longer than it


def sizes_for(device: str, quick: bool) -> tuple[int, ...]:
    """Message sizes; a quick sweep takes every other one."""
    full = CPU_SIZES if device == "cpu" else GPU_SIZES
    return full[::2] if quick else full


@dataclass(frozen=True)
class Ranks:
    """Where this process is. `group`: a process group of the level, None for all ranks. `stride`: how far away the
    neighbour is that a rank sends to."""

    rank: int
    ranks: int
    device: str
    group: Any = None
    stride: int = 1

    @property
    def padded(self) -> Callable[[int], int]:
        """Elements of float32 in a message of so many bytes that every rank gets an equal part of."""
        return lambda size_bytes: max(1, size_bytes // 4 // self.ranks) * self.ranks


def collectives(own: Ranks, level: Level, sizes: Sequence[int], clock: Clock) -> Iterator[CollectivePoint]:
    """Every collective at every size: the smallest and a middle one whatever the time, the others as long as there is
    some."""
    names = [name for name in get_args(CollectiveName) if name != "point-to-point" or own.ranks // own.stride % 2 == 0]
    needed = (sizes[0], sizes[len(sizes) // 2])
    for size_bytes in (*needed, *(s for s in sizes if s not in needed)):
        for name in list(names):
            if size_bytes not in needed and clock.late():
                return
            count = own.padded(size_bytes)
            call = _call(name, own, count)
            try:
                call()
            except (RuntimeError, NotImplementedError, ValueError):
                names.remove(name)  # not in this backend
                continue
            seconds = clock.seconds(call) / (2 if name == "point-to-point" else 1)  # there and back
            yield CollectivePoint(level=level, collective=name, ranks=own.ranks, size_bytes=4 * count, seconds=seconds)


def _call(name: CollectiveName, own: Ranks, count: int) -> Callable[[], object]:
    """One collective of `count` elements of float32 in all, as `cost_model/collectives.py` counts them."""
    whole = torch.ones(count, device=own.device)
    part = torch.ones(count // own.ranks, device=own.device)
    group = own.group
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    calls: dict[CollectiveName, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group),  # a sum would overflow
        "all-gather": lambda: gather(whole, part, group=group),
        "reduce-scatter": lambda: scatter(part, whole, group=group),
        "all-to-all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole, group=group),
        "point-to-point": lambda: _there_and_back(own, whole)}
    return calls[name]


def _there_and_back(own: Ranks, tensor: torch.Tensor) -> None:
    """Even ranks (or nodes) send to the next one and get it back, all pairs at once."""
    first = own.rank // own.stride % 2 == 0
    other = own.rank + own.stride if first else own.rank - own.stride
    peer = dist.get_global_rank(own.group, other) if own.group is not None else other
    if first:
        dist.send(tensor, peer, group=own.group)
        dist.recv(tensor, peer, group=own.group)
    else:
        dist.recv(tensor, peer, group=own.group)
        dist.send(tensor, peer, group=own.group)


def overlaps(own: Ranks, dtype: Dtype, clock: Clock, quick: bool) -> Iterator[OverlapPoint]:
    """Products that take longer than an all-reduce, alone and beside it."""
    side = OVERLAP_PRODUCT[own.device]
    a = torch.randn(side, side, device=own.device, dtype=getattr(torch, dtype))
    product_s = clock.seconds(lambda: torch.mm(a, a))
    for number, size_bytes in enumerate(OVERLAP_SIZES[own.device][:1 if quick else None]):
        if number and clock.late():
            return
        count = own.padded(size_bytes)
        tensor = torch.ones(count, device=own.device)
        communication_s = clock.seconds(lambda t=tensor: _reduced(own, t, lambda: None))  # type: ignore[misc]
        products = max(1, round(LONGER * communication_s / product_s))

        def compute(products: int = products) -> None:
            for _ in range(products):
                torch.mm(a, a)

        compute_s = clock.seconds(compute)
        together_s = clock.seconds(lambda t=tensor, c=compute: _reduced(own, t, c))  # type: ignore[misc]
        yield OverlapPoint(ranks=own.ranks, size_bytes=4 * count, compute_s=compute_s,
                           communication_s=communication_s, together_s=together_s)


def _reduced(own: Ranks, tensor: torch.Tensor, beside: Callable[[], None]) -> None:
    work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=own.group, async_op=True)
    beside()
    work.wait()
