"""Keeping the kernel cache under a size: what was used longest ago goes first.

An entry's modification time is its last use (`mark_used`). Removing happens under the entry's own lock, and never
within an hour of its last use: a process that was given a path may still be about to load it. Lock files are empty and
stay, because another process may be waiting on one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import filelock

from .locks import ForkSafeLock

log = logging.getLogger(__name__)

LOCK_SUFFIX = ".lock"
DIGEST_SUFFIX = ".sha256"
IN_USE_S = 3600.0  # an entry used since then may be about to be loaded by some process
TARGET = 0.9  # of the limit: a sweep makes room for more than one entry
SWEEP_SHARE = 1 / 16  # of the limit: how much this process adds before it looks at the directory again


def mark_used(entry: Path) -> None:
    """Remember that `entry` was wanted now. An entry that is not there, or can't be touched, is left alone."""
    with contextlib.suppress(OSError):
        os.utime(entry)


@dataclass
class Sweeper:
    """Decides when one process looks at the directory: at its first build and after every `SWEEP_SHARE` it adds."""

    _since: int | None = None

    def __post_init__(self) -> None:
        self._guard = ForkSafeLock()

    def added(self, directory: Path, size_bytes: int, limit_bytes: int) -> None:
        """An entry of `size_bytes` was built; sweep when it is time. `limit_bytes` 0: no limit."""
        if limit_bytes <= 0:
            return
        with self._guard:
            due = self._since is None or self._since + size_bytes > limit_bytes * SWEEP_SHARE
            self._since = 0 if due else (self._since or 0) + size_bytes
        if due:
            evict(directory, limit_bytes)


@dataclass(frozen=True)
class _Entry:
    path: Path
    size_bytes: int
    used: float  # seconds since the epoch


def evict(directory: Path, limit_bytes: int) -> int:
    """Remove entries, longest unused first, until the directory is below `TARGET` of a limit it has outgrown; the
    number removed. What can't be removed (in use, locked, no permission) is passed over."""
    entries = _entries(directory)
    size_bytes = sum(e.size_bytes for e in entries)
    removed = 0
    if size_bytes <= limit_bytes:
        return 0
    for entry in sorted(entries, key=lambda e: e.used):
        if size_bytes <= limit_bytes * TARGET:
            break
        if _remove(entry.path):
            size_bytes -= entry.size_bytes
            removed += 1
    log.debug("removed %d of %d entries of %s, %d bytes are left", removed, len(entries), directory, size_bytes)
    return removed


def _remove(entry: Path) -> bool:
    """Remove an entry that is idle: nobody holds its lock, and its last use is long ago (looked up under the lock)."""
    lock = filelock.FileLock(entry.with_name(entry.name + LOCK_SUFFIX), timeout=0)
    try:
        with lock:
            if time.time() - entry.stat().st_mtime < IN_USE_S:
                return False
            entry.with_name(entry.name + DIGEST_SUFFIX).unlink(missing_ok=True)  # first: without it there is no entry
            entry.unlink()
            return True
    except (OSError, filelock.Timeout):
        return False


def _entries(directory: Path) -> list[_Entry]:
    """Every entry with its digest's size. Folders and files that vanish meanwhile are passed over."""
    found = []
    for folder in _folders(directory):
        with contextlib.suppress(OSError), os.scandir(folder) as files:
            sizes = {f.name: f.stat(follow_symlinks=False) for f in files if f.is_file(follow_symlinks=False)}
            for name, status in sizes.items():
                if not name.endswith((LOCK_SUFFIX, DIGEST_SUFFIX)):
                    digest = sizes.get(name + DIGEST_SUFFIX)
                    size_bytes = status.st_size + (digest.st_size if digest else 0)
                    found.append(_Entry(Path(folder, name), size_bytes, status.st_mtime))
    return found


def _folders(directory: Path) -> list[str]:
    """The folders entries lie in; those of builds in progress are deeper."""
    with contextlib.suppress(OSError), os.scandir(directory) as found:
        return [f.path for f in found if f.is_dir(follow_symlinks=False)]
    return []
