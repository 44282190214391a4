import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit(do_not_specialize=['s0'])
def embedding(ids_ptr, w_ptr, p_ptr, y_ptr, s0, XBLOCK: tl.constexpr, INDEX: tl.constexpr):
    s0 = s0.to(INDEX)
    x = tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = x < 40*s0
    p0 = x // 40
    p1 = x % 40
    v0 = tl.load(ids_ptr + p0, mask=xmask, other=0)
    v1 = tl.load(w_ptr + (40*v0 + p1), mask=xmask, other=0)
    v2 = tl.load(p_ptr + (40*(p0 % 4) + p1), mask=xmask, other=0)
    v3 = v1 + v2
    tl.store(y_ptr + (40*p0 + p1), v3, mask=xmask)
