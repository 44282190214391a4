"""From kernels of the IR to callables: printed as one module, launched by the table of `triton_config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..runtime.triton_launch import Configure, Launch, TritonKernel
from .ir import Kernel, verify
from .triton import print_module
from .triton_config import launch_config


def triton_kernel(kernel: Kernel) -> TritonKernel:
    """`k(buffers, sizes)` for one kernel: on the GPU of CUDA buffers, in the interpreter for CPU buffers."""
    return triton_kernels({kernel.name: kernel})[kernel.name]


def triton_kernels(kernels: Mapping[str, Kernel], source: str | None = None) -> dict[str, TritonKernel]:
    """Callables by name, all from one module. `source`: a module already printed that holds them under these names."""
    named = [k.renamed(name) for name, k in kernels.items()]
    for kernel in named:
        verify(kernel)
    text = source if source is not None else print_module(named)
    return {k.name: TritonKernel(k.name, text, configure(k)) for k in named}


def configure(kernel: Kernel) -> Configure:
    """The launch table of one kernel as a function of its sizes."""

    def at(sizes: Sequence[int], interpret: bool) -> Launch:
        return launch_config(kernel, sizes, interpret)

    return at
