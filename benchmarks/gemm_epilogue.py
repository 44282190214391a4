"""How much a GELU inside the matrix product could save at most: the kernel on cached memory against after the product.

    python benchmarks/gemm_epilogue.py            writes benchmarks/results/gemm_epilogue-*.json

The bound that docs/decisions.md quotes. BERT-base's widening product, one and eight sequences of 128 tokens.
"""

from __future__ import annotations

import argparse
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


def bound(rows: int, threads: int, rounds: int) -> dict[str, float]:
    """Seconds of product and kernel, of the product, and of the kernel on rows that stay in cache."""
    from meshwright.codegen.cpp import compile_kernels
    from meshwright.codegen.ir_text import parse_kernel
    from meshwright.codegen.program_cpp_gemm import Weight
    from meshwright.codegen.program_cpp_packing import may_split, pack
    from meshwright.codegen.program_cpp_run import host_library
    from meshwright.codegen.templates.cpu_gemm import FP32, SPLIT

    torch.set_num_threads(threads)
    library, gelu = host_library(), compile_kernels([parse_kernel(GELU)])["gelu"]
    w, a, c, out = torch.randn(N, K), torch.randn(rows, K), torch.empty(rows, N), torch.empty(rows, N)
    packed = pack(library, Weight(0, 0, K, N, 1, K), w, SPLIT if may_split(library) else FP32)

    def product() -> None:
        library.mw_gemm(threads, 1, rows, N, K, a.data_ptr(), 0, K, 1, w.data_ptr(), 0, 1, K, None, 0, 0, c.data_ptr(),
                        0, N, packed.data_ptr())

    def both() -> None:
        product()
        gelu([c, out], [rows * N])

    def hot() -> None:
        for _ in range(rows // HOT_ROWS):
            gelu([c[:HOT_ROWS], out[:HOT_ROWS]], [HOT_ROWS * N])

    legs: list[tuple[str, Callable[[], Any]]] = [("both_s", both), ("product_s", product), ("hot_s", hot)]
    found = interleave([Leg(name, call) for name, call in legs], rounds=rounds)
    return {name: min(t.seconds) for name, t in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds, nothing written")
    given = parser.parse_args()
    cases = [{"rows": rows, "threads": t, **bound(rows, t, 5 if given.quick else 15)}
             for t in (1, 2) for rows in (128, 1024)]
    for case in cases:
        case["saved_at_most"] = 1 - (case["product_s"] + case["hot_s"]) / case["both_s"]
    print_table("GELU in the product: what could be saved",
                ["rows", "threads", "both ms", "product ms", "hot ms", "share"],
                [[c["rows"], c["threads"], *(c[k] * 1e3 for k in ("both_s", "product_s", "hot_s")), c["saved_at_most"]]
                 for c in cases])
    if not given.quick:
        print(f"written to {write_result('gemm_epilogue', {'cases': cases})}")


if __name__ == "__main__":
    main()
