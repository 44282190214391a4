"""Environment variables are read at call time, typed, and refused with a sentence when they make no sense."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from meshwright.runtime.errors import InvalidInputError
from meshwright.runtime.settings import Settings, settings


def test_defaults() -> None:
    assert settings({}) == Settings() == settings({"MESHWRIGHT_STRICT": "", "MESHWRIGHT_ISA": " "})


def test_values() -> None:
    found = settings({"MESHWRIGHT_STRICT": "1", "MESHWRIGHT_CACHE_DIR": "/c", "MESHWRIGHT_DISABLE": "fuse, moe,",
                      "MESHWRIGHT_ISA": "AVX2", "MESHWRIGHT_COMPILE_JOBS": "3", "CXX": "clang++"})
    assert found == Settings(strict=True, cache_dir=Path("/c"), disable=frozenset({"fuse", "moe"}), isa="avx2",
                             compile_jobs=3, cxx="clang++")


def test_own_variable_wins_over_cxx() -> None:
    assert settings({"MESHWRIGHT_CXX": "g++-13", "CXX": "clang++"}).cxx == "g++-13"


@pytest.mark.parametrize(("text", "size_bytes"), [
    ("0", 0), ("4096", 4096), ("500MiB", 500 << 20), ("1.5 g", 3 << 29), ("2GB", 2 << 30), ("8k", 8 << 10),
])
def test_sizes(text: str, size_bytes: int) -> None:
    assert settings({"MESHWRIGHT_CACHE_LIMIT": text}).cache_limit == size_bytes


@pytest.mark.parametrize("bad", [{"MESHWRIGHT_STRICT": "maybe"}, {"MESHWRIGHT_ISA": "sse9"},
                                 {"MESHWRIGHT_COMPILE_JOBS": "0"}, {"MESHWRIGHT_COMPILE_JOBS": "many"},
                                 {"MESHWRIGHT_CACHE_LIMIT": "lots"}, {"MESHWRIGHT_CACHE_LIMIT": "-1"}])
def test_nonsense_is_refused(bad: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        settings(bad)


def test_read_at_call_time_and_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_STRICT", "0")
    assert not settings().strict
    monkeypatch.setenv("MESHWRIGHT_STRICT", "1")
    assert settings().strict
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().strict = False  # type: ignore[misc]
