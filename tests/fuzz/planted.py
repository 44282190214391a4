"""Twenty bugs, planted into the printers and the grouping while a test runs: what the fuzzer has to notice.

All keep memory accesses in bounds, so that a planted bug gives wrong numbers and not a crash of the test process. Most
rewrite a kernel just before it is printed, which is what a printer with that bug amounts to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch

from meshwright.codegen import cpp, cpp_reduce, group, triton
from meshwright.codegen.expr import const
from meshwright.codegen.ir import Const, Kernel, Load, Op, Reduce, Stmt, Store, uses
from meshwright.codegen.lowering.builder import TABLES, KernelBuilder

aten = torch.ops.aten
Patch = pytest.MonkeyPatch
Rewrite = Callable[[Kernel], Kernel]


@dataclass(frozen=True)
class Bug:
    """`plant` installs it for the duration of a test; `where` decides how the fuzzer must run to meet it."""

    name: str
    where: Literal["cpp", "triton", "group"]
    plant: Callable[[Patch], None]

    def __str__(self) -> str:
        return self.name


# -- rewriting kernels ----------------------------------------------------------------------------
def _statements(change: Callable[[Stmt, Kernel], Stmt]) -> Rewrite:
    return lambda kernel: replace(kernel, body=tuple(change(s, kernel) for s in kernel.body))


def _operation(old: str, new: str, dtypes: tuple[str, ...] = ("f32", "f64", "i32", "i64", "b1")) -> Rewrite:
    def change(s: Stmt, kernel: Kernel) -> Stmt:
        return replace(s, op=new) if isinstance(s, Op) and s.op == old and s.dtype in dtypes else s

    return _statements(change)


def _swapped(op: str, i: int, j: int) -> Rewrite:
    def change(s: Stmt, kernel: Kernel) -> Stmt:
        if not isinstance(s, Op) or s.op != op:
            return s
        args = list(s.args)
        args[i], args[j] = args[j], args[i]
        return replace(s, args=tuple(args))

    return _statements(change)


def _without_rounding(narrow: tuple[str, ...]) -> Rewrite:
    """x → narrow → y becomes x → y."""

    def rewrite(kernel: Kernel) -> Kernel:
        made = {s.dst: s for s in kernel.body if isinstance(s, Op) and s.op == "cast" and s.dtype in narrow}

        def change(s: Stmt, _: Kernel) -> Stmt:
            return (
                replace(s, args=made[s.args[0]].args)
                if isinstance(s, Op) and s.op == "cast" and s.args[0] in made
                else s
            )

        return _statements(change)(kernel)

    return rewrite


def _zero_stride(s: Stmt, kernel: Kernel) -> Stmt:
    """A load along two axes forgets the first."""
    if not isinstance(s, Load) or s.mask is not None:
        return s
    axes = [a.name for a in kernel.axes if a.name in s.index.variables()]
    return replace(s, index=s.index.subs({axes[0]: const(0)})) if len(axes) > 1 else s


def _no_offset(s: Stmt, kernel: Kernel) -> Stmt:
    """The constant part of a load's index, a slice's start, is lost."""
    if not isinstance(s, Load) or s.mask is not None:
        return s
    offset = sum(c for m, c in s.index.terms if m == ())
    return replace(s, index=s.index - offset) if offset > 0 and all(c >= 0 for _, c in s.index.terms) else s


def _skip_second_phase(kernel: Kernel) -> Kernel:
    """A reduction of something already reduced gives 1."""
    after: set[str] = set()
    body: list[Stmt] = []
    for s in kernel.body:
        late = any(v in after for v in uses(s))
        if isinstance(s, Reduce) and late and s.dtype in ("f32", "f64"):
            body.append(Const(s.dst, s.dtype, 1.0))
            continue
        if not isinstance(s, Store) and (isinstance(s, Reduce) or late):
            after.add(s.dst)
        body.append(s)
    return replace(kernel, body=tuple(body))


def _any_is_all(s: Stmt, kernel: Kernel) -> Stmt:
    return replace(s, op="all") if isinstance(s, Reduce) and s.op == "any" else s


# -- planting -------------------------------------------------------------------------------------
def _in_cpp(rewrite: Rewrite) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        honest = cpp.print_kernel_cpp
        patch.setattr(cpp, "print_kernel_cpp", lambda kernel: honest(rewrite(kernel)))
        entry = cpp.print_entry
        patch.setattr(cpp, "print_entry", lambda kernel: entry(rewrite(kernel)))

    return plant


def _in_triton(rewrite: Rewrite) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        honest = triton.print_kernel_triton
        patch.setattr(triton, "print_kernel_triton", lambda kernel: honest(rewrite(kernel)))

    return plant


def _cpp_last_item(patch: Patch) -> None:
    honest = cpp.print_entry
    patch.setattr(cpp, "print_entry", lambda k: re.sub(r"(const int64_t items = )(.*);", r"\1(\2) - 1;", honest(k)))


def _cpp_max_identity(patch: Patch) -> None:
    patch.setitem(cpp_reduce._LOWEST, "f32", "0")


def _cpp_last_argmax(patch: Patch) -> None:
    honest = cpp_reduce.Accumulator.update

    def update(self: Any, value: str, position: str) -> list[str]:
        lines = honest(self, value, position)
        return [ln.replace(" > ", " >= ").replace(" < ", " <= ") for ln in lines] if self.is_arg else lines

    patch.setattr(cpp_reduce.Accumulator, "update", update)


def _triton_neutral(patch: Patch) -> None:
    honest = triton.neutral
    patch.setattr(triton, "neutral", lambda op, dtype: "1" if op == "sum" else honest(op, dtype))


def _triton_last_item(patch: Patch) -> None:
    honest = triton.print_kernel_triton
    patch.setattr(triton, "print_kernel_triton", lambda k: re.sub(r"(xmask = x < )(.*)", r"\1(\2) - 1", honest(k)))


def _group_cycles(patch: Patch) -> None:
    patch.setattr(group._Reach, "acyclic", lambda self, a, b: True)


def _group_step(patch: Patch) -> None:
    honest = TABLES.views[aten.slice.Tensor]
    patch.setitem(TABLES.views, aten.slice.Tensor, lambda b, node, index: honest(b, _NoStep(node), index))


class _NoStep:
    """A slice node that hides its step."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self.args = node.args[:4]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


