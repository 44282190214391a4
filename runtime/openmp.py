"""One OpenMP runtime per process: emitted kernels use the very library that torch has loaded.

Two OpenMP runtimes in a process mean two thread pools that fight for the cores, and a `torch.set_num_threads` that
only one of them hears. So kernels are linked against torch's own copy; where that is impossible (clang emits calls
that GNU's runtime does not have), they are compiled without threads, and `reason` says so.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_RUNTIMES = ("libgomp", "libiomp5", "libomp")


@dataclass(frozen=True)
class OpenMP:
    """How to compile and link with threads. `library` is None, and `reason` not empty, when there are none.

    Without threads `#pragma omp simd` still counts, and `_OPENMP` is not defined.
    """

    compile_flags: tuple[str, ...] = ("-fopenmp-simd",)
    link_flags: tuple[str, ...] = ()
    library: Path | None = None
    reason: str = ""


def openmp_for(compiler_kind: str) -> OpenMP:
    """Flags for a `compiler_kind` ("gcc" or "clang") that bind kernels to torch's OpenMP runtime."""
    return choose_openmp(compiler_kind, torch_runtime(), platform.system())


def choose_openmp(compiler_kind: str, library: Path | None, system: str) -> OpenMP:
    """Pure part of `openmp_for`: `library` is torch's runtime, `system` what `platform.system()` says."""
    if library is None:
        return OpenMP(reason="this torch has no OpenMP runtime that was found: kernels use one thread")
    if system == "Darwin":
        return OpenMP(("-Xclang", "-fopenmp"), (str(library), f"-Wl,-rpath,{library.parent}"), library)
    if compiler_kind == "clang" and library.name.startswith("libgomp"):
        return OpenMP(reason=f"clang can't use torch's {library.name}: kernels use one thread; install g++ for threads")
    # Named first, torch's copy satisfies every symbol; --as-needed then drops the compiler's own.
    return OpenMP(("-fopenmp",), ("-Wl,--as-needed", str(library)), library)


@lru_cache(maxsize=1)
def torch_runtime() -> Path | None:
    """The OpenMP library torch loaded (it imports torch); None when there is none."""
    import torch

    mapped = mapped_runtimes()
    if mapped:
        return mapped[0]
    folder = Path(torch.__file__).parent
    for directory in (folder / "lib", folder.parent / "torch.libs"):
        for name in _RUNTIMES:
            for found in sorted(directory.glob(f"{name}*")):
                return found
    return None


def mapped_runtimes() -> list[Path]:
    """OpenMP libraries mapped into this process, without repeats (Linux; empty elsewhere)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return [Path(p) for p in paths if any(Path(p).name.split(".")[0].split("-")[0] == name for name in _RUNTIMES)]
