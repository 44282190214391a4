"""Cases for index maps: views, broadcasting, masks, gathers, symbolic sizes, several outputs."""

from __future__ import annotations

import torch

from .cases import Case, bools, floats, ints


def _transpose() -> Case:
    text = """
    kernel transpose(s0, s1, x: f32 -> y: f32)
      axes p0: s0, p1: s1
      %0: f32 = load x[p0 + s0*p1]
      store y[s1*p0 + p1] = %0
    """
    return Case("transpose", text, lambda: [floats(37, 50)], ((50, 37),), lambda x: [x.t()], (50, 37), True)


def _heads() -> Case:
    """[B, S, H, D] to [B, H, S, D] times a scale read from memory."""
    text = """
    kernel heads(s0, s1, x: f32, c: f32 -> y: f32)
      axes p0: s0, p1: 3, p2: s1, p3: 16
      %0: f32 = load x[48*s1*p0 + 48*p2 + 16*p1 + p3]
      %1: f32 = load c[0]
      %2: f32 = mul %0, %1
      store y[48*s1*p0 + 16*s1*p1 + 16*p2 + p3] = %2
    """
    return Case("heads", text, lambda: [floats(2, 5, 3, 16), floats(1, seed=1)], ((2, 3, 5, 16),),
                lambda x, c: [x.transpose(1, 2) * c], (2, 5), True)


def _broadcast() -> Case:
    """Row and column operands; nothing merges."""
    text = """
    kernel broadcast(s0, s1, x: f32, a: f32, b: f32 -> y: f32)
      axes p0: s0, p1: s1
      %0: f32 = load x[s1*p0 + p1]
      %1: f32 = load a[p1]
      %2: f32 = add %0, %1
      %3: f32 = load b[p0]
      %4: f32 = mul %2, %3
      store y[s1*p0 + p1] = %4
    """
    return Case("broadcast", text, lambda: [floats(9, 77), floats(77, seed=1), floats(9, 1, seed=2)], ((9, 77),),
                lambda x, a, b: [(x + a) * b], (9, 77), True)


def _flip() -> Case:
    text = """
    kernel flip(x: i64 -> y: i64)
      axes p0: 6, p1: 11
      %0: i64 = load x[11*p0 - p1 + 10]
      store y[11*p0 + p1] = %0
    """
    return Case("flip", text, lambda: [ints(6, 11)], ((6, 11),), lambda x: [x.flip(1)])


def _pad() -> Case:
    """A masked load outside the buffer reads nothing."""
    text = """
    kernel pad(s0, x: f32 -> y: f32)
      axes p0: s0 + 7
      %0: i64 = index p0 - 3
      %1: i64 = const 0
      %2: b1 = ge %0, %1
      %3: i64 = index p0 - s0 - 3
      %4: b1 = lt %3, %1
      %5: b1 = and %2, %4
      %6: f32 = load x[p0 - 3] if %5 else 2.5
      store y[p0] = %6
    """
    return Case("pad", text, lambda: [floats(29)], ((36,),),
                lambda x: [torch.nn.functional.pad(x, (3, 4), value=2.5)], (29,), True)


def _masked_far() -> Case:
    """A mask that is false everywhere guards an address no page backs."""
    text = """
    kernel masked_far(x: bf16, c: b1 -> y: f32)
      axes p0: 100
      %0: b1 = load c[p0]
      %1: bf16 = load x[p0 + 1000000000000] if %0 else -1.0
      %2: f32 = cast %1
      store y[p0] = %2
    """
    return Case("masked_far", text, lambda: [floats(4, dtype="bf16"), torch.zeros(100, dtype=torch.bool)], ((100,),),
                lambda x, c: [torch.full((100,), -1.0, dtype=torch.float32)], (), True)


