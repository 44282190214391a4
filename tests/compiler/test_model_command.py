"""`meshwright model`: a table, JSON that reads back, mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.cost_model.model import model_from_json

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "meshwright", "model", *arguments], capture_output=True, text=True,
                          cwd=cwd, timeout=500, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_table(folder: Path) -> None:
    done = run("config.json", "--seq", "16", "--micro-batch", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    for word in ("LlamaDecoderLayer", "embedding", "head", "min-cut", "selective", "4 heads, 2 kv heads, 64 ffn",
                 "100 vocabulary", "16 tokens × micro-batch 2"):
        assert word in done.stdout


def test_json_reads_back(folder: Path) -> None:
    done = run(".", "--seq", "16", "--verify-folding", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    model = model_from_json(done.stdout)
    assert (model.order, model.seq, model.micro_batch) == ((0, 1, 1, 2), 16, 1)
    assert model.parameter_count == 2 * 100 * 32 + 32 + 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)


@pytest.mark.parametrize(("arguments", "message"), [
    (["llama3-8x"], "unknown model 'llama3-8x'; expected one of"),
    (["no/config.json"], "no/config.json: No such file"),
    (["config.json", "--dtype", "int8"], "unknown dtype 'int8'"),
])
def test_mistakes_are_one_line(folder: Path, arguments: list[str], message: str) -> None:
    done = run(*arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = [ln for ln in done.stderr.splitlines() if ln.startswith("meshwright: ")]
    assert message in line and "Traceback" not in done.stderr


def test_sizes_below_one_are_refused(folder: Path) -> None:
    assert run("config.json", "--seq", "0", cwd=folder).returncode == 2
    assert run("config.json", "--imbalance", "0.5", cwd=folder).returncode == 2
