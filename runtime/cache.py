"""The kernel cache on disk: built files and small JSON values, each keyed by a SHA-256 of what it depends on.

An entry is two files: `<key><suffix>` and `<key><suffix>.sha256`, the digest of its content. An entry whose content
and digest disagree (cut short, edited) does not exist: it is built again. Writing is a temporary file in the same
directory, then `os.replace`; a lock file per entry lets one of several processes build while the others wait. The
directory has mode 0700 and must belong to this user. Where it can't be used (read-only, full, someone else's), a
warning is given once and a private temporary directory takes its place until the process ends. When the directory
outgrows its limit, what was used longest ago goes (see `cache_eviction`).
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from .cache_eviction import DIGEST_SUFFIX, LOCK_SUFFIX, Sweeper, mark_used
from .errors import CacheError, MeshwrightWarning
from .locks import ForkSafeLock
from .settings import settings

log = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 600.0  # longer than any one compile; past it this process builds for itself
_BUILD_PREFIX = ".build-"
_UNUSABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.ENOTSUP,
             errno.ENOSYS, errno.EIO, errno.ENOTDIR, errno.EFBIG}


def key_of(*parts: str) -> str:
    """The key of an entry that depends on `parts` (order and borders count): 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


class KernelCache:
    """Built files under one directory. Safe to share between threads and processes. `limit_bytes`: the size it is kept
    under, 0 for no limit."""

    def __init__(self, directory: Path, limit_bytes: int = 0) -> None:
        self._wanted = directory
        self.limit_bytes = limit_bytes
        self._directory: Path | None = None
        self._guard = ForkSafeLock()
        self._sweeper = Sweeper()

    @property
    def directory(self) -> Path:
        """Where entries live now: the directory asked for or, when that is unusable, a private temporary one."""
        with self._guard:
            if self._directory is None:
                try:
                    _make_private(self._wanted)
                    self._directory = self._wanted
                except OSError as error:
                    self._directory = _temporary_directory(self._wanted, error)
            return self._directory

    @property
    def is_temporary(self) -> bool:
        """True when the directory asked for was unusable."""
        return self.directory != self._wanted

    def get_or_build(self, key: str, suffix: str, build: Callable[[Path], None]) -> Path:
        """The file of `key`; `build(path)` writes it when there is none that is whole.

        `build` gets a temporary path in the cache's directory with the same suffix. What it raises reaches the caller,
        except an `OSError` that means the directory is unusable: then it is called again elsewhere. Raises `CacheError`
        when that is unusable too.
        """
        while True:
            entry = self._entry(key, suffix)
            mark_used(entry)
            if is_whole(entry):
                return entry
            try:
                self._build_locked(entry, build)
                break
            except (OSError, filelock.Timeout) as error:
                if not _directory_is_unusable(error):
                    raise
                self._move_away(entry.parent.parent, error)  # at most twice: it raises when there is nowhere to go
        self._sweeper.added(self.directory, _size_of(entry), self.limit_bytes)
        return entry

    def get_json(self, key: str) -> Any:
        """The JSON value stored under `key`, or None when there is none that is whole."""
        entry = self._entry(key, ".json")
        mark_used(entry)
        try:
            return json.loads(entry.read_text()) if is_whole(entry) else None
        except (OSError, ValueError):
            return None

    def put_json(self, key: str, value: Any) -> None:
        """Store a JSON value, replacing any older one. Where it can't be stored it is forgotten: a cache may forget."""
        text = json.dumps(value, sort_keys=True)
        entry = self._entry(key, ".json")
        try:
            _install(entry, lambda path: path.write_text(text))
        except OSError as error:
            log.warning("could not remember %s: %s", entry, error)

    def size(self) -> tuple[int, int]:
        """(number of entries, bytes they take with their digests)."""
        files = [f for f in _files(self.directory) if f.suffix != LOCK_SUFFIX]
        entries = [f for f in files if f.suffix != DIGEST_SUFFIX]
        return len(entries), sum(_size_of(f) for f in files)

    def clear(self) -> int:
        """Delete every entry; the number deleted. Files that are loaded somewhere stay usable there.

        What another process is building just now is left alone; what a killed one left behind goes.
        """
        entries, _ = self.size()
        for file in _files(self.directory):
            file.unlink(missing_ok=True)
        for folder in self.directory.glob(f"*/{_BUILD_PREFIX}*"):
            if time.time() - folder.stat().st_mtime > LOCK_TIMEOUT_S:
                shutil.rmtree(folder, ignore_errors=True)
        return entries

    def _entry(self, key: str, suffix: str) -> Path:
        if not key or not all(c in "0123456789abcdef" for c in key):
            raise CacheError(f"cache key {key!r}", expected="hexadecimal digits", do="Make keys with key_of().")
        return self.directory / key[:2] / f"{key}{suffix}"

    def _build_locked(self, entry: Path, build: Callable[[Path], None]) -> None:
        entry.parent.mkdir(mode=0o700, exist_ok=True)
        with filelock.FileLock(entry.with_name(entry.name + LOCK_SUFFIX), timeout=LOCK_TIMEOUT_S):
            if not is_whole(entry):  # another process may have built it while we waited
                _install(entry, build)

    def _move_away(self, failed: Path, error: Exception) -> None:
        """Leave the directory in which something failed, unless another thread has left it meanwhile. Raises
        `CacheError` when that was the temporary one: there is no third."""
        with self._guard:
            if self._directory != failed:
                return
            if failed != self._wanted:
                raise _nowhere(self._wanted, "see the warning before", error) from error
            self._directory = _temporary_directory(self._wanted, error)