def _concatenate() -> Case:
    text = """
    kernel concatenate(a: f32, b: f32 -> y: f32)
      axes p0: 5, p1: 24
      %0: i64 = index p1
      %1: i64 = const 16
      %2: b1 = lt %0, %1
      %3: b1 = not %2
      %4: f32 = load a[16*p0 + p1] if %2 else 0.0
      %5: f32 = load b[8*p0 + p1 - 16] if %3 else 0.0
      %6: f32 = where %2, %4, %5
      store y[24*p0 + p1] = %6
    """
    return Case("concatenate", text, lambda: [floats(5, 16), floats(5, 8, seed=1)], ((5, 24),),
                lambda a, b: [torch.cat([a, b], 1)], (), True)


def _embedding() -> Case:
    """A gather: the index of one load is the value of another; a position index is added."""
    text = """
    kernel embedding(s0, ids: i64, w: f32, p: f32 -> y: f32)
      axes p0: s0, p1: 40
      %0: i64 = load ids[p0]
      %1: f32 = load w[40*%0 + p1]
      %2: f32 = load p[40*mod(p0, 4) + p1]
      %3: f32 = add %1, %2
      store y[40*p0 + p1] = %3
    """
    return Case("embedding", text, lambda: [ints(12, low=0, high=100), floats(100, 40), floats(4, 40, seed=1)],
                ((12, 40),), lambda i, w, p: [w[i] + p.repeat(3, 1)], (12,), True)


def _gather_lanes() -> Case:
    """A gather along the vector axis, negative indices normalised in the kernel."""
    text = """
    kernel gather_lanes(s0, i: i64, x: f32 -> y: f32)
      axes p0: 3, p1: 19
      %0: i64 = load i[19*p0 + p1]
      %1: i64 = const 0
      %2: b1 = lt %0, %1
      %3: i64 = index s0
      %4: i64 = add %0, %3
      %5: i64 = where %2, %4, %0
      %6: f32 = load x[s0*p0 + %5]
      store y[19*p0 + p1] = %6
    """
    return Case("gather_lanes", text, lambda: [ints(3, 19, low=-31, high=31), floats(3, 31)], ((3, 19),),
                lambda i, x: [x.gather(1, i % 31)], (31,), True)


def _rope() -> Case:
    """Rotary embedding: the other half of the head is read through a mask, no copy is made."""
    text = """
    kernel rope(s0, x: f32, cos: f32, sin: f32 -> y: f32)
      axes p0: 4, p1: s0, p2: 32
      %0: f32 = load x[32*s0*p0 + 32*p1 + p2]
      %1: f32 = load cos[32*p1 + p2]
      %2: f32 = mul %0, %1
      %3: i64 = index p2
      %4: i64 = const 16
      %5: b1 = lt %3, %4
      %6: b1 = not %5
      %7: f32 = load x[32*s0*p0 + 32*p1 + p2 + 16] if %5 else 0.0
      %8: f32 = neg %7
      %9: f32 = load x[32*s0*p0 + 32*p1 + p2 - 16] if %6 else 0.0
      %10: f32 = where %5, %8, %9
      %11: f32 = load sin[32*p1 + p2]
      %12: f32 = mul %10, %11
      %13: f32 = add %2, %12
      store y[32*s0*p0 + 32*p1 + p2] = %13
    """
    def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
        rotated = torch.cat([-x[..., 16:], x[..., :16]], -1)
        return [x * cos + rotated * sin]

    return Case("rope", text, lambda: [floats(4, 9, 32), floats(9, 32, seed=1), floats(9, 32, seed=2)], ((4, 9, 32),),
                reference, (9,))


