"""Program mlp: printed by Meshwright; `run` launches its kernels in order."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit(do_not_specialize=['s0'])
def gelu_0(x_ptr, y_ptr, s0, XBLOCK: tl.constexpr, INDEX: tl.constexpr):
    s0 = s0.to(INDEX)
    x = tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK)
    xmask = x < 8*s0
    v0 = tl.load(x_ptr + x, mask=xmask, other=0)
    v2 = v0 * 0.7071067811865476
    v3 = libdevice.erf(v2)
    v5 = v3 + 1.0
    v7 = v0 * 0.5
    v8 = v7 * v5
    tl.store(y_ptr + x, v8, mask=xmask)

import torch


def run(inputs, launch):
    x, w, b = inputs
    s0 = x.size(0)
    device = x.device
    t0 = torch.ops.aten.addmm.default(b, x, w)
    y = torch.empty_strided((s0, 8), (8, 1), dtype=torch.float32, device=device)
    launch.gelu_0([t0, y], [s0])
    del t0
    first = torch.as_strided(y, (s0,), (8,), y.storage_offset())
    return [y, first, None, s0]
