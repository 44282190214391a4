"""Where measuring happens: in this process, in processes of its own (`--ranks N`), or as one rank of torchrun's.

Every rank runs `rank_points`; rank 0 has the result. Processes that were started here are ended here, whatever happens.
"""

from __future__ import annotations

import datetime
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from ...cost_model.machine_profile import CollectivePoint, OverlapPoint, Tables
from ...runtime.errors import InvalidInputError, MeshwrightError
from ...runtime.settings import TORCHRUN
from .clock import Agree, Clock, alone
from .collectives import Ranks, collectives, overlaps, sizes_for
from .measure import Points, Progress, Sweep, measured, steps, sweep_for

START_S, MOST_S = 60.0, 900.0  # for a process group to come together, for everything
QUICK_S, FULL_S = 8.0, 40.0  # measuring stops adding points after this; shares below
SHARE_ALONE, SHARE_TOGETHER = 0.4, 0.75  # of the time, cumulated; collectives have the rest
MOST_RANKS = 1024


@dataclass(frozen=True)
class Setting:
    """What every rank has to know."""

    device: str
    quick: bool
    ranks: int = 1
    threads: int = 1

    @property
    def backend(self) -> str:
        return "nccl" if self.device == "cuda" else "gloo"

    @property
    def sweep(self) -> Sweep:
        return sweep_for(self.device, self.quick)

    @property
    def steps(self) -> int:
        """Reports of progress, at most."""
        rounds = 1 if self.ranks == 1 or self.device == "cuda" else 2
        return rounds * steps(self.sweep) + (3 if self.ranks > 1 else 0)


@dataclass(frozen=True)
class Place:
    """This rank among all; ranks of a node are consecutive, as torchrun numbers them."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int

    @property
    def nodes(self) -> int:
        return self.ranks // self.local_ranks


def torchrun_place(environment: Mapping[str, str]) -> Place | None:
    """Where torchrun put this process, None without it. Raises `InvalidInputError` for nodes of different sizes."""
    if not all(name in environment for name in TORCHRUN):
        return None
    try:
        rank, ranks, local_rank, local_ranks = (int(environment[name]) for name in TORCHRUN[:4])
    except ValueError:
        raise InvalidInputError("RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is no number",
                                expected="the environment that torchrun sets") from None
    if not (0 <= local_rank < local_ranks <= ranks and 0 <= rank < ranks) or ranks % local_ranks or \
            rank % local_ranks != local_rank:
        raise InvalidInputError(f"rank {rank} of {ranks}, local rank {local_rank} of {local_ranks}",
                                expected="nodes with equal numbers of ranks, numbered node by node")
    return Place(rank, ranks, local_rank, local_ranks)


def in_this_process(setting: Setting, progress: Progress) -> Tables:
    """One process, no collectives."""
    with threads_set(setting.threads):
        clock = Clock(setting.device, deadline=time.perf_counter() + _budget_s(setting))
        return _tables([measured(clock, setting.sweep, 1, progress)], [], [])


def under_torchrun(setting: Setting, place: Place, progress: Progress) -> Tables | None:
    """This rank's part; the tables on rank 0, None on others. Raises `MeshwrightError`."""
    with threads_set(setting.threads), _group(setting, place, "env://"):
        return rank_points(setting, place, progress if place.rank == 0 else lambda what: None)


def in_own_processes(setting: Setting, progress: Progress) -> Tables:
    """Starts `setting.ranks` processes on this machine. Raises `MeshwrightError` where they can't work together."""
    context = processes.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="meshwright-profile-") as folder:
        started = processes.start_processes(_worker, (setting, folder, writer), nprocs=setting.ranks, join=False,
                                            start_method="spawn")
        writer.close()
        try:
            return _joined(started, reader, progress, time.monotonic() + MOST_S, setting)
        finally:
            _ended(started.processes)
            reader.close()


def _joined(started: Any, reader: Connection, progress: Progress, deadline: float, setting: Setting) -> Tables:
    tables: Tables | None = None
    while True:
        while reader.poll(0.1):
            try:
                kind, text = reader.recv()
            except EOFError:
                break
            if kind == "progress":
                progress(text)
            elif kind == "fault":
                raise MeshwrightError(text)
            else:
                tables = Tables.model_validate_json(text)
        try:
            if started.join(timeout=0.05):
                break
        except (processes.ProcessRaisedException, processes.ProcessExitedException) as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1:]
            raise MeshwrightError(f"a rank of {setting.ranks} stopped: {' '.join(last)[:300]}") from None
        if time.monotonic() > deadline:
            raise MeshwrightError(f"{setting.ranks} ranks took more than {MOST_S:.0f} s", do="Try --quick.")
    if tables is None:
        raise MeshwrightError("the ranks ended without a result")
    return tables


