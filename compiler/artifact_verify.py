"""What an artifact must satisfy before its program is printed and compiled: nothing in it may be more than data.

Names become identifiers of printed source, so every name is checked to be one; operators come from an allow list;
kernels are parsed and verified; every tensor is defined before it is read; sizes are integer expressions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..codegen.expr import parse_expr
from ..codegen.ir import DTYPES, IRError, Kernel, verify
from ..codegen.ir_text import parse_kernel
from ..runtime.errors import ArtifactError
from ..runtime.program import (
    Alloc,
    Attention,
    Call,
    Conv,
    Epilogue,
    Gemm,
    Gemms,
    Launch,
    Program,
    Release,
    Size,
    Step,
    TensorSpec,
    View,
    defines,
    reads,
)

_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,200}")
_VALUE = re.compile(r"%\w{1,12}")
_WORD = re.compile(r"[\w .,:+-]{0,80}")
_DEVICE = re.compile(r"cpu|cuda(:\d{1,2})?")
_OPERATOR = re.compile(r"(aten|prims)\.[A-Za-z_]\w*\.\w+")
# Operators that read files, hand out raw memory or change global state; random ones are fine.
_DENIED = re.compile(r"aten\.(from_file|set_|set|_set|resize|_resize|record_stream|_pin_memory|pin_memory|"
                     r"_local_scalar|_print|_assert|_debug|_test|_make_per|storage|data|retain_grad|requires_grad|_backward|"
                     r"backward)")
_DTYPES = frozenset(str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype))
_CONSTANT_KEYS = {"dtype", "device", "layout", "memory_format", "float", "size", "tensor"}
MAX_STEPS = 200_000


def verify_program(program: Program) -> None:
    """Raise `ArtifactError` with the culprit when `program` breaks a rule."""
    _identifiers([program.name, *program.kernels, *(s.name for s in program.symbols)])
    if len(program.steps) > MAX_STEPS:
        raise ArtifactError(f"{len(program.steps)} steps", expected=f"at most {MAX_STEPS}")
    kernels = {name: _kernel(name, text) for name, text in program.kernels.items()}
    known = {item.name for item in program.inputs}
    _identifiers(known)
    for item in program.inputs:
        if isinstance(item, TensorSpec):
            _spec(item)
    for step in program.steps:
        _step(step, known, kernels)
    for output in program.outputs:
        _tree(output if not isinstance(output, str) else {"tensor": output}, known)


def _need(condition: object, message: str) -> None:
    if not condition:
        raise ArtifactError(message)


def _identifiers(names: Iterable[str]) -> None:
    for name in names:
        _need(_IDENTIFIER.fullmatch(name), f"{name[:80]!r} is no identifier")


def _kernel(name: str, text: str) -> Kernel:
    try:
        kernel = parse_kernel(text)
        _identifiers([kernel.name, *kernel.sizes, *(b.name for b in (*kernel.inputs, *kernel.outputs)),
                      *(a.name for a in kernel.axes)])
        _need(kernel.name == name, f"kernel {kernel.name!r} is filed under {name!r}")
        _need(all(b.dtype in DTYPES for b in (*kernel.inputs, *kernel.outputs)), f"{name}: unknown buffer dtype")
        _need(all(_VALUE.fullmatch(s.dst) for s in kernel.body if hasattr(s, "dst")), f"{name}: a bad value name")
        verify(kernel)
    except (IRError, ValueError, RecursionError) as error:
        raise ArtifactError(f"kernel {name}: {error}") from None
    return kernel


def _spec(spec: TensorSpec) -> None:
    _identifiers([spec.name])
    _need(spec.dtype in _DTYPES, f"{spec.name}: unknown dtype {spec.dtype!r}")
    _need(_DEVICE.fullmatch(spec.device), f"{spec.name}: unknown device {spec.device!r}")
    _need(len(spec.shape) == len(spec.strides) <= 64, f"{spec.name}: shape and strides disagree")
    for size in (*spec.shape, *spec.strides):
        _size(size)


def _size(size: Size) -> None:
    try:
        expr = parse_expr(str(size))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(str(error)) from None
    _need(all(_IDENTIFIER.fullmatch(s) for s in expr.symbols()), f"size {size!r} reads something that is no symbol")


def _step(step: Step, known: set[str], kernels: dict[str, Kernel]) -> None:
    missing = [n for n in reads(step) if n not in known]
    _need(not missing, f"{missing[:1]} is read before it is defined")
    match step:
        case Alloc(spec=spec) | View(spec=spec):
            _spec(spec)
            if isinstance(step, View):
                _size(step.offset)
        case Launch():
            _launch(step, known, kernels)
        case Call():
            _call(step, known)
        case Gemm(out=out, a=a, b=b, bias=bias):
            _need({out, a, b, *([bias] if bias else [])} <= known, "a product reads a tensor that is not defined")
        case Gemms(products=products):
            _need(products and len({p.a for p in products}) == 1, "products that share no left side")
            for product in products:
                _step(product, known, kernels)
        case Epilogue(product=product, launch=launch):
            _step(product, known, kernels)
            _step(launch, known, kernels)
        case Conv(spec=spec, weight=weight, bias=bias, sources=sources):
            _spec(spec)
            _need({weight, *([bias] if bias else []), *sources} <= known, "a convolution reads what is not defined")
        case Attention(out=out, logsumexp=logsumexp):
            _need({out, *([logsumexp] if logsumexp else [])} <= known, "an attention writes what is not defined")
        case Release(names=names):
            _need(set(names) <= known, f"released before it is defined: {names}")
    _identifiers(defines(step))
    known.update(defines(step))


def _launch(step: Launch, known: set[str], kernels: dict[str, Kernel]) -> None:
    kernel = kernels.get(step.kernel)
    _need(kernel is not None, f"unknown kernel {step.kernel!r}")
    assert kernel is not None
    given = (len(step.inputs), len(step.outputs), len(step.sizes))
    wanted = (len(kernel.inputs), len(kernel.outputs), len(kernel.sizes))
    _need(given == wanted, f"kernel {step.kernel} is launched with {given} inputs, outputs and sizes, takes {wanted}")
    _need(set(step.outputs) <= known, f"kernel {step.kernel} writes a tensor that is not defined")
    for size in step.sizes:
        _size(size)


def _call(step: Call, known: set[str]) -> None:
    _need(_OPERATOR.fullmatch(step.op) and not _DENIED.match(step.op), f"operator {step.op[:80]!r} is not allowed")
    namespace, name, overload = step.op.split(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    _need(packet is not None and overload in packet.overloads(), f"this torch has no operator {step.op}")
    _identifiers(step.kwargs)
    for value in (*step.args, *step.kwargs.values()):
        _tree(value, known)
    for spec in step.specs:
        if spec is not None:
            _spec(spec)


def _tree(value: Any, known: set[str]) -> None:
    for item in _walk(value):
        if isinstance(item, str):
            _need(_WORD.fullmatch(item), f"the text {item[:80]!r} is not allowed as an argument")
        elif isinstance(item, dict):
            _need(len(item) == 1 and set(item) <= _CONSTANT_KEYS, f"{str(item)[:80]} is no argument")
            key, content = next(iter(item.items()))
            if key == "size":
                _size(content)
            else:
                _need(isinstance(content, str) and _WORD.fullmatch(content), f"{str(item)[:80]} is no argument")
            _need(key != "tensor" or content in known, f"{content!r} is read before it is defined")


def _walk(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item)