_caches: dict[Path, KernelCache] = {}
_caches_guard = ForkSafeLock()


def default_directory() -> Path:
    """`kernels` under MESHWRIGHT_CACHE_DIR, else under the user's cache directory on this platform.

    A directory of its own, so that setting its mode and clearing it touch nothing else in the directory given.
    """
    base = settings().cache_dir or Path(platformdirs.user_cache_dir("meshwright", appauthor=False))
    return base / "kernels"


def default_cache() -> KernelCache:
    """The cache the settings ask for now (one object per directory and process)."""
    directory, limit = default_directory(), settings().cache_limit
    with _caches_guard:
        found = _caches.setdefault(directory, KernelCache(directory))
    found.limit_bytes = limit
    return found


def get_or_build(key: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """`KernelCache.get_or_build` of the default cache."""
    return default_cache().get_or_build(key, suffix, build)


def get_json(key: str) -> Any:
    """`KernelCache.get_json` of the default cache."""
    return default_cache().get_json(key)


def put_json(key: str, value: Any) -> None:
    """`KernelCache.put_json` of the default cache."""
    default_cache().put_json(key, value)


def is_whole(entry: Path) -> bool:
    """True when `entry` exists and its content has the digest stored beside it."""
    try:
        wanted = _digest_file(entry).read_text().strip()
        return wanted == _digest(entry)
    except (OSError, UnicodeDecodeError):
        return False


def _digest_file(entry: Path) -> Path:
    return entry.with_name(entry.name + DIGEST_SUFFIX)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _install(entry: Path, build: Callable[[Path], Any]) -> None:
    """Build into a temporary file, then move it and its digest into place."""
    entry.parent.mkdir(mode=0o700, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=_BUILD_PREFIX, dir=entry.parent))
    try:
        built, digest = work / entry.name, work / "digest"
        build(built)
        digest.write_text(_digest(built) + "\n")
        _flush(built)
        os.replace(built, entry)
        os.replace(digest, _digest_file(entry))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flush(path: Path) -> None:
    """Ask the disk to keep the file, so that a full disk shows itself here and not after a crash."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_private(directory: Path) -> None:
    """Create `directory` with mode 0700 and check that it belongs to this user. Raises `OSError` otherwise."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, f"belongs to user id {status.st_uid}, not {os.getuid()}", str(directory))
    if stat.S_IMODE(status.st_mode) != 0o700:
        directory.chmod(0o700)
    with tempfile.TemporaryFile(dir=directory) as probe:  # root passes os.access on a read-only mount
        probe.write(b"x")


def _directory_is_unusable(error: Exception) -> bool:
    return isinstance(error, filelock.Timeout) or (isinstance(error, OSError) and error.errno in _UNUSABLE)


def _temporary_directory(wanted: Path, error: Exception) -> Path:
    """A private directory that lives as long as this process, in place of `wanted`; warns."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="meshwright-"))
    except OSError as second:
        raise _nowhere(wanted, error, second) from second
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    warnings.warn(MeshwrightWarning(
        f"the kernel cache {wanted} can't be used ({error}); kernels of this process go to {directory} and are "
        "compiled again next time. Point MESHWRIGHT_CACHE_DIR at a writable directory."), stacklevel=3)
    return directory


def _nowhere(wanted: Path, first: object, second: Exception) -> CacheError:
    return CacheError(f"the kernel cache {wanted} is unusable ({first}), and so is a temporary one ({second})",
                      do="Free some disk space or point MESHWRIGHT_CACHE_DIR at a writable directory.")


def _files(directory: Path) -> list[Path]:
    """All files but those being built. `os.walk`, because other processes add and remove folders meanwhile."""
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(_BUILD_PREFIX)]
        found += [Path(folder, name) for name in names]
    return found


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
