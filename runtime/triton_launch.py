"""Calling printed Triton kernels: source text in, a function over tensors out.

`@triton.jit` reads a function's source file, so the text (always one that we just printed, never one found in an
artifact) is written into the kernel cache and imported from there under a private module name. On CPU tensors the
kernel runs in Triton's interpreter, whether or not TRITON_INTERPRET is set: that is how kernels are tested where there
is no GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import cache
from .errors import InvalidInputError, ToolchainError
from .locks import ForkSafeLock
from .settings import settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Launch:
    """How one call launches a kernel: number of programs, block constants, warps (of 32 threads), and whether indices
    need 64 bits."""

    grid: int
    constants: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    wide_index: bool = False

    def warps(self, warp_size: int) -> int:
        """The number of warps of `warp_size` threads that gives the same number of threads."""
        return max(1, self.num_warps * 32 // warp_size)


Configure = Callable[[tuple[int, ...], bool], Launch]  # (sizes, interpreted) -> Launch


def require_triton() -> ModuleType:
    """The triton module. Raises `ToolchainError` where it is not installed."""
    try:
        import triton
    except ImportError as error:
        raise ToolchainError(f"Triton can't be imported ({error})", expected="the package `triton` (Linux only)",
                             do="Install triton, or compile for the CPU.") from error
    module: ModuleType = triton
    return module


def wants_interpreter() -> bool:
    """True when TRITON_INTERPRET asks for the interpreter on every device."""
    return settings().triton_interpret


class TritonKernel:
    """One callable kernel: `k(buffers, sizes)`, buffers being inputs then outputs, as for C++ kernels.

    Launches on the device and the current stream of the buffers; returns without waiting. CPU tensors are interpreted.
    """

    def __init__(self, name: str, source: str, configure: Configure) -> None:
        self.name, self.source = name, source
        self._configure = configure
        self._launches: dict[tuple[tuple[int, ...], bool], Launch] = {}
        self._functions: dict[bool, Any] = {}

    def __call__(self, buffers: Sequence[torch.Tensor], sizes: Sequence[int] = ()) -> None:
        device = _one_device(self.name, buffers)
        interpret = device.type == "cpu" or wants_interpreter()
        launch = self.launch(tuple(int(s) for s in sizes), interpret)
        if launch.grid == 0:
            return
        function = self._function(interpret)
        if interpret:
            from .triton_interpret import quiet

            with quiet():
                function[(launch.grid,)](*buffers, *sizes, **self._constants(launch))
            return
        import torch

        warps = launch.warps(64 if torch.version.hip else 32)
        with torch.cuda.device(device):
            function[(launch.grid,)](*buffers, *sizes, **self._constants(launch), num_warps=warps,
                                     num_stages=launch.num_stages, enable_fp_fusion=True)

    def launch(self, sizes: tuple[int, ...], interpret: bool) -> Launch:
        """The launch at these sizes (remembered)."""
        key = (sizes, interpret)
        found = self._launches.get(key)
        if found is None:
            found = self._launches[key] = self._configure(sizes, interpret)
        return found

    def _constants(self, launch: Launch) -> dict[str, Any]:
        import triton.language as tl

        return {**launch.constants, "INDEX": tl.int64 if launch.wide_index else tl.int32}

    def _function(self, interpret: bool) -> Any:
        if interpret not in self._functions:
            self._functions[interpret] = getattr(load_module(self.source, interpret), self.name)
        return self._functions[interpret]


def _one_device(name: str, buffers: Sequence[torch.Tensor]) -> torch.device:
    devices = {b.device for b in buffers}
    if len(devices) != 1:
        raise InvalidInputError(f"kernel {name} got buffers on {sorted(map(str, devices))}", expected="one device")
    return devices.pop()


_modules: dict[tuple[str, bool], ModuleType] = {}
_modules_guard = ForkSafeLock()


def write_source(source: str) -> Path:
    """The file in the kernel cache that holds `source` (the cache checks its digest)."""
    return cache.get_or_build(cache.key_of("triton source", source), ".py", lambda path: _write(path, source))


def _write(path: Path, source: str) -> None:
    path.write_text(source)


def load_module(source: str, interpret: bool = False) -> ModuleType:
    """The module of a printed source; with `interpret` its kernels run in Triton's interpreter on CPU tensors."""
    require_triton()
    key = (cache.key_of(source), interpret)
    with _modules_guard:
        if key not in _modules:
            module = _import(write_source(source), f"_meshwright_triton_{key[0][:16]}{'_i' if interpret else ''}")
            if interpret:
                from .triton_interpret import make_interpreted

                make_interpreted(module)
            _modules[key] = module
        return _modules[key]


def load_plain_module(source: str) -> ModuleType:
    """The module of a printed program (`codegen/program_python.py`), which may hold Triton kernels or none."""
    key = (cache.key_of("program", source), False)
    with _modules_guard:
        if key not in _modules:
            _modules[key] = _import(write_source(source), f"_meshwright_program_{key[0][:16]}")
        return _modules[key]


def _import(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ToolchainError(f"{path} can't be imported", expected="a Python file in the kernel cache")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
