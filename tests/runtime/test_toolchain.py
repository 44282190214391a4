"""From C++ text to a loaded library: found, compiled once, refused with a sentence."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.runtime.cache import default_cache, is_whole
from meshwright.runtime.errors import CompileFailure, MeshwrightWarning, ToolchainError
from meshwright.runtime.toolchain import Source, compile_many, compile_shared, find_compiler, load_shared, toolchain

EXPORT = 'extern "C" __attribute__((visibility("default")))'
FORTY_TWO = f"{EXPORT} int answer() {{ return 42; }}\n"
GXX = shutil.which("g++") or shutil.which("c++")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cold cache."""
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def counted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes its time and writes a line into the returned file for every source."""
    log = fresh / "compiled.txt"
    return _wrapper(fresh, monkeypatch, f'case "$*" in *--version*) ;; *) echo run >> {log}; sleep 0.3 ;; esac', log)


def _wrapper(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, log: Path) -> Path:
    program = folder / "wrapped-g++"
    program.write_text(f'#!/bin/sh\n{script}\nexec {GXX} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("MESHWRIGHT_CXX", str(program))
    return log


def test_compile_and_call(fresh: Path) -> None:
    path = compile_shared(FORTY_TWO)
    assert load_shared(path).answer() == 42 and path.suffix == ".so" and is_whole(path)
    assert load_shared(path) is load_shared(path)


def test_second_time_runs_no_compiler(counted: Path) -> None:
    assert compile_shared(FORTY_TWO) == compile_shared(FORTY_TWO)
    assert counted.read_text().count("run") == 1


def test_what_makes_another_entry(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [compile_shared(FORTY_TWO), compile_shared(FORTY_TWO + "\n"),
             compile_shared(FORTY_TWO, extra_flags=["-O1"]), compile_shared(FORTY_TWO, libtorch=True)]
    if toolchain().isa.name != "scalar":
        monkeypatch.setenv("MESHWRIGHT_ISA", "scalar")
        paths.append(compile_shared(FORTY_TWO))
    assert len(set(paths)) == len(paths)


def test_header_is_part_of_the_key(fresh: Path) -> None:
    source = f'#include "word.h"\n{EXPORT} int answer() {{ return WORD; }}'
    for word in (7, 8):
        (fresh / "word.h").write_text(f"#define WORD {word}\n")
        assert load_shared(compile_shared(source, includes=[fresh])).answer() == word


@pytest.mark.parametrize("damage", ["truncate", "tamper"])
def test_damaged_library_is_compiled_again(counted: Path, damage: str) -> None:
    path = compile_shared(FORTY_TWO)
    data = path.read_bytes()
    path.write_bytes(data[:100] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    assert load_shared(compile_shared(FORTY_TWO)).answer() == 42
    assert counted.read_text().count("run") == 2 and path.read_bytes() == data


def test_two_processes_at_once_compile_once(counted: Path) -> None:
    code = f"from meshwright.runtime.toolchain import *; print(load_shared(compile_shared({FORTY_TWO!r})).answer())"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["42", "42"]
    assert counted.read_text().count("run") == 1


def test_many_at_once(counted: Path) -> None:
    sources = [f"{EXPORT} int answer() {{ return {i}; }}" for i in range(4)]
    paths = compile_many([*sources, sources[0], Source(sources[1])], jobs=4)
    assert [load_shared(p).answer() for p in paths] == [0, 1, 2, 3, 0, 1]
    assert counted.read_text().count("run") == 4
    assert paths[0] == paths[4] and paths[1] == paths[5]


def test_jobs_overlap(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two compilers that each wait for the other's start: one after the other, they would wait in vain."""
    meet = f'case "$*" in *--version*) ;; *) touch {fresh}/$$.started; for i in $(seq 100); do ' \
           f'[ "$(ls {fresh}/*.started | wc -l)" -ge 2 ] && break; [ $i = 100 ] && exit 9; sleep 0.1; done ;; esac'
    _wrapper(fresh, monkeypatch, meet, fresh)
    assert len(set(compile_many([FORTY_TWO, FORTY_TWO + " "], jobs=2))) == 2


