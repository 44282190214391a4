"""The doctor tells a healthy machine from one that lacks something, and never raises."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from meshwright.compiler import doctor
from meshwright.compiler.doctor import Check, Diagnosis, examine
from meshwright.runtime.settings import settings


def named(diagnosis: Diagnosis, name: str) -> Check:
    return next(check for check in diagnosis.checks if check.name == name)


def test_this_machine() -> None:
    found = examine()
    assert named(found, "C++ compiler").ok and named(found, "instruction set").ok and named(found, "kernel cache").ok
    assert found.packages["torch"] and found.cache is not None and found.cache.entries > 0
    assert found.cache.limit_bytes == settings().cache_limit
    assert "cpu" in found.targets
    assert json.loads(json.dumps(found.as_dict()))["targets"] == list(found.targets)
    page = io.StringIO()
    Console(file=page, width=300).print(found)
    text = page.getvalue()
    assert "C++ compiler" in text and f"torch {found.packages['torch']}" in text and found.cache.directory in text
    assert "Check(" not in text  # a table, not Python


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
def test_every_gpu_target_compiles_without_a_gpu() -> None:
    checks = [doctor._check(name, partial(doctor._triton_target, name)) for name in doctor.GPU_TARGETS]
    assert all(check.ok for check in checks), checks


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GPU_TARGETS", {})
    monkeypatch.setenv("MESHWRIGHT_CXX", "no-such-compiler")
    found = examine()
    compiler = named(found, "C++ compiler")
    assert not compiler.ok and "no-such-compiler" in compiler.detail and "MESHWRIGHT_CXX" in compiler.advice
    assert "cpu" not in found.targets


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    found = examine()
    assert not named(found, "Triton sm_90").ok and "not installed" in named(found, "Triton sm_90").detail
    assert found.targets == ("cpu",)


def test_target_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GPU_TARGETS", {"gfx1": ("hip", "gfx1", 64)})
    assert not named(examine(), "Triton gfx1").ok


def test_unusable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "GPU_TARGETS", {})
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="kernel cache"):
        found = examine()
    assert not named(found, "kernel cache").ok and found.cache is not None and found.cache.temporary
    assert found.can_compile_for_cpu
