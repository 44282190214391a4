"""A model cut into the positions of a pipeline: its layers, and what its own `forward` computes between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...cost_model.model import BoundaryRole
from ...runtime import torch_compat
from .layers import Call, again, named_tensors, replaced_forwards, roles, signature, unique_tensors
from .meta_model import MetaModel
from .state import State, exchanged

Function = Callable[[Mapping[int, torch.Tensor], Sequence[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class Part:
    """One position of the pipeline. Parts with equal `group` compute the same.

    `function(weights, tensors)` runs it: `candidates` are the names of the weights it may read, which it gets by
    `State.identity`; `tensors` are what else it gets, with a name and a role each.
    """

    module: str
    title: str
    group: Any
    names: tuple[str, ...]
    roles: tuple[BoundaryRole, ...]
    tensors: tuple[torch.Tensor, ...]
    candidates: tuple[str, ...]
    function: Function
    is_layer: bool


def parts_of(built: MetaModel, state: State, calls: Sequence[Call], prints: Mapping[str, Any]) -> list[Part]:
    """The parts of a model in order, from the calls of its layers. `prints`: the layers' fingerprints by name."""
    cutter = _Cutter(built, state, calls, prints)
    parts = [cutter.between(-1)]
    for i in range(len(calls)):
        parts.append(cutter.layer(i))
        if i in cutter.cuts:
            parts.append(cutter.between(i))
    return parts


class _Cutter:
    def __init__(self, built: MetaModel, state: State, calls: Sequence[Call], prints: Mapping[str, Any]) -> None:
        self.built, self.state, self.calls, self.prints = built, state, calls, prints
        inside = tuple(f"{c.path}." for c in calls)
        outside = {state.identity(n): n for n in reversed(state.fake) if not n.startswith(inside)}
        self.outside = tuple(reversed(outside.values()))
        self.roles = roles(calls)
        uses = Counter(id(t) for c in calls for t in c.inputs)
        self.shared = {t: i for i, t in enumerate(t for t, n in uses.items() if n > 1)}
        self.cuts = self._cuts()

    def _cuts(self) -> list[int]:
        """The calls after which `forward` computes something of its own that the next one gets, and the last one.

        Masks and position tables are made at the start, also those that only later layers get.
        """
        known = {id(t) for t in unique_tensors((self.state.args, self.state.kwargs))}
        cuts = []
        for i, call in enumerate(self.calls[:-1]):
            known.update(id(t) for t in (*call.inputs, *unique_tensors(call.output)))
            following = zip(self.calls[i + 1].inputs, self.roles[i + 1], strict=True)
            if any(id(t) not in known and role != "constant" for t, role in following):
                cuts.append(i)
        return [*cuts, len(self.calls) - 1] if self.calls else []

    def layer(self, i: int) -> Part:
        """Call `i` of a layer, as its module's forward."""
        call = self.calls[i]
        marks = tuple((role, self.shared.get(id(t))) for role, t in zip(self.roles[i], call.inputs, strict=True))
        group = (self.prints[call.path], signature((call.args, call.kwargs)), marks)
        own = tuple(f"{call.path}.{n}" for named in (call.module.named_parameters(), call.module.named_buffers())
                    for n, _ in named)

        def function(weights: Mapping[int, torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            given = {id(t): v for t, v in zip(call.inputs, tensors, strict=True)}
            args, kwargs = _replaced((call.args, call.kwargs), given)
            with exchanged(call.module, weights):
                return _new(call.module(*args, **kwargs), tensors)

        return Part(call.path, type(call.module).__name__, group, tuple(named_tensors(call.args, call.kwargs)),
                    tuple(self.roles[i]), tuple(call.inputs), own, function, True)

    def between(self, i: int) -> Part:
        """What runs after call `i` (-1: from the start) and before the next one, or to the end."""
        given = unique_tensors((self.state.args, self.state.kwargs))
        made = unique_tensors(self.calls[i].output) if i >= 0 else []

        def function(weights: Mapping[int, torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            fresh = {id(t): v for t, v in zip((*given, *made), tensors, strict=True)}
            args, kwargs = _replaced((self.state.args, self.state.kwargs), fresh)
            stubs = _Stubs(self.calls, self.roles, i, next((c for c in self.cuts if c > i), None), fresh)
            try:
                with replaced_forwards({c.module: stubs for c in self.calls}), exchanged(self.built.model, weights):
                    out = self.built.model(*args, **kwargs)
            except _Stop:
                return _new(stubs.reached, tensors)
            loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
            return _new(out if loss is None else loss, tensors)

        names = [*named_tensors(self.state.args, self.state.kwargs), *("hidden" for _ in made)]
        own: list[BoundaryRole] = ["constant"] * len(given)
        own += ["chain" if t.is_floating_point() else "constant" for t in made]
        title, where, group = self._names(i)
        return Part(where, title, (group, signature(made)), tuple(names), tuple(own), (*given, *made), self.outside,
                    function, False)

    def _names(self, i: int) -> tuple[str, str, Any]:
        if not self.calls:
            return type(self.built.model).__name__, "", "everything"
        if i < 0:
            return "embedding", f"before {self.calls[0].path}", "start"
        if i + 1 == len(self.calls):
            return "head", f"after {self.calls[i].path}", "end"
        return "between", f"after {self.calls[i].path}", tuple(self.prints[c.path] for c in self.calls[i:i + 2])


class _Stop(BaseException):
    """Ends the run of a model at the layer where a part ends; no `except Exception` of the model may swallow it."""


class _Stubs:
    """Stands for every layer. Call `i` gives `fresh`, the others tensors nobody should need. `reached` are the inputs
    of the call after `i`, and the constants of those up to call `stop`, which ends the run."""

    def __init__(self, calls: Sequence[Call], own: Sequence[Sequence[BoundaryRole]], i: int, stop: int | None,
                 fresh: Mapping[int, torch.Tensor]) -> None:
        self.calls, self.roles, self.i, self.stop, self.fresh = calls, own, i, stop, fresh
        self.at = 0
        self.reached: list[torch.Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        at, call = self.at, self.calls[self.at]
        self.at += 1
        if at == self.i:
            return _replaced(call.output, self.fresh)
        if at > self.i:
            given = zip(unique_tensors((args, kwargs)), self.roles[at], strict=True)
            self.reached += [t for t, role in given if at == self.i + 1 or role == "constant"]
        if at == self.stop:
            raise _Stop
        return again(call.output, (call.args, call.kwargs), (args, kwargs), gradients=False)


def _replaced(tree: Any, by_id: Mapping[int, torch.Tensor]) -> Any:
    return torch_compat.tree_map(lambda v: by_id.get(id(v), v), tree)


def _new(tree: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a result that are not inputs handed through."""
    return [t for t in unique_tensors(tree) if all(t is not v for v in inputs)]
