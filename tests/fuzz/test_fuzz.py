"""Seeded programs: eager, C++ kernels and interpreted Triton kernels agree."""

from __future__ import annotations

import pytest
import torch

from ..differential import Printer
from ..scale import size
from .check import Failure, failures, plan, shrink
from .generate import Generator, generate, runs
from .program import namespace

BATCH = 8  # programs whose kernels are compiled together
CPP_SEEDS, TRITON_SEEDS = size(16, 400), size(8, 120)


def batches(seeds: int) -> list[int]:
    return list(range(0, seeds, BATCH))


def _run(first: int, printer: Printer) -> list[Failure]:
    return failures([r for seed in range(first, first + BATCH) for r in plan(generate(seed))], printer)


def _explain(found: list[Failure], printer: Printer) -> str:
    """All reasons, and the first failure made small."""
    rows = [f"seed {f.run.program.seed}, {f.run.label}: {f.reason}" for f in found]
    return "\n".join([*rows, "", shrink(found[0], printer).report()])


@pytest.mark.parametrize("first", batches(CPP_SEEDS))
def test_cpp_agrees_with_eager(first: int) -> None:
    found = _run(first, "cpp")
    assert not found, _explain(found, "cpp")


@pytest.mark.parametrize("first", batches(TRITON_SEEDS))
def test_triton_agrees_with_eager(first: int) -> None:
    found = _run(first, "triton")
    assert not found, _explain(found, "triton")


def test_programs_are_repeatable_and_valid() -> None:
    for seed in range(10):
        program = generate(seed)
        assert program == generate(seed) and program.source() == generate(seed).source()
        assert 5 <= len(program.lines) <= 60
        assert runs(program, program.sizes) and runs(program, program.other_sizes)


@pytest.mark.parametrize("wide", [False, True])
def test_a_mutation_reaches_the_same_tensors_in_the_wide_run(wide: bool) -> None:
    space = namespace(wide)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.zeros(3, dtype=torch.float64 if wide else dtype)
        for name in ("f32", "bf16", "f64"):
            space[name](x).add_(1)
        assert not x.any()


def test_programs_cover_what_they_promise() -> None:
    """Mutation, gradients, zero sizes, mixed dtypes and views all occur; torch refuses few of the statements."""
    made = [generate(seed) for seed in range(40)]
    text = "\n".join(p.source() for p in made)
    assert (
        sum(p.mutates for p in made) >= 10
        and sum(p.has_grad for p in made) >= 8
        and sum(map(bool, (p.zero for p in made))) >= 8
    )
    assert len({i.dtype for p in made for i in p.inputs}) >= 5
    for needle in ("permute", "expand", "narrow", "bf16(", "argmax", "softmax", "embedding", "cat", "where", "chunk"):
        assert needle in text, f"no program uses {needle}"
    tried = [Generator(seed) for seed in range(20)]
    for g in tried:
        g.program()
    assert sum(g.refused for g in tried) < 0.2 * sum(g.tried for g in tried)


def test_shrinking_keeps_the_failing_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a planted bug in `erf`, the reproducer is a few lines long and still fails."""
    from .planted import PLANTED

    bug = next(b for b in PLANTED if b.name == "triton: erf printed as tanh")
    bug.plant(monkeypatch)
    for seed in range(40):
        program = generate(seed)
        if "erf" in program.source() and not program.has_grad:
            found = failures(plan(program)[:1], "triton")
            if found:
                small = shrink(found[0], "triton")
                assert len(small.run.program.lines) <= 3, small.report()
                assert failures([small.run], "triton")
                return
    raise AssertionError("no program met the planted bug")
