"""One compilation in a fresh process, timed; prints one JSON line. Started by cpu_models, twice per cache directory.

`backend_s`: from the moment Dynamo hands its (first) graph over to the first result: AOTAutograd, the compiler, the
first run. `first_call_s`: the whole first call, Dynamo included. Importing the model and building its weights are
outside both;
importing the backend itself is inside both, for every backend.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def measure(model_name: str, backend: str, threads: int) -> dict[str, Any]:
    """Compile `model_name` once in this process."""
    sys.path.append(str(ROOT))
    import torch
    from torch._dynamo.backends.registry import lookup_backend

    from benchmarks._models import load

    torch.set_num_threads(threads)
    model, inputs = load(model_name)
    handed_over: list[float] = []

    def timed(gm: Any, example_inputs: Sequence[Any]) -> Any:
        handed_over.append(time.perf_counter())
        return lookup_backend(backend)(gm, example_inputs)

    compiled = torch.compile(model, backend=timed)
    with torch.inference_mode():
        started = time.perf_counter()
        compiled(**inputs)
        done = time.perf_counter()
    return {"backend_s": done - handed_over[0], "first_call_s": done - started, "graphs": len(handed_over)}


def in_fresh_processes(model_name: str, backend: str, threads: int) -> dict[str, dict[str, Any]]:
    """Cold and warm: two processes one after the other, sharing cache directories that start empty."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "MESHWRIGHT_CACHE_DIR": f"{folder}/meshwright",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # what pip installs comes with its bytecode: a checkout gets it now
        folders = [str(f) for f in ROOT.iterdir() if (f / "__init__.py").exists()]
        subprocess.run([sys.executable, "-m", "compileall", "-q", *folders], env=env, check=True)
        for state in ("cold", "warm"):
            command = [sys.executable, __file__, "--model", model_name, "--backend", backend, "--threads", str(threads)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{backend} on {model_name}, {state}: {done.stderr.strip().splitlines()[-1:]}")
            out[state] = json.loads(done.stdout.strip().splitlines()[-1])
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.backend, given.threads)))


if __name__ == "__main__":
    main()
