"""Every architecture of the zoo through `torch.compile(backend="meshwright")`: forward and backward agree with eager.

A seeded sample of 8 runs in every test run, the whole zoo in the sweep.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ..scale import sampled
from .compare import EVERY_KERNEL, against_eager
from .zoo import ARCHITECTURES, Architecture

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("architecture", sampled(ARCHITECTURES, 8))
def test_forward_and_backward_agree_with_eager(
    architecture: Architecture, record_property: pytest.FixtureRequest
) -> None:
    reports = against_eager(
        architecture.build(),
        architecture.inputs(),
        lambda m: torch.compile(m, backend="meshwright", options=EVERY_KERNEL),
    )
    graphs = [g for r in reports for g in r.graphs]
    record_property("graphs", len(graphs))
    record_property("kernels", sum(g.kernels for g in graphs))
    record_property("kernel_bytes", sum(g.kernel_bytes for g in graphs))
    record_property("aten_bytes", sum(g.aten_bytes for g in graphs))


def test_the_zoo_is_wide() -> None:
    assert len({a.name for a in ARCHITECTURES}) == len(ARCHITECTURES) >= 30
    assert {a.kind for a in ARCHITECTURES} >= {"encoder", "decoder", "encoder-decoder", "moe", "vision", "audio"}
