"""CUDA graphs: record a program's launches once, replay them with one call.

A graph fixes addresses. So a call's inputs are copied into buffers that the graph reads, Parameters are read where they
are (their addresses are part of what a graph is found by: a replaced Parameter means another graph), and results are
copied out of the graph's own memory, because the next replay overwrites it. The first call of each input signature runs
directly: it compiles kernels and fills library handles, which must not happen during a capture.
`codegen.program_graphs` decides which programs may be captured: inference, nothing random, no input written to.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)

Call = Callable[[Sequence[Any]], list[Any]]
Signature = tuple[Any, ...]
MAX_GRAPHS = 8  # kept per program; further signatures run directly
IDLE_CALLS = 64  # a graph that was not used for so many calls makes way for another


class GraphApi(Protocol):
    """What a device must offer; `CudaGraphApi` is the real one, tests bring their own."""

    def capture(self, call: Callable[[], list[Any]], device: torch.device) -> tuple[list[Any], Callable[[], None]]:
        """Record `call`; its results (memory of the graph) and a function that replays it on the current stream."""

    def order(self, device: torch.device, last: Any) -> None:
        """Make the current stream wait for the use marked by `last` (a `mark`, or None for none)."""

    def mark(self, device: torch.device) -> Any:
        """A mark after everything that the current stream was given so far."""


class CudaGraphApi:
    """torch.cuda.CUDAGraph."""

    def capture(self, call: Callable[[], list[Any]], device: torch.device) -> tuple[list[Any], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = call()
        return outputs, graph.replay

    def order(self, device: torch.device, last: Any) -> None:
        if last is not None:
            torch.cuda.current_stream(device).wait_event(last)

    def mark(self, device: torch.device) -> Any:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event


@dataclass
class _Captured:
    """One graph: `buffers[i]` is the memory it reads input i from (None: a Parameter, read where it is)."""

    buffers: list[torch.Tensor | None]
    outputs: list[Any]
    replay: Callable[[], None]
    last_use: Any = None  # a mark on the device
    last_call: int = 0


class GraphedProgram:
    """`call(inputs) -> outputs` through CUDA graphs. `static[i]`: input i is a Parameter or a buffer of the model.

    Falls back to the plain call, for good, when a capture fails or a result shares memory with a copied input. Calls
    from several threads take turns; calls on several streams wait for each other on the device.
    """

    def __init__(self, call: Call, static: Sequence[bool], api: GraphApi | None = None) -> None:
        self._call = call
        self._static = tuple(static)
        self._api = api or CudaGraphApi()
        self._calls = 0
        self._seen: set[Signature] = set()
        self._graphs: dict[Signature, _Captured] = {}
        self._lock = threading.Lock()
        self.refused: str | None = None  # why this program runs without graphs, once that is known

    @property
    def captured(self) -> int:
        """How many graphs exist now."""
        return len(self._graphs)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        with self._lock:
            graph = self._graph_for(inputs)
            if graph is not None:
                return self._run(graph, inputs)
        return self._call(inputs)

    def _graph_for(self, inputs: Sequence[Any]) -> _Captured | None:
        """The graph to replay, captured now if it is time; None: run directly."""
        if self.refused is not None:
            return None
        self._calls += 1
        signature = self._signature(inputs)
        graph = self._graphs.get(signature)
        if graph is None and signature in self._seen and self._has_room():
            graph = self._capture(signature, inputs)
        elif graph is None:
            if len(self._seen) >= 8 * MAX_GRAPHS:
                self._seen.clear()
            self._seen.add(signature)
        if graph is not None:
            graph.last_call = self._calls
        return graph

    def _has_room(self) -> bool:
        """True when one more graph may be made; the longest unused one goes when it has been idle for a while."""
        if len(self._graphs) < MAX_GRAPHS:
            return True
        oldest = min(self._graphs, key=lambda key: self._graphs[key].last_call)
        if self._calls - self._graphs[oldest].last_call <= IDLE_CALLS:
            return False
        del self._graphs[oldest]
        return True

    def _signature(self, inputs: Sequence[Any]) -> Signature:
        """What a graph depends on: layouts, plain values, and the addresses of Parameters."""
        return tuple(
            (tuple(i.shape), i.stride(), i.dtype, i.device, i.data_ptr() if fixed else None)
            if isinstance(i, torch.Tensor) else i for i, fixed in zip(inputs, self._static, strict=True))

    def _capture(self, signature: Signature, inputs: Sequence[Any]) -> _Captured | None:
        try:
            device = _one_device(inputs)
            buffers = [None if fixed or not isinstance(i, torch.Tensor) else _same_layout(i)
                       for i, fixed in zip(inputs, self._static, strict=True)]
            _fill(buffers, inputs)
            arguments = [i if b is None else b for i, b in zip(inputs, buffers, strict=True)]
            outputs, replay = self._api.capture(lambda: self._call(arguments), device)
        except (RuntimeError, ValueError) as error:  # not every operator may be captured; the direct call is correct
            self.refused = f"capture failed: {error}"
            log.warning("running without CUDA graphs: %s", self.refused)
            return None
        self.refused = _why_not(outputs, buffers)
        if self.refused is not None:
            return None
        graph = _Captured(buffers, outputs, replay)
        self._graphs[signature] = graph
        return graph

    def _run(self, graph: _Captured, inputs: Sequence[Any]) -> list[Any]:
        device = _one_device(inputs)
        self._api.order(device, graph.last_use)
        _fill(graph.buffers, inputs)
        graph.replay()
        results = [_copy_out(o, inputs) for o in graph.outputs]
        graph.last_use = self._api.mark(device)
        return results


def _one_device(inputs: Sequence[Any]) -> torch.device:
    devices = {i.device for i in inputs if isinstance(i, torch.Tensor)}
    if len(devices) != 1:
        raise ValueError(f"inputs on {len(devices)} devices")
    return devices.pop()


def _fill(buffers: Sequence[torch.Tensor | None], inputs: Sequence[Any]) -> None:
    for buffer, value in zip(buffers, inputs, strict=True):
        if buffer is not None:
            buffer.copy_(value)


def _same_layout(tensor: torch.Tensor) -> torch.Tensor:
    """New memory with the tensor's shape and, where no two elements share a place, its strides."""
    if _is_dense(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError("an expanded input can't be copied element by element")
    storage = torch.empty(_span(tensor), dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, tensor.stride())


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to behind the last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * st for n, st in zip(tensor.shape, tensor.stride(), strict=True))


def _is_dense(tensor: torch.Tensor) -> bool:
    """No gaps and no two elements in one place."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda d: (d[1], d[0])):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _why_not(outputs: Sequence[Any], buffers: Sequence[torch.Tensor | None]) -> str | None:
    """Why results can't be copied out of a graph, or None."""
    copied = {b.untyped_storage().data_ptr() for b in buffers if b is not None}
    for output in outputs:
        if not isinstance(output, torch.Tensor):
            continue
        if output.untyped_storage().data_ptr() in copied and output.numel():
            return "a result is a view of an input"
        if not _is_dense(output):
            return "a result has gaps or overlaps in memory"
    return None


def _copy_out(output: Any, inputs: Sequence[Any]) -> Any:
    """The caller's own copy of a result; a Parameter that is returned stays itself."""
    if not isinstance(output, torch.Tensor):
        return output
    for value in inputs:
        if output is value:
            return value
    own = torch.empty_strided(output.shape, output.stride(), dtype=output.dtype, device=output.device)
    return own.copy_(output)