def _ended(own: list[Any]) -> None:
    for process in own:
        if process.is_alive():
            process.terminate()
    for process in own:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join(5)


def _worker(rank: int, setting: Setting, folder: str, writer: Connection) -> None:
    """One rank of `in_own_processes`."""
    torch.set_num_threads(setting.threads)
    place = Place(rank, setting.ranks, rank, setting.ranks)

    def progress(what: str) -> None:
        if rank == 0:
            writer.send(("progress", what))

    try:
        with _group(setting, place, (Path(folder) / "store").as_uri()):
            tables = rank_points(setting, place, progress)
    except MeshwrightError as error:
        writer.send(("fault", str(error)))
        return
    if tables is not None:
        writer.send(("tables", tables.model_dump_json()))


@contextmanager
def _group(setting: Setting, place: Place, address: str) -> Iterator[None]:
    """Within it there is a process group. Raises `MeshwrightError` where it can't be made."""
    if setting.device == "cuda":
        torch.cuda.set_device(place.local_rank)
    if setting.backend == "gloo" and place.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    try:
        dist.init_process_group(setting.backend, init_method=address, rank=place.rank, world_size=place.ranks,
                                timeout=datetime.timedelta(seconds=START_S))
        _agree(setting.device)(0.0)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise MeshwrightError(f"the process group ({setting.backend}, {place.ranks} ranks) can't start: {reason}",
                              do="See that all ranks run and reach each other.") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def _loopback() -> str:
    """The interface that processes of one machine talk over; a host name need not resolve."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _agree(device: str) -> Agree:
    def agree(value: float) -> float:
        tensor = torch.tensor([value], device=device, dtype=torch.float64 if device == "cpu" else torch.float32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())

    return agree


def rank_points(setting: Setting, place: Place, progress: Progress) -> Tables | None:
    """Everything that one rank takes part in, in the same order on each."""
    agree, started, total = _agree(setting.device), time.perf_counter(), _budget_s(setting)
    found: list[Points] = []
    if setting.device == "cpu" and place.local_ranks > 1:  # processes of one CPU share it: also alone
        if place.rank == 0:
            clock = Clock(setting.device, alone, started + total * SHARE_ALONE)
            found.append(measured(clock, setting.sweep, 1, progress))
        agree(0.0)
    clock = Clock(setting.device, agree, started + total * SHARE_TOGETHER)
    found.append(measured(clock, setting.sweep, place.local_ranks, progress))
    clock = Clock(setting.device, agree, started + total)
    points = list(_levels(setting, place, clock, progress))
    progress("products beside an all-reduce")
    everyone = Ranks(place.rank, place.ranks, setting.device)
    beside = list(overlaps(everyone, setting.sweep.dtypes[0], clock, setting.quick))
    return _tables(found, points, beside) if place.rank == 0 else None


def _levels(setting: Setting, place: Place, clock: Clock, progress: Progress) -> Iterator[CollectivePoint]:
    sizes = sizes_for(setting.device, setting.quick)
    if place.local_ranks > 1:
        progress("collectives inside a node")
        own = Ranks(place.local_rank, place.local_ranks, setting.device, _node_group(place))
        yield from collectives(own, "inner", sizes, clock)
    if place.nodes > 1:
        progress("collectives between nodes")
        everyone = Ranks(place.rank, place.ranks, setting.device, stride=place.local_ranks)
        yield from collectives(everyone, "network", sizes, clock)


def _node_group(place: Place) -> Any:
    """The group of this rank's node; None where that is all ranks. Every rank makes every group."""
    if place.nodes == 1:
        return None
    groups = [dist.new_group(list(range(n * place.local_ranks, (n + 1) * place.local_ranks)))
              for n in range(place.nodes)]
    return groups[place.rank // place.local_ranks]


def _tables(found: list[Points], points: list[CollectivePoint], beside: list[OverlapPoint]) -> Tables:
    return Tables(products=tuple(p for f in found for p in f.products),
                  streams=tuple(p for f in found for p in f.streams),
                  attention=tuple(p for f in found for p in f.attention),
                  overheads=tuple(p for f in found for p in f.overheads),
                  collectives=tuple(points), overlap=tuple(beside))


def _budget_s(setting: Setting) -> float:
    return QUICK_S if setting.quick else FULL_S


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Within it torch uses `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


