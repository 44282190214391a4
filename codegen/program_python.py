"""The Python printer of programs: allocate, launch in order, return.

    def run(inputs, launch):
        x, w, b = inputs
        s0 = x.size(0)
        t0 = torch.ops.aten.addmm.default(b, x, w)
        t1 = torch.empty_strided((s0, 768), (768, 1), dtype=torch.float32, device=device)
        launch.gelu_0([t0, t1], [s0])
        del t0
        return [t1]

For CUDA the module also holds the Triton kernels that it launches, so one file shows everything a graph does. The same
text runs a CPU program whose steps have no C++ form. A program may come from a stranger's file: every name that is
printed must be an identifier, sizes are parsed, strings are quoted, so the text holds nothing but these forms.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ..runtime.errors import ArtifactError
from ..runtime.program import (
    Alloc,
    Attention,
    Call,
    Epilogue,
    Gemm,
    Gemms,
    Json,
    Launch,
    Program,
    Release,
    Size,
    Step,
    TensorSpec,
    View,
)
from .expr import Expr, const, parse_expr, split_atom
from .ir_text import parse_kernel
from .program_attention import FLASH
from .schema import schema_of
from .triton import print_module
from .triton_build import triton_kernels

KernelCall = Callable[[Sequence[Any], Sequence[int]], None]
_RESERVED = frozenset(("torch", "device", "inputs", "launch", "run", "max", "min", "_made", *keyword.kwlist))
_OP = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){2}", re.ASCII)
_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_FLOATS = ("inf", "-inf", "nan")


def print_program_python(program: Program, kernels: bool | None = None) -> str:
    """The program as one Python module with a function `run(inputs, launch)`.

    `kernels`: print the Triton kernels too (default: when the program runs on a GPU). Raises `ArtifactError` for a name
    or a literal that can't be printed safely.
    """
    with_kernels = program.device != "cpu" if kernels is None else kernels
    return _ProgramPrinter(program).text(with_kernels)


def load_program_python(program: Program, kernels: Mapping[str, KernelCall] | None = None) -> Callable[..., list[Any]]:
    """`call(inputs) -> outputs` for a program, from text printed here and now.

    `kernels` gives the callables of a CPU program by name; by default the program's own Triton kernels are launched.
    """
    from ..runtime.triton_launch import load_plain_module

    source = print_program_python(program, kernels is None)
    if kernels is None:
        kernels = triton_kernels({n: parse_kernel(t) for n, t in program.kernels.items()}, source)
    run = load_plain_module(source).run
    launch = SimpleNamespace(**kernels)

    def call(inputs: Sequence[Any]) -> list[Any]:
        outputs: list[Any] = run(inputs, launch)
        return outputs

    return call


class _ProgramPrinter:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.lines: list[str] = []

    def text(self, with_kernels: bool) -> str:
        self._entry()
        for step in self.program.steps:
            self._step(step)
        self.line(f"return [{', '.join(self._output(o) for o in self.program.outputs)}]")
        name = _word(self.program.name)
        head = f'"""Program {name}: printed by Meshwright; `run` launches its kernels in order."""\n'
        found = [parse_kernel(t).renamed(_word(n)) for n, t in self.program.kernels.items()] if with_kernels else []
        body = "def run(inputs, launch):\n" + "\n".join("    " + ln for ln in self.lines) + "\n"
        parts = [head, *([print_module(found)] if found else []), "import torch\n\n", body]
        return "\n".join(parts)

    # -- entry ----------------------------------------------------------------------------------
    def _entry(self) -> None:
        names = [_name(i.name) for i in self.program.inputs]
        if names:
            self.line(f"{', '.join(names)}{',' if len(names) == 1 else ''} = inputs")
        for symbol in self.program.symbols:
            if symbol.argument is not None:
                self.line(f"{_name(symbol.name)} = inputs[{int(symbol.argument)}]")
            else:
                self.line(f"{_name(symbol.name)} = {_name(symbol.tensor or '')}.size({int(symbol.dim)})")
        self.line(f"device = {self._device_source()}")

    def _device_source(self) -> str:
        """The device of the call: that of the first input on the program's device (a call may come from cuda:1)."""
        wanted = self.program.device
        for item in self.program.inputs:
            if isinstance(item, TensorSpec) and item.device.split(":")[0] == wanted:
                return f"{_name(item.name)}.device"
        return f"torch.device({wanted!r})"

    # -- steps ----------------------------------------------------------------------------------
    def _step(self, step: Step) -> None:
        match step:
            case Alloc(spec=spec):
                self.line(f"{_name(spec.name)} = torch.empty_strided({_tuple(spec.shape)}, {_tuple(spec.strides)}, "
                          f"dtype=torch.{_word(spec.dtype)}, device={self._device(spec.device)})")
            case View(spec=spec, base=base, offset=offset):
                start = f"{_name(base)}.storage_offset()" + ("" if offset in (0, "0") else f" + {_size(offset)}")
                self.line(f"{_name(spec.name)} = torch.as_strided({_name(base)}, {_tuple(spec.shape)}, "
                          f"{_tuple(spec.strides)}, {start})")
            case Launch(kernel=kernel, inputs=inputs, outputs=outputs, sizes=sizes):
                buffers = ", ".join(_name(n) for n in (*inputs, *outputs))
                self.line(f"launch.{_word(kernel)}([{buffers}], [{', '.join(_size(s) for s in sizes)}])")
            case Gemm():
                self._gemm(step)
            case Gemms(products=products):
                for product in products:
                    self._gemm(product)
            case Epilogue(product=product, launch=launch):
                self._step(product)
                self._step(launch)
            case Attention():
                self._attention(step)
            case Call():
                self._call(step)
            case Release(names=names):
                self.line(f"del {', '.join(_name(n) for n in names)}")
            case _:  # a step that only the C++ host knows
                raise ArtifactError(f"a step of kind {step.kind!r}", expected="one that Python can run")

    def _gemm(self, step: Gemm) -> None:
        out, a, b = _name(step.out), _name(step.a), _name(step.b)
        if step.bias is None:
            self.line(f"torch.matmul({a}, {b}, out={out})")
        else:
            self.line(f"torch.add(torch.matmul({a}, {b}), {_name(step.bias)}, out={out})")

    def _attention(self, step: Attention) -> None:
        """ATen's operator into the step's memory."""
        q, k, v, out = (_name(n) for n in (step.q, step.k, step.v, step.out))
        sums = _name(step.logsumexp) if step.logsumexp is not None else None
        mask = _name(step.mask) if step.mask is not None else None
        self.line(f"_made = torch.ops.{FLASH}({q}, {k}, {v}, 0.0, {bool(step.causal)}, attn_mask={mask}, "
                  f"scale={self._number(step.scale)})")
        self.line(f"{out}.copy_(_made[0])")
        if sums is not None:
            self.line(f"{sums}.copy_(_made[1])")
        self.line("del _made")

    def _call(self, step: Call) -> None:
        arguments = [self._tree(a) for a in step.args]
        arguments += [f"{_word(k)}={self._tree(v)}" for k, v in step.kwargs.items()]
        if not _OP.fullmatch(step.op):
            raise ArtifactError(f"operator {step.op!r}", expected="namespace.name.overload")
        call = f"torch.ops.{step.op}({', '.join(arguments)})"
        names = ["_" if o is None else _name(o) for o in step.outs]
        if all(n == "_" for n in names):
            self.line(call)
        elif len(names) == 1 and not _returns_several(step.op):
            self.line(f"{names[0]} = {call}")
        else:
            self.line(f"{', '.join(names)}{',' if len(names) == 1 else ''} = {call}")

    # -- trees ----------------------------------------------------------------------------------
    def _tree(self, tree: Json) -> str:
        if isinstance(tree, (list, tuple)):
            return "[" + ", ".join(self._tree(t) for t in tree) + "]"
        if isinstance(tree, dict):
            return self._leaf(tree)
        if tree is None or type(tree) in (bool, int, float, str):
            return repr(tree)
        raise ArtifactError(f"argument {tree!r}", expected="numbers, strings, lists and tagged names")

    def _leaf(self, tree: dict[str, Json]) -> str:
        kind, value = next(iter(tree.items())) if len(tree) == 1 else ("", "")
        if kind == "tensor":
            return _name(value)
        if kind == "size":
            return _size(value)
        if kind == "device":
            return self._device(value)
        if kind in ("dtype", "layout", "memory_format"):
            return f"torch.{_word(str(value).removeprefix('torch.'))}"
        if kind == "float" and value in _FLOATS:
            return f'float("{value}")'
        raise ArtifactError(f"argument {tree!r}", expected="a tag such as tensor, size, dtype, device or float")

    def _number(self, value: float) -> str:
        return repr(float(value)) if math.isfinite(value) else f'float("{float(value)}")'

    def _device(self, name: str) -> str:
        kind = str(name).split(":")[0]
        return "device" if kind == self.program.device else f"torch.device({kind!r})"

    def _output(self, tree: Json) -> str:
        return _name(tree) if isinstance(tree, str) else self._tree(tree)

    def line(self, text: str) -> None:
        self.lines.append(text)


