"""DDP and FSDP2 around a compiled model: two gloo processes on the CPU get the gradients of one."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import meshwright as mw

WORLD = 2
WIDTH = 16


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))


def data() -> torch.Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


def one_process() -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over the whole batch."""
    reference = model()
    reference(data()).square().mean().backward()
    return {n: p.grad for n, p in reference.named_parameters()}


def _join(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", MESHWRIGHT_STRICT="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)


def _compare(found: dict[str, torch.Tensor], rank: int, folder: str) -> None:
    for name, wanted in one_process().items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6)
    Path(folder, f"done{rank}").touch()


def worker(rank: int, job: Callable[..., None], port: int, folder: str, entry: str) -> None:
    """Join, run `job`, leave. A wrapper that outlives its process group can wait for its peer for ever."""
    _join(rank, port)
    job(rank, folder, entry)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _inside(base: nn.Module, entry: str) -> nn.Module:
    """What the wrapper gets: the model, or its compiled form where the entry compiles it before it is wrapped."""
    if entry == "compile":
        return mw.compile(base)
    return torch.compile(base, backend="meshwright") if entry == "backend-inside" else base


def ddp(rank: int, folder: str, entry: str) -> None:
    base = model()
    inner = _inside(base, entry)
    wrapped = nn.parallel.DistributedDataParallel(inner)
    call = torch.compile(wrapped, backend="meshwright") if entry == "backend-outside" else wrapped
    for _ in range(2):
        base.zero_grad(set_to_none=True)
        call(data().chunk(WORLD)[rank]).square().mean().backward()
    assert entry != "compile" or inner.report.graphs, "nothing was compiled"
    _compare({n: p.grad for n, p in base.named_parameters()}, rank, folder)


def fsdp(rank: int, folder: str, entry: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = model()
    if entry == "backend-inside":
        for layer in base:
            layer.compile(backend="meshwright")
    inner = mw.compile(base) if entry == "compile" else base
    fully_shard(inner, mesh=init_device_mesh("cpu", (WORLD,)))
    call = torch.compile(inner, backend="meshwright") if entry == "backend-outside" else inner
    for _ in range(2):
        inner.zero_grad(set_to_none=True)
        call(data().chunk(WORLD)[rank]).square().mean().backward()
    assert entry != "compile" or inner.report.graphs, "nothing was compiled"
    _compare({n: p.grad.full_tensor() for n, p in inner.named_parameters()}, rank, folder)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("entry", ["backend-inside", "backend-outside", "compile"])
@pytest.mark.parametrize("job", [ddp, fsdp], ids=["ddp", "fsdp2"])
def test_gradients_equal_one_process(job: Callable[..., None], entry: str, tmp_path: Path) -> None:
    arguments = (job, _free_port(), str(tmp_path), entry)
    mp.start_processes(worker, arguments, nprocs=WORLD, start_method="spawn")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done0", "done1"]
