"""Which programs a CUDA graph may hold, and the one way to load a program for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..runtime.cuda_graphs import GraphApi, GraphedProgram
from ..runtime.program import Attention, Call, Gemm, Launch, Program, TensorSpec, tensors_in
from .ir_text import parse_kernel
from .program_choices import ChosenProgram, Options
from .program_memory import roots, writes
from .program_python import KernelCall, load_program_python
from .program_rewrites import find_rewrites
from .schema import bind
from .triton_build import triton_kernels

_UNSUITABLE_TAGS = ("nondeterministic_seeded", "data_dependent_output", "dynamic_output_shape")


def load_program_cuda(program: Program, kernels: Mapping[str, KernelCall] | None = None, api: GraphApi | None = None,
                      options: Options | None = None) -> Callable[[Sequence[Any]], list[Any]]:
    """`call(inputs) -> outputs` on the GPU of the inputs, through CUDA graphs where `why_no_graph` has no objection.

    `kernels`: the program's Triton kernels where they were made already. With `options`, candidates of
    `program_rewrites` are measured at the first call, and used where they are faster.
    """
    if options is not None and program.device == "cuda" and find_rewrites(program)[0]:
        if kernels is None:
            kernels = triton_kernels({n: parse_kernel(t) for n, t in program.kernels.items()})
        return ChosenProgram(program, kernels, options, lambda p, k: load_program_cuda(p, k, api))
    call = load_program_python(program, kernels)
    if why_no_graph(program) is not None:
        return call
    static = [isinstance(i, TensorSpec) and i.static for i in program.inputs]
    return GraphedProgram(call, static, api)


def why_no_graph(program: Program) -> str | None:
    """Why `program` must not be captured, or None when it may be.

    Symbolic sizes are no objection: each set of actual sizes gets a graph of its own once it has been seen twice.
    """
    if program.device != "cuda":
        return f"it runs on {program.device}"
    if not program.inference:
        return "it is part of training"
    if any(isinstance(i, TensorSpec) and not i.device.startswith("cuda") for i in program.inputs):
        return "an input is not on the GPU"
    inputs, root = {i.name for i in program.inputs}, roots(program)
    for step in program.steps:
        reason = _objection(step, lambda name: root[name] in inputs)
        if reason is not None:
            return reason
    return None


def _objection(step: object, is_input: Callable[[str], bool]) -> str | None:
    if isinstance(step, Launch) and any(is_input(o) for o in step.outputs):
        return f"kernel {step.kernel} writes to an input"
    if isinstance(step, Gemm) and is_input(step.out):
        return "a product writes to an input"
    if isinstance(step, Attention) and any(is_input(o) for o in writes(step)):
        return "an attention writes to an input"
    return _call_objection(step, is_input) if isinstance(step, Call) else None


def _call_objection(step: Call, is_input: Callable[[str], bool]) -> str | None:
    operator = _operator(step.op)
    for tag in _UNSUITABLE_TAGS:
        if getattr(torch.Tag, tag) in operator.tags:
            return f"{step.op} is {tag.replace('_', ' ')}"
    written = {a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    for argument, value in bind(step):
        if argument.name in written and any(is_input(t) for t in tensors_in(value)):
            return f"{step.op} writes to an input"
        if argument.type.startswith("Device") and value not in (None, {"device": "cuda"}) and "cuda" not in str(value):
            return f"{step.op} works on another device"
    return None


def _operator(op: str) -> Any:
    namespace, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)