def _returns_several(op: str) -> bool:
    returns = schema_of(op).returns
    return len(returns) != 1 or returns[0][0] != "Tensor"


def _word(name: str) -> str:
    """`name` when it is a plain identifier. Raises `ArtifactError` otherwise."""
    if not isinstance(name, str) or not _WORD.fullmatch(name) or keyword.iskeyword(name):
        raise ArtifactError(f"name {name!r}", expected="letters, digits and underscores")
    return name


def _name(name: str) -> str:
    """A tensor's or symbol's name in the printed function."""
    word = _word(name)
    return f"{word}_" if word in _RESERVED else word


def _tuple(sizes: Sequence[Size]) -> str:
    texts = [_size(s) for s in sizes]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def _size(size: Size) -> str:
    """A size as Python arithmetic over the program's symbols."""
    return _render(const(size) if isinstance(size, int) else parse_expr(size))


def _render(e: Expr) -> str:
    return e.render(_variable)


def _variable(name: str) -> str:
    call = split_atom(name)
    if call is None:
        return _name(name)
    a, b = (_render(arg) for arg in call[1])
    if call[0] in ("max", "min"):
        return f"{call[0]}({a}, {b})"
    return f"(({a}) {'//' if call[0] == 'floordiv' else '%'} ({b}))"
