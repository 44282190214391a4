"""The C++ compiler: finding it, describing it for cache keys, and turning source text into a loaded library.

`compile_shared(source)` is the one way from C++ text to a `.so`: through the kernel cache, keyed by the text, the
compiler's version, the instruction set and the flags. No compiler is `ToolchainError`; a rejected source is
`CompileFailure` with the compiler's first words and the path of the kept source.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from . import cache
from .errors import CompileFailure, ToolchainError
from .isa import Isa, current_isa
from .locks import ForkSafeLock
from .openmp import OpenMP, openmp_for
from .settings import settings

COMPILE_TIMEOUT_S = 300.0
# Exceptions and errno are not observed by kernels; a*b+c stays two roundings, so that every ISA gives the same bits.
BASE_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
              "-ffp-contract=off", "-w")
_ERROR_LINES = 12
_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}
Library = TypeVar("Library", bound=ctypes.CDLL)
_DEFAULT_COMPILERS = ("g++", "c++", "clang++")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that starts it, the first line of `--version`, and "gcc" or "clang"."""

    command: tuple[str, ...]
    version: str
    kind: str


@dataclass(frozen=True)
class Toolchain:
    """All that decides how a source becomes machine code here."""

    compiler: Compiler
    isa: Isa
    openmp: OpenMP

    def identity(self) -> tuple[str, ...]:
        """What belongs into a cache key besides the source: no environment's path, so that environments share."""
        library = self.openmp.library.name if self.openmp.library else "no OpenMP"
        arguments = self.compiler.command[1:]
        return (self.compiler.version, *arguments, platform.machine(), self.isa.name, *self.isa.flags,
                *self.openmp.compile_flags, library)


def find_compiler() -> Compiler:
    """The compiler that MESHWRIGHT_CXX or CXX names, else the first of g++, c++, clang++ on PATH.

    Raises `ToolchainError` when there is none or it does not start.
    """
    wanted = settings().cxx
    if wanted:
        found = shutil.which(wanted)
        return _describe((found,) if found else tuple(shlex.split(wanted)))
    for name in _DEFAULT_COMPILERS:
        if path := shutil.which(name):
            return _describe((path,))
    raise ToolchainError("no C++ compiler on PATH", expected=f"one of {', '.join(_DEFAULT_COMPILERS)}",
                         do="Install one (for example g++), or name it in MESHWRIGHT_CXX.")


def toolchain() -> Toolchain:
    """Compiler, instruction set and OpenMP as the settings ask for now. Raises `ToolchainError`."""
    compiler = find_compiler()
    return Toolchain(compiler, current_isa(), openmp_for(compiler.kind))


def compile_shared(source: str, *, includes: Sequence[str | Path] = (), extra_flags: Sequence[str] = (),
                   libtorch: bool = False) -> Path:
    """Compile C++17 text to a shared library, through the cache; the path of the library.

    `libtorch=True` adds torch's headers and links torch's C shim (for the host program). Symbols are hidden unless
    marked `extern "C" __attribute__((visibility("default")))`. The text of the headers (`*.h`) in the folders
    `includes` is part of the cache key. Raises `ToolchainError` or `CompileFailure`.
    """
    tools = toolchain()
    key = cache.key_of("c++", source, *tools.identity(), *BASE_FLAGS, *_headers(includes), "flags",
                       *extra_flags, _torch_version() if libtorch else "no torch")
    command = _command(tools, includes, extra_flags, libtorch)
    return cache.get_or_build(key, ".so", lambda target: _compile(command, source, target))


@dataclass(frozen=True)
class Source:
    """One translation unit for `compile_many`; the fields are the arguments of `compile_shared`."""

    text: str
    includes: tuple[str, ...] = ()
    extra_flags: tuple[str, ...] = ()
    libtorch: bool = False


def compile_many(sources: Sequence[Source | str], *, jobs: int | None = None) -> list[Path]:
    """`compile_shared` of every source, several compilers at once (the threads here only wait for them).

    Equal sources are compiled once. Raises the first failure in the order of `sources`, after all have ended.
    """
    units = [Source(s) if isinstance(s, str) else s for s in sources]
    unique = list(dict.fromkeys(units))
    with ThreadPoolExecutor(max_workers=jobs or compile_jobs()) as pool:
        futures = {unit: pool.submit(_compile_unit, unit) for unit in unique}
    return [futures[unit].result() for unit in units]


def compile_jobs() -> int:
    """How many compilers to run at once: MESHWRIGHT_COMPILE_JOBS or the CPUs this process may use."""
    asked = settings().compile_jobs
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_loaded: dict[Path, ctypes.CDLL] = {}
_loaded_guard = ForkSafeLock()


def load_shared(path: Path) -> ctypes.CDLL:
    """Load a library made by `compile_shared` (once per process). torch is loaded first: its OpenMP is the one used."""
    import torch  # noqa: F401

    with _loaded_guard:
        if path not in _loaded:
            _loaded[path] = open_library(path, ctypes.CDLL)
        return _loaded[path]