def test_one_bad_source_among_many(fresh: Path) -> None:
    with pytest.raises(CompileFailure):
        compile_many([FORTY_TWO, "int broken( {"])
    assert default_cache().size()[0] == 1  # the good one was kept


def test_rejected_source(fresh: Path) -> None:
    with pytest.raises(CompileFailure, match="error") as caught:
        compile_shared("int broken( {\n")
    kept = Path(str(caught.value.source_path))
    assert kept.read_text() == "int broken( {\n" and str(kept) in str(caught.value)
    kept.unlink()


def test_libtorch_shim(fresh: Path) -> None:
    source = f"""#include <torch/csrc/inductor/aoti_torch/c/shim.h>
    {EXPORT} int dtype() {{ return aoti_torch_dtype_float32(); }}"""
    assert load_shared(compile_shared(source, libtorch=True)).dtype() == 6


def test_no_compiler_on_path(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    for name in ("MESHWRIGHT_CXX", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ToolchainError, match="no C\\+\\+ compiler on PATH.*g\\+\\+.*MESHWRIGHT_CXX"):
        compile_shared(FORTY_TWO)


@pytest.mark.parametrize("name", ["no-such-compiler", "/nowhere/g++"])
def test_named_compiler_that_is_missing(fresh: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MESHWRIGHT_CXX", name)
    with pytest.raises(ToolchainError, match=name.replace("+", "\\+")):
        find_compiler()


def test_named_compiler_that_does_not_work(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_CXX", shutil.which("false") or "false")
    with pytest.raises(ToolchainError, match="--version ended with 1"):
        find_compiler()


def test_compiler_with_arguments(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in (7, 8):  # the arguments are part of the key
        monkeypatch.setenv("MESHWRIGHT_CXX", f"{GXX} -DWORD={word}")
        path = compile_shared(f"{EXPORT} int answer() {{ return WORD; }}")
        assert load_shared(path).answer() == word


@pytest.mark.parametrize("message", ["No space left on device", "Disk quota exceeded"])
def test_full_disk_compiles_elsewhere(fresh: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    full = f'case "$PWD" in {fresh}/cache/*) echo "final link failed: {message}" >&2; exit 1 ;; esac'
    _wrapper(fresh, monkeypatch, full, fresh)
    with pytest.warns(MeshwrightWarning, match=message):
        path = compile_shared(FORTY_TWO)
    assert load_shared(path).answer() == 42 and fresh not in path.parents


def test_the_compilers_temporary_files_lie_in_the_cache(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full or read-only TMPDIR does not matter where the cache is usable."""
    monkeypatch.setenv("TMPDIR", str(fresh / "missing"))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    wrong = f'case "$*" in *--version*) ;; *) case "$TMPDIR$LC_ALL" in {fresh}/cache/*C) ;; *) exit 1 ;; esac ;; esac'
    _wrapper(fresh, monkeypatch, wrong, fresh)
    assert load_shared(compile_shared(FORTY_TWO)).answer() == 42


@pytest.mark.parametrize(("script", "message"), [
    ("kill -SEGV $$", "ended with -11"), ("exit 0", "wrote no library"), ("exit 3", "ended with 3"),
])
def test_a_compiler_that_crashes_is_one_sentence(fresh: Path, monkeypatch: pytest.MonkeyPatch, script: str,
                                                 message: str) -> None:
    _wrapper(fresh, monkeypatch, f'case "$*" in *--version*) ;; *) {script} ;; esac', fresh)
    with pytest.raises(CompileFailure, match=message) as caught:
        compile_shared(FORTY_TWO)
    Path(str(caught.value.source_path)).unlink()
    assert default_cache().size() == (0, 0)


def test_a_library_the_system_refuses_is_one_sentence(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = 'for out; do :; done; echo x > $out; exit 0'  # the output is the last argument
    _wrapper(fresh, monkeypatch, f'case "$*" in *--version*) ;; *) {garbage} ;; esac', fresh)
    with pytest.raises(ToolchainError, match="can't be loaded.*MESHWRIGHT_CACHE_DIR"):
        load_shared(compile_shared(FORTY_TWO))
