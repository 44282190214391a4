"""The command line: fast help, one-line errors with exit code 2, JSON that parses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "meshwright", *arguments], capture_output=True, text=True, cwd=cwd,
                          timeout=500, check=False)


def test_help_imports_neither_torch_nor_rich_and_is_fast() -> None:
    code = ("import runpy, sys\nsys.argv = ['meshwright', '--help']\n"
            "try:\n    runpy.run_module('meshwright', run_name='__main__')\nexcept SystemExit:\n    pass\n"
            "import resource\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
            "print('heavy:', sorted({'torch', 'rich', 'transformers', 'triton', 'numpy'} & set(sys.modules)))\n"
            "print('cpu:', used.ru_utime + used.ru_stime)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert all(command in out for command in ("explain", "kernels", "model", "plan", "doctor"))
    assert "heavy: []" in out
    assert float(out.rsplit("cpu:", 1)[1]) < 0.4  # processor time: wall time depends on what else runs


@pytest.mark.parametrize(("arguments", "message"), [
    (["explain", "bert-bse"], "unknown model 'bert-bse'"),
    (["explain", "no/such/config.json"], "does not exist"),
    (["explain", "nomodule:thing"], "No module named 'nomodule'"),
    (["explain", "bert-tiny", "--mode", "fast"], "unknown mode 'fast'"),
    (["explain", "bert-tiny", "--disable", "fuss"], "unknown pass 'fuss'"),
    (["kernels", "bert-tiny", "--target", "sm_91"], "unknown target 'sm_91'"),
])
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = [ln for ln in done.stderr.splitlines() if ln.startswith("meshwright: ")]
    assert message in line
    assert "Traceback" not in done.stderr


@pytest.fixture
def module(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def net():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64))\n"
        "    return model, torch.randn(32, 64)\n"
        "def number():\n    return 3\n")
    return tmp_path


def test_explain_gives_json_and_html(module: Path) -> None:
    done = run("explain", "mine:net", "--json", "--html", "report.html", cwd=module)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert [p["name"] for p in data["passes"]] == ["fuse"] and data["graphs"][0]["kind"] == "inference"
    assert (module / "report.html").read_text().startswith("<!doctype html>")


def test_explain_a_training_step(module: Path) -> None:
    done = run("explain", "mine:net", "--train", cwd=module)
    assert done.returncode == 0, done.stderr
    assert "forward 0" in done.stdout and "backward 1" in done.stdout


def test_a_callable_must_give_a_model(module: Path) -> None:
    done = run("explain", "mine:number", cwd=module)
    assert (done.returncode, "mine:number gave a int" in done.stderr) == (2, True)


def test_kernels_for_the_cpu(module: Path) -> None:
    done = run("kernels", "mine:net", "-o", "out", "--json", cwd=module)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert kernels and all(k["language"] == "c++" and k["ir"].startswith("kernel ") for k in kernels)
    assert sorted(p.stem for p in (module / "out").iterdir()) == sorted(k["name"] for k in kernels)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
def test_kernels_for_a_gpu_that_is_not_here(module: Path) -> None:
    done = run("kernels", "mine:net", "--target", "sm_90", "--json", cwd=module)
    assert done.returncode == 0, done.stderr
    for kernel in json.loads(done.stdout):
        assert "@triton.jit" in kernel["source"]
        assert kernel["registers"] > 0 and kernel["spills"] == 0


def test_presets_and_configs_build(tmp_path: Path) -> None:
    from meshwright.compiler.models import load_model

    loaded = load_model("bert-tiny", seq=8)
    assert loaded.example["input_ids"].shape == (1, 8)
    loaded.model.config.save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), seq=8).model) is type(loaded.model)
