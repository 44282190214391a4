"""Products with an element-wise kernel behind them in the C++ program: on finished blocks where that measured faster.

Both ways are printed. `mw_gemm_then` says whether the template took the kernel with it; where it did not (the library
did the product, or values left the range of the split method) the kernel is launched on the whole result as ever.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from ..runtime.program import Epilogue, Program
from .cpp import print_kernel_cpp, print_rows, rows_name
from .ir import Kernel
from .program_cpp_gemm import Product, operands, print_gemm
from .program_cpp_tensors import Tensors
from .program_epilogue import BLOCK_SIZES, BlockKernel, block_kernel
from .schema import Unsupported
from .templates.cpu_gemm import EPILOGUE_TENSORS
from .timings import HOST_FLOATS

_EXPORT = 'extern "C" __attribute__((visibility("default")))'


def print_blocks(kernels: Iterable[Kernel]) -> str:
    """Kernels that may work on blocks; exported, so that they can be timed before the program runs."""
    return "\n".join(print_kernel_cpp(k) + print_rows(k, _EXPORT) for k in kernels)


def print_epilogue(step: Epilogue, tensors: Tensors, program: Program, products: list[Product],
                   blocks: dict[str, Kernel], kernel: Kernel, launch: str) -> None:
    """Both ways; `launch` is the text that launches `kernel`. Adds what is to be printed to `products` and `blocks`.
    Raises `Unsupported` where the kernel can't work on blocks."""
    product, inputs = step.product, step.launch.inputs
    position = next((i for i, n in enumerate(inputs) if tensors.root[n] == tensors.root[product.out]), None)
    if position is None:
        raise Unsupported("a kernel behind a product that it does not read", step)
    block = block_kernel(kernel, step.launch, position, tensors.spec(product.out))
    o = operands(product, tensors, program, products, block)
    if o.slot is None:
        print_gemm(product, tensors, program, products)
        tensors.lines.append(launch)
        return
    name = block.kernel.name
    blocks[name] = block.kernel
    others = [tensors.address(n) for i, n in enumerate((*inputs, *step.launch.outputs)) if i != position]
    tensors.lines += [
        f"{{  // {product.out}, and {kernel.name} on it",
        f"  const Product product = {o.side()};",
        f"  const Epilogue epilogue = {{{rows_name(name)}, {{nullptr, {', '.join(others)}}}}};",
        f"  const bool inside = frame->products[{o.slot}].inside;",
        f"  if (!mw_gemm_then(threads, {o.M}, {o.K}, {o.a[0]}, {o.a[2]}, {o.a[3]}, &product,",
        "                    inside ? &epilogue : nullptr))",
        f"    {launch}", "}"]


class Way(ctypes.Structure):
    """The template's `Way`."""

    _fields_ = [("how", ctypes.c_void_p), ("inside", ctypes.c_int64)]


# -- measuring ------------------------------------------------------------------------------------
class ProductStruct(ctypes.Structure):
    """The template's `Product`."""

    _fields_ = [("N", ctypes.c_int64), ("b", ctypes.c_void_p), ("sbk", ctypes.c_int64), ("sbn", ctypes.c_int64),
                ("bias", ctypes.c_void_p), ("bias_m", ctypes.c_int64), ("c", ctypes.c_void_p), ("ldc", ctypes.c_int64),
                ("how", ctypes.c_void_p)]


class EpilogueStruct(ctypes.Structure):
    """The template's `Epilogue`."""

    _fields_ = [("run", ctypes.c_void_p), ("tensors", ctypes.c_void_p * EPILOGUE_TENSORS)]


def timed_runs(host: ctypes.PyDLL, program: ctypes.CDLL, behind: BlockKernel, threads: int, M: int, K: int,
               a: tuple[int, int, int], sides: Sequence[tuple[ProductStruct, bool]]) -> list[Callable[[], Any]]:
    """One call for each of `sides` that does the product (of `a`: address, strides of row and column) and the kernel
    behind it: on its blocks where the flag says so and the template can, else on the whole result."""
    N, name = int(sides[0][0].N), behind.kernel.name
    address = ctypes.cast(getattr(program, rows_name(name)), ctypes.c_void_p).value
    room = [torch.ones(1 + row * (M - 1) + column * (N - 1) + start, **HOST_FLOATS)
            for row, column, start in (*behind.operands, (N, 1, 0))]
    epilogue = EpilogueStruct(address)
    for i, tensor in enumerate(room, 1):
        epilogue.tensors[i] = tensor.data_ptr()
    whole = (ctypes.c_int64 * len(BLOCK_SIZES))(N, 0, M, 0, N)
    work = M * N * 8

    def run(side: ProductStruct, inside: bool) -> None:
        if host.mw_gemm_then(threads, M, K, *a, ctypes.byref(side), ctypes.byref(epilogue) if inside else None):
            return
        tensors = (ctypes.c_void_p * (1 + len(room)))(side.c, *(t.data_ptr() for t in room))
        host.mw_launch(address, threads, M, work, tensors, whole)

    return [partial(run, side, inside) for side, inside in sides]
