"""ATen operators in the C++ program: dispatcher calls over the stable shim, direct shim functions where it has none.

The dispatcher's stack takes tensors, integers, floats, bools, dtypes, layouts, devices, memory formats, optionals and
lists of these. It does not take `Scalar`; the few operators that need one go through the shim function of their name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..runtime.program import Call, Json, TensorSpec, tensors_in
from .program_cpp_tensors import Tensors, c_expr, dtype_code
from .schema import Schema, Unsupported, bind, schema_of

_MEMORY_FORMATS = {"contiguous_format": 0, "preserve_format": 1, "channels_last": 2, "channels_last_3d": 3}


def print_call(call: Call, tensors: Tensors, from_python: list[Call]) -> None:
    """Print one operator call and its results; what the shim can't carry is added to `from_python` and called back."""
    if call.op in _DIRECT:
        _DIRECT[call.op](call, tensors)
        return
    schema = schema_of(call.op)
    try:
        values = [_value(argument.type, value, tensors) for argument, value in bind(call)]
        returns = [t for t, _ in schema.returns]
        if any(t not in ("Tensor", "List[Tensor]") for t in returns):
            raise Unsupported(f"results of type {returns}", call)
    except Unsupported:
        _print_callback(call, tensors, from_python)
        return
    lines = tensors.lines
    lines.append(f"{{  // {call.op}")
    lines.append(f"  Value stack[{max(len(values), len(returns), 1)}] = {{{', '.join(values)}}};")
    lines.append(f'  dispatch("{schema.name}", "{schema.overload}", stack);')
    temporary = _keep_results(call, schema, tensors, lines)
    lines.append("}")
    for name, spec, slot in temporary:
        tensors.add_result(name, spec, slot)


def _print_callback(call: Call, tensors: Tensors, from_python: list[Call]) -> None:
    """The operator runs in Python: tensors and sizes go there in tree order, results come back as handles."""
    tree = [list(call.args), list(call.kwargs.values())]
    handles = [tensors.handle(name) for name in tensors_in(tree)]
    sizes = [f"int64_t({c_expr(size)})" for size in sizes_in(tree)]
    made = f"made_{len(from_python)}"
    lines = tensors.lines
    lines.append(f"void* {made}[{max(1, len(call.outs))}] = {{}};")
    lines.append(f"from_python(frame, {len(from_python)}, {{{', '.join(handles)}}}, {{{', '.join(sizes)}}}, {made});"
                 f"  // {call.op}")
    specs = list(call.specs) + [None] * (len(call.outs) - len(call.specs))
    for k, (name, spec) in enumerate(zip(call.outs, specs, strict=True)):
        if name is not None:
            tensors.add_result(name, spec, f"{made}[{k}]")
    from_python.append(call)


def sizes_in(tree: Json) -> list[Json]:
    """The symbolic sizes of an argument tree, in order."""
    if isinstance(tree, dict):
        return [tree["size"]] if "size" in tree else []
    return [size for item in tree for size in sizes_in(item)] if isinstance(tree, (list, tuple)) else []


def _keep_results(call: Call, schema: Schema, tensors: Tensors,
                  lines: list[str]) -> list[tuple[str, TensorSpec | None, str]]:
    """Move results out of the stack's scope; what is unused is dropped at once."""
    kept: list[tuple[str, TensorSpec | None, str]] = []
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


def _scatter_value(call: Call, tensors: Tensors) -> None:
    """In place, as the loss functions' backward does."""
    target, dim, index, value = (v for _, v in bind(call))
    handle, source = tensors.handle(target["tensor"]), tensors.handle(index["tensor"])
    arguments = f"{handle}, {handle}, {dim}, {source}, {c_float(value)}"
    tensors.lines.append(f'check(aoti_torch_cpu_scatter_value_out({arguments}), "{call.op}");')
    _same_tensor(call, target["tensor"], tensors)


def _fill(call: Call, tensors: Tensors) -> None:
    target, value = (v for _, v in bind(call))
    handle = tensors.handle(target["tensor"])
    tensors.lines.append(f'check(aoti_torch_cpu_fill__Scalar({handle}, {c_float(value)}), "{call.op}");')
    _same_tensor(call, target["tensor"], tensors)


def _same_tensor(call: Call, target: str, tensors: Tensors) -> None:
    """An in-place operator's result, where it is used, is its target."""
    if call.outs and call.outs[0] is not None:
        spec = call.specs[0] if call.specs else None
        tensors.add_result(call.outs[0], spec, f"new_reference({tensors.handle(target)})")


_DIRECT: dict[str, Callable[[Call, Tensors], None]] = {
    "aten.mm.default": _products("aoti_torch_cpu_mm_out", 2),
    "aten.bmm.default": _products("aoti_torch_cpu_bmm_out", 2),
    "aten.addmm.default": _products("aoti_torch_cpu_addmm_out", 3),
    "aten.baddbmm.default": _products("aoti_torch_cpu_baddbmm_out", 3),
    "aten.scatter_.value": _scatter_value,
    "aten.fill_.Scalar": _fill,
}
