"""The Triton printer: one readable function per kernel of the IR.

    @triton.jit
    def rms_norm(x_ptr, w_ptr, y_ptr, s0, XBLOCK: tl.constexpr, INDEX: tl.constexpr):
        ...

Arguments are the input and output pointers, then the sizes, then the launch constants. A program handles XBLOCK points
of the flattened parallel axes; `x` and `r` are the flat positions along the parallel and the reduce axes. Values along
`x` only have shape [XBLOCK, 1], along both [XBLOCK, RBLOCK]; a pointwise kernel has the single direction [XBLOCK].
INDEX is the type of all index arithmetic: the launch picks tl.int64 whenever an index could pass 2**31.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .expr import Expr, product, split_atom
from .ir import Const, Index, IRError, Kernel, Load, Op, Reduce, Stmt, Store
from .triton_axes import Dims, R, X, decode, expr_dims, expressions, merge_axes, value_dims
from .triton_ops import HELPERS, INFIX_OPS, TRITON_DTYPES, cast, helpers_in, literal, neutral, operation
from .triton_schedule import Looped, Pass, form_of, live, schedule, store_dims

PRINTER_VERSION = "1"
_RESERVED = frozenset(("x", "r", "xmask", "rmask", "mask", "tl", "triton", "libdevice", "start", "max", "min",
                       "XBLOCK", "RBLOCK", "INDEX")) | frozenset(HELPERS) | frozenset(keyword.kwlist)
_HEADER = "import triton\nimport triton.language as tl\nfrom triton.language.extra import libdevice\n"


def print_module(kernels: Sequence[Kernel]) -> str:
    """A Python module that holds `kernels` and the helpers they call; it needs nothing but Triton."""
    return module_of([print_kernel_triton(k) for k in kernels])


def module_of(functions: Sequence[str]) -> str:
    """The module of functions that were printed already."""
    helpers = [HELPERS[name].strip("\n") + "\n" for name in helpers_in("\n".join(functions))]
    return "\n\n".join([_HEADER, *helpers, *functions])


def print_kernel_triton(kernel: Kernel) -> str:
    """The Triton function of one (verified) kernel, decorator included, without imports and helpers.

    Raises `IRError` when a name is no identifier: a kernel may come from a stranger's file.
    """
    check_names(kernel)
    return KernelPrinter(merge_axes(kernel)).text()


def check_names(kernel: Kernel) -> None:
    """Raise `IRError` unless every name of the kernel is an identifier."""
    names = [kernel.name, *kernel.sizes, *(b.name for b in (*kernel.inputs, *kernel.outputs))]
    names += [a.name for a in kernel.axes]
    values = [s.dst for s in kernel.body if not isinstance(s, Store)]
    for name in [*names, *(v.removeprefix("%") for v in values)]:
        if not re.fullmatch(r"\w+", name, re.ASCII) or keyword.iskeyword(name):
            raise IRError(f"{kernel.name!r}: {name!r} is no name; expected letters, digits and underscores")


def constants_of(kernel: Kernel) -> tuple[str, ...]:
    """Names of the launch constants (`tl.constexpr` parameters) of the printed kernel."""
    looped = form_of(merge_axes(kernel)) == "looped"
    return ("XBLOCK", "RBLOCK", "INDEX") if looped else ("XBLOCK", "INDEX")


class KernelPrinter:
    """Prints one kernel whose axes are merged. `lines` grows as statements are printed."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.form = form_of(kernel)
        self.dims = value_dims(kernel)
        self.types = {s.dst: s.dtype for s in kernel.body if not isinstance(s, Store)}
        self.constants = {s.dst: s for s in kernel.body if isinstance(s, Const)}
        self.names = self._axis_names()
        self.row_mask = bool(kernel.reduce) and not self._row_fills_block()
        self.lines: list[str] = []
        self.indent = 1

    # -- the function ---------------------------------------------------------------------------
    def text(self) -> str:
        self._prologue()
        if self.form == "looped":
            self._looped(schedule(self.kernel))
        else:
            self._straight()
        body = "\n".join(self._without_unused_constants())
        return f"{self._signature()}\n{body}\n"

    def _without_unused_constants(self) -> list[str]:
        """The lines, except definitions of constants that were printed in place everywhere."""
        words = Counter(re.findall(r"\w+", "\n".join(self.lines)))
        unused = {self.name(c) for c in self.constants if words[self.name(c)] == 1}
        return [ln for ln in self.lines if ln.split(" = ")[0].strip() not in unused]

    def _signature(self) -> str:
        buffers = [self.pointer(b.name) for b in (*self.kernel.inputs, *self.kernel.outputs)]
        blocks = ["XBLOCK", "RBLOCK"] if self.form == "looped" else ["XBLOCK"]
        constants = [f"{name}: tl.constexpr" for name in (*blocks, "INDEX")]
        sizes = [self.names[s] for s in self.kernel.sizes]
        fixed = f"(do_not_specialize={sizes!r})" if sizes else ""
        return f"@triton.jit{fixed}\ndef {self.kernel.name}({', '.join([*buffers, *sizes, *constants])}):"

    def _prologue(self) -> None:
        used = {name for e in self._used_expressions() for name in e.symbols()}
        for size in self.kernel.sizes:
            self.line(f"{self.names[size]} = {self.names[size]}.to(INDEX)")
        flat = "tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK)"
        self.line(f"x = {flat}" if self.form == "pointwise" else f"x = ({flat})[:, None]")
        self.line(f"xmask = x < {self.expr(self.kernel.rows)}")
        self._decode(self.kernel.parallel, "x", used)
        if self.form == "persistent":
            self.line(f"RBLOCK: tl.constexpr = {_next_power_of_2(self.kernel.row_size.value)}")
            self.line("r = tl.arange(0, RBLOCK)[None, :].to(INDEX)")
            if self.row_mask:
                self.line(f"rmask = r < {self.expr(self.kernel.row_size)}")
            self._decode(self.kernel.reduce, "r", used)

    def _used_expressions(self) -> Iterable[Expr]:
        return [*expressions(self.kernel), *(a.size for a in self.kernel.axes)]

    def _decode(self, axes: tuple[object, ...], flat: str, used: set[str]) -> None:
        kernel_axes = self.kernel.parallel if flat == "x" else self.kernel.reduce
        if len(kernel_axes) < 2:
            return
        for name, source, size, stride in decode(kernel_axes, flat):
            if name not in used:
                continue
            text = source if stride == 1 else f"{source} // {self.factor(stride)}"
            if size is not None:
                text = f"{text} % {self.factor(size)}" if stride == 1 else f"({text}) % {self.factor(size)}"
            self.line(f"{self.names[name]} = {text}")

    # -- bodies ---------------------------------------------------------------------------------
    def _straight(self) -> None:
        alive = live(self.kernel)
        stores = [s for s in self.kernel.body if isinstance(s, Store)]
        for stmt in self.kernel.body:
            if not isinstance(stmt, Store) and stmt.dst in alive:
                self.define(stmt)
        for store in stores:
            self.store(store)

    def _looped(self, plan: Looped) -> None:
        for before, one in zip(plan.before, plan.passes, strict=True):
            for stmt in before:
                self.define(stmt)
            self._pass(one)
        for stmt in plan.after:
            self.define(stmt)
        for store in plan.row_stores:
            self.store(store)

    def _pass(self, one: Pass) -> None:
        for reduction in one.reductions:
            self._start(reduction)
        self.line(f"for start in range(0, {self.expr(self.kernel.row_size)}, RBLOCK):")
        self.indent += 1
        self.line("r = (start + tl.arange(0, RBLOCK))[None, :].to(INDEX)")
        self.line(f"rmask = r < {self.expr(self.kernel.row_size)}")
        inner = [*one.body, *one.reductions, *one.stores]
        used = {n for s in inner if isinstance(s, (Load, Store)) for n in s.index.symbols()}
        used |= {n for s in inner if isinstance(s, Index) for n in s.expr.symbols()}
        self._decode(self.kernel.reduce, "r", used)
        for stmt in one.body:
            self.define(stmt)
        for reduction in one.reductions:
            self._accumulate(reduction)
        for store in one.stores:
            self.store(store)
        self.indent -= 1
        for reduction in one.reductions:
            self._finish(reduction)

    # -- reductions -----------------------------------------------------------------------------
    def _start(self, stmt: Reduce) -> None:
        source = self._reduced_type(stmt)
        value = neutral(stmt.op, source)
        self.line(f"{self.name(stmt.dst)}_acc = tl.full([XBLOCK, RBLOCK], {value}, {TRITON_DTYPES[source]})")
        if stmt.op in ("argmax", "argmin"):
            self.line(f"{self.name(stmt.dst)}_at = tl.full([XBLOCK, RBLOCK], {2**63 - 1}, tl.int64)")

    def _accumulate(self, stmt: Reduce) -> None:
        acc, value = f"{self.name(stmt.dst)}_acc", self._source(stmt)
        dtype = self._reduced_type(stmt)
        if stmt.op in ("argmax", "argmin"):
            at, sign = f"{self.name(stmt.dst)}_at", ">" if stmt.op == "argmax" else "<"
            nan = f" | (({value} != {value}) & ({acc} == {acc}))" if dtype in ("f32", "f64") else ""
            self.line(f"better = rmask & (({value} {sign} {acc}){nan} | ({at} == {2**63 - 1}))")
            self.line(f"{acc} = tl.where(better, {value}, {acc})")
            self.line(f"{at} = tl.where(better, r.to(tl.int64), {at})")
            return
        combined = operation({"sum": "add", "prod": "mul", "any": "max", "all": "min"}.get(stmt.op, stmt.op),
                             [acc, value], dtype)
        self.line(f"{acc} = tl.where(rmask, {combined}, {acc})")

    def _finish(self, stmt: Reduce) -> None:
        name = self.name(stmt.dst)
        if stmt.op in ("argmax", "argmin"):
            self._first(stmt, f"{name}_acc", f"{name}_at", mask="")
        else:
            self._fold(stmt, f"{name}_acc")

    def _reduce(self, stmt: Reduce) -> None:
        """A reduction in a persistent kernel: the whole row is in the block."""
        value = self._source(stmt)
        if R not in self.dims[stmt.src] or X not in self.dims[stmt.src]:
            value = f"tl.broadcast_to({value}, [XBLOCK, RBLOCK])"
        if self.row_mask:
            value = f"tl.where(rmask, {value}, {neutral(stmt.op, self._reduced_type(stmt))})"
        if stmt.op in ("argmax", "argmin"):
            name = self.name(stmt.dst)
            self.line(f"{name}_row = {value}")
            self._first(stmt, f"{name}_row", "r.to(tl.int64)", "rmask & " if self.row_mask else "")
        else:
            self._fold(stmt, value)

    def _fold(self, stmt: Reduce, value: str) -> None:
        helper = {"any": "row_max", "all": "row_min"}.get(stmt.op, f"row_{stmt.op}")
        test = " != 0" if stmt.op in ("any", "all") else ""
        self.line(f"{self.name(stmt.dst)} = {helper}({value}){test}")

    def _first(self, stmt: Reduce, values: str, positions: str, mask: str) -> None:
        """Position of the first element equal to the extremum; NaN is the extremum where there is one."""
        helper = "row_max" if stmt.op == "argmax" else "row_min"
        self.line(f"best = {helper}({values})")
        self.line(f"hit = {mask}(({values} == best) | ({values} != {values}))")
        self.line(f"{self.name(stmt.dst)} = row_min(tl.where(hit, {positions}, {2**63 - 1}))")

    def _reduced_type(self, stmt: Reduce) -> str:
        return "i32" if stmt.op in ("any", "all") else self.types[stmt.src]

    def _source(self, stmt: Reduce) -> str:
        name = self.name(stmt.src)
        return f"{name}.to(tl.int32)" if stmt.op in ("any", "all") else name

    # -- statements -----------------------------------------------------------------------------
    def define(self, stmt: Stmt) -> None:
        """Print one definition."""
        if isinstance(stmt, Reduce):
            self._reduce(stmt)
            return
        assert not isinstance(stmt, Store)
        self.line(f"{self.name(stmt.dst)} = {self._value(stmt)}")

    def _value(self, stmt: Load | Const | Index | Op) -> str:
        match stmt:
            case Load():
                return self._load(stmt)
            case Const(dtype=dtype, value=value):
                return f"tl.full({self.ones}, {literal(value, dtype)}, {TRITON_DTYPES[dtype]})"
            case Index(expr=expr):
                if not expr_dims(self.kernel, expr, self.dims):
                    return f"tl.full({self.ones}, {self.expr(expr)}, tl.int64)"
                return f"{self.factor(expr)}.to(tl.int64)"
            case Op(op="cast", args=args, dtype=dtype):
                return cast(self.name(args[0]), self.types[args[0]], dtype)
            case Op(op=op, args=args):
                return operation(op, self._operands(op, args), self.types[args[-1]])

    def _operands(self, op: str, args: tuple[str, ...]) -> list[str]:
        """Names of the arguments; a constant is printed in place where that can't change the result's type."""
        names = [self.name(a) for a in args]
        if op in INFIX_OPS and len(args) == 2 and not all(a in self.constants for a in args):
            for i, arg in enumerate(args):
                found = self.constants.get(arg)
                if found is not None and found.dtype in ("f32", "i32", "i64"):
                    names[i] = literal(found.value, found.dtype)
        return names

    def _load(self, stmt: Load) -> str:
        dims = self.dims[stmt.dst]
        index, mask = self.index(stmt.index, dims), self.mask(dims)
        if stmt.mask is not None:
            guard = self.name(stmt.mask)
            if not self.dims[stmt.mask]:
                guard = f"(tl.full({self.shape(dims)}, 1, tl.int1) & {guard})"
            mask = f"{guard} & {mask}" if mask else guard
            other = f", other={literal(stmt.other, stmt.dtype)}"
        else:
            other = ", other=0" if mask else ""
        guard = f", mask={mask}{other}" if mask else ""
        return f"tl.load({self.pointer(stmt.buffer)} + {index}{guard})"

    def store(self, stmt: Store) -> None:
        """Print one store; the address has the full shape of its level, so that every value broadcasts to it."""
        dims = store_dims(self.kernel, stmt, self.dims) | {X}
        index = self.index(stmt.index, dims)
        self.line(f"tl.store({self.pointer(stmt.buffer)} + {index}, {self.name(stmt.value)}, mask={self.mask(dims)})")

    # -- small pieces ---------------------------------------------------------------------------
    @property
    def ones(self) -> str:
        return "[1, 1]" if self.kernel.reduce else "[1]"

    def shape(self, dims: Dims) -> str:
        if not self.kernel.reduce:
            return "[XBLOCK]"
        return f"[{'XBLOCK' if X in dims else 1}, {'RBLOCK' if R in dims else 1}]"

    def mask(self, dims: Dims) -> str:
        parts = (["xmask"] if X in dims else []) + (["rmask"] if R in dims and self.row_mask else [])
        return " & ".join(parts)

    def index(self, e: Expr, dims: Dims) -> str:
        """`e` as an offset of exactly the directions `dims`."""
        text, own = self.expr(e), expr_dims(self.kernel, e, self.dims)
        if own == dims:
            return text if len(e.terms) == 1 else f"({text})"
        if not own and not any(v.startswith("%") for v in e.symbols()):  # a value may be a block of one element
            return f"tl.full({self.shape(dims)}, {text}, INDEX)"
        return f"tl.broadcast_to({text}, {self.shape(dims)})"

    def expr(self, e: Expr) -> str:
        return e.render(self._variable)

    def factor(self, e: Expr) -> str:
        """`e` as an operand: in parentheses unless it is a number, a name or a call."""
        text = self.expr(e)
        return text if re.fullmatch(r"\w+", text) else f"({text})"

    def _variable(self, name: str) -> str:
        if name.startswith("%"):
            return self.name(name) if self.types[name] == "i64" else f"{self.name(name)}.to(tl.int64)"
        call = split_atom(name)
        if call is None:
            return self.names[name]
        function, args = call
        texts = [self.expr(a) for a in args]
        if function in ("max", "min"):
            return f"tl.{function}imum({', '.join(texts)})"
        if all(_is_non_negative(a) for a in args):
            return f"({self.factor(args[0])} {'//' if function == 'floordiv' else '%'} {self.factor(args[1])})"
        return f"{'floor_div' if function == 'floordiv' else 'floor_mod'}({', '.join(texts)})"

    def _axis_names(self) -> dict[str, str]:
        """Printed names of axes and sizes: a lone axis is the flat position itself."""
        names: dict[str, str] = {}
        for flat, axes in (("x", self.kernel.parallel), ("r", self.kernel.reduce)):
            for axis in axes:
                names[axis.name] = flat if len(axes) == 1 else _safe(axis.name)
        names.update((s, _safe(s)) for s in self.kernel.sizes)
        return names

    def _row_fills_block(self) -> bool:
        size = self.kernel.row_size
        return self.form == "persistent" and size.value == _next_power_of_2(size.value)

    def name(self, value: str) -> str:
        return "v" + value[1:]

    def pointer(self, buffer: str) -> str:
        return f"{buffer}_ptr"

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)


def _is_non_negative(e: Expr) -> bool:
    """True when every term has a positive coefficient and no SSA value: axes and sizes are never negative."""
    return all(c >= 0 and not any(n.startswith("%") for n in m) for m, c in e.terms)


def _safe(name: str) -> str:
    return f"{name}_" if name in _RESERVED or name.startswith("v") else name


def _next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def index_bound(kernel: Kernel, sizes: Mapping[str, int]) -> int:
    """An upper bound on the magnitude of every 32-bit intermediate of the kernel's index arithmetic."""
    merged = merge_axes(kernel)
    axes = {a.name: max(a.size.evaluate(sizes), 1) for a in merged.axes}
    bound = product(axes.values()).value
    for e in expressions(merged):
        bound = max(bound, _magnitude(e, {**sizes, **axes}))
    return max(bound, *sizes.values()) if sizes else bound


def _magnitude(e: Expr, largest: Mapping[str, int]) -> int:
    total = 0
    for names, coefficient in e.terms:
        if any(n.startswith("%") for n in names):
            continue  # an i64 value makes its whole term i64
        term = abs(coefficient)
        for name in names:
            call = split_atom(name)
            term *= max(_magnitude(a, largest) for a in call[1]) if call else largest[name]
        total += term
    return total
