"""The kernel cache: one build per entry, damage is detected, an unusable directory costs a warning and no result."""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwright.runtime import cache
from meshwright.runtime.cache import KernelCache, is_whole, key_of
from meshwright.runtime.errors import CacheError, MeshwrightWarning

KEY = key_of("a kernel")


class Builder:
    """Writes `content`; counts its calls; raises the errors it was given first."""

    def __init__(self, content: bytes = b"kernel", errors: tuple[Exception, ...] = ()) -> None:
        self.content, self.errors, self.paths = content, list(errors), []

    def __call__(self, path: Path) -> None:
        self.paths.append(path)
        if self.errors:
            raise self.errors.pop(0)
        path.write_bytes(self.content)


@pytest.fixture
def kernels(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "cache")


def test_keys_depend_on_parts_order_and_borders() -> None:
    assert len({key_of("a", "b"), key_of("b", "a"), key_of("ab"), key_of("ab", ""), key_of("a", "b", "")}) == 5
    assert key_of("a", "b") == key_of("a", "b") and len(key_of()) == 64


def test_builds_once(kernels: KernelCache) -> None:
    build = Builder()
    first = kernels.get_or_build(KEY, ".so", build)
    assert kernels.get_or_build(KEY, ".so", build) == first and first.read_bytes() == b"kernel"
    assert len(build.paths) == 1 and build.paths[0].suffix == ".so" and not build.paths[0].exists()
    assert KernelCache(kernels.directory).get_or_build(KEY, ".so", build) == first and len(build.paths) == 1


def test_suffixes_are_separate_entries(kernels: KernelCache) -> None:
    kernels.get_or_build(KEY, ".so", Builder(b"1"))
    assert kernels.get_or_build(KEY, ".cubin", Builder(b"2")).read_bytes() == b"2"


@pytest.mark.parametrize("damage", ["truncate", "tamper", "digest gone", "digest empty", "digest not text", "gone"])
def test_damaged_entry_is_rebuilt(kernels: KernelCache, damage: str) -> None:
    entry = kernels.get_or_build(KEY, ".so", Builder())
    digest = entry.with_name(entry.name + ".sha256")
    harm = {
        "truncate": lambda: os.truncate(entry, 3),
        "tamper": lambda: entry.write_bytes(b"kernfl"),
        "digest gone": digest.unlink,
        "digest empty": lambda: digest.write_text(""),
        "digest not text": lambda: digest.write_bytes(b"\xff\xfe"),
        "gone": entry.unlink,
    }
    harm[damage]()
    assert not is_whole(entry)
    again = Builder()
    assert kernels.get_or_build(KEY, ".so", again).read_bytes() == b"kernel"
    assert len(again.paths) == 1 and is_whole(entry)


def test_failed_build_leaves_nothing(kernels: KernelCache) -> None:
    with pytest.raises(ZeroDivisionError):
        kernels.get_or_build(KEY, ".so", Builder(errors=(ZeroDivisionError(),)))
    assert kernels.size() == (0, 0)
    assert not list(kernels.directory.rglob(".build-*"))
    assert kernels.get_or_build(KEY, ".so", Builder()).read_bytes() == b"kernel"