def _integer_atoms() -> Case:
    """floordiv, mod, max and min of index expressions round as Python does, below zero too."""
    text = """
    kernel integer_atoms(s0 -> a: i64, b: i64, c: i64, d: i64)
      axes p0: s0
      %0: i64 = index floordiv(p0 - 20, 7)
      %1: i64 = index mod(p0 - 20, 7)
      %2: i64 = index max(p0 - 20, -3)
      %3: i64 = index min(2*p0 - s0, floordiv(s0, 2))
      store a[p0] = %0
      store b[p0] = %1
      store c[p0] = %2
      store d[p0] = %3
    """
    def reference() -> list[torch.Tensor]:
        p = torch.arange(45)
        return [(p - 20) // 7, (p - 20) % 7, (p - 20).clamp_min(-3), (2 * p - 45).clamp_max(22)]

    return Case("integer_atoms", text, list, ((45,),) * 4, reference, (45,))


def _scalar() -> Case:
    """No axes at all."""
    text = """
    kernel scalar(x: f32 -> y: f32)
      axes
      %0: f32 = load x[0]
      %1: f32 = exp %0
      store y[0] = %1
    """
    return Case("scalar", text, lambda: [floats(1)], ((1,),), lambda x: [x.exp()], (), True)


def _many_axes(sizes: tuple[int, int, int, int]) -> Case:
    """Four axes in reversed memory order: nothing merges, the vector axis is not the last one."""
    a, b, c, d = sizes
    name = "many_axes_" + "_".join(map(str, sizes))
    text = f"""
    kernel {name}(s0, s1, s2, s3, x: f32, y: f32 -> z: f32)
      axes p0: s0, p1: s1, p2: s2, p3: s3
      %0: f32 = load x[p0 + s0*p1 + s0*s1*p2 + s0*s1*s2*p3]
      %1: f32 = load y[s1*s2*s3*p0 + s2*s3*p1 + s3*p2 + p3]
      %2: f32 = sub %0, %1
      store z[p0 + s0*p1 + s0*s1*p2 + s0*s1*s2*p3] = %2
    """
    return Case(name, text, lambda: [floats(d, c, b, a), floats(a, b, c, d, seed=1)], ((d, c, b, a),),
                lambda x, y: [x - y.permute(3, 2, 1, 0)], sizes, True)


def _long_rows() -> Case:
    """Two long rows: the vector axis is cut into tiles so that threads have something to share."""
    text = """
    kernel long_rows(x: f32, a: f32 -> y: f32)
      axes p0: 2, p1: 20001
      %0: f32 = load x[20001*p0 + p1]
      %1: f32 = load a[p0]
      %2: f32 = mul %0, %1
      store y[20001*p0 + p1] = %2
    """
    return Case("long_rows", text, lambda: [floats(2, 20001), floats(2, 1, seed=1)], ((2, 20001),),
                lambda x, a: [x * a], (), True)


def _two_outputs() -> Case:
    """Outputs of several dtypes, names that are C++ keywords."""
    text = """
    kernel two_outputs(s0, double: f32, int: b1 -> float: f64, new: i8, v0: b1)
      axes p0: s0
      %0: f32 = load double[p0]
      %1: b1 = load int[p0]
      %2: f64 = cast %0
      %3: f32 = const 0.0
      %4: f32 = where %1, %0, %3
      %5: i32 = cast %4
      %6: i8 = cast %5
      %7: b1 = gt %4, %3
      store float[p0] = %2
      store new[p0] = %6
      store v0[p0] = %7
    """
    def reference(x: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        kept = torch.where(c, x, torch.zeros_like(x))
        return [x.double(), kept.to(torch.int8), kept > 0]

    return Case("two_outputs", text, lambda: [floats(61, scale=20), bools(61)], ((61,),) * 3, reference, (61,), True)


def cases() -> list[Case]:
    return [_transpose(), _heads(), _broadcast(), _flip(), _pad(), _masked_far(), _concatenate(), _embedding(),
            _gather_lanes(), _rope(), _integer_atoms(), _scalar(), _many_axes((3, 4, 5, 6)), _many_axes((0, 4, 5, 6)),
            _many_axes((1, 1, 1, 1)), _many_axes((7, 1, 300, 1)), _long_rows(), _two_outputs()]
