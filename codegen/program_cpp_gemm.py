"""Products in the C++ program: every one names a slot that says how it is done (`program_cpp_packing` fills it)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..runtime.program import Gemm, Gemms, Program, Size, TensorSpec
from .expr import Expr, const
from .program_cpp_tensors import Tensors, c_expr
from .program_epilogue import BlockKernel
from .program_memory import size_expr
from .schema import Unsupported

MIN_COLUMNS = 16  # narrower products would mostly multiply padding
FEW_ROWS = 16  # below it a product reads its weight faster than it multiplies: of a symbolic size, chosen apart


@dataclass(frozen=True)
class Weight:
    """A [K, N] matrix inside input tensor number `position` (offset, strides in elements): a product's right side."""

    position: int
    offset: int
    K: int
    N: int
    stride_k: int
    stride_n: int


@dataclass(frozen=True)
class Product:
    """What the choice of a method depends on. Sizes are None where symbolic; `a_rows`, `b_rows`: rows of that side are
    contiguous (else its columns are); `weight`: the right side where it may be kept packed."""

    rows: int | None
    K: int | None
    N: int | None
    a_rows: bool
    b_rows: bool
    weight: Weight | None
    twin: int | None = None  # the slot of the same product with more rows, whose packed copy this one may use
    behind: BlockKernel | None = None  # what may be done with its finished blocks


@dataclass(frozen=True)
class Operands:
    """One product as C++ text. `slot`: its place in `frame->products`, None where the library is the only choice."""

    batch: str
    M: str
    N: str
    K: str
    a: tuple[str, str, str, str]  # address, strides of batch, row, column
    b: tuple[str, str, str, str]
    bias: tuple[str, str, str]  # address, strides of batch and row
    out: tuple[str, str, str]
    slot: str | None

    @property
    def how(self) -> str:
        return "nullptr" if self.slot is None else f"frame->products[{self.slot}].how"

    def side(self) -> str:
        """A `Product` of the template."""
        return (f"{{{self.N}, {self.b[0]}, {self.b[2]}, {self.b[3]}, {self.bias[0]}, {self.bias[2]}, {self.out[0]}, "
                f"{self.out[2]}, {self.how}}}")


def print_gemm(step: Gemm, tensors: Tensors, program: Program, products: list[Product]) -> None:
    """`out = a @ b + bias`. Raises `Unsupported` for what the template does not take."""
    o = operands(step, tensors, program, products)
    tensors.lines.append(f"mw_gemm(threads, {o.batch}, {o.M}, {o.N}, {o.K}, {', '.join(o.a)}, {', '.join(o.b)}, "
                         f"{', '.join(o.bias)}, {', '.join(o.out)}, {o.how});")


def print_gemms(step: Gemms, tensors: Tensors, program: Program, products: list[Product]) -> None:
    """Products that share their left side, in one call."""
    if any(size_expr(tensors.spec(p.out).shape[0]) != 1 for p in step.products if len(tensors.spec(p.out).shape) > 2):
        for p in step.products:
            print_gemm(p, tensors, program, products)
        return
    found = [operands(p, tensors, program, products) for p in step.products]
    first = found[0]
    tensors.lines += [f"{{  // {len(found)} products of {step.products[0].a}", "  const Product products[] = {",
                      *(f"      {o.side()}," for o in found), "  };",
                      f"  mw_gemms(threads, {first.M}, {first.K}, {first.a[0]}, {first.a[2]}, {first.a[3]}, products, "
                      f"{len(found)});", "}"]


