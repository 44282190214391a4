"""The one place that reads environment variables.

`settings()` reads them anew at every call, so a test or a notebook can change one between two compilations.
docs/environment.md holds the same table for users; a test compares the two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import InvalidInputError

EPILOGUES = ("measured", "always", "never")
ISA_NAMES = ("native", "avx512", "avx2", "neon", "scalar")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. Every field is one row of `VARIABLES`."""

    strict: bool = False
    cache_dir: Path | None = None
    cache_limit: int = 4 << 30
    graph_cache: bool = True
    dump: Path | None = None
    cxx: str | None = None
    disable: frozenset[str] = frozenset()
    isa: str = "native"
    split_products: bool = True
    epilogues: str = "measured"
    compile_jobs: int | None = None
    triton_interpret: bool = False


@dataclass(frozen=True)
class Variable:
    """One environment variable: `names` in order of precedence, the field it fills, how it is read, what it does."""

    names: tuple[str, ...]
    field: str
    read: Callable[[str, str], Any]
    meaning: str


def _flag(name: str, text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("", "0", "false", "no", "off"):
        return False
    raise InvalidInputError(f"{name}={text!r}", expected="1 or 0", do=f"Unset {name} or give it one of these.")


def _path(name: str, text: str) -> Path:
    return Path(text).expanduser().absolute()


def _text(name: str, text: str) -> str:
    return text.strip()


def _names(name: str, text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def _isa(name: str, text: str) -> str:
    if text.strip().lower() not in ISA_NAMES:
        raise InvalidInputError(f"{name}={text!r}", expected=f"one of {', '.join(ISA_NAMES)}")
    return text.strip().lower()


def _epilogues(name: str, text: str) -> str:
    if text.strip().lower() not in EPILOGUES:
        raise InvalidInputError(f"{name}={text!r}", expected=f"one of {', '.join(EPILOGUES)}")
    return text.strip().lower()


def _count(name: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise InvalidInputError(f"{name}={text!r}", expected="a whole number of at least 1")
    return int(text)


_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def _bytes(name: str, text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise InvalidInputError(f"{name}={text!r}", expected="a size such as 500MiB or 4GiB, or 0 for no limit")
    return int(float(found[1]) * (1 << _UNITS[found[2]]))


VARIABLES: tuple[Variable, ...] = (
    Variable(("MESHWRIGHT_STRICT",), "strict", _flag,
             "`1`: raise on Meshwright's own failures instead of running the region eagerly with a warning"),
    Variable(("MESHWRIGHT_CACHE_DIR",), "cache_dir", _path,
             "directory of the kernel cache; default: the user's cache directory of this platform"),
    Variable(("MESHWRIGHT_CACHE_LIMIT",), "cache_limit", _bytes,
             "size the kernel cache is kept under, as in `500MiB` (default `4GiB`, `0`: no limit); what was used "
             "longest ago goes first"),
    Variable(("MESHWRIGHT_GRAPH_CACHE",), "graph_cache", _flag,
             "`0`: trace and check every graph anew; by default an inference graph compiled before starts from its "
             "program in the kernel cache"),
    Variable(("MESHWRIGHT_DUMP",), "dump", _path,
             "directory into which every step of the pass pipeline is written as text"),
    Variable(("MESHWRIGHT_CXX", "CXX"), "cxx", _text,
             "C++ compiler, a name on PATH or a path; `CXX` is used when it is unset; default: g++, c++, clang++"),
    Variable(("MESHWRIGHT_DISABLE",), "disable", _names,
             "comma-separated names of passes that are switched off"),
    Variable(("MESHWRIGHT_ISA",), "isa", _isa,
             "instruction set of CPU kernels: `native` (default), `avx512`, `avx2`, `neon` or `scalar`"),
    Variable(("MESHWRIGHT_SPLIT_PRODUCTS",), "split_products", _flag,
             "`0`: no fp32 product through AMX tiles; by default they are used where they measure faster, and are as "
             "accurate as the library"),
    Variable(("MESHWRIGHT_EPILOGUES",), "epilogues", _epilogues,
             "when the element-wise kernel behind an fp32 product on the CPU runs on the product's blocks, each as it "
             "is finished: where that `measured` faster (default), `always` (such products then never go to the "
             "library where another method can do them), or `never`"),
    Variable(("MESHWRIGHT_COMPILE_JOBS",), "compile_jobs", _count,
             "how many compilers run at once; default: the number of CPUs this process may use"),
    Variable(("TRITON_INTERPRET",), "triton_interpret", _flag,
             "`1`: Triton's own switch; Triton kernels run in its interpreter, on CPU tensors"),
)


def settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of `environment` (default: the process's own). An empty value counts as unset.

    Raises `InvalidInputError` for a value that can't be read.
    """
    env = os.environ if environment is None else environment
    found: dict[str, Any] = {}
    for variable in VARIABLES:
        for name in variable.names:
            if env.get(name, "").strip():
                found[variable.field] = variable.read(name, env[name])
                break
    return Settings(**found)


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def torchrun_variables() -> dict[str, str]:
    """What torchrun set for this process, by `TORCHRUN`'s names; those that are not set are missing."""
    return {name: os.environ[name] for name in TORCHRUN if name in os.environ}


def setting_fields() -> tuple[str, ...]:
    """Names of the fields of `Settings`, in order."""
    return tuple(f.name for f in fields(Settings))


def environment_table() -> str:
    """The Markdown table of docs/environment.md."""
    lines = ["| variable | meaning |", "| --- | --- |"]
    lines += [f"| {', '.join(f'`{n}`' for n in v.names)} | {v.meaning} |" for v in VARIABLES]
    return "\n".join(lines) + "\n"
