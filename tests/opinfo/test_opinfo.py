"""PyTorch's OpInfo database through both printers.

A chunk of eight operators shares its compiler runs. Every test run takes a seeded few chunks (5 of C++, 2 of Triton,
up to 4 samples per dtype); the sweep takes all of them with up to 10 samples. Triton runs in its interpreter, on
which bf16 arithmetic is not to be trusted: kernels upcast right after the load, so bf16 samples are compared there too.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from ..differential import Printer
from ..scale import sampled, size
from .cases import NOT_COMPARABLE, Outcome, claimed_names, operators, run_operators, samples
from .cases import _traced as traced

CHUNK = 8
OPERATORS = operators()
CHUNKS = [f"{k}" for k in range(-(-len(OPERATORS) // CHUNK))]
SAMPLES = size(4, 10)


def _chunk(name: str) -> list[Any]:
    """Every chunk-count-th operator from `name` on: neighbours in the alphabet land in different chunks."""
    return OPERATORS[int(name) :: len(CHUNKS)]


def _check(name: str, printer: Printer, limit: int, record: Any) -> None:
    outcome = run_operators(_chunk(name), printer, limit)
    record("cases", outcome.ran)
    record("operators", sorted(outcome.operators))
    record("kernels", outcome.kernels)
    record("left_to_aten", outcome.left_to_aten)
    record("not_traced", len(outcome.not_traced))
    print(f"{outcome.ran} cases, {outcome.kernels} kernels, operators {sorted(outcome.operators)}")
    assert not outcome.failures, f"{len(outcome.failures)} of {outcome.ran}:\n" + "\n".join(outcome.failures[:40])


@pytest.mark.parametrize("chunk", sampled(CHUNKS, 5))
def test_cpp(chunk: str, record_property: Any) -> None:
    _check(chunk, "cpp", SAMPLES, record_property)


@pytest.mark.parametrize("chunk", sampled(CHUNKS, 2))
def test_triton(chunk: str, record_property: Any) -> None:
    _check(chunk, "triton", size(2, 4), record_property)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_every_claimed_operator_is_emitted(record_property: Any) -> None:
    """No claim is empty: some sample of some OpInfo, forward only, puts each claimed operator into a kernel."""
    outcome = Outcome()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in OPERATORS:
            for sample in samples(op, 4):
                traced(sample, "c", outcome)
    missing = sorted(claimed_names() - outcome.emitted)
    record_property("claimed", len(claimed_names()))
    record_property("claimed_but_never_emitted", missing)
    record_property("left_to_aten", outcome.left_to_aten)
    assert len(missing) <= 0.1 * len(claimed_names()), missing


def test_what_is_left_out_is_named() -> None:
    assert all(reason for reason in NOT_COMPARABLE.values())
    assert len(OPERATORS) > 350
