"""Index algebra: how an element of one tensor finds its place in another.

Indices are affine in the loop axes. A reshape linearises the index and takes it apart again; the quotient and
remainder of an affine expression stay affine when each term is either a multiple of the divisor or provably
smaller than it. When an axis straddles the divisor, `NeedSplit` asks for the axis to be split in two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..expr import Expr, const, product, var
from .shapes import CannotLower, contiguous_strides

AxisSizes = Mapping[str, Expr]


class NeedSplit(CannotLower):
    """The kernel can be built once axis `axis` is split into (outer, inner of size `inner`)."""

    def __init__(self, axis: str, inner: Expr) -> None:
        super().__init__(f"axis {axis} must be split by {inner}")
        self.axis = axis
        self.inner = inner


class NotAffine(CannotLower):
    """The index is no affine function of the axes."""


def provably_non_negative(e: Expr) -> bool:
    """True when every coefficient is ≥ 0 (sizes and axes are never negative)."""
    return all(c >= 0 for _, c in e.terms)


def upper_bound(e: Expr, axes: AxisSizes) -> Expr | None:
    """An inclusive bound of an expression with non-negative coefficients: every axis at its last value."""
    if not provably_non_negative(e):
        return None
    return e.subs({a: axes[a] - 1 for a in e.variables() if a in axes})


def divmod_index(e: Expr, divisor: Expr, axes: AxisSizes) -> tuple[Expr, Expr]:
    """`(e // divisor, e % divisor)` as affine expressions; raises `NeedSplit` or `NotAffine`."""
    if divisor == 1:
        return e, const(0)
    quotient, rest = const(0), const(0)
    for monomial, c in e.terms:
        term = Expr({monomial: c})
        q = term.divide_exact(divisor)
        if q is None:
            rest = rest + term
        else:
            quotient = quotient + q
    bound = upper_bound(rest, axes)
    if bound is not None and provably_non_negative(divisor - 1 - bound):
        return quotient, rest
    _ask_split(rest, divisor, axes)
    raise NotAffine(f"({e}) divided by {divisor}")


def _ask_split(rest: Expr, divisor: Expr, axes: AxisSizes) -> None:
    """Raise `NeedSplit` for the widest axis of `rest` whose coefficient divides `divisor`."""
    for name in sorted(rest.variables() & set(axes)):
        try:
            coefficient = rest.coefficient(name)
        except ValueError:
            continue
        inner = divisor.divide_exact(coefficient) if len(coefficient.terms) == 1 else None
        if inner is None or inner == 1 or inner == axes[name]:
            continue
        if axes[name].divide_exact(inner) is not None and axes[name] != inner:
            raise NeedSplit(name, inner)


def linearize(index: Sequence[Expr], sizes: Sequence[Expr]) -> Expr:
    """Row-major position of `index` in a tensor of shape `sizes`."""
    out = const(0)
    for i, stride in zip(index, contiguous_strides(sizes), strict=True):
        out = out + i * stride
    return out


def unflatten(position: Expr, sizes: Sequence[Expr], axes: AxisSizes) -> tuple[Expr, ...]:
    """The index whose row-major position in `sizes` is `position`."""
    out: list[Expr] = []
    rest = position
    live = [s for s in sizes if s != 1]
    for size in reversed(live[1:]):
        rest, digit = divmod_index(rest, size, axes)
        out.append(digit)
    if live:
        out.append(rest)
    digits = iter(reversed(out))
    return tuple(const(0) if s == 1 else next(digits) for s in sizes)


def reindex(index: Sequence[Expr], old: Sequence[Expr], new: Sequence[Expr], axes: AxisSizes) -> tuple[Expr, ...]:
    """`index` into shape `old` as an index into shape `new` of equally many elements (`view`, `reshape`).

    Dimensions that both shapes share at the front or back are passed through, so that sizes which can't be
    divided symbolically don't have to be. Raises `CannotLower` where they share a 0 and differ elsewhere: without
    elements [13, 0] and [4, 0] hold equally many, but what depends on the first index alone would be read all the same.
    """
    front = 0
    while front < min(len(old), len(new)) and old[front] == new[front]:
        front += 1
    back = 0
    while back < min(len(old), len(new)) - front and old[-1 - back] == new[-1 - back]:
        back += 1
    mid_old = old[front: len(old) - back]
    mid_new = new[front: len(new) - back]
    mid_index = index[front: len(old) - back]
    if const(0) in (*old[:front], *old[len(old) - back:]) and product(mid_old) != product(mid_new):
        raise CannotLower(f"sizes {list(map(str, old))} and {list(map(str, new))}, without elements")
    middle = unflatten(linearize(mid_index, mid_old), mid_new, axes)
    return (*index[:front], *middle, *index[len(old) - back:])


def axis_exprs(names: Sequence[str]) -> tuple[Expr, ...]:
    return tuple(var(n) for n in names)
