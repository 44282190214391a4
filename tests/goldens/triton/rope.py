import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit(do_not_specialize=['s0'])
def rope(x_ptr, cos_ptr, sin_ptr, y_ptr, s0, XBLOCK: tl.constexpr, INDEX: tl.constexpr):
    s0 = s0.to(INDEX)
    x = tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = x < 128*s0
    p0 = x // (32*s0)
    p1 = (x // 32) % s0
    p2 = x % 32
    v0 = tl.load(x_ptr + (32*p0*s0 + 32*p1 + p2), mask=xmask, other=0)
    v1 = tl.load(cos_ptr + (32*p1 + p2), mask=xmask, other=0)
    v2 = v0 * v1
    v3 = p2.to(tl.int64)
    v5 = (v3 < 16)
    v6 = (v5 == 0)
    v7 = tl.load(x_ptr + (32*p0*s0 + 32*p1 + p2 + 16), mask=v5 & xmask, other=0.0)
    v8 = -v7
    v9 = tl.load(x_ptr + (32*p0*s0 + 32*p1 + p2 - 16), mask=v6 & xmask, other=0.0)
    v10 = tl.where(v5, v8, v9)
    v11 = tl.load(sin_ptr + (32*p1 + p2), mask=xmask, other=0)
    v12 = v10 * v11
    v13 = v2 + v12
    tl.store(y_ptr + (32*p0*s0 + 32*p1 + p2), v13, mask=xmask)
