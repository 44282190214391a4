"""ATen operators in the C++ program: dispatcher calls over the stable shim, direct shim functions where it has none.

The dispatcher's stack takes tensors, integers, floats, bools, dtypes, layouts, devices, memory formats, optionals and
lists of these. It does not take `Scalar`; the few operators that need one go through the shim function of their name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..runtime.program import Call, Json
from .program_cpp_tensors import Tensors, c_expr, dtype_code
from .schema import Schema, Unsupported, bind, schema_of

_MEMORY_FORMATS = {"contiguous_format": 0, "preserve_format": 1, "channels_last": 2, "channels_last_3d": 3}


def print_call(call: Call, tensors: Tensors) -> None:
    """Print one operator call and its results. Raises `Unsupported` with the argument that can't be expressed."""
    if call.op in _DIRECT:
        _DIRECT[call.op](call, tensors)
        return
    schema = schema_of(call.op)
    try:
        values = [_value(argument.type, value, tensors) for argument, value in bind(call)]
    except Unsupported as error:
        raise Unsupported(error.reason, call) from error
    returns = [t for t, _ in schema.returns]
    if len(returns) > 8 or any(t not in ("Tensor", "List[Tensor]", "int", "float", "bool") for t in returns):
        raise Unsupported(f"results of type {returns}", call)
    lines = tensors.lines
    lines.append(f"{{  // {call.op}")
    lines.append(f"  Value stack[{max(len(values), len(returns), 1)}] = {{{', '.join(values)}}};")
    lines.append(f'  dispatch("{schema.name}", "{schema.overload}", stack);')
    temporary = _keep_results(call, schema, tensors, lines)
    lines.append("}")
    for name, spec, slot in temporary:
        tensors.add_result(name, spec, slot)


def _keep_results(call: Call, schema: Schema, tensors: Tensors,
                  lines: list[str]) -> list[tuple[str, object, str]]:
    """Move results out of the stack's scope; what is unused is dropped at once."""
    kept: list[tuple[str, object, str]] = []
    specs = list(call.specs) + [None] * (len(call.outs) - len(call.specs))
    before = lines.index(f"{{  // {call.op}", max(0, len(lines) - 3))
    declared: list[str] = []
    if [t for t, _ in schema.returns] == ["List[Tensor]"]:
        lines.append(f"  void* items[{max(1, len(call.outs))}];")
        lines.append(f"  unpack(stack[0], items, {len(call.outs)});")
        sources = [f"items[{k}]" for k in range(len(call.outs))]
    else:
        sources = [f"(void*)stack[{k}]" for k in range(len(call.outs))]
        for k in range(len(call.outs), len(schema.returns)):
            if schema.returns[k][0] == "Tensor":
                lines.append(f"  Handle drop{k}((void*)stack[{k}]);")
    for k, (name, source) in enumerate(zip(call.outs, sources, strict=True)):
        if name is None:
            if k >= len(schema.returns) or schema.returns[k][0] == "Tensor" or source.startswith("items"):
                lines.append(f"  Handle drop{k}({source});")
            continue
        slot = f"r_{tensors.name(name)}"
        declared.append(slot)
        lines.append(f"  {slot} = {source};")
        kept.append((name, specs[k], slot))
    if declared:
        lines.insert(before, "void " + ", ".join(f"*{slot}" for slot in declared) + ";")
    return kept


def _value(kind: str, value: Json, tensors: Tensors) -> str:
    """One stack slot of schema type `kind`."""
    if kind.startswith("Optional["):
        return "none" if value is None else f"some({_value(kind[9:-1], value, tensors)})"
    if kind.startswith("List["):
        if not isinstance(value, (list, tuple)):
            value = [value]
        return f"list({{{', '.join(_value(kind[5:-1], item, tensors) for item in value)}}})"
    printer = _VALUES.get(kind)
    if printer is None:
        raise Unsupported(f"an argument of type {kind}")
    return printer(value, tensors)


