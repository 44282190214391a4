"""Which vector instructions CPU kernels are compiled for: decided at run time, spelled out as compiler flags.

The flags are explicit (never `-march=native`), because they are part of the cache key: a cache on a shared disk must
not hand AVX-512 code to a machine that has none.
"""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .errors import InvalidInputError
from .settings import settings

_AVX2 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "popcnt", "movbe")
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
_X86_FLAG_OF = {"bmi1": "bmi", "abm": "lzcnt"}  # how Linux names a feature -> how compilers name it


@dataclass(frozen=True)
class Isa:
    """An instruction set: `name` is avx512, avx2, neon or scalar; `flags` for the compiler; bytes of one vector."""

    name: str
    flags: tuple[str, ...]
    vector_bytes: int

    def lanes(self, itemsize: int) -> int:
        """Elements of `itemsize` bytes in one vector (at least 1)."""
        return max(1, self.vector_bytes // itemsize)


def current_isa() -> Isa:
    """The best instruction set of this machine, or the one MESHWRIGHT_ISA asks for.

    Raises `InvalidInputError` when the machine lacks the one asked for.
    """
    return choose_isa(settings().isa, platform.machine().lower(), cpu_features())


def choose_isa(wanted: str, machine: str, features: frozenset[str]) -> Isa:
    """`wanted` ("native" or a name) on a `machine` of `features` (in compilers' spelling)."""
    available = _available(machine, features)
    if wanted == "native":
        return available[0]
    for isa in available:
        if isa.name == wanted:
            return isa
    raise InvalidInputError(f"MESHWRIGHT_ISA={wanted!r} on this {machine} machine",
                            expected=f"one of native, {', '.join(i.name for i in available)}")


def _available(machine: str, features: frozenset[str]) -> list[Isa]:
    """Best first; the last one, scalar, runs everywhere."""
    found = [Isa("scalar", (), 8)]
    if machine in ("x86_64", "amd64"):
        if features.issuperset(_AVX2):
            found.insert(0, Isa("avx2", tuple(f"-m{f}" for f in _AVX2), 32))
        if features.issuperset(_AVX2 + _AVX512):
            wide = "-mprefer-vector-width=512"  # compilers prefer 256 on some CPUs that no longer clock down
            found.insert(0, Isa("avx512", tuple(f"-m{f}" for f in _AVX2 + _AVX512) + (wide,), 64))
    elif machine in ("aarch64", "arm64"):
        found.insert(0, Isa("neon", (), 16))  # NEON belongs to the base instruction set
    return found


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Features of this CPU in compilers' spelling (`avx2`, `fma`, …); empty when the system does not tell."""
    names = _linux_features() or _macos_features()
    return frozenset(_X86_FLAG_OF.get(n, n) for n in names)


def _linux_features() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _macos_features() -> frozenset[str]:
    if platform.system() != "Darwin" or platform.machine() != "x86_64":
        return frozenset()
    keys = ["machdep.cpu.features", "machdep.cpu.leaf7_features", "machdep.cpu.extfeatures"]
    try:
        run = subprocess.run(["sysctl", "-n", *keys], check=False, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(run.stdout.lower().split())
