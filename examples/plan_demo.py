"""A plan for Llama-3-8B on 64 H100s, with no GPU and no weights: found in seconds, explained on one HTML page.

Captures the model on the meta device, searches, prints the plan, and writes it to dump/demo/.

    python -m examples.plan_demo [--cluster "8x8 h100-sxm"] [--model llama3-8b]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console

import meshwright as mw
from meshwright.compiler.plan_files import Shown
from meshwright.compiler.plan_page import plan_page
from meshwright.runtime.plan import write_atomically

FOLDER = Path("dump") / "demo"
MODEL, CLUSTER, SEQ, GLOBAL_BATCH = "llama3-8b", "8x8 h100-sxm", 8192, 1024


def show_plan(console: Console, model: str = MODEL, cluster: str = CLUSTER) -> Path:
    """Plan, print, write plan and page; gives the page."""
    console.print(f"\n[bold]Planning {model} on {cluster}[/], {SEQ} tokens × {GLOBAL_BATCH} samples a step …")
    start = time.perf_counter()
    plan = mw.plan(model, cluster=cluster, seq=SEQ, global_batch=GLOBAL_BATCH)
    console.print(f"  {time.perf_counter() - start:.1f} s, capture included; all numbers are predictions\n")
    console.print(plan.table())
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "plan.json"
    plan.save(path)
    page = FOLDER / "plan.html"
    write_atomically(page, plan_page(Shown(str(path), plan)))
    console.print(f"\n{path}: the plan; {page}: pipeline, memory, costs and search on one page, opens offline")
    return page


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Plan a large model on a cluster, without either.")
    parser.add_argument("--model", default=MODEL, help="a preset, a Hugging Face config.json, or module:callable")
    parser.add_argument("--cluster", default=CLUSTER, help="nodes x GPUs per node and a device, or a cluster file")
    options = parser.parse_args()
    show_plan(Console(width=None if sys.stdout.isatty() else 120), options.model, options.cluster)
    return 0


if __name__ == "__main__":
    sys.exit(main())
