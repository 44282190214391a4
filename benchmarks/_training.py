"""Training steps: forward, backward and a plain SGD update, eager against Inductor and our two entries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from benchmarks._harness import Leg
from benchmarks._isolation import inductor_blocked
from benchmarks._legs import BACKEND, OURS
from benchmarks._models import Inputs, load_training

LEARNING_RATE = 1e-4


def _step(model: Callable[..., Any], parameters: Iterable[nn.Parameter], inputs: Inputs) -> Callable[[], float]:
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def legs(name: str, peers: bool, extra: bool) -> list[Leg]:
    """Compiled legs, each training a copy of its own, ours first (Inductor's compiler blocked while they compile)."""
    base, inputs = load_training(name)
    out: list[Leg] = []

    def add(leg: str, wrap: Callable[[nn.Module], Callable[..., Any]], blocked: bool = False) -> None:
        model = copy.deepcopy(base)
        step = _step(wrap(model), list(model.parameters()), inputs)
        if blocked:
            with inductor_blocked():
                step(), step()
        else:
            step(), step()
        out.append(Leg(leg, step))
        print(f"    {leg}: ready", flush=True)

    def mw_compile(model: nn.Module) -> Callable[..., Any]:
        import meshwright as mw

        return mw.compile(model, dict(inputs))

    add(OURS[0], lambda m: torch.compile(m, backend=BACKEND), blocked=True)
    add(OURS[1], mw_compile, blocked=True)
    add("eager", lambda m: m)
    if peers:
        add("inductor", lambda m: torch.compile(m, backend="inductor"))
    if extra:
        add(OURS[2], lambda m: torch.compile(m, backend=BACKEND, options={"mode": "max"}))
    return out
