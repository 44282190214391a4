"""What a GELU saves inside of the matrix product before it: on finished blocks, against one launch after the product.

    python benchmarks/gemm_epilogue.py            writes benchmarks/results/gemm_epilogue-*.json

BERT-base's widening product, one and eight sequences of 128 tokens, by both methods of the template. "By hot kernel":
what the kernel on cached memory would save alone; inside, the product isn't written to memory either. Seconds are
those of the fastest of interleaved calls (what disturbs a machine only adds to them); docs/decisions.md quotes them.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402

from benchmarks._harness import Leg, interleave, print_table, write_result  # noqa: E402

GELU = """kernel gelu(s0, in0: f32 -> out0: f32)
  axes p0: s0
  %0: f32 = load in0[p0]
  %1: f32 = const 0.7071067811865476
  %2: f32 = mul %0, %1
  %3: f32 = erf %2
  %4: f32 = const 1.0
  %5: f32 = add %3, %4
  %6: f32 = const 0.5
  %7: f32 = mul %0, %6
  %8: f32 = mul %7, %5
  store out0[p0] = %8
"""
N, K, HOT_ROWS = 3072, 768, 32


def timed(rows: int, threads: int, method: int, rounds: int) -> dict[str, float]:
    """Seconds of the product, of the kernel after it, inside of it, and on rows that stay in cache."""
    from meshwright.codegen.cpp import compile_kernels
    from meshwright.codegen.ir_text import parse_kernel
    from meshwright.codegen.program_cpp_epilogue import EpilogueStruct, ProductStruct
    from meshwright.codegen.program_cpp_gemm import Weight
    from meshwright.codegen.program_cpp_packing import pack
    from meshwright.codegen.program_cpp_run import host_library
    from meshwright.codegen.program_epilogue import block_kernel
    from meshwright.runtime.program import Launch, TensorSpec

    torch.set_num_threads(threads)
    library, whole = host_library(), parse_kernel(GELU)
    result = TensorSpec("c", "float32", (rows, N), (N, 1))
    block = block_kernel(whole, Launch("gelu", ("c",), ("out",), (rows * N,)), 0, result).kernel
    kernels = compile_kernels([whole, block])
    gelu = kernels["gelu"]
    w, a, c, out = torch.randn(N, K), torch.randn(rows, K), torch.empty(rows, N), torch.empty(rows, N)
    packed = pack(library, Weight(0, 0, K, N, 1, K), w, method)
    side = ProductStruct(N, w.data_ptr(), 1, K, None, 0, c.data_ptr(), N, packed.data_ptr())
    epilogue = EpilogueStruct(kernels[block.name].rows)
    epilogue.tensors[1] = out.data_ptr()

    def multiply(then: Any) -> bool:
        return bool(library.mw_gemm_then(threads, rows, K, a.data_ptr(), K, 1, ctypes.byref(side), then))

    def product() -> None:
        multiply(None)

    def both() -> None:
        multiply(None)
        gelu([c, out], [rows * N])

    def inside() -> None:
        if not multiply(ctypes.byref(epilogue)):
            raise AssertionError("the template left the kernel to the caller")

    def hot() -> None:
        for _ in range(rows // HOT_ROWS):
            gelu([c[:HOT_ROWS], out[:HOT_ROWS]], [HOT_ROWS * N])

    legs: list[tuple[str, Callable[[], Any]]] = [("both_s", both), ("inside_s", inside), ("product_s", product),
                                                 ("hot_s", hot)]
    found = interleave([Leg(name, call) for name, call in legs], rounds=rounds, slice_s=0.0, limit_s=10)
    return {name: min(t.seconds) for name, t in found.items()}


def main() -> None:
    from meshwright.codegen.program_cpp_packing import may_split
    from meshwright.codegen.program_cpp_run import host_library
    from meshwright.codegen.templates.cpu_gemm import FP32, SPLIT

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds, nothing written")
    given = parser.parse_args()
    methods = {"split": SPLIT} if may_split(host_library()) else {}
    cases: list[dict[str, Any]] = [
        {"method": name, "rows": rows, "threads": t, **timed(rows, t, method, 5 if given.quick else 60)}
        for name, method in {**methods, "fp32": FP32}.items() for t in (1, 2) for rows in (128, 1024)]
    for case in cases:
        case["saved"] = 1 - case["inside_s"] / case["both_s"]
        case["saved_by_a_hot_kernel"] = 1 - (case["product_s"] + case["hot_s"]) / case["both_s"]
    seconds = ("both_s", "inside_s", "product_s", "hot_s")
    print_table("GELU in the product, and behind it",
                ["method", "rows", "threads", "behind ms", "inside ms", "product ms", "hot ms", "saved",
                 "by hot kernel"],
                [[c["method"], c["rows"], c["threads"], *(c[k] * 1e3 for k in seconds), c["saved"],
                  c["saved_by_a_hot_kernel"]] for c in cases])
    if not given.quick:
        print(f"written to {write_result('gemm_epilogue', {'cases': cases})}")


if __name__ == "__main__":
    main()
