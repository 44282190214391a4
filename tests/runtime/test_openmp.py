"""Kernels use the OpenMP runtime of torch, or no threads; never a second runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.runtime.openmp import choose_openmp, torch_runtime
from meshwright.runtime.toolchain import find_compiler

LIBGOMP, LIBOMP = Path("/torch/lib/libgomp.so.1"), Path("/torch/lib/libomp.dylib")

PROBE = """
import ctypes, torch
from meshwright.runtime.openmp import mapped_runtimes
from meshwright.runtime.toolchain import compile_shared, load_shared
before = mapped_runtimes()
library = load_shared(compile_shared('''
#include <omp.h>
extern "C" __attribute__((visibility("default"))) int threads() {
    int n = 0;
    #pragma omp parallel
    #pragma omp atomic
    n += 1;
    return n;
}
'''))
counts = []
for n in (1, 2):
    torch.set_num_threads(n)
    counts.append(library.threads())
print(counts, len(before), before == mapped_runtimes())
"""


def test_gcc_links_torchs_copy_first() -> None:
    openmp = choose_openmp("gcc", LIBGOMP, "Linux")
    assert openmp.library == LIBGOMP and openmp.link_flags[-1] == str(LIBGOMP) and not openmp.reason


@pytest.mark.parametrize(("kind", "library", "system", "why"), [
    ("gcc", None, "Linux", "no OpenMP runtime"),
    ("clang", LIBGOMP, "Linux", "clang"),
    ("clang", None, "Darwin", "no OpenMP runtime"),
])
def test_no_threads_says_why(kind: str, library: Path | None, system: str, why: str) -> None:
    openmp = choose_openmp(kind, library, system)
    assert openmp.compile_flags == ("-fopenmp-simd",) and not openmp.link_flags
    assert openmp.library is None and why in openmp.reason


def test_without_threads_simd_still_counts(tmp_path: Path) -> None:
    """Vector pragmas are obeyed and headers can tell that there are no threads."""
    source = tmp_path / "probe.cpp"
    source.write_text("#ifdef _OPENMP\n#error threads\n#endif\n"
                      "void twice(float* x) {\n#pragma omp simd\nfor (int i = 0; i < 64; i++) x[i] *= 2; }\n")
    flags = choose_openmp("gcc", None, "Linux").compile_flags
    run = subprocess.run([*find_compiler().command, "-Wall", "-Wextra", "-Werror", *flags, "-c", source, "-o",
                          tmp_path / "probe.o"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_macos_with_torchs_libomp() -> None:
    assert str(LIBOMP) in choose_openmp("clang", LIBOMP, "Darwin").link_flags


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_runtime_is_mapped_and_hears_torch() -> None:
    assert torch_runtime() is not None
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[1, 2] 1 True", run.stderr
