"""What the command line does with a MODEL: compile it for its report, or collect its kernels for any target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from ..runtime import torch_compat
from ..runtime.errors import UnknownNameError
from .acceptance import kernel_names
from .api import compile as compile_model
from .guard import Boxed, eager_boxed
from .models import Loaded, load_model
from .report import Report

TARGETS = ("cpu", "sm_80", "sm_90", "gfx942")


def compile_for_report(spec: str, *, batch: int, seq: int, train: bool, mode: str, disable: Sequence[str],
                       time_limit_s: float | None) -> Report:
    """The report after one call (with `train`: one forward and backward) of the model that `spec` names."""
    loaded = load_model(spec, batch=batch, seq=seq)
    loaded.model.train(train)
    compiled = compile_model(loaded.model, loaded.example, mode=mode, disable=disable or None,
                             time_limit_s=time_limit_s)
    if train:
        _backward(_call(compiled, loaded))
    report: Report = compiled.report  # type: ignore[assignment]
    report.name = loaded.name
    return report


def _call(model: Callable[..., Any], loaded: Loaded) -> Any:
    if isinstance(loaded.example, dict):
        return model(**loaded.example)
    return model(*loaded.example)


def _backward(output: Any) -> None:
    from ..runtime.structure import flatten

    ends = [o for o in flatten(output)[0] if isinstance(o, torch.Tensor) and o.requires_grad]
    torch.autograd.backward(ends, [torch.ones_like(o) for o in ends])


@dataclass(frozen=True)
class EmittedKernel:
    """One kernel for one target. Registers (per thread), shared memory and spills (bytes) are known on GPU targets."""

    name: str
    target: str
    language: str
    source: str
    ir: str
    launches: int
    registers: int | None = None
    shared_bytes: int | None = None
    spills: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def comment(self) -> str:
        """A line that says what the source below is."""
        mark = "//" if self.language == "c++" else "#"
        usage = "" if self.registers is None else (
            f", {self.registers} registers, {self.shared_bytes} bytes of shared memory, {self.spills} bytes spilled")
        return f"{mark} {self.name} for {self.target}: {self.launches} launches{usage}"


def emitted_kernels(spec: str, target: str, *, batch: int, seq: int, train: bool) -> list[EmittedKernel]:
    """Every kernel of the model, printed for `target`; GPU kernels are also compiled ahead of time, with no GPU.

    Raises `UnknownNameError` for an unknown target.
    """
    if target not in TARGETS:
        raise UnknownNameError("target", target, TARGETS)
    loaded = load_model(spec, batch=batch, seq=seq)
    collected = _collect(loaded, "cpu" if target == "cpu" else "cuda", train)
    return _printed_cpu(collected) if target == "cpu" else _printed_gpu(collected, target)


@dataclass
class _Collected:
    kernel: Any  # codegen.ir.Kernel
    launches: int = 0


def _collect(loaded: Loaded, device: str, train: bool) -> list[_Collected]:
    """Trace the model as a compilation does, but run its graphs in eager: kernels for any target come out."""
    found: dict[str, _Collected] = {}

    def compiler(kind: str) -> Callable[..., Boxed]:
        def compile_one(gm: fx.GraphModule, fake_inputs: Sequence[Any]) -> Boxed:
            _add_groups(gm, device, kind, found)
            return torch_compat.mark_boxed(eager_boxed(gm))

        return compile_one

    def collect(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from ..codegen.lowering import decompositions

        return torch_compat.aot_autograd(gm, inputs, forward=compiler("forward"), backward=compiler("backward"),
                                         inference=compiler("inference"), decompositions=decompositions())

    loaded.model.train(train)
    with torch.set_grad_enabled(train), torch_compat.specializing_floats():
        output = _call(torch.compile(loaded.model, backend=collect, dynamic=True), loaded)
        if train:
            _backward(output)
    return list(found.values())


def _add_groups(gm: fx.GraphModule, device: str, kind: str, found: dict[str, _Collected]) -> None:
    from ..passes.base import Candidate, PassContext
    from ..passes.fuse import Fuse, FusedRegion

    findings = Fuse().find(gm, PassContext(device, kind != "inference", {}))
    regions = [f.replacement for f in findings if isinstance(f, Candidate)]
    groups = [r.group for r in regions if isinstance(r, FusedRegion)]
    names = kernel_names(groups)
    taken = {c.kernel.name for c in found.values()}
    for group in groups:
        key = group.built.key
        if key not in found:
            name = names[key] if names[key] not in taken else f"{kind}_{names[key]}"
            found[key] = _Collected(group.built.kernel.renamed(name))
        found[key].launches += 1


def _printed_cpu(collected: Sequence[_Collected]) -> list[EmittedKernel]:
    from ..codegen.cpp import print_kernel_cpp

    return [EmittedKernel(c.kernel.name, "cpu", "c++", print_kernel_cpp(c.kernel), str(c.kernel), c.launches)
            for c in collected]


def _printed_gpu(collected: Sequence[_Collected], target: str) -> list[EmittedKernel]:
    from ..codegen.aot import compile_ahead
    from ..codegen.triton import print_kernel_triton

    used = compile_ahead([c.kernel for c in collected], target)
    return [EmittedKernel(c.kernel.name, target, "triton", print_kernel_triton(c.kernel), str(c.kernel), c.launches,
                          u.registers, u.shared_bytes, u.spills)
            for c, u in zip(collected, used, strict=True)]
