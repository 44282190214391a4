"""Text form of the kernel IR: `parse_kernel(print_kernel(k)) == k`.

The grammar is line based; the examples in `ir.py` and the golden files under tests/ are its reference.
"""

from __future__ import annotations

import re

from .expr import parse_expr
from .ir import (
    REDUCTIONS,
    Axis,
    Buffer,
    Const,
    Definition,
    Index,
    IRError,
    Kernel,
    Load,
    Op,
    Reduce,
    Scalar,
    Stmt,
    Store,
)


def _scalar(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def print_stmt(stmt: Stmt) -> str:
    match stmt:
        case Store(buffer=buffer, index=index, value=value):
            return f"store {buffer}[{index}] = {value}"
        case Load(buffer=buffer, index=index, mask=mask, other=other):
            guard = f" if {mask} else {_scalar(other)}" if mask is not None else ""
            right = f"load {buffer}[{index}]{guard}"
        case Const(value=number):
            right = f"const {_scalar(number)}"
        case Index(expr=expr):
            right = f"index {expr}"
        case Op(op=op, args=args):
            right = f"{op} {', '.join(args)}"
        case Reduce(op=op, src=src):
            right = f"reduce_{op} {src}"
    return f"{stmt.dst}: {stmt.dtype} = {right}"


def print_kernel(kernel: Kernel) -> str:
    """The kernel as text, one statement a line."""
    left = list(kernel.sizes) + [f"{b.name}: {b.dtype}" for b in kernel.inputs]
    right = [f"{b.name}: {b.dtype}" for b in kernel.outputs]
    axes = ", ".join(f"{a.name}: {a.size}{' reduce' if a.is_reduce else ''}" for a in kernel.axes)
    lines = [f"kernel {kernel.name}({', '.join(left)} -> {', '.join(right)})", f"  axes {axes}".rstrip()]
    lines += ["  " + print_stmt(s) for s in kernel.body]
    return "\n".join(lines) + "\n"


_HEAD = re.compile(r"kernel (\w+)\((.*)\)$")
_LOAD = re.compile(r"load (\w+)\[(.*?)\](?: if (%\w+) else (\S+))?$")
_STORE = re.compile(r"store (\w+)\[(.*)\] = (%\w+)$")
_DEFINE = re.compile(r"(%\w+): (\w+) = (\w+)(?: (.*))?$")


def _split_top(text: str) -> list[str]:
    """Split at commas that stand outside parentheses."""
    parts, depth, start = [], 0, 0
    for i, ch in enumerate(text):
        depth += (ch == "(") - (ch == ")")
        if ch == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    return parts + [tail] if tail else parts


def _parse_scalar(text: str) -> Scalar:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _parse_axis(text: str) -> Axis:
    name, _, size = text.partition(":")
    size = size.strip()
    if size.endswith(" reduce"):
        return Axis(name.strip(), parse_expr(size[: -len(" reduce")]), "reduce")
    return Axis(name.strip(), parse_expr(size))


def _parse_buffer(text: str) -> Buffer:
    name, _, dtype = text.partition(":")
    return Buffer(name.strip(), dtype.strip())


def _parse_definition(line: str) -> Definition:
    m = _DEFINE.match(line)
    if not m:
        raise IRError(f"cannot read statement: {line!r}")
    dst, dtype, op, rest = m[1], m[2], m[3], m[4] or ""
    if op == "load":
        found = _LOAD.match("load " + rest)
        if not found:
            raise IRError(f"cannot read load: {line!r}")
        other = _parse_scalar(found[4]) if found[3] else 0
        return Load(dst, dtype, found[1], parse_expr(found[2]), found[3], other)
    if op == "const":
        return Const(dst, dtype, _parse_scalar(rest))
    if op == "index":
        return Index(dst, parse_expr(rest), dtype)
    if op.startswith("reduce_") and op[7:] in REDUCTIONS:
        return Reduce(dst, dtype, op[7:], rest)
    return Op(dst, dtype, op, tuple(_split_top(rest)))


def _parse_stmt(line: str) -> Stmt:
    m = _STORE.match(line)
    return Store(m[1], parse_expr(m[2]), m[3]) if m else _parse_definition(line)


def parse_kernel(text: str) -> Kernel:
    """Read one kernel back from its text. Raises `IRError` with the offending line."""
    lines = [ln.strip() for ln in text.strip().splitlines() if ln.strip()]
    head = _HEAD.match(lines[0]) if lines else None
    if not head or len(lines) < 2 or not lines[1].startswith("axes"):
        raise IRError(f"expected 'kernel name(... -> ...)' and 'axes ...', got {text[:80]!r}")
    left, arrow, right = head[2].partition("->")
    if not arrow:
        raise IRError(f"no '->' in {lines[0]!r}")
    params = _split_top(left)
    return Kernel(
        name=head[1],
        sizes=tuple(p for p in params if ":" not in p),
        inputs=tuple(_parse_buffer(p) for p in params if ":" in p),
        outputs=tuple(_parse_buffer(p) for p in _split_top(right)),
        axes=tuple(_parse_axis(a) for a in _split_top(lines[1][len("axes"):])),
        body=tuple(_parse_stmt(ln) for ln in lines[2:]),
    )