def operands(step: Gemm, tensors: Tensors, program: Program, products: list[Product],
             behind: BlockKernel | None = None) -> Operands:
    """A product as text; adds it to `products`. `behind`: what may be done with its finished blocks. Raises
    `Unsupported` for what the template does not take."""
    a, b, out = (tensors.spec(n) for n in (step.a, step.b, step.out))
    if any(t.dtype != "float32" for t in (a, b, out)):
        raise Unsupported("a product in another type than float32", step)
    (batch, M, K), strides_a = _rank3(a)
    (_, _, N), strides_b = _rank3(b)
    _, (scb, ldc, _) = _rank3(out)
    bias = ("nullptr", "0", "0")
    if step.bias is not None:
        bias = (tensors.address(step.bias), *_bias_strides(tensors.spec(step.bias), len(out.shape)))
    place = None
    if size_expr(batch) == 1:
        product = _product((M, N, K), strides_a[1:], strides_b[1:], find_weight(step.b, tensors, program))
        if product is not None:
            slot = _slot(replace(product, behind=behind), products)
            place = str(slot)
            if product.rows is None and product.weight is not None:  # the same graph prefills and decodes
                few = _slot(replace(product, rows=1, twin=slot, behind=behind), products)
                place = f"{c_expr(M)} < {FEW_ROWS} ? {few} : {slot}"
    return Operands(c_expr(batch), c_expr(M), c_expr(N), c_expr(K),
                     (tensors.address(step.a), *_three(strides_a)), (tensors.address(step.b), *_three(strides_b)),
                     bias, (tensors.address(step.out), c_expr(scb), c_expr(ldc)), place)


def _slot(product: Product, products: list[Product]) -> int:
    if product not in products:
        products.append(product)
    return products.index(product)


def _three(strides: list[Size]) -> tuple[str, str, str]:
    first, second, third = map(c_expr, strides)
    return first, second, third


def _product(sizes: tuple[Size, Size, Size], strides_a: list[Size], strides_b: list[Size],
             weight: Weight | None) -> Product | None:
    """None where the library is the only choice."""
    M, N, K = (e.value if (e := size_expr(s)).is_const else None for s in sizes)
    (sm, sk), (sbk, sbn) = ([size_expr(s) for s in strides] for strides in (strides_a, strides_b))
    if sm != 1 and sk != 1 or sbk != 1 and sbn != 1 or N is not None and N < MIN_COLUMNS:
        return None
    return Product(M, K, N, sk == 1, sbn == 1, weight)


def _rank3(spec: TensorSpec) -> tuple[list[Size], list[Size]]:
    """Shape and strides with exactly one batch dimension (of size 1, stride 0 when there is none)."""
    extra = 3 - len(spec.shape)
    if extra < 0:
        raise Unsupported(f"a product of rank {len(spec.shape)}")
    return [1] * extra + list(spec.shape), [0] * extra + list(spec.strides)


def _bias_strides(spec: TensorSpec, rank: int) -> tuple[str, str]:
    """Batch and row strides of a bias broadcast to the product; its columns must be contiguous."""
    shape = [1] * (rank - len(spec.shape)) + list(spec.shape)
    strides = [0] * (rank - len(spec.shape)) + list(spec.strides)
    if strides[-1] not in (1, "1") or shape[-1] in (1, "1"):
        raise Unsupported(f"a bias with strides {spec.strides}")
    steps = [0 if n in (1, "1") else s for n, s in zip(shape[:-1], strides[:-1], strict=True)]
    return c_expr(steps[-2]) if rank == 3 else "0", c_expr(steps[-1])


def find_weight(name: str, tensors: Tensors, program: Program) -> Weight | None:
    """The constant-size matrix that views a static input, when the program may keep packed copies."""
    spec, offset = tensors.spec(name), const(0)
    if not program.inference or len(spec.shape) != 2:
        return None
    while name in tensors.base:
        name, step = tensors.base[name]
        offset = offset + size_expr(step)
    inputs = [i for i in program.inputs if isinstance(i, TensorSpec)]
    found = [k for k, i in enumerate(inputs) if i.name == name and i.static]
    numbers: list[Expr] = [size_expr(s) for s in (*spec.shape, *spec.strides)] + [offset]
    if not found or not all(n.is_const for n in numbers):
        return None
    K, N, sk, sn, at = (n.value for n in numbers)
    return Weight(found[0], at, K, N, sk, sn)
