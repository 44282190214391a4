"""A model's description, from graphs: no weights are allocated and no formula knows an architecture.

    build (meta_model) → find the layers and what each gets (layers) → trace one layer of each group and the parts of
    `forward` around them, forward and backward (joint) → read costs, saved tensors and structure off the graphs

The parts outside of layers (embedding, what lies between an encoder and a decoder, head and loss) are traced as the
model's own `forward` from the end of one layer to the start of the next, with the layers cut out. They are ordinary
layers of the description.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...cost_model.model import Boundary, LayerKind, ModelDescription, ParameterGroup
from ...runtime.errors import UnsupportedError
from .fused import fused_bytes
from .gpu_operators import GpuOperators
from .hf_tracing import plain_sequences
from .joint import InputRole, Joint, tensor_bytes, trace
from .layers import Recorder
from .meta_model import MetaModel, build
from .parts import Part, parts_of
from .state import State
from .structure import structure_of


@dataclass(frozen=True)
class Captured:
    """A part's graph as numbers, parameters left out. `used`: the names among its candidates that the graph reads."""

    kind: LayerKind
    used: frozenset[str]


def capture_model(spec: str, *, seq: int, micro_batch: int = 1, dtype: str = "bfloat16", imbalance: float = 1.0,
                  verify_folding: bool = False) -> ModelDescription:
    """Describe the model that `spec` names (see `meta_model.build`) for a micro-batch of `micro_batch` × `seq` tokens.

    `verify_folding` traces every layer and compares it with its group. Raises a `MeshwrightError` for a model that
    can't be built, one that needs data to run (by the module's name), and one whose layers differ from their group.
    """
    built = build(spec, seq=seq, micro_batch=micro_batch, dtype=dtype, imbalance=imbalance)
    return describe(built, seq=seq, micro_batch=micro_batch, imbalance=imbalance, verify_folding=verify_folding)


def describe(built: MetaModel, *, seq: int, micro_batch: int, imbalance: float = 1.0,
             verify_folding: bool = False) -> ModelDescription:
    """`capture_model` for a model that is built already."""
    state, captured = State(built), dict[Any, Captured]()
    with plain_sequences():
        recorder = Recorder(built, state, run_all=verify_folding)
        parts = parts_of(built, state, recorder.layer_calls(), recorder.prints)
        for part in parts:
            if part.group not in captured:
                captured[part.group] = _capture(part, state, imbalance)
            elif verify_folding:
                _compare(part, captured[part.group], _capture(part, state, imbalance))
    kinds, order, unused = _owned(parts, captured, state)
    notes = (*built.notes, *([f"{unused} parameters are not used in training; they count with the last layer"]
                             if unused else []))
    return ModelDescription(built.name, _sequence_length(parts, micro_batch) or seq, micro_batch, imbalance,
                            tuple(_named(kinds)), tuple(order), tuple(p.module for p in parts), notes)


def _capture(part: Part, state: State, imbalance: float) -> Captured:
    started = time.perf_counter()
    names = part.candidates

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        with GpuOperators():
            weights = {state.identity(n): t for n, t in zip(names, tensors, strict=False)}
            return part.function(weights, tensors[len(names):])

    roles: list[InputRole] = ["parameter" if state.is_parameter(n) else "buffer" for n in names]
    with state.mode:
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in (*(state.fake[n] for n in names), *part.tensors)]
    try:
        joint = trace(flat, inputs, [*roles, *part.roles])
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedError(f"{part.module or part.title} can't be traced forward and backward "
                               f"({type(error).__name__}: {first})") from error
    chain = next((t for t, role in zip(part.tensors, part.roles, strict=True) if role == "chain"), None)
    found = structure_of(joint, None if chain is None else chain.shape[-1],
                         None if chain is None else math.prod(chain.shape[:-1]), imbalance)
    boundaries = tuple(Boundary(name, role, str(t.dtype).removeprefix("torch."), tuple(t.shape), tensor_bytes(t))
                       for i, (name, role, t) in enumerate(zip(part.names, part.roles, part.tensors, strict=True))
                       if len(names) + i in joint.read)
    kind = LayerKind(part.title, joint.forward_records, joint.backward_records, (), (), joint.saved(), boundaries,
                     time.perf_counter() - started, **_delayed(joint), **dataclasses.asdict(found))
    return Captured(kind, frozenset(n for i, n in enumerate(names) if i in joint.read))


