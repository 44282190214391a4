"""One process: products, memory, attention and overheads of a device, as points for a profile's tables.

Tensors hold small random numbers: a GPU draws less power, and so runs faster, on zeros.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...cost_model.machine_profile import AttentionPoint, Dtype, OverheadPoint, ProductPoint, StreamPoint
from .clock import Clock

Progress = Callable[[str], None]
Shape = tuple[int, int, int, int]  # batch, m, k, n
CHAIN = 50  # operators of the chain that overheads are measured with
GRAPH_KERNELS = 200
TOO_SLOW = 12.0  # a dtype that reaches less than a twelfth of the first one's rate is emulated: left out


@dataclass(frozen=True)
class Sweep:
    """What is measured on a kind of device. Sizes grow from where launches count to where the ceiling is reached."""

    dtypes: tuple[Dtype, ...]
    products: tuple[Shape, ...]
    stream_elements: tuple[int, ...]
    attention: tuple[tuple[int, int, int, int], ...]  # batch, heads, seq, head size
    stream_dtype: Dtype


CPU_SWEEP = Sweep(
    dtypes=("float32", "bfloat16", "float16"),
    products=((1, 64, 64, 64), (1, 128, 384, 384), (1, 256, 256, 1024), (1, 256, 1024, 256), (1, 512, 512, 512),
              (1, 512, 768, 3072), (1, 512, 3072, 768), (1, 768, 512, 3072), (1, 1024, 384, 1536),
              (1, 1024, 1024, 1024), (16, 128, 64, 128), (1, 512, 256, 8192), (1, 2048, 768, 768),
              (1, 2048, 1024, 2048)),
    stream_elements=(1 << 16, 1 << 18, 1 << 20, 1 << 22),
    attention=((1, 8, 128, 64), (4, 12, 128, 32), (2, 12, 256, 64), (1, 8, 1024, 64)), stream_dtype="float32")
GPU_SWEEP = Sweep(
    dtypes=("bfloat16", "float16", "tfloat32", "float32"),
    products=((1, 256, 256, 256), (1, 512, 512, 512), (1, 1024, 1024, 1024), (1, 2048, 256, 4096), (1, 2048, 4096, 256),
              (1, 2048, 1024, 4096), (1, 2048, 4096, 1024), (64, 1024, 128, 1024), (1, 2048, 2048, 2048),
              (1, 4096, 4096, 4096), (1, 4096, 4096, 14336), (1, 4096, 14336, 4096), (1, 8192, 8192, 8192),
              (1, 16384, 8192, 8192)),
    stream_elements=(1 << 20, 1 << 24, 1 << 26),
    attention=((1, 32, 1024, 64), (1, 32, 4096, 64), (2, 32, 2048, 128), (1, 32, 8192, 128)), stream_dtype="bfloat16")


def sweep_for(device: str, quick: bool) -> Sweep:
    """The sweep of a kind of device; a quick one leaves out every other shape and all but the usual dtypes."""
    full = CPU_SWEEP if device == "cpu" else GPU_SWEEP
    if not quick:
        return full
    return Sweep(full.dtypes[:2] if device == "cpu" else full.dtypes[:1], full.products[::2],
                 full.stream_elements[1::2], full.attention[::2], full.stream_dtype)


class Measurement:
    """Measures one rank's device while `processes` of the node do the same (`clock` keeps them together)."""

    def __init__(self, clock: Clock, sweep: Sweep, processes: int) -> None:
        self.clock, self.sweep, self.processes = clock, sweep, processes
        self.device = clock.device

    def _random(self, *shape: int, dtype: Dtype) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch_dtype(dtype)) * 0.1

    def overheads(self) -> list[OverheadPoint]:
        """A chain of operators on a tensor of four numbers, forward and backward, is nothing but overhead: sine has one
        operator forward, and backward a cosine and a product."""
        x = torch.ones(4, device=self.device, requires_grad=True)

        def chain() -> None:
            y = x
            for _ in range(CHAIN):
                y = torch.sin(y)
            torch.autograd.grad(y, x, torch.ones_like(y))

        operator_s = self.clock.host_seconds(chain) / (3 * CHAIN)
        kernel_s = self._graph_kernel_s() if self.device == "cuda" else operator_s
        seconds = {"kernel": kernel_s, "operator": operator_s}
        return [OverheadPoint(processes=self.processes, what=what, seconds=s)  # type: ignore[arg-type]
                for what, s in seconds.items()]

    def _graph_kernel_s(self) -> float:
        """A small kernel between its neighbours in a CUDA graph, where the host plays no part."""
        x, graph = torch.ones(4, device=self.device), torch.cuda.CUDAGraph()
        x.add_(1)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_KERNELS):
                x.add_(1)
        return self.clock.seconds(graph.replay) / GRAPH_KERNELS

    def streams(self) -> Iterator[StreamPoint]:
        """Operators that are as fast as memory, in the mixture that a transformer has them in."""
        functions = torch.nn.functional
        for number, elements in enumerate(self.sweep.stream_elements):
            if number and self.clock.late():
                return
            x, y = (self._random(elements // 256, 256, dtype=self.sweep.stream_dtype) for _ in range(2))
            weight = self._random(256, dtype=self.sweep.stream_dtype)
            size = x.numel() * x.element_size()
            calls: dict[str, tuple[int, Callable[[], object]]] = {
                "copy": (2, lambda x=x: x.clone()), "add": (3, lambda x=x, y=y: x + y),  # type: ignore[misc]
                "multiply": (2, lambda x=x: x * 0.5),  # type: ignore[misc]
                "gelu": (2, lambda x=x: functions.gelu(x)),  # type: ignore[misc]
                "softmax": (2, lambda x=x: torch.softmax(x, -1)),  # type: ignore[misc]
                "layer norm": (2, lambda x=x, w=weight: functions.layer_norm(x, (256,), w, w))}  # type: ignore[misc]
            for name, (passes, call) in calls.items():
                yield StreamPoint(processes=self.processes, operator=name, moved_bytes=passes * size,
                                  seconds=self.clock.seconds(call))

    def products(self, dtype: Dtype, fastest: float) -> list[ProductPoint]:
        """Products of every shape. Empty for a dtype that the device refuses or emulates: `fastest` is the best rate
        seen in FLOP/s."""
        found: list[ProductPoint] = []
        with float32_precision(dtype):
            for batch, m, k, n in self.sweep.products:
                if found and self.clock.late():
                    break
                try:
                    seconds = self._product_s(dtype, batch, m, k, n)
                except (RuntimeError, NotImplementedError):
                    return []
                if len(found) < 3 and 2 * batch * m * k * n / seconds < fastest / TOO_SLOW / 10:
                    return []
                found.append(ProductPoint(processes=self.processes, dtype=dtype, batch=batch, m=m, k=k, n=n,
                                          seconds=seconds))
        best = max(2 * p.batch * p.m * p.k * p.n / p.seconds for p in found)
        return found if best > fastest / TOO_SLOW else []

    def _product_s(self, dtype: Dtype, batch: int, m: int, k: int, n: int) -> float:
        """Weights stand as a linear layer keeps them: [n, k]."""
        if batch > 1:
            a, b = self._random(batch, m, k, dtype=dtype), self._random(batch, k, n, dtype=dtype)
            return self.clock.seconds(lambda: torch.bmm(a, b))
        x, weight = self._random(m, k, dtype=dtype), self._random(n, k, dtype=dtype)
        return self.clock.seconds(lambda: torch.nn.functional.linear(x, weight))

    def attention(self, dtype: Dtype) -> Iterator[AttentionPoint]:
        """Forward, and backward alone."""
        attend = torch.nn.functional.scaled_dot_product_attention
        for number, (batch, heads, seq, size) in enumerate(self.sweep.attention):
            if number and self.clock.late():
                return
            q, k, v = (self._random(batch, heads, seq, size, dtype=dtype).requires_grad_() for _ in range(3))
            with torch.no_grad():
                forward_s = self.clock.seconds(lambda q=q, k=k, v=v: attend(q, k, v))  # type: ignore[misc]
            out = attend(q, k, v)
            gradient = torch.randn_like(out)
            backward_s = self.clock.seconds(lambda o=out, g=gradient, own=(q, k, v): torch.autograd.grad(  # type: ignore[misc]
                o, own, g, retain_graph=True))
            for backward, seconds in ((False, forward_s), (True, backward_s)):
                yield AttentionPoint(processes=self.processes, dtype=dtype, batch=batch, heads=heads, seq=seq,
                                     head_size=size, backward=backward, seconds=seconds)


@dataclass
class Points:
    """Of one number of processes; `profile_fit` turns them into scalars."""

    products: list[ProductPoint]
    streams: list[StreamPoint]
    attention: list[AttentionPoint]
    overheads: list[OverheadPoint]


def measured(clock: Clock, sweep: Sweep, processes: int, progress: Progress) -> Points:
    """Every point of a sweep. What comes first is never left out, however late it is."""
    own, beside = Measurement(clock, sweep, processes), f"{processes} at once, " if processes > 1 else ""
    progress(f"{beside}overheads")
    overheads = own.overheads()
    progress(f"{beside}memory")
    streams = list(own.streams())
    products: list[ProductPoint] = []
    attention: list[AttentionPoint] = []
    for dtype in sweep.dtypes:
        progress(f"{beside}products in {dtype}")
        fastest = max((2 * p.batch * p.m * p.k * p.n / p.seconds for p in products), default=0.0)
        found = own.products(dtype, fastest) if not products or not clock.late() else []
        products += found
        if found and dtype != "tfloat32":
            progress(f"{beside}attention in {dtype}")
            attention += own.attention(dtype)
    return Points(products, streams, attention, overheads)


def steps(sweep: Sweep) -> int:
    """How many times `measured` reports progress at most."""
    return 2 + 2 * len(sweep.dtypes)


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """tfloat32 is how a GPU multiplies float32."""
    found = getattr(torch, "float32" if dtype == "tfloat32" else dtype)
    assert isinstance(found, torch.dtype)
    return found


class float32_precision:
    """Within it, products of float32 run as `dtype` says; the setting is put back."""

    def __init__(self, dtype: Dtype) -> None:
        self.wanted = "high" if dtype == "tfloat32" else "highest"

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.wanted)

    def __exit__(self, *error: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def memory_bytes(device: str) -> float:
    """Of a GPU, or of the whole machine."""
    if device == "cuda":
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def hardware_name(device: str) -> str:
    """As the system gives it."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    from ...cost_model.this_machine import cpu_name

    return cpu_name()


def transcendental_per_s(device: str, clock: Clock) -> float:
    """Exponentials per second: of a CPU's process measured, of a GPU 16 per multiprocessor and clock (`presets.py`)."""
    if device == "cuda":
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        return float(properties.multi_processor_count * 16 * getattr(properties, "clock_rate", 1.5e6) * 1e3)
    x = torch.linspace(0.1, 2.0, 1 << 14)
    y = torch.empty_like(x)
    return x.numel() / clock.seconds(lambda: torch.exp(x, out=y))