def _tensor(value: Json, tensors: Tensors) -> str:
    if not isinstance(value, dict) or "tensor" not in value:
        raise Unsupported(f"{value!r} where a tensor is expected")
    return f"tensor({tensors.handle(value['tensor'])})"


def _int(value: Json, tensors: Tensors) -> str:
    if isinstance(value, dict):
        if "dtype" in value:
            return f"v(int64_t({dtype_code(value['dtype'])}))"
        for key, table in (("memory_format", _MEMORY_FORMATS), ("layout", {"strided": 0})):
            if key in value:
                return f"v(int64_t({table[value[key]]}))"
        if "size" in value:
            return f"v(int64_t({c_expr(value['size'])}))"
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unsupported(f"{value!r} where an integer is expected")
    return f"v(int64_t({value}))"


def c_float(value: Json) -> str:
    """A double literal. Raises `Unsupported` for what is no number."""
    if isinstance(value, dict) and "float" in value:
        value = float(value["float"])
    if isinstance(value, dict) and "size" in value:
        return f"double({c_expr(value['size'])})"
    if not isinstance(value, (int, float)):
        raise Unsupported(f"{value!r} where a number is expected")
    if math.isnan(value):
        return "__builtin_nan(\"\")"
    return ("-" if value < 0 else "") + "__builtin_inf()" if math.isinf(value) else repr(float(value))


def _float(value: Json, tensors: Tensors) -> str:
    return f"v(double({c_float(value)}))"


def _bool(value: Json, tensors: Tensors) -> str:
    return f"flag({'true' if value else 'false'})"


def _device(value: Json, tensors: Tensors) -> str:
    name = value["device"] if isinstance(value, dict) else value
    if name != "cpu":
        raise Unsupported(f"device {name}")
    return "v(int64_t(0xffffffff))"  # type cpu (0) above, index -1 below


_VALUES: dict[str, Callable[[Json, Tensors], str]] = {
    "Tensor": _tensor, "int": _int, "SymInt": _int, "float": _float, "bool": _bool, "Device": _device,
    "ScalarType": lambda v, t: _constant(v, "dtype"), "Layout": lambda v, t: _constant(v, "layout"),
    "MemoryFormat": lambda v, t: _constant(v, "memory_format"),
}


def _constant(value: Json, key: str) -> str:
    name = value.get(key) if isinstance(value, dict) else None
    if name is None:
        raise Unsupported(f"{value!r} where a {key} is expected")
    if key == "dtype":
        return f"v32({dtype_code(name)})"
    table = {"strided": 0} if key == "layout" else _MEMORY_FORMATS
    if name not in table:
        raise Unsupported(f"{key} {name}")
    return f"v32({table[name]})"


# -- operators with Scalar arguments: the shim function of their name ------------------------------
def _products(function: str, operands: int) -> Callable[[Call, Tensors], None]:
    """mm, bmm, addmm, baddbmm: an allocation, then the `_out` function of the shim."""

    def print_product(call: Call, tensors: Tensors) -> None:
        bound = [value for _, value in bind(call)]
        spec = call.specs[0] if call.specs else None
        if spec is None or call.outs[0] is None:
            raise Unsupported("a product whose result is not described", call)
        tensors.add_alloc(spec)
        handles = [tensors.handle(value["tensor"]) for value in bound[:operands]]
        scalars = [c_float(value) for value in bound[operands:]]
        out = tensors.handle(spec.name)
        tensors.lines.append(f'check({function}({", ".join([out, *handles, *scalars])}), "{call.op}");')

    return print_product


_DIRECT: dict[str, Callable[[Call, Tensors], None]] = {
    "aten.mm.default": _products("aoti_torch_cpu_mm_out", 2),
    "aten.bmm.default": _products("aoti_torch_cpu_bmm_out", 2),
    "aten.addmm.default": _products("aoti_torch_cpu_addmm_out", 3),
    "aten.baddbmm.default": _products("aoti_torch_cpu_baddbmm_out", 3),
}
