"""The cache stays under its limit: what was used longest ago goes, what may be in use stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import filelock
import pytest

from meshwright.runtime import cache
from meshwright.runtime.cache import KernelCache, key_of
from meshwright.runtime.cache_eviction import evict

SIZE = 1000
ENTRY = SIZE + 65  # with its digest: 64 digits and a line end


def build(path: Path) -> None:
    path.write_bytes(b"x" * SIZE)


def filled(directory: Path, ages_h: list[float], limit_bytes: int = 0) -> tuple[KernelCache, list[Path]]:
    """A cache whose entries were used that many hours ago."""
    kernels = KernelCache(directory, limit_bytes)
    entries = [kernels.get_or_build(key_of(str(i)), ".so", build) for i in range(len(ages_h))]
    for entry, age_h in zip(entries, ages_h, strict=True):
        os.utime(entry, (time.time() - age_h * 3600,) * 2)
    return kernels, entries


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    kernels, entries = filled(tmp_path / "c", [5, 9, 2, 7, 3])
    assert evict(kernels.directory, 4 * ENTRY) == 2  # down to nine tenths
    assert [e.exists() for e in entries] == [True, False, True, False, True]
    assert kernels.size() == (3, 3 * ENTRY)


def test_a_directory_under_its_limit_is_left_alone(tmp_path: Path) -> None:
    kernels, entries = filled(tmp_path / "c", [5, 9])
    assert evict(kernels.directory, 2 * ENTRY) == 0 and all(e.exists() for e in entries)


def test_what_was_used_within_the_hour_stays(tmp_path: Path) -> None:
    kernels, entries = filled(tmp_path / "c", [0.9, 0.1, 1.1])
    assert evict(kernels.directory, 1) == 1
    assert [e.exists() for e in entries] == [True, True, False]


@pytest.mark.parametrize("used", ["built", "json"])
def test_a_hit_counts_as_a_use(tmp_path: Path, used: str) -> None:
    kernels, entries = filled(tmp_path / "c", [9, 9])
    if used == "built":
        assert kernels.get_or_build(key_of("0"), ".so", build) == entries[0]
    else:
        kernels.put_json(key_of("j"), [1])
        entries[0] = kernels._entry(key_of("j"), ".json")
        os.utime(entries[0], (0, 0))
        assert kernels.get_json(key_of("j")) == [1]
    evict(kernels.directory, 1)
    assert entries[0].exists() and not entries[1].exists()


def test_an_entry_whose_lock_is_held_stays(tmp_path: Path) -> None:
    kernels, entries = filled(tmp_path / "c", [9, 9])
    with filelock.FileLock(entries[0].with_name(entries[0].name + ".lock")):
        assert evict(kernels.directory, 1) == 1
    assert entries[0].exists() and not entries[1].exists()


def test_building_keeps_the_cache_under_its_limit(tmp_path: Path) -> None:
    filled(tmp_path / "c", [9] * 6)
    kernels = KernelCache(tmp_path / "c", 4 * ENTRY)
    new = kernels.get_or_build(key_of("new"), ".so", build)
    assert new.exists() and kernels.size() == (3, 3 * ENTRY)
    rebuilt = kernels.get_or_build(key_of("0"), ".so", build)
    assert rebuilt.read_bytes() == b"x" * SIZE


def test_the_limit_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path))
    assert cache.default_cache().limit_bytes == 4 << 30
    monkeypatch.setenv("MESHWRIGHT_CACHE_LIMIT", f"{4 * ENTRY}")
    filled(tmp_path / "kernels", [9] * 6)
    cache.get_or_build(key_of("new"), ".so", build)
    assert cache.default_cache().size() == (3, 3 * ENTRY)


def test_nothing_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert evict(tmp_path / "gone", 1) == 0
