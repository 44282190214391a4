"""The smallest Triton kernel, compiled by `doctor` for every GPU target. Imported only where Triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction


def twice(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y[0:n] = 2 * x[0:n] (fp32)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


def compile_for(backend: str, arch: int | str, warp_size: int) -> None:
    """Compile `twice` ahead of time; raises whatever Triton raises."""
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(JITFunction(twice), signature, {"BLOCK": 128})  # JITFunction: also under TRITON_INTERPRET
    triton.compile(source, target=GPUTarget(backend, arch, warp_size))
