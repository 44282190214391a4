"""Compiling Triton kernels with no GPU: does every printed kernel build, and what does it cost on each target?

`compile_ahead` answers with registers, shared memory and spills per kernel. Compiling is not launching, so the shared
memory is also compared with what the target has. Results are cached on disk; what is not cached is compiled by worker
processes (`python -m meshwright.codegen.aot_worker`), because Triton's compiler holds the interpreter lock.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime import cache
from ..runtime.errors import CompileFailure, ToolchainError, UnknownNameError
from ..runtime.settings import settings
from ..runtime.triton_launch import Launch
from .ir import Buffer, Kernel
from .templates.triton_gemm import GemmKernel, Tile, gemm_launch, print_gemm
from .triton import PRINTER_VERSION, constants_of, module_of, print_module
from .triton_config import launch_config
from .triton_ops import SIGNATURE_DTYPES

DEFAULT_SIZE = 1024  # stands for a symbolic size that no hint names
WORKERS = 2


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. `shared_bytes`: what one block (workgroup) may use at most."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS: dict[str, Target] = {
    t.name: t for t in (
        Target("sm_80", "cuda", 80, 32, 166912),  # 163 KiB, CUDA C++ Programming Guide, compute capabilities
        Target("sm_90", "cuda", 90, 32, 232448),  # 227 KiB
        Target("gfx942", "hip", "gfx942", 64, 65536),  # 64 KiB of LDS
    )
}


@dataclass(frozen=True)
class AotReport:
    """One kernel compiled for one target. Registers are per thread; `spills` is bytes moved to memory for lack of them
    (spill stores and loads on NVIDIA, spilled vector registers x 4 on AMD). `assembly` is PTX or AMD GCN text."""

    kernel: str
    target: str
    registers: int
    shared_bytes: int
    spills: int
    num_warps: int
    assembly_bytes: int
    binary: bytes
    assembly: str = ""

    @property
    def fits(self) -> bool:
        """The shared memory is within the target's limit."""
        return self.shared_bytes <= TARGETS[self.target].shared_bytes


def target_named(name: str) -> Target:
    """The target called `name`. Raises `UnknownNameError`, which names the nearest."""
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    return TARGETS[name]


def compile_ahead(kernels: Kernel | Sequence[Kernel], target: str = "sm_90",
                  hints: Mapping[str, int] | None = None) -> list[AotReport]:
    """Compile `kernels` for `target`; symbolic sizes count as `hints` say (they choose block sizes only).

    Raises `CompileFailure` with Triton's message when one does not compile, `ToolchainError` without Triton.
    """
    listed = [kernels] if isinstance(kernels, Kernel) else list(kernels)
    jobs = [make_job(k, target_named(target), hints or {}) for k in listed]
    return _compile([k.name for k in listed], jobs)


def compile_gemms_ahead(gemms: Sequence[tuple[GemmKernel, Tile]], target: str = "sm_90",
                        hints: Mapping[str, int] | None = None) -> list[AotReport]:
    """The same for products with an epilogue, each with one tile."""
    return _compile([g.name for g, _ in gemms],
                    [make_gemm_job(g, t, target_named(target), hints or {}) for g, t in gemms])


def _compile(names: Sequence[str], jobs: Sequence[dict[str, Any]]) -> list[AotReport]:
    keys = [_key(job) for job in jobs]
    known: dict[str, Any] = {key: cache.get_json(key) for key in keys}
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if known[key] is None}
    for key, result in zip(missing, run_jobs(list(missing.values())), strict=True):
        known[key] = result
        if "error" not in result:
            cache.put_json(key, result)
    return [_report(name, known[key], job) for name, key, job in zip(names, keys, jobs, strict=True)]


def make_job(kernel: Kernel, target: Target, hints: Mapping[str, int]) -> dict[str, Any]:
    """What a worker needs to compile one kernel, as JSON. Kernels that differ in name alone give equal jobs."""
    sizes = {s: hints.get(s, DEFAULT_SIZE) for s in kernel.sizes}
    launch = launch_config(kernel, sizes)
    constants = {c: launch.constants[c] for c in constants_of(kernel) if c != "INDEX"}
    return _job(print_module([kernel.renamed("kernel")]), (*kernel.inputs, *kernel.outputs), constants, launch, target)


def make_gemm_job(gemm: GemmKernel, tile: Tile, target: Target, hints: Mapping[str, int]) -> dict[str, Any]:
    """The same for a product with an epilogue."""
    launch = gemm_launch(gemm, tile, {s: hints.get(s, DEFAULT_SIZE) for s in gemm.sizes})
    return _job(module_of([print_gemm(gemm.renamed("kernel"))]), gemm.buffers, launch.constants, launch, target)


def _job(source: str, buffers: Sequence[Buffer], constants: Mapping[str, int], launch: Launch,
         target: Target) -> dict[str, Any]:
    return {
        "source": source, "function": "kernel", "constants": dict(constants),
        "pointers": {f"{b.name}_ptr": "*" + SIGNATURE_DTYPES[b.dtype] for b in buffers},
        "wide_index": launch.wide_index, "num_warps": launch.warps(target.warp_size), "num_stages": launch.num_stages,
        "target": {"name": target.name, "backend": target.backend, "arch": target.arch, "warp_size": target.warp_size},
    }


def _key(job: dict[str, Any]) -> str:
    return cache.key_of("triton aot", PRINTER_VERSION, _triton_version(), json.dumps(job, sort_keys=True))


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolchainError("Triton is not installed", expected="the package `triton` (Linux only)",
                             do="Install triton to compile for GPUs.") from error


def run_jobs(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compile `jobs` in worker processes; results in the same order."""
    if not jobs:
        return []
    count = min(settings().compile_jobs or WORKERS, len(jobs))
    with tempfile.TemporaryDirectory(prefix="meshwright-aot-") as folder:
        workers = [_start_worker(Path(folder), i, jobs[i::count]) for i in range(count)]
        parts = [_collect(*worker) for worker in workers]
    results: list[dict[str, Any]] = [{} for _ in jobs]
    for i, part in enumerate(parts):
        results[i::count] = part
    return results


def _start_worker(folder: Path, number: int, jobs: Sequence[dict[str, Any]]) -> tuple[subprocess.Popen[str], Path]:
    asked, answered = folder / f"jobs{number}.json", folder / f"results{number}.json"
    asked.write_text(json.dumps(list(jobs)))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    package = __name__.rpartition(".")[0]
    command = [sys.executable, "-m", f"{package}.aot_worker", str(asked), str(answered)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    return process, answered


def _collect(process: subprocess.Popen[str], answered: Path) -> list[dict[str, Any]]:
    _, errors = process.communicate()
    if process.returncode != 0 or not answered.exists():
        raise CompileFailure(f"the Triton compiler process ended with {process.returncode}: {errors[-2000:]}")
    results: list[dict[str, Any]] = json.loads(answered.read_text())
    return results


def _report(name: str, result: dict[str, Any], job: dict[str, Any]) -> AotReport:
    if "error" in result:
        raise CompileFailure(f"Triton could not compile {name} for {job['target']['name']}: {result['error']}",
                             do=f"Its source:\n{job['source']}")
    return AotReport(name, job["target"]["name"], result["registers"], result["shared_bytes"], result["spills"],
                     job["num_warps"], len(result["assembly"]), base64.b64decode(result["binary"]), result["assembly"])
