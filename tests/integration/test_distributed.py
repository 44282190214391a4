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


def worker(rank: int, job: Callable[..., None], port: int, folder: str, compile_first: bool) -> None:
    """Join, run `job`, leave. A wrapper that outlives its process group can wait for its peer for ever."""
    _join(rank, port)
    job(rank, folder, compile_first)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def ddp(rank: int, folder: str, compile_first: bool) -> None:
    base = model()
    wrapped = nn.parallel.DistributedDataParallel(torch.compile(base, backend="meshwright") if compile_first else base)
    call = wrapped if compile_first else torch.compile(wrapped, backend="meshwright")
    for _ in range(2):
        base.zero_grad(set_to_none=True)
        call(data().chunk(WORLD)[rank]).square().mean().backward()
    _compare({n: p.grad for n, p in base.named_parameters()}, rank, folder)


def fsdp(rank: int, folder: str, compile_first: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = model()
    if compile_first:
        for layer in base:
            layer.compile(backend="meshwright")
    fully_shard(base, mesh=init_device_mesh("cpu", (WORLD,)))
    call = base if compile_first else torch.compile(base, backend="meshwright")
    for _ in range(2):
        base.zero_grad(set_to_none=True)
        call(data().chunk(WORLD)[rank]).square().mean().backward()
    _compare({n: p.grad.full_tensor() for n, p in base.named_parameters()}, rank, folder)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("compile_first", [True, False], ids=["compiled-inside", "compiled-outside"])
@pytest.mark.parametrize("job", [ddp, fsdp], ids=["ddp", "fsdp2"])
def test_gradients_equal_one_process(job: Callable[..., None], compile_first: bool, tmp_path: Path) -> None:
    arguments = (job, _free_port(), str(tmp_path), compile_first)
    mp.start_processes(worker, arguments, nprocs=WORLD, start_method="spawn")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done0", "done1"]