def test_threads_build_once(kernels: KernelCache) -> None:
    inside, build = threading.Event(), Builder()

    def slow(path: Path) -> None:
        inside.set()
        threading.Event().wait(0.2)
        build(path)

    threads = [threading.Thread(target=kernels.get_or_build, args=(KEY, ".so", slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside.is_set() and len(build.paths) == 1


def test_directory_is_private(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache").chmod(0o777)
    kernels = KernelCache(tmp_path / "cache")
    assert stat.S_IMODE(kernels.directory.stat().st_mode) == 0o700 and not kernels.is_temporary


def test_directory_given_by_the_user_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path))
    cache.get_or_build(KEY, ".so", Builder())
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    (tmp_path / "mine.txt").write_text("not a kernel")
    assert cache.default_cache().clear() == 1 and (tmp_path / "mine.txt").exists()


def test_someone_elses_directory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    kernels = KernelCache(tmp_path / "cache")
    with pytest.warns(MeshwrightWarning, match="belongs to user id"):
        assert kernels.is_temporary
    assert kernels.get_or_build(KEY, ".so", Builder()).read_bytes() == b"kernel"


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A directory nobody can write into, not even root."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /sys")
    yield Path("/sys/kernel/meshwright")


def test_read_only_directory(unwritable: Path, recwarn: pytest.WarningsRecorder) -> None:
    kernels = KernelCache(unwritable)
    build = Builder()
    entry = kernels.get_or_build(KEY, ".so", build)
    assert entry.read_bytes() == b"kernel" and kernels.get_or_build(KEY, ".so", build) == entry
    kernels.put_json(KEY, 1)
    assert kernels.get_json(KEY) == 1 and len(build.paths) == 1
    assert [w.category for w in recwarn].count(MeshwrightWarning) == 1  # once, not per entry


def test_existing_directory_that_turned_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only mount fails at the first write, whatever the modes say."""
    home = tmp_path / "cache"
    home.mkdir()
    _fail_under(monkeypatch, home, errno.EROFS)
    with pytest.warns(MeshwrightWarning, match="Read-only"):
        assert KernelCache(home).get_or_build(KEY, ".so", Builder()).read_bytes() == b"kernel"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_while_building(kernels: KernelCache, code: int) -> None:
    build = Builder(errors=(OSError(code, os.strerror(code)),))
    with pytest.warns(MeshwrightWarning, match=os.strerror(code)):
        entry = kernels.get_or_build(KEY, ".so", build)
    assert entry.read_bytes() == b"kernel" and kernels.is_temporary and len(build.paths) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second entry warns no more
        kernels.get_or_build(key_of("another"), ".so", Builder())


def test_disk_that_fills_up_under_several_threads(kernels: KernelCache) -> None:
    """All of them are building when it does; the first moves away, the others follow."""
    together, found, failed = threading.Barrier(4, timeout=30), [], []

    def work(name: str) -> None:
        def build(path: Path) -> None:
            if kernels._wanted in path.parents:
                together.wait()
                raise OSError(errno.ENOSPC, "No space left on device")
            path.write_bytes(b"kernel")
        try:
            found.append(kernels.get_or_build(key_of(name), ".so", build).read_bytes())
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(str(k),)) for k in range(4)]
    with pytest.warns(MeshwrightWarning, match="No space") as warned:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed and found == [b"kernel"] * 4 and len(warned) == 1


def test_a_full_disk_everywhere_is_the_callers_error(kernels: KernelCache) -> None:
    def build(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.warns(MeshwrightWarning, match="No space"), pytest.raises(CacheError, match="No space.*Free some disk"):
        kernels.get_or_build(KEY, ".so", build)


def test_disk_that_fills_up_while_moving_into_place(kernels: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    home = kernels.directory
    _fail_under(monkeypatch, home, errno.ENOSPC)
    with pytest.warns(MeshwrightWarning, match="No space"):
        assert kernels.get_or_build(KEY, ".so", Builder()).read_bytes() == b"kernel"


def test_nowhere_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(CacheError, match="MESHWRIGHT_CACHE_DIR"):
        KernelCache(tmp_path / "cache").get_or_build(KEY, ".so", Builder())


def test_other_errors_of_the_builder_reach_the_caller(kernels: KernelCache) -> None:
    with pytest.raises(FileNotFoundError):
        kernels.get_or_build(KEY, ".so", Builder(errors=(FileNotFoundError(errno.ENOENT, "no g++"),)))
    assert not kernels.is_temporary


def test_json(kernels: KernelCache) -> None:
    assert kernels.get_json(KEY) is None
    kernels.put_json(KEY, {"tile": [64, 32], "seconds": 0.25})
    assert KernelCache(kernels.directory).get_json(KEY) == {"tile": [64, 32], "seconds": 0.25}
    kernels.put_json(KEY, None)
    kernels.put_json(KEY, [1])
    assert kernels.get_json(KEY) == [1]
    next(kernels.directory.rglob("*.json")).write_text("[2]")
    assert kernels.get_json(KEY) is None  # edited: not believed


def test_size_and_clear(kernels: KernelCache) -> None:
    assert kernels.size() == (0, 0)
    kernels.get_or_build(KEY, ".so", Builder(b"12345"))
    kernels.put_json(key_of("b"), 1)
    assert kernels.size() == (2, 5 + 1 + 2 * 65)  # two digests of 64 digits and a line end
    assert kernels.clear() == 2 and kernels.size() == (0, 0)


def test_clear_spares_a_running_build(kernels: KernelCache) -> None:
    def build(path: Path) -> None:
        path.write_bytes(b"kernel")
        assert kernels.clear() == 0 and kernels.size() == (0, 0)

    assert kernels.get_or_build(KEY, ".so", build).read_bytes() == b"kernel"


def test_clear_removes_what_a_killed_process_left(kernels: KernelCache) -> None:
    left = kernels.directory / "ab" / ".build-x"
    left.mkdir(parents=True)
    (left / "kernel.cpp").write_text("half")
    os.utime(left, (0, 0))
    kernels.clear()
    assert not left.exists()


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "ABC", "a/b"])
def test_keys_are_hexadecimal(kernels: KernelCache, key: str) -> None:
    with pytest.raises(CacheError, match="key"):
        kernels.get_or_build(key, ".so", Builder())


def _fail_under(monkeypatch: pytest.MonkeyPatch, home: Path, code: int) -> None:
    """`os.replace` and temporary files under `home` fail with `code`."""
    import tempfile

    def guard(original, where):
        def call(*args, **kwargs):
            if str(where(args, kwargs)).startswith(str(home)):
                raise OSError(code, os.strerror(code))
            return original(*args, **kwargs)
        return call

    monkeypatch.setattr(os, "replace", guard(os.replace, lambda a, k: a[1]))
    monkeypatch.setattr(tempfile, "TemporaryFile", guard(tempfile.TemporaryFile, lambda a, k: k.get("dir")))
