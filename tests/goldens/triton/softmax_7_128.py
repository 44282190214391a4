import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def max_of(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_sum(v):
    return tl.sum(v, 1)[:, None]


@triton.jit
def row_max(v):
    return tl.reduce(v, 1, max_of)[:, None]


@triton.jit(do_not_specialize=['s0'])
def softmax_7_128(x_ptr, y_ptr, s0, XBLOCK: tl.constexpr, INDEX: tl.constexpr):
    s0 = s0.to(INDEX)
    x = (tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK))[:, None]
    xmask = x < s0
    RBLOCK: tl.constexpr = 128
    r = tl.arange(0, RBLOCK)[None, :].to(INDEX)
    v0 = tl.load(x_ptr + (128*x + r), mask=xmask, other=0)
    v1 = row_max(v0)
    v2 = v0 - v1
    v3 = libdevice.exp(v2)
    v4 = row_sum(v3)
    v5 = tl.div_rn(v3, v4)
    tl.store(y_ptr + (128*x + r), v5, mask=xmask)
