"""What this machine can do: `examine()` tries every part once and says what is missing and what to do about it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from rich.markup import escape

from ..runtime import cache
from ..runtime.errors import MeshwrightError
from ..runtime.isa import current_isa
from ..runtime.toolchain import compile_shared, find_compiler, load_shared, toolchain

PACKAGES = ("meshwright", "torch", "triton", "numpy", "transformers", "onnxruntime")
GPU_TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}

_PROBE = """
extern "C" __attribute__((visibility("default"))) int threads(int asked) {
    int n = 0;
    #pragma omp parallel num_threads(asked)
    #pragma omp atomic
    n += 1;
    return n;
}
"""


@dataclass(frozen=True)
class Check:
    """One thing that was tried: did it work, what was seen, and what to do when it did not."""

    name: str
    ok: bool
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class CacheState:
    """The kernel cache: where, whether that is only a stand-in until this process ends, how much is in it, and the size
    it is kept under (0: no limit)."""

    directory: str
    temporary: bool
    entries: int
    size_bytes: int
    limit_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """Everything `meshwright doctor` shows. `packages` holds versions, None for what is not installed."""

    python: str
    platform: str
    packages: dict[str, str | None]
    checks: tuple[Check, ...]
    cache: CacheState | None
    gpus: tuple[str, ...] = field(default=())

    @property
    def can_compile_for_cpu(self) -> bool:
        return any(check.name == "C++ compiler" and check.ok for check in self.checks)

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets that kernels can be compiled for here, as `meshwright kernels --target` names them."""
        gpu = tuple(check.name.removeprefix("Triton ") for check in self.checks
                    if check.ok and check.name.removeprefix("Triton ") in GPU_TARGETS)
        return (("cpu",) if self.can_compile_for_cpu else ()) + gpu

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "checks": [asdict(check) for check in self.checks], "gpus": list(self.gpus),
                "targets": list(self.targets)}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("", "check", "seen", "what to do", title=f"Python {self.python} on {self.platform}")
        for check in self.checks:
            table.add_row("ok" if check.ok else "[red]no[/]", check.name, escape(check.detail), escape(check.advice))
        versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in self.packages.items())
        lines = [f"packages: {versions}", f"GPUs: {', '.join(self.gpus) or 'none'}",
                 f"targets: {', '.join(self.targets) or 'none'}"]
        if self.cache is not None:
            limit = f" of at most {self.cache.limit_bytes / 2**30:.1f} GiB" if self.cache.limit_bytes else ""
            kept = " (until this process ends)" if self.cache.temporary else ""
            lines.append(f"kernel cache: {self.cache.entries} entries, {self.cache.size_bytes / 2**20:.0f} MiB{limit}, "
                         f"{self.cache.free_bytes / 2**30:.0f} GiB free, in {self.cache.directory}{kept}")
        return Group(table, *map(escape, lines))


def examine() -> Diagnosis:
    """Look at this machine. Never raises: what fails is a `Check` that is not ok. Takes some seconds when cold."""
    checks = [_check("C++ compiler", _compiler), _check("instruction set", _isa), _check("OpenMP", _openmp),
              _check("kernel cache", _cache_works)]
    checks += [_check(f"Triton {name}", partial(_triton_target, name)) for name in GPU_TARGETS]
    return Diagnosis(python=sys.version.split()[0], platform=platform.platform(),
                     packages={name: _version(name) for name in PACKAGES}, checks=tuple(checks), cache=_cache_state(),
                     gpus=_gpus())


def _check(name: str, probe: Callable[[], Check | str]) -> Check:
    """Run a probe; text means it went well, and an error of any kind means it did not."""
    try:
        found = probe()
    except MeshwrightError as error:
        return Check(name, False, error.given.strip(), error.do)
    except Exception as error:  # what a compiler or a driver raises can't be listed
        return Check(name, False, f"{type(error).__name__}: {str(error).strip()[:300]}")
    return found if isinstance(found, Check) else Check(name, True, found)


def _compiler() -> str:
    compiler = find_compiler()
    if load_shared(compile_shared(_PROBE)).threads(1) != 1:
        raise MeshwrightError(f"{compiler.version} compiles, but the result computes wrongly",
                              do="Name another compiler in MESHWRIGHT_CXX.")
    return f"{compiler.version} ({' '.join(compiler.command)})"


def _isa() -> str:
    isa = current_isa()
    return f"{isa.name}, vectors of {isa.vector_bytes} bytes"


def _openmp() -> Check | str:
    openmp = toolchain().openmp
    if openmp.library is None:
        return Check("OpenMP", False, openmp.reason, "Install g++ to get kernels with several threads.")
    threads = load_shared(compile_shared(_PROBE)).threads(2)
    if threads != 2:
        return Check("OpenMP", False, f"asked {openmp.library} for 2 threads, got {threads}",
                     "Is OMP_THREAD_LIMIT or a container limiting threads?")
    return f"torch's own, {openmp.library}"


def _cache_works() -> Check | str:
    kernels = cache.default_cache()
    if kernels.is_temporary:
        return Check("kernel cache", False, f"{cache.default_directory()} can't be used",
                     "Point MESHWRIGHT_CACHE_DIR at a writable directory; until then kernels are compiled every time.")
    return str(kernels.directory)


def _cache_state() -> CacheState | None:
    try:
        kernels = cache.default_cache()
        entries, size_bytes = kernels.size()
        free_bytes = shutil.disk_usage(kernels.directory).free
    except (MeshwrightError, OSError):
        return None
    return CacheState(str(kernels.directory), kernels.is_temporary, entries, size_bytes, kernels.limit_bytes,
                      free_bytes)


def _triton_target(name: str) -> Check | str:
    if _version("triton") is None:
        return Check(f"Triton {name}", False, "Triton is not installed",
                     "It exists for Linux only; kernels for the CPU do without.")
    kernel = importlib.import_module(".doctor_kernel", __package__)
    kernel.compile_for(*GPU_TARGETS[name])
    return "compiled ahead of time"


def _gpus() -> tuple[str, ...]:
    """Names of the GPUs that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
