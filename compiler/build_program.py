"""From a `Program` and its kernels to something that runs: the one place that knows which printer a device needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..codegen.ir import Kernel
from ..codegen.schema import Unsupported
from ..runtime.program import Program
from .report import KernelReport

if TYPE_CHECKING:
    from ..codegen.cpp import CompiledCppKernel
    from ..codegen.program_cpp_packing import BehindProduct

Runner = Callable[[Sequence[Any]], list[Any]]
Kernels = Mapping[str, Callable[..., Any]]
T = TypeVar("T")
_pool: ThreadPoolExecutor


def _renew_pool() -> None:
    global _pool
    _pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="meshwright-compile")


_renew_pool()
if hasattr(os, "register_at_fork"):  # threads do not survive a fork: what a child submits would wait for ever
    os.register_at_fork(after_in_child=_renew_pool)


def submit(work: Callable[..., T], *args: Any) -> Future[T]:
    """Start `work(*args)` beside what goes on here (tracing, Dynamo's guards); at most two at once."""
    return _pool.submit(work, *args)


@dataclass(frozen=True)
class Built:
    """A program ready to call: its printed `source`, the `timings` that choose its methods and the `behind_products`
    they choose for (both fill when it is called), and a `note` for the report where it could not be printed for its
    device."""

    run: Runner
    source: str
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    behind_products: list[BehindProduct] = field(default_factory=list)
    note: str = ""


def build_kernels(device: str, kernels: Sequence[Kernel]) -> Kernels:
    """Kernels of distinct names, compiled for "cpu" or a GPU (device type); by name."""
    if device == "cpu":
        from ..codegen.cpp import compile_kernels

        return compile_kernels(kernels)
    from ..codegen.triton_build import triton_kernels

    return triton_kernels({k.name: k for k in kernels})


def build_program(program: Program, kernels: Callable[[], Kernels],
                  timings: Mapping[str, Mapping[str, float]] | None = None, *, own_unit: bool = False) -> Built:
    """`kernels` gives the program's kernels, which may still be compiling: it is asked last. `own_unit`: a CPU program
    has its kernels in its own translation unit, and asks only where it can't be printed. `timings`: what decided
    between methods where the program was saved."""
    from ..codegen.program_python import load_program_python, print_program_python

    note = ""
    if program.device == "cpu":
        from ..codegen.program_cpp_run import compile_program

        linked = cast("Callable[[], Mapping[str, CompiledCppKernel]]", kernels)
        try:
            compiled = compile_program(program, None if own_unit else linked, timings)
            return Built(compiled, compiled.source, compiled.timings.used, compiled.behind_products)
        except Unsupported as why:
            note = str(why)
    source = print_program_python(program)
    if program.device == "cuda":
        from ..codegen.program_graphs import load_program_cuda

        return Built(load_program_cuda(program, kernels()), source)
    return Built(load_program_python(program, kernels()), source, note=note)


def kernel_report(kernel: Kernel, device: str) -> KernelReport:
    """A kernel with its printed source, for the report."""
    if device == "cpu":
        from ..codegen.cpp import print_kernel_cpp

        return KernelReport(kernel.name, "c++", print_kernel_cpp(kernel), str(kernel))
    from ..codegen.triton import print_kernel_triton

    return KernelReport(kernel.name, "triton", print_kernel_triton(kernel), str(kernel))
