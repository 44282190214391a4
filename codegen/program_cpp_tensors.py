"""How the C++ program holds each tensor: a raw address, a handle, or both, made when first needed.

Kernels take addresses (`p_NAME`), operators take handles (`h_NAME`). Arena tensors are born as addresses, operator
results as handles; the other form is printed at its first use and kept until the end of the call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..runtime.program import Program, Size, TensorSpec
from .expr import Expr, split_atom
from .program_memory import ITEMSIZE, Arena, roots, size_expr
from .schema import Unsupported


def c_name(name: str) -> str:
    """A C++ identifier for a tensor or symbol name."""
    return re.sub(r"\W", "_", name)


def c_expr(value: Size | Expr) -> str:
    """An integer expression as C++ text over `s_NAME` variables."""
    e = value if isinstance(value, Expr) else size_expr(value)
    return str(e.value) if e.is_const else e.render(_c_variable)


def _c_variable(name: str) -> str:
    call = split_atom(name)
    if call is None:
        return "s_" + c_name(name)
    return f"{call[0]}({', '.join(f'int64_t({c_expr(a)})' for a in call[1])})"


def ints(values: Sequence[Size]) -> str:
    """A braced list of int64."""
    return "{" + ", ".join(c_expr(v) if isinstance(v, int) else f"int64_t({c_expr(v)})" for v in values) + "}"


# ScalarType numbers are frozen by torch's stable ABI (`aoti_torch_dtype_*` return them).
DTYPE_CODES = {"uint8": 0, "int8": 1, "int16": 2, "int32": 3, "int64": 4, "float16": 5, "float32": 6, "float64": 7,
               "bool": 11, "bfloat16": 15}


def dtype_code(dtype: str) -> int:
    """torch's number of a dtype. Raises `Unsupported` for one that programs don't compute with."""
    if dtype not in DTYPE_CODES:
        raise Unsupported(f"dtype {dtype}")
    return DTYPE_CODES[dtype]


def output_names(program: Program) -> list[str]:
    """Names of the tensors a program returns."""
    named = [o["tensor"] if isinstance(o, dict) and "tensor" in o else o for o in program.outputs]
    return [n for n in named if isinstance(n, str)]


class Tensors:
    """Knows each tensor's spec and prints its address or handle into `lines` on first use."""

    def __init__(self, program: Program, arena: Arena, lines: list[str]) -> None:
        self.arena = arena
        self.lines = lines
        self.root = roots(program)
        self.specs: dict[str, TensorSpec] = {}
        self.base: dict[str, tuple[str, Size]] = {}
        self._address: set[str] = set()
        self._handle: set[str] = set()
        self._owned: set[str] = set()
        self.kept = {self.root[n] for n in output_names(program)} | set(output_names(program))
        self._names: dict[str, str] = {}

    def name(self, tensor: str) -> str:
        """The unique C++ suffix of a tensor."""
        if tensor not in self._names:
            plain, taken = c_name(tensor), set(self._names.values())
            while plain in taken:
                plain += "_"
            self._names[tensor] = plain
        return self._names[tensor]

    def spec(self, tensor: str) -> TensorSpec:
        """Raises `Unsupported` when nothing says what the tensor is."""
        if tensor not in self.specs:
            raise Unsupported(f"no shape is known for {tensor}")
        return self.specs[tensor]

    # -- birth --------------------------------------------------------------------------------------
    def add_input(self, spec: TensorSpec, position: int) -> None:
        self.specs[spec.name] = spec
        self.lines.append(f"void* const h_{self.name(spec.name)} = in[{position}];")
        self._handle.add(spec.name)

    def add_alloc(self, spec: TensorSpec) -> None:
        self.specs[spec.name] = spec
        name = self.name(spec.name)
        if spec.name in self.arena.offsets:
            self.lines.append(f"const Ptr p_{name} = arena.at({c_expr(self.arena.offsets[spec.name])});"
                              f"  // {spec.dtype}{ints(spec.shape)}")
            self._address.add(spec.name)
        else:
            made = f"empty({ints(spec.shape)}, {ints(spec.strides)}, {dtype_code(spec.dtype)})"
            self.lines.append(f"Handle o_{name}({made});")
            self.lines.append(f"void* const h_{name} = o_{name}.h;")
            self._handle.add(spec.name)
            self._owned.add(spec.name)

    def add_view(self, spec: TensorSpec, base: str, offset: Size) -> None:
        self.specs[spec.name] = spec
        self.base[spec.name] = (base, offset)

    def add_result(self, tensor: str, spec: TensorSpec | None, expression: str) -> None:
        name = self.name(tensor)
        self.lines.append(f"Handle o_{name}({expression});")
        if spec is not None:
            self.specs[tensor] = spec
            self.lines.append(f'expect(o_{name}.h, {ints(spec.shape)}, {ints(spec.strides)}, "{name}");')
        self.lines.append(f"void* const h_{name} = o_{name}.h;")
        self._handle.add(tensor)
        self._owned.add(tensor)

    # -- use ----------------------------------------------------------------------------------------
    def address(self, tensor: str) -> str:
        """C++ text of the tensor's address (a `Ptr`)."""
        text = f"p_{self.name(tensor)}"
        if tensor in self._address:
            return text
        self._address.add(tensor)
        if tensor in self._handle:
            self.lines.append(f"const Ptr {text} = data_of(h_{self.name(tensor)});")
        elif tensor in self.base:
            base, offset = self.base[tensor]
            step = size_expr(offset) * ITEMSIZE[self.spec(base).dtype]
            self.lines.append(f"const Ptr {text} = offset({self.address(base)}, {c_expr(step)});")
        else:
            raise Unsupported(f"{tensor} is used before it exists")
        return text

    def handle(self, tensor: str) -> str:
        """C++ text of the tensor's handle (borrowed)."""
        text = f"h_{self.name(tensor)}"
        if tensor in self._handle:
            return text
        made = self._handle_of_view(tensor) if tensor in self.base else self._handle_of_memory(tensor)
        self._handle.add(tensor)
        self.lines.append(f"Handle o_{self.name(tensor)}({made});")
        self.lines.append(f"void* const {text} = o_{self.name(tensor)}.h;")
        return text

    def _handle_of_view(self, tensor: str) -> str:
        base, offset = self.base[tensor]
        if self.root[tensor] in self.arena.offsets or self.spec(base).dtype != self.spec(tensor).dtype:
            return self._handle_of_memory(tensor)
        spec = self.spec(tensor)
        return f"view_of({self.handle(base)}, {ints(spec.shape)}, {ints(spec.strides)}, {c_expr(offset)})"

    def _handle_of_memory(self, tensor: str) -> str:
        spec = self.spec(tensor)
        return f"wrap({self.address(tensor)}, {ints(spec.shape)}, {ints(spec.strides)}, {dtype_code(spec.dtype)})"

    def release(self, tensor: str) -> None:
        """Free a result or allocation that nothing uses any more (arena memory is planned instead)."""
        if tensor in self._owned and tensor not in self.kept:
            self.lines.append(f"o_{self.name(tensor)}.reset();")

    def take(self, tensor: str) -> str:
        """C++ text of a new reference to an output."""
        return f"new_reference({self.handle(tensor)})"
