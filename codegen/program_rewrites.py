"""Other ways to do what steps of a CUDA program do: candidates, of which `program_choices` keeps what measures faster.

* A product and the one pointwise kernel that reads it: the GEMM template with the kernel as its epilogue.
* Products of one tensor with several weights of equal shape (query, key and value; gate and up), in inference: one
  batched product with a stacked copy of the weights. The results are slices of its output that lie as they would have
  lain alone, so nothing that reads them changes. (One wide product would leave their rows apart in memory.)

Both compute the same sums as the steps they stand for; the epilogue reads them before they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..runtime.program import TORCH_DTYPES, Call, Launch, Program, Step, TensorSpec, View
from .expr import Expr, const, var
from .ir import Kernel
from .ir_text import parse_kernel
from .program_facts import ProgramFacts
from .program_memory import size_expr, size_text
from .schema import bind
from .templates.triton_gemm import GemmKernel, Precision, print_gemm
from .triton_epilogue import Bias, CannotFuse, as_epilogue

MAX_STACKED = 4  # results of one product are alive at once: every decoder layer multiplies one encoder output
_PRODUCTS = {"aten.mm.default": False, "aten.addmm.default": True}  # operator -> whether it adds a bias
_KINDS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_IR_DTYPES = {name: kind for kind, name in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Stack:
    """A stacked copy of weights, a further input `spec` [G, K, N]: of input tensors `sources` (positions among the
    program's inputs), each seen as a matrix of `strides` at `offsets` elements. Biases are [G, 1, N]."""

    spec: TensorSpec
    sources: tuple[int, ...]
    strides: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def variant(self) -> tuple[object, ...]:
        return ("stack", self.spec.shape, self.strides, self.offsets)

    @torch.no_grad()
    def pack(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The copy, laid out as its parts are: columns stay contiguous where they were."""
        made = torch.empty_strided(self.spec.shape, self.spec.strides, dtype=tensors[0].dtype,  # type: ignore[arg-type]
                                   device=tensors[0].device)
        if made.is_cuda:  # another stream may still read what this memory held
            torch.cuda.synchronize(made.device)
        for part, tensor, offset in zip(made, tensors, self.offsets, strict=True):
            part.copy_(tensor.as_strided(part.shape, self.strides, tensor.storage_offset() + offset))
        if made.is_cuda:  # calls on other streams will read it
            torch.cuda.current_stream(made.device).synchronize()
        return made


@dataclass(frozen=True)
class Rewrite:
    """`steps` instead of the steps number `replaced`, before the step number `at`; both give the tensors `results`.

    Rewrites of equal `key` do the same work. `gemm` is the template's kernel, launched under its name; `stacks` are
    inputs that the program then has in addition.
    """

    what: str
    key: str
    replaced: tuple[int, ...]
    at: int
    steps: tuple[Step, ...]
    results: tuple[str, ...]
    gemm: GemmKernel | None = None
    stacks: tuple[Stack, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """A product and a kernel that stay apart, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class _Product:
    """`out = a @ b + bias` as an operator call: the step and its operands' names."""

    step: int
    op: str
    out: TensorSpec
    a: str
    b: str
    bias: str | None


def find_rewrites(program: Program, precision: Precision = "exact") -> tuple[list[Rewrite], list[Refusal]]:
    """All candidates of a program, and what was refused. `precision`: how fp32 products may be computed."""
    facts = ProgramFacts(program)
    products = [p for i, s in enumerate(program.steps) if isinstance(s, Call) and (p := _product(i, s, facts))]
    epilogues = _Epilogues(facts, {p.out.name: p for p in products}, precision)
    found = epilogues.find()
    return [*found, *_stacks(facts, products)], epilogues.refused


def _product(i: int, call: Call, facts: ProgramFacts) -> _Product | None:
    if call.op not in _PRODUCTS or not call.specs or call.specs[0] is None:
        return None
    values = [value for _, value in bind(call)]
    has_bias, out = _PRODUCTS[call.op], call.specs[0]
    if has_bias and any(scalar != 1 for scalar in values[3:]):
        return None
    names = [v["tensor"] for v in values[: 3 if has_bias else 2]]
    specs = [facts.specs.get(n) for n in names]
    if out.dtype not in _KINDS or any(s is None or s.dtype != out.dtype for s in specs):
        return None
    if [size_expr(s) for s in out.strides] != [size_expr(out.shape[1]), const(1)]:
        return None
    return _Product(i, call.op, out, names[-2], names[-1], names[0] if has_bias else None)


# -- epilogues --------------------------------------------------------------------------------------
class _Epilogues:
    """Finds products whose only reader is a pointwise kernel."""

    def __init__(self, facts: ProgramFacts, products: dict[str, _Product], precision: Precision) -> None:
        self.facts, self.products, self.precision = facts, products, precision
        self.kernels: dict[str, Kernel] = {n: parse_kernel(t) for n, t in facts.program.kernels.items()}
        self.names: dict[str, str] = {}  # text of a template's kernel -> its name
        self.refused: list[Refusal] = []

    def find(self) -> list[Rewrite]:
        return [r for i, s in enumerate(self.facts.program.steps) if isinstance(s, Launch) and (r := self._of(i, s))]

    def _of(self, i: int, launch: Launch) -> Rewrite | None:
        read = [p for n in launch.inputs if (p := self.products.get(self.facts.root[n]))]
        alone = [p for p in read if self.facts.users[p.out.name] == [i]
                 and p.out.name not in self.facts.leaving]
        if not alone:
            return None
        product = max(alone, key=lambda p: p.step)  # the last one: the others are there when it ends
        what = f"{product.op.split('.')[1]} → {launch.kernel}"
        try:
            return self._fused(i, launch, product, what)
        except CannotFuse as why:
            if Refusal(what, str(why)) not in self.refused:
                self.refused.append(Refusal(what, str(why)))
            return None

    def _fused(self, i: int, launch: Launch, product: _Product, what: str) -> Rewrite:
        facts, kernel = self.facts, self.kernels[launch.kernel]
        operands = [n for n in (product.a, product.b, product.bias) if n is not None]
        if not facts.may_move(operands, product.step, i):
            raise CannotFuse("something in between writes into the product's operands")
        if {facts.root[o] for o in launch.outputs} & {facts.root[n] for n in (*operands, *launch.inputs)}:
            raise CannotFuse("the kernel writes into what is read")
        shown = [k for k, n in enumerate(launch.inputs) if facts.root[n] == product.out.name]
        if any(facts.offset.get(launch.inputs[k]) != const(0) for k in shown):
            raise CannotFuse("the kernel reads a part of the product")
        gemm, symbols = self._gemm(launch, product, kernel, {kernel.inputs[k].name for k in shown})
        others = [n for k, n in enumerate(launch.inputs) if k not in shown]
        step = Launch(gemm.name, (*operands, *others), launch.outputs, tuple(symbols))
        gone = (product.step, i, *facts.views_of(product.out.name))
        return Rewrite(what, f"{print_gemm(gemm.renamed('kernel'))} {symbols}", gone, i, (step,), launch.outputs, gemm)

    def _gemm(self, launch: Launch, product: _Product, kernel: Kernel, shown: set[str]) -> tuple[GemmKernel, list[str]]:
        """The template's kernel in sizes s0, s1, …, and what these are in the program's symbols."""
        a, b = self.facts.specs[product.a], self.facts.specs[product.b]
        bias = self.facts.specs[product.bias] if product.bias is not None else None
        wanted = [*a.shape, *a.strides, *b.shape, *b.strides, *launch.sizes, *(bias.strides if bias else ())]
        symbols = sorted({name for size in wanted for name in size_expr(size).symbols()})
        renamed: dict[str, Expr] = {name: var(f"s{k}") for k, name in enumerate(symbols)}

        def expr(size: int | str) -> Expr:
            return size_expr(size).subs(renamed)

        (M, K), N = map(expr, a.shape), expr(b.shape[1])
        sides = [(expr(s.strides[0]), expr(s.strides[1])) for s in (a, b)]
        if any(const(1) not in side for side in sides):
            raise CannotFuse("an operand of the product has no contiguous dimension")
        sizes = {name: expr(size) for name, size in zip(kernel.sizes, launch.sizes, strict=True)}
        epilogue = as_epilogue(kernel, shown, sizes, M, N, _bias(bias, expr) if bias else None)
        epilogue = replace(epilogue, sizes=tuple(f"s{k}" for k in range(len(symbols))))
        gemm = GemmKernel("kernel", _KINDS[product.out.dtype], M, N, K, sides[0], sides[1], epilogue, self.precision)
        return gemm.renamed(self._name(print_gemm(gemm), launch.kernel)), symbols

    def _name(self, text: str, kernel: str) -> str:
        if text not in self.names:
            base = f"gemm_{kernel}"
            taken = {*self.names.values(), *self.kernels}
            self.names[text] = next(n for n in (base, *(f"{base}_{k}" for k in range(1, len(taken) + 2)))
                                    if n not in taken)
        return self.names[text]


def _bias(spec: TensorSpec, expr: Callable[[int | str], Expr]) -> Bias:
    """A bias [N], [1, N], [M, 1] or [M, N] as it broadcasts to the product."""
    missing = 2 - len(spec.shape)
    shape = [const(1)] * missing + [size_expr(s) for s in spec.shape]
    rows, columns = [const(0)] * missing + [expr(s) for s in spec.strides]
    return Bias(_IR_DTYPES[spec.dtype], const(0) if shape[0] == 1 else rows, const(0) if shape[1] == 1 else columns)


# -- stacked weights --------------------------------------------------------------------------------
def _stacks(facts: ProgramFacts, products: Sequence[_Product]) -> list[Rewrite]:
    """Products of the same left side with static weights of one shape, at the place of the first."""
    if not facts.program.inference:
        return []
    groups: dict[object, list[_Product]] = {}
    for p in products:
        key = _stacking_key(facts, p)
        if key is not None:
            groups.setdefault(key, []).append(p)
    found = []
    for members in groups.values():
        first = members[0]
        kept = [p for p in members if facts.may_move(_operands(p), first.step, p.step)]
        for k in range(0, len(kept) - 1, MAX_STACKED):
            if len(part := kept[k : k + MAX_STACKED]) > 1:
                found.append(_stacked(facts, part))
    return found


def _operands(p: _Product) -> list[str]:
    return [n for n in (p.a, p.b, p.bias) if n is not None]


def _stacking_key(facts: ProgramFacts, p: _Product) -> object | None:
    """What products that can share a step have in common; None for one that can't."""
    if p.out.name in facts.leaving or p.a not in facts.offset:
        return None
    weights = [facts.specs[n] for n in _operands(p)[1:]]
    if not all(_is_weight(facts, w.name) for w in weights) or any(n == 1 for w in weights for n in w.shape):
        return None
    if p.bias is not None and len(weights[1].shape) != 1:
        return None
    a = facts.specs[p.a]
    return (facts.root[p.a], str(facts.offset[p.a]), a.shape, a.strides, a.dtype,
            *((w.shape, w.strides) for w in weights))


def _is_weight(facts: ProgramFacts, name: str) -> bool:
    """A view of constant sizes of a Parameter or buffer, with a contiguous dimension."""
    spec, root, offset = facts.specs[name], facts.specs.get(facts.root[name]), facts.offset.get(name)
    numbers = [size_expr(n) for n in (*spec.shape, *spec.strides)]
    return (root is not None and root.static and offset is not None and offset.is_const
            and all(n.is_const for n in numbers) and const(1) in numbers[len(spec.shape):])


def _stacked(facts: ProgramFacts, members: Sequence[_Product]) -> Rewrite:
    first, count = members[0], len(members)
    a, out = facts.specs[first.a], first.out
    M, N = out.shape
    prefix = f"{out.name}_all"
    stacks = [_stack(facts, f"{prefix}_weights", [p.b for p in members])]
    left = TensorSpec(f"{prefix}_left", a.dtype, (count, *a.shape), (0, *a.strides), a.device)
    size = size_expr(M) * size_expr(N)
    all_out = TensorSpec(f"{prefix}_out", out.dtype, (count, M, N), (size_text(size), N, 1), out.device)
    arguments = [{"tensor": left.name}, {"tensor": stacks[0].spec.name}]
    if first.bias is not None:
        stacks.append(_stack(facts, f"{prefix}_bias", [str(p.bias) for p in members]))
        arguments.insert(0, {"tensor": stacks[1].spec.name})
    op = "aten.bmm.default" if first.bias is None else "aten.baddbmm.default"
    steps: list[Step] = [View(left, first.a, 0), Call(op, tuple(arguments), {}, (all_out.name,), (all_out,))]
    steps += [View(p.out, all_out.name, size_text(size * k)) for k, p in enumerate(members)]
    key = f"{op} {count} {a.shape} {a.strides} {stacks[0].spec.shape} {stacks[0].spec.strides} {a.dtype}"
    what = f"{count} x {first.op.split('.')[1]} of one tensor → {op.split('.')[1]}"
    return Rewrite(what, key, tuple(p.step for p in members), first.step, tuple(steps),
                   tuple(p.out.name for p in members), None, tuple(stacks))


def _stack(facts: ProgramFacts, name: str, weights: Sequence[str]) -> Stack:
    positions = {i.name: k for k, i in enumerate(facts.program.inputs)}
    spec = facts.specs[weights[0]]
    shape, strides = ([size_expr(n).value for n in ns] for ns in (spec.shape, spec.strides))
    if len(shape) == 1:
        shape, strides = [1, *shape], [shape[0], *strides]
    dense = [1 if n == 1 else other for n, other in zip(strides, reversed(shape), strict=True)]
    made = TensorSpec(name, spec.dtype, (len(weights), *shape), (shape[0] * shape[1], *dense), spec.device, True)
    return Stack(made, tuple(positions[facts.root[w]] for w in weights), tuple(strides),
                 tuple(facts.offset[w].value for w in weights))

