"""The fuzzer's own test: at least 18 of 20 planted bugs must be caught (a seeded few in every run, all in the
sweep)."""

from __future__ import annotations

from functools import cache

import pytest

from ..scale import sampled
from .check import Graphs, compared, plan, traced
from .generate import generate
from .planted import PLANTED, Bug

BATCH, BATCHES = 6, 8  # seeds tried per bug at most: 48
NEEDED = 18


def _runs(batch: int) -> list:
    return [plan(generate(seed))[0] for seed in range(batch * BATCH, (batch + 1) * BATCH)]


@cache
def _graphs(batch: int) -> Graphs:
    """Traced and grouped once: printer bugs are planted after that."""
    graphs, broken = traced(_runs(batch))
    assert not broken, broken[0].report()
    return graphs


def catches(bug: Bug, patch: pytest.MonkeyPatch) -> bool:
    """True when some program gives a wrong result (or breaks the grouping) with the bug planted."""
    for batch in range(BATCHES):
        honest = _graphs(batch) if bug.where != "group" else []
        with patch.context() as planted:
            bug.plant(planted)
            if bug.where == "group":
                graphs, broken = traced(_runs(batch))
                if broken or compared(graphs, "triton"):
                    return True
            elif compared(honest, bug.where):
                return True
    return False


SAMPLE = [
    b
    for b in PLANTED
    if b.name
    in (
        "c++: operands of sub swapped",
        "triton: branches of where swapped",
        "triton: sums start at 1 in padding",
        "grouping: a slice's step is ignored",
    )
]


@pytest.mark.parametrize("bug", sampled(SAMPLE, len(SAMPLE)))
def test_sampled_bugs_are_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catches(bug, monkeypatch), f"{bug.name} was not noticed"


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_most_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch, record_property: pytest.FixtureRequest) -> None:
    missed = [bug.name for bug in PLANTED if not catches(bug, monkeypatch)]
    record_property("planted_bugs", len(PLANTED))
    record_property("missed_bugs", missed)
    assert len(PLANTED) - len(missed) >= NEEDED, f"not noticed: {missed}"
