"""OpInfo samples as traced kernel graphs: which operators to take, how to run and compare one sample."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils import _pytree as pytree

from meshwright.codegen.lowering import claimed_ops, decompositions

from ..differential import KernelGraph, Printer, compile_graphs, difference, flat, trace, widen

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
KNOWN = {*DTYPES, torch.float64, torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8}
MAX_ELEMENTS = 4096

# Operators whose result is not a function of their inputs, or whose samples take minutes and hold no kernel of ours.
NOT_COMPARABLE = {
    "empty": "uninitialised memory",
    "empty_like": "uninitialised memory",
    "new_empty": "uninitialised memory",
    "empty_permuted": "uninitialised memory",
    "empty_strided": "uninitialised memory",
    "new_empty_strided": "uninitialised memory",
}
# More than 2 × eager's own error + 4 ulp, with the reason.
WIDER = {"logcumsumexp": "a scan in another order", "cumprod": "a scan in another order"}


@dataclass
class Sample:
    """One call of an operator: `function(*tensors)` over the sample's tensors."""

    name: str
    dtype: torch.dtype
    function: Callable[..., Any]
    tensors: list[torch.Tensor]
    dynamic: bool
    number: int

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype)[6:]} sample {self.number}{' symbolic' if self.dynamic else ''}"


@dataclass
class Outcome:
    """What happened to a set of operators."""

    ran: int = 0
    operators: set[str] = field(default_factory=set)
    kernels: int = 0
    emitted: set[str] = field(default_factory=set)
    left_to_aten: dict[str, str] = field(default_factory=dict)  # claimed operator that was refused: why
    not_traced: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def operators() -> list[OpInfo]:
    """OpInfos that have something for a code generator: CPU, comparable, one of our dtypes."""
    out = [
        o
        for o in op_db
        if o.name not in NOT_COMPARABLE
        and not o.name.startswith(("linalg.", "fft.", "_native"))
        and o.supported_dtypes("cpu") & set(DTYPES)
    ]
    return sorted(out, key=lambda o: (o.name, o.variant_test_name))


@functools.lru_cache(maxsize=1)
def claimed_names() -> frozenset[str]:
    """`aten.add.Tensor` and so on: the claimed operators that tracing leaves whole. Rules for the others serve graphs
    that no decomposition has seen."""
    return frozenset(str(o) for o in claimed_ops() if o not in decompositions())


def samples(op: OpInfo, limit: int) -> Iterator[Sample]:
    """Up to `limit` samples per dtype, spread over the operator's own list, each static and symbolic in turns."""
    for dtype in DTYPES:
        if dtype not in op.supported_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        try:
            # Not `op.sample_inputs`: it walks the stack for the name of a test, a quarter of this suite's time.
            found = [s for s in op.sample_inputs_func(op, "cpu", dtype, False) if _small(s)]
        except Exception:  # some generators need what a CPU build lacks
            continue
        step = max(1, len(found) // limit)
        for number, sample in enumerate(found[::step][:limit]):
            leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
            tensors = [x.detach() for x in leaves if isinstance(x, torch.Tensor)]
            if not tensors or any(t.dtype not in KNOWN or t.layout != torch.strided for t in tensors):
                continue
            yield Sample(op.formatted_name, dtype, _function(op, leaves, spec), tensors, number % 2 == 1, number)


def _small(sample: Any) -> bool:
    leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    return sum(x.numel() for x in leaves if isinstance(x, torch.Tensor)) <= MAX_ELEMENTS


def _function(op: OpInfo, leaves: Sequence[Any], spec: Any) -> Callable[..., Any]:
    def call(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        filled = [next(given) if isinstance(x, torch.Tensor) else x for x in leaves]
        first, args, kwargs = pytree.tree_unflatten(filled, spec)
        return [x for x in pytree.tree_leaves(op(first, *args, **kwargs)) if isinstance(x, torch.Tensor)]

    return call


def random(graph: KernelGraph) -> bool:
    return any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in graph.gm.graph.nodes)


def run_operators(ops: Sequence[OpInfo], printer: Printer, limit: int) -> Outcome:
    """Trace all samples, compile all their kernels together, compare every sample with eager."""
    outcome = Outcome()
    work: list[tuple[Sample, KernelGraph]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in ops:
            for sample in samples(op, limit):
                graph = _traced(sample, f"o{len(work)}", outcome)
                if graph is not None and graph.groups and not random(graph):
                    work.append((sample, graph))
        kernels = _compiled(work, printer, outcome)
        for sample, graph in work:
            _compare(sample, graph, kernels, outcome)
    return outcome


def _traced(sample: Sample, prefix: str, outcome: Outcome) -> KernelGraph | None:
    try:
        gm = trace(sample.function, [t.clone() for t in sample.tensors], sample.dynamic)
    except Exception as error:  # data-dependent shapes and the like: no graph, no kernels
        outcome.not_traced[str(sample)] = f"{type(error).__name__}: {error}"[:160]
        return None
    try:
        graph = KernelGraph(gm, prefix)
    except Exception as error:
        outcome.failures.append(f"{sample}: grouping: {type(error).__name__}: {error}"[:400])
        return None
    if any(name.startswith("u") for g in graph.groups for e in g.built.sizes for name in e.symbols()):
        outcome.not_traced[str(sample)] = "a size is known only inside the graph"
        return None
    outcome.emitted |= graph.emitted
    outcome.left_to_aten.update({u.target: f"{u.reason} ({sample})" for u in graph.uncovered})
    return graph


def _compiled(work: Sequence[tuple[Sample, KernelGraph]], printer: Printer, outcome: Outcome) -> dict[str, Any]:
    try:
        kernels = compile_graphs([g for _, g in work], printer)
    except Exception as whole:
        if len(work) == 1:
            outcome.failures.append(f"{work[0][0]}: compile: {type(whole).__name__}: {whole}"[:1500])
            return {}
        kernels = {}
        half = len(work) // 2
        for part in (work[:half], work[half:]):
            kernels.update(_compiled(part, printer, outcome))
    outcome.kernels = len(kernels)
    return kernels


def _compare(sample: Sample, graph: KernelGraph, kernels: dict[str, Any], outcome: Outcome) -> None:
    if any(k.name not in kernels for k in graph.kernels):
        return
    outcome.ran += 1
    outcome.operators.add(sample.name)
    eager = flat(sample.function(*[t.clone() for t in sample.tensors]))
    try:
        truth = flat(sample.function(*widen([t.clone() for t in sample.tensors])))
    except Exception:  # an operator without float64
        truth = eager
    try:
        got = flat(graph.run([t.clone() for t in sample.tensors], kernels))
    except Exception as error:
        outcome.failures.append(f"{sample}: {type(error).__name__}: {error}"[:400])
        return
    factor, ulps = (16.0, 64.0) if sample.name.split(".")[-1] in WIDER else (2.0, 4.0)
    for k, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        if e.dtype not in KNOWN:
            continue
        reason = difference(g, e, t if t.shape == e.shape else e, own_factor=factor, ulps=ulps)
        if reason is not None:
            shapes = [(str(x.dtype)[6:], list(x.shape)) for x in sample.tensors]
            outcome.failures.append(f"{sample}: result {k}: {reason}; inputs {shapes}")
            return
