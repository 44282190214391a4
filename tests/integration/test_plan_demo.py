"""The planner's part of `make demo`, on a model small enough for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from meshwright.runtime.plan import Plan

ROOT = Path(__file__).parents[2]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
          "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 512,
          "max_position_embeddings": 8192}


def test_it_plans_and_writes_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-m", "examples.plan_demo", "--model", str(tmp_path / "config.json"),
                           "--cluster", "1x4 h100-sxm"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths},
                          capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "all numbers are predictions" in done.stdout and "certificate: no plan takes less" in done.stdout
    folder = tmp_path / "dump" / "demo"
    assert Plan.load(folder / "plan.json").mesh.gpus == 4
    assert "</html>" in (folder / "plan.html").read_text()
