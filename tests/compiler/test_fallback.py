"""A failure of ours runs the region eagerly, with one warning; strict mode raises; graph breaks are named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compiler import backend

from .conftest import plain_engine


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def engine_failing(at: str, kind: str | None = None):
    """An engine that fails while compiling ("compile"), or at its first ("run") or third ("third") call."""

    def engine(gm, inputs, *, kind: str, settings, report):
        if at == "compile" and kind in (wanted or kind):
            raise RuntimeError("planted: compile")
        run = plain_engine(gm, inputs, kind=kind, settings=settings, report=report)
        calls = []

        def call(args):
            calls.append(1)
            if kind in (wanted or kind) and (at == "run" or (at == "third" and len(calls) == 3)):
                args.clear()
                raise RuntimeError(f"planted: {at}")
            return run(args)

        return call

    wanted = kind
    return lambda: engine


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_STRICT", "0")


# A backward that ran once is not guarded any more: keeping its arguments would keep all activations alive.
@pytest.mark.parametrize(("at", "kind"), [(at, kind) for at in ("compile", "run", "third")
                                          for kind in ("inference", "forward", "backward")
                                          if (at, kind) != ("third", "backward")])
def test_every_stage_falls_back(lenient: None, monkeypatch: pytest.MonkeyPatch, at: str, kind: str) -> None:
    monkeypatch.setattr(backend, "_engine", engine_failing(at, kind))
    model, x = Net(), torch.randn(4, 8)
    fast = mw.compile(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(4):
            with torch.set_grad_enabled(kind != "inference"):
                out, expected = fast(x), model(x)
            torch.testing.assert_close(out, expected)
            if kind != "inference":
                torch.testing.assert_close(torch.autograd.grad(out.sum(), list(model.parameters())),
                                           torch.autograd.grad(expected.sum(), list(model.parameters())))
    ours = [w for w in seen if issubclass(w.category, mw.MeshwrightWarning)]
    assert len(ours) == 1
    assert f"planted: {at}" in str(ours[0].message)
    assert f"planted: {at}" in fast.report.fall_backs[0].reason
    assert Path(__file__).name in str(ours[0].message), "the message names the user's file, not ours"


@pytest.mark.parametrize("at", ["compile", "run"])
def test_strict_raises_the_error_itself(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    monkeypatch.setattr(backend, "_engine", engine_failing(at))
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"^planted: {at}"):
        mw.compile(Net())(torch.randn(4, 8))


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.sum(0))
        return x * self.seen


def test_a_failing_first_run_is_undone_before_eager_runs(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(gm, inputs, *, kind, settings, report):
        run = plain_engine(gm, inputs, kind=kind, settings=settings, report=report)

        def call(args):
            run(args)  # writes into the buffer
            raise RuntimeError("planted: after the mutation")

        return call

    monkeypatch.setattr(backend, "_engine", lambda: engine)
    model, twin, x = Cache(), Cache(), torch.randn(4, 8)
    fast = mw.compile(model)
    with torch.no_grad(), pytest.warns(mw.MeshwrightWarning, match="after the mutation"):
        torch.testing.assert_close(fast(x), twin(x))
    torch.testing.assert_close(model.seen, twin.seen)


def test_a_later_failure_of_a_writing_graph_is_raised(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_engine", engine_failing("third"))
    fast, x = mw.compile(Cache()), torch.randn(4, 8)
    with torch.no_grad():
        fast(x)
        fast(x)
        with pytest.raises(RuntimeError, match="planted: third"):
            fast(x)


def test_the_users_own_errors_stay_theirs(lenient: None, eager_engine: None) -> None:
    fast = mw.compile(Net())
    with pytest.raises(RuntimeError, match="shape|size"):
        fast(torch.randn(4, 5))
    torch.testing.assert_close(fast(torch.ones(4, 8)).shape, torch.Size([4, 8]))
    assert not fast.report.fall_backs


class Breaking(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        print("hello", end="")
        return self.second(x)


def test_graph_breaks_are_named_and_no_failure(eager_engine: None, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = Breaking().eval(), torch.randn(4, 8)
    fast = mw.compile(model, x)  # strict: a graph break is a region, not a fall-back
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    [found] = {(r.file, r.line) for r in fast.report.graph_breaks}
    assert found[0].endswith("test_fallback.py")
    assert 'print("hello"' in Path(found[0]).read_text().splitlines()[found[1] - 1]
    assert not fast.report.fall_backs
    assert "hello" in capsys.readouterr().out


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("trouble", ["no compiler", "crashing compiler", "read-only cache", "full disk"])
def test_a_crippled_machine_still_gives_right_results(tmp_path: Path, trouble: str, strict: bool) -> None:
    """In a process of its own, with the real engine. Strict raises one clear error where eager would have to help."""
    environment = {**os.environ, "MESHWRIGHT_STRICT": str(int(strict)), "TMPDIR": str(tmp_path),
                   "MESHWRIGHT_CACHE_DIR": str(tmp_path / "cache")}
    program, error = _PROGRAM, ""
    if trouble == "no compiler":
        environment["MESHWRIGHT_CXX"] = str(tmp_path / "missing")
        error = "ToolchainError: the C.. compiler"
    elif trouble == "crashing compiler":
        compiler = tmp_path / "crash"
        compiler.write_text('#!/bin/sh\ncase "$*" in *--version*) echo crash 1.0 ;; *) kill -SEGV $$ ;; esac\n')
        compiler.chmod(0o755)
        environment["MESHWRIGHT_CXX"] = str(compiler)
        error = "CompileFailure: .*crash ended with -11"
    elif trouble == "full disk":
        program = _FULL_DISK + program
        error = "CacheError: the kernel cache .* is unusable .*, and so is a temporary one"
    else:
        (tmp_path / "cache").write_text("a file where the directory should be")
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300,
                         check=False)
    if strict and error:
        assert run.returncode == 1
        assert re.search(f"^meshwright.*{error}", run.stderr, re.MULTILINE), run.stderr
        return
    assert run.returncode == 0, run.stderr
    assert "MeshwrightWarning" in run.stderr
    assert "right" in run.stdout


# Files may not grow beyond some bytes: writing fails half way, in the cache and in every other place.
_FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
"""
_PROGRAM = """
import torch
import meshwright as mw
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8)).eval()
x = torch.randn(4, 8)
fast = mw.compile(model, x)
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x))
print("right")
"""
