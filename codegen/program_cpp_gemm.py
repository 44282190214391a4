"""Products in the C++ program: packed weights where they may be cached, the library's GEMM on addresses elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..runtime.program import Gemm, Program, Size, TensorSpec
from .expr import Expr, const
from .program_cpp_tensors import Tensors, c_expr
from .program_memory import size_expr
from .schema import Unsupported

MIN_COLUMNS = 16  # narrower products would mostly multiply padding


@dataclass(frozen=True)
class PackedWeight:
    """A [K, N] matrix inside input tensor number `position` (offset, strides in elements): a product's right side."""

    position: int
    offset: int
    K: int
    N: int
    stride_k: int
    stride_n: int
    rows: int | None = None  # of the left side; None when symbolic

    @property
    def variant(self) -> tuple[str | int, ...]:
        """Equal for equal packed copies of the same tensor."""
        return ("gemm", self.offset, self.K, self.N, self.stride_k, self.stride_n)


def _rank3(spec: TensorSpec) -> tuple[list[Size], list[Size]]:
    """Shape and strides with exactly one batch dimension (of size 1, stride 0 when there is none)."""
    extra = 3 - len(spec.shape)
    if extra < 0:
        raise Unsupported(f"a product of rank {len(spec.shape)}")
    return [1] * extra + list(spec.shape), [0] * extra + list(spec.strides)


def print_gemm(step: Gemm, tensors: Tensors, program: Program, packed: list[PackedWeight]) -> None:
    """`out = a @ b + bias`. Raises `Unsupported` for what the template does not take."""
    a, b, out = (tensors.spec(n) for n in (step.a, step.b, step.out))
    if any(t.dtype != "float32" for t in (a, b, out)):
        raise Unsupported("a product in another type than float32", step)
    (batch, M, K), (sab, sm, sk) = _rank3(a)
    (_, _, N), (sbb, sbk, sbn) = _rank3(b)
    _, (scb, ldc, _) = _rank3(out)
    bias, bias_b, bias_m = "nullptr", "0", "0"
    if step.bias is not None:
        bias, (bias_b, bias_m) = tensors.address(step.bias), _bias_strides(tensors.spec(step.bias), len(out.shape))
    addresses = [tensors.address(n) for n in (step.a, step.out)]
    weight = find_weight(step.b, tensors, program) if len(b.shape) == 2 else None
    sizes = [c_expr(s) for s in (M, N, K)]
    if weight is not None:
        weight = replace(weight, rows=size_expr(M).value if size_expr(M).is_const else None)
        slot = packed.index(weight) if weight in packed else len(packed)
        if slot == len(packed):
            packed.append(weight)
        source = (f"if (frame->packed && frame->packed[{slot}])\n      "
                  f"mw_gemm_packed(threads, {', '.join(sizes)}, {addresses[0]}, {c_expr(sm)}, {c_expr(sk)}, "
                  f"frame->packed[{slot}], {bias}, {bias_m}, {addresses[1]}, {c_expr(ldc)});\n    else")
        b_address = tensors.address(step.b)
        tensors.lines.append(source)
    else:
        b_address = tensors.address(step.b)
    strides_a, strides_b = ", ".join(map(c_expr, (sab, sm, sk))), ", ".join(map(c_expr, (sbb, sbk, sbn)))
    tensors.lines.append(f"  mw_gemm(threads, {c_expr(batch)}, {', '.join(sizes)}, {addresses[0]}, {strides_a}, "
                         f"{b_address}, {strides_b}, {bias}, {bias_b}, {bias_m}, "
                         f"{addresses[1]}, {c_expr(scb)}, {c_expr(ldc)});")


def _bias_strides(spec: TensorSpec, rank: int) -> tuple[str, str]:
    """Batch and row strides of a bias broadcast to the product; its columns must be contiguous."""
    shape = [1] * (rank - len(spec.shape)) + list(spec.shape)
    strides = [0] * (rank - len(spec.shape)) + list(spec.strides)
    if strides[-1] not in (1, "1") or shape[-1] in (1, "1"):
        raise Unsupported(f"a bias with strides {spec.strides}")
    steps = [0 if n in (1, "1") else s for n, s in zip(shape[:-1], strides[:-1], strict=True)]
    return c_expr(steps[-2]) if rank == 3 else "0", c_expr(steps[-1])


def find_weight(name: str, tensors: Tensors, program: Program) -> PackedWeight | None:
    """The packed form of a constant-size matrix that views a static input, when the program may cache it."""
    if not program.inference:
        return None
    spec, offset = tensors.spec(name), const(0)
    while name in tensors.base:
        name, step = tensors.base[name]
        offset = offset + size_expr(step)
    inputs = [i for i in program.inputs if isinstance(i, TensorSpec)]
    found = [k for k, i in enumerate(inputs) if i.name == name and i.static]
    numbers: list[Expr] = [size_expr(s) for s in (*spec.shape, *spec.strides)] + [offset]
    if not found or not all(n.is_const for n in numbers):
        return None
    K, N, sk, sn, at = (n.value for n in numbers)
    return PackedWeight(found[0], at, K, N, sk, sn) if N >= MIN_COLUMNS else None
