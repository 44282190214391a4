import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def row_sum(v):
    return tl.sum(v, 1)[:, None]


@triton.jit(do_not_specialize=['s0', 's1'])
def channel_mean(x_ptr, y_ptr, s0, s1, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr, INDEX: tl.constexpr):
    s0 = s0.to(INDEX)
    s1 = s1.to(INDEX)
    x = (tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK))[:, None]
    xmask = x < 5
    v1_acc = tl.full([XBLOCK, RBLOCK], 0.0, tl.float32)
    for start in range(0, s0*s1, RBLOCK):
        r = (start + tl.arange(0, RBLOCK))[None, :].to(INDEX)
        rmask = r < s0*s1
        r0 = r // s1
        r1 = r % s1
        v0 = tl.load(x_ptr + (x*s1 + 5*r0*s1 + r1), mask=xmask & rmask, other=0)
        v1_acc = tl.where(rmask, v1_acc + v0, v1_acc)
    v1 = row_sum(v1_acc)
    tl.store(y_ptr + x, v1, mask=xmask)
