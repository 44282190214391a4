"""An ATen engine that runs graphs as they are, for tests of everything around the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from meshwright.compiler import backend


def plain_engine(gm, example_inputs, *, kind, settings, report):
    entry = report.add_graph("plain", kind, len(gm.graph.nodes))
    entry.state = "ready"

    def run(args):
        taken = list(args)
        args.clear()
        return gm.forward(*taken)

    return run


@pytest.fixture
def eager_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled graphs run node by node in ATen: no kernels, no compiler."""
    monkeypatch.setattr(backend, "_engine", lambda: plain_engine)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
