"""Small problems written by hand."""

from __future__ import annotations

from typing import Any

from meshwright.compiler.planner.problem import Option, Outer, Problem, Reshard, Transfer
from meshwright.cost_model.schedules import ScheduleName


def option(name: str, forward_ns: int, saved_bytes: int = 0, **more: Any) -> Option:
    """An option whose two gradients take as long as its forward each."""
    prices: dict[str, Any] = {"input_gradient_ns": forward_ns, "weight_gradient_ns": forward_ns, **more}
    return Option(name=name, forward_ns=forward_ns, saved_bytes=saved_bytes, **prices)


def outer(p: int, m: int, options: list[list[Option]], schedule: ScheduleName = "1f1b", v: int = 1,
          reshard_ns: int = 0, transfer_ns: int = 0) -> Outer:
    """Two layouts; changing between them costs `reshard_ns` each way, any cut `transfer_ns`."""
    move, stay = Reshard(forward_ns=reshard_ns, backward_ns=reshard_ns), Reshard()
    cut = Transfer(forward_ns=transfer_ns, backward_ns=transfer_ns)
    return Outer(p=p, v=v, schedule=schedule, m=m, options=tuple(map(tuple, options)),
                 reshard=((stay, move), (move, stay)), transfer=((cut, cut), (cut, cut)))


def problem(layers: list[int], outers: list[Outer], capacity_bytes: int = 10**9, mixing: bool = False) -> Problem:
    """A problem on 16 GPUs with a batch of 64."""
    return Problem(kinds=tuple(f"kind{i}" for i in range(max(layers) + 1)), layers=tuple(layers), gpus=16,
                   global_batch=64, capacity_bytes=capacity_bytes, outers=tuple(outers), mixing=mixing)