def _delayed(joint: Joint) -> dict[str, Any]:
    """Fields of `LayerKind` about gradients of weights and about fusion."""
    forward, backward = fused_bytes(joint)
    ran = [n for n in joint.backward if n in joint.records]
    return {"weight_only": tuple(i for i, n in enumerate(ran) if n in joint.weight_only), "fused_forward": forward,
            "fused_backward": backward, "gradient_bytes": joint.gradient_bytes()}


def _compare(part: Part, group: Captured, own: Captured) -> None:
    """Raise `UnsupportedError` when a layer is not what its group says."""
    for field in dataclasses.fields(LayerKind):
        ours, theirs = getattr(own.kind, field.name), getattr(group.kind, field.name)
        if field.name != "capture_s" and ours != theirs:
            raise UnsupportedError(f"{part.module} differs in {field.name} from the layers it was grouped with",
                                   expected="layers of one class, configuration and shape that compute the same",
                                   do="Give them an attribute or arguments that tell them apart.")


# -- parameters -----------------------------------------------------------------------------------
def _owned(parts: Sequence[Part], captured: Mapping[Any, Captured],
           state: State) -> tuple[list[LayerKind], list[int], int]:
    """The kinds with their parameters, the kind at each position, and how many parameters nothing uses.

    A parameter belongs to the first part that reads it; later ones are tied to it.
    """
    owned: set[int] = set()
    reads = [[n for n in p.candidates if state.is_parameter(n) and (p.is_layer or n in captured[p.group].used)]
             for p in parts]
    everything = {state.identity(n): n for n in state.fake if state.is_parameter(n)}
    unused = [n for i, n in everything.items() if i not in {state.identity(n) for names in reads for n in names}]
    reads[-1] = [*reads[-1], *unused]
    kinds: dict[Any, int] = {}
    order, made = list[int](), list[LayerKind]()
    for part, names in zip(parts, reads, strict=True):
        new = [n for n in names if state.identity(n) not in owned]
        own = _groups(state, new)
        vectors = sum(state.fake[n].numel() for n in new if state.fake[n].dim() < 2)
        tied = _groups(state, [n for n in names if state.identity(n) in owned])
        owned.update(state.identity(n) for n in names)
        key = (part.group, own, tied)
        if key not in kinds:
            kinds[key] = len(made)
            made.append(dataclasses.replace(captured[part.group].kind, parameters=own, tied=tied,
                                            vector_parameters=vectors))
        order.append(kinds[key])
    return made, order, sum(state.fake[n].numel() for n in unused)


def _groups(state: State, names: Sequence[str]) -> tuple[ParameterGroup, ...]:
    counts: Counter[tuple[str, bool, int]] = Counter()
    for name in names:
        tensor = state.fake[name]
        counts[str(tensor.dtype).removeprefix("torch."), tensor.requires_grad, tensor.element_size()] += tensor.numel()
    return tuple(ParameterGroup(dtype, trainable, count, count * size)
                 for (dtype, trainable, size), count in sorted(counts.items()))


def _named(kinds: Sequence[LayerKind]) -> Iterator[LayerKind]:
    """Kinds of one class are told apart by a number."""
    many, seen = Counter(k.name for k in kinds), Counter[str]()
    for kind in kinds:
        seen[kind.name] += 1
        number = f" {seen[kind.name]}" if many[kind.name] > 1 else ""
        yield dataclasses.replace(kind, name=kind.name + number)


def _sequence_length(parts: Sequence[Part], micro_batch: int) -> int | None:
    """Tokens per sequence as the first layer sees them (an image model makes them itself)."""
    for part in parts:
        for role, tensor in zip(part.roles, part.tensors, strict=True):
            if part.is_layer and role == "chain":
                return int(tensor.shape[1]) if tensor.dim() == 3 and tensor.shape[0] == micro_batch else None
    return None
