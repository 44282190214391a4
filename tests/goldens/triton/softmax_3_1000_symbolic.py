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


@triton.jit(do_not_specialize=['s0', 's1'])
def softmax_3_1000_symbolic(x_ptr, y_ptr, s0, s1, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr, INDEX: tl.constexpr):
    s0 = s0.to(INDEX)
    s1 = s1.to(INDEX)
    x = (tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK))[:, None]
    xmask = x < s0
    v1_acc = tl.full([XBLOCK, RBLOCK], float("-inf"), tl.float32)
    for start in range(0, s1, RBLOCK):
        r = (start + tl.arange(0, RBLOCK))[None, :].to(INDEX)
        rmask = r < s1
        v0 = tl.load(x_ptr + (x*s1 + r), mask=xmask & rmask, other=0)
        v1_acc = tl.where(rmask, max_of(v1_acc, v0), v1_acc)
    v1 = row_max(v1_acc)
    v4_acc = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    for start in range(0, s1, RBLOCK):
        r = (start + tl.arange(0, RBLOCK))[None, :].to(INDEX)
        rmask = r < s1
        v0 = tl.load(x_ptr + (x*s1 + r), mask=xmask & rmask, other=0)
        v2 = v0 - v1
        v3 = libdevice.exp(v2)
        v4_acc = tl.where(rmask, v4_acc + v3, v4_acc)
    v4 = row_sum(v4_acc)
    for start in range(0, s1, RBLOCK):
        r = (start + tl.arange(0, RBLOCK))[None, :].to(INDEX)
        rmask = r < s1
        v0 = tl.load(x_ptr + (x*s1 + r), mask=xmask & rmask, other=0)
        v2 = v0 - v1
        v3 = libdevice.exp(v2)
        v5 = tl.div_rn(v3, v4)
        tl.store(y_ptr + (x*s1 + r), v5, mask=xmask & rmask)