def open_library(path: Path, kind: type[Library], mode: int = ctypes.DEFAULT_MODE) -> Library:
    """Load a library as `kind`. Raises `ToolchainError` where the system refuses to."""
    try:
        return kind(str(path), mode=mode)
    except OSError as error:
        raise ToolchainError(f"a compiled library can't be loaded: {error}",
                             do="Point MESHWRIGHT_CACHE_DIR elsewhere where its disk is mounted noexec; otherwise "
                             "delete the file, and it is compiled again.") from error


def _compile_unit(unit: Source) -> Path:
    return compile_shared(unit.text, includes=unit.includes, extra_flags=unit.extra_flags, libtorch=unit.libtorch)


def _describe(command: tuple[str, ...]) -> Compiler:
    program = shutil.which(command[0]) if command else None
    if program is None:
        raise ToolchainError(f"the C++ compiler {' '.join(command)!r} was not found",
                             expected="a program on PATH or a path",
                             do="Correct MESHWRIGHT_CXX (or CXX), or unset it to search PATH.")
    stamp = os.stat(program)
    return _version_of((program, *command[1:]), stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=16)
def _version_of(command: tuple[str, ...], _mtime_ns: int, _size: int) -> Compiler:
    """Ask once per process and per state of the file."""
    try:
        run = subprocess.run([*command, "--version"], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{command[0]} --version failed: {error}",
                             do="Name a working C++ compiler in MESHWRIGHT_CXX.") from error
    if run.returncode:
        raise ToolchainError(f"{command[0]} --version ended with {run.returncode}: {run.stderr.strip()[:200]}",
                             do="Name a working C++ compiler in MESHWRIGHT_CXX.")
    first = (run.stdout.strip().splitlines() or ["unknown"])[0]
    return Compiler(command, first, "clang" if "clang" in run.stdout.lower() else "gcc")


def _command(tools: Toolchain, includes: Sequence[str | Path], extra_flags: Sequence[str], libtorch: bool) -> list[str]:
    """The command line up to the source file; `_compile` adds source and output."""
    command = [*tools.compiler.command, *BASE_FLAGS, *tools.isa.flags, *tools.openmp.compile_flags, *extra_flags]
    command += [f"-I{Path(path).absolute()}" for path in includes]
    link = list(tools.openmp.link_flags)
    if libtorch:
        folder = _torch_folder()
        command += [f"-I{folder / 'include'}"]
        link += [f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    return [*command, "{source}", *link]


def _headers(includes: Sequence[str | Path]) -> list[str]:
    """Names and texts of all headers, in a fixed order; not the folders, which differ between environments."""
    files = [file for folder in includes for file in sorted(Path(folder).glob("*.h"))]
    return [word for file in files for word in (file.name, file.read_text())]


def _compile(command: list[str], source: str, target: Path) -> None:
    name = "kernel.cpp"  # the same for all, so that messages are short and no path gets into the library
    target.with_name(name).write_text(source)
    line = [name if word == "{source}" else word for word in command] + ["-o", target.name]
    # Its own temporary files beside the library: one disk that can be full instead of two. Messages in English: some
    # are looked for below.
    environment = {**os.environ, "TMPDIR": str(target.parent), "LC_ALL": "C"}
    try:
        run = subprocess.run(line, check=False, capture_output=True, text=True, errors="replace", cwd=target.parent,
                             timeout=COMPILE_TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired as error:
        raise CompileFailure(f"{line[0]} did not end within {COMPILE_TIMEOUT_S:.0f} s",
                             source_path=_keep(source)) from error
    except OSError as error:
        raise ToolchainError(f"{line[0]} could not be started: {error}") from error
    if run.returncode == 0 and target.exists():
        return
    for code, message in _FULL.items():
        if message in run.stderr:
            raise OSError(code, message, str(target.parent.parent))
    raise _failure(line, run.returncode, run.stderr, source)


def _failure(line: list[str], status: int, stderr: str, source: str) -> CompileFailure:
    kept = _keep(source)
    first = "\n  ".join(_error_lines(stderr))
    what = f"ended with {status}" if status else "ended with 0 and wrote no library"
    return CompileFailure(f"{line[0]} {what}:\n  {first}\n", source_path=kept,
                          do=f"The source is kept in {kept}; the command was: {shlex.join(line)}")


def _error_lines(stderr: str) -> list[str]:
    """The first lines from the first error on: what comes before is usually 'In file included from'."""
    lines = stderr.strip().splitlines() or ["(it printed nothing)"]
    start = next((i for i, line in enumerate(lines) if "error" in line), 0)
    return lines[start:start + _ERROR_LINES]


def _keep(source: str) -> str:
    """Write a rejected source where the user can look at it; its path, or why it could not be kept."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="meshwright-rejected-", suffix=".cpp", delete=False) as file:
            file.write(source)
            return file.name
    except OSError as error:
        return f"(nowhere: {error})"


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def _torch_version() -> str:
    import torch

    return str(torch.__version__)