def _group_memo(patch: Patch) -> None:
    """What was read under a guard is used again outside of it."""

    def evaluate(self: KernelBuilder, node: Any, index: Any) -> Any:
        key = (node, index)
        if key not in self._memo:
            self._memo[key] = self._eval(node, index)
        return self._memo[key]

    patch.setattr(KernelBuilder, "eval", evaluate)


PLANTED: tuple[Bug, ...] = (
    Bug("c++: operands of sub swapped", "cpp", _in_cpp(_swapped("sub", 0, 1))),
    Bug("c++: min printed as max", "cpp", _in_cpp(_operation("min", "max"))),
    Bug("c++: a stride is lost", "cpp", _in_cpp(_statements(_zero_stride))),
    Bug("c++: the last work item is not done", "cpp", _cpp_last_item),
    Bug("c++: max starts at 0", "cpp", _cpp_max_identity),
    Bug("c++: the second reduction is skipped", "cpp", _in_cpp(_skip_second_phase)),
    Bug("c++: rounding to bf16 and f16 is lost", "cpp", _in_cpp(_without_rounding(("bf16", "f16")))),
    Bug("c++: any computes all", "cpp", _in_cpp(_statements(_any_is_all))),
    Bug("c++: argmax gives the last position", "cpp", _cpp_last_argmax),
    Bug("c++: floordiv truncates", "cpp", _in_cpp(_operation("floordiv", "truncdiv", ("i32", "i64")))),
    Bug("triton: sums start at 1 in padding", "triton", _triton_neutral),
    Bug("triton: branches of where swapped", "triton", _in_triton(_swapped("where", 1, 2))),
    Bug("triton: the last point is not done", "triton", _triton_last_item),
    Bug("triton: erf printed as tanh", "triton", _in_triton(_operation("erf", "tanh"))),
    Bug("triton: constant offsets are lost", "triton", _in_triton(_statements(_no_offset))),
    Bug("triton: ge compares strictly", "triton", _in_triton(_operation("ge", "gt"))),
    Bug("triton: integer wrap-around is lost", "triton", _in_triton(_without_rounding(("i8", "u8", "i16")))),
    Bug("grouping: cycles between kernels", "group", _group_cycles),
    Bug("grouping: a slice's step is ignored", "group", _group_step),
    Bug("grouping: guards are ignored in the memo", "group", _group_memo),
)
assert len(PLANTED) == 20
