import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def floor_div(a, b):
    """Integer division that rounds down (`//` on Triton tensors rounds towards zero)."""
    return a // b - ((a % b != 0) & ((a < 0) != (b < 0))).to(tl.int32)


@triton.jit
def floor_mod(a, b):
    """Integer remainder with the sign of the divisor."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit(do_not_specialize=['s0'])
def integer_atoms(a_ptr, b_ptr, c_ptr, d_ptr, s0, XBLOCK: tl.constexpr, INDEX: tl.constexpr):
    s0 = s0.to(INDEX)
    x = tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = x < s0
    v0 = (floor_div(x - 20, 7)).to(tl.int64)
    v1 = (floor_mod(x - 20, 7)).to(tl.int64)
    v2 = (tl.maximum(x - 20, -3)).to(tl.int64)
    v3 = (tl.minimum(2*x - s0, (s0 // 2))).to(tl.int64)
    tl.store(a_ptr + x, v0, mask=xmask)
    tl.store(b_ptr + x, v1, mask=xmask)
    tl.store(c_ptr + x, v2, mask=xmask)
    tl.store(d_ptr + x, v3, mask=xmask)
