"""Passes that replace `torch.nn.functional.gelu` by something, right or wrong on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from meshwright.passes.base import Candidate, Predicted, Refused


def right(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x)


def wrong(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) * 1.001


def wrong_for_large(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x.clamp(max=50.0))


def slow(x: torch.Tensor) -> torch.Tensor:
    for _ in range(40):
        x = x + 0
    return torch.nn.functional.gelu(x)


def crashing(x: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("planted")


def hanging(x: torch.Tensor) -> torch.Tensor:
    time.sleep(30)
    return torch.nn.functional.gelu(x)


def other_dtype(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x).double()


def mutating(x: torch.Tensor) -> torch.Tensor:
    out = torch.nn.functional.gelu(x)
    x.detach().add_(1)
    return out


def two_outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.nn.functional.gelu(x), x


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.01


def wrong_gradient(x: torch.Tensor) -> torch.Tensor:
    return _WrongGradient.apply(x)


@dataclass(frozen=True)
class Planted:
    """Replaces every gelu by `function`."""

    function: Callable[[torch.Tensor], Any]
    gain_s: float = 1e-6
    one_key: bool = True
    name: ClassVar[str] = "planted"
    lossless: ClassVar[bool] = True
    level: ClassVar[str] = "graph"

    def find(self, target, context):
        found = []
        for i, node in enumerate(target.graph.nodes):
            if node.target is torch._C._nn.gelu or node.target is torch.nn.functional.gelu:
                found.append(Candidate((node,), self.function, Predicted(self.gain_s, 0.0), (node.args[0],), (node,),
                                       key="gelu" if self.one_key else str(i), description="gelu"))
            elif node.op == "call_function" and "relu" in str(node.target):
                found.append(Refused("relu is left alone", node))
        return found


@dataclass(frozen=True)
class BrokenFind:
    how: str = "raise"
    name: ClassVar[str] = "broken"
    lossless: ClassVar[bool] = True
    level: ClassVar[str] = "graph"

    def find(self, target, context):
        if self.how == "hang":
            time.sleep(30)
        raise RuntimeError("find is broken")
