"""Integer expressions: the sizes, strides and index maps of the kernel IR.

An `Expr` is a polynomial with integer coefficients over named variables. A variable is a loop axis
(`p0`, `r1`), a symbolic size (`s0`), an SSA value of the kernel (`%7`, for gathers) or an opaque atom:
a function of other expressions such as `floordiv(s0, 2)`. One class serves sizes and index maps, so an
index that is affine in its axes may have symbolic strides (`768*s0*p0 + r0`).

Expressions are immutable, hashable and canonical: two equal polynomials compare equal and print alike.
`parse_expr(str(e)) == e`; nothing is ever evaluated by Python's `eval`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Union

Monomial = tuple[str, ...]  # sorted variable names, repeated for powers; () is the constant term
ExprLike = Union["Expr", int]

_ATOM_FUNCTIONS = ("floordiv", "mod", "max", "min")


class Expr:
    """An integer polynomial. Build with `const`, `var`, `+`, `-`, `*`; read with `terms`."""

    __slots__ = ("_hash", "terms")

    terms: tuple[tuple[Monomial, int], ...]

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        kept = sorted((m, c) for m, c in terms.items() if c != 0)
        self.terms = tuple(kept)
        self._hash = hash(self.terms)

    # -- comparison ---------------------------------------------------------------------------
    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, int):
            other = const(other)
        return isinstance(other, Expr) and self.terms == other.terms

    # -- arithmetic ---------------------------------------------------------------------------
    def __add__(self, other: ExprLike) -> Expr:
        other = as_expr(other)
        if not other.terms:
            return self
        if not self.terms:
            return other
        out = dict(self.terms)
        for m, c in other.terms:
            out[m] = out.get(m, 0) + c
        return Expr(out)

    __radd__ = __add__

    def __neg__(self) -> Expr:
        return Expr({m: -c for m, c in self.terms})

    def __sub__(self, other: ExprLike) -> Expr:
        return self + (-as_expr(other))

    def __rsub__(self, other: ExprLike) -> Expr:
        return as_expr(other) - self

    def __mul__(self, other: ExprLike) -> Expr:
        other = as_expr(other)
        if other.terms == (((), 1),):
            return self
        out: dict[Monomial, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in other.terms:
                m = tuple(sorted(m1 + m2))
                out[m] = out.get(m, 0) + c1 * c2
        return Expr(out)

    __rmul__ = __mul__

    # -- reading ------------------------------------------------------------------------------
    @property
    def is_const(self) -> bool:
        return not self.terms or (len(self.terms) == 1 and not self.terms[0][0])

    @property
    def value(self) -> int:
        """The integer this expression is. Raises `ValueError` when it is not constant."""
        if not self.is_const:
            raise ValueError(f"expected a constant expression, got {self}")
        return self.terms[0][1] if self.terms else 0

    def variables(self) -> frozenset[str]:
        """Names in the polynomial itself (an atom counts as one name)."""
        return _variables(self)

    def symbols(self) -> frozenset[str]:
        """Like `variables`, with atoms opened: `floordiv(s0, 2)` counts as `s0`."""
        found: set[str] = set()
        for name in self.variables():
            call = split_atom(name)
            if call is None:
                found.add(name)
            else:
                for arg in call[1]:
                    found |= arg.symbols()
        return frozenset(found)

    def coefficient(self, name: str) -> Expr:
        """The factor of `name` in an expression that is linear in it (`3*s0` in `3*s0*p0 + 1`)."""
        out: dict[Monomial, int] = {}
        for m, c in self.terms:
            if m.count(name) == 1:
                rest = list(m)
                rest.remove(name)
                out[tuple(rest)] = c
            elif m.count(name) > 1:
                raise ValueError(f"{self} is not linear in {name}")
        return Expr(out)

    def without(self, names: Iterable[str]) -> Expr:
        """The terms that mention none of `names`."""
        gone = frozenset(names)
        return Expr({m: c for m, c in self.terms if not gone.intersection(m)})

    def subs(self, values: Mapping[str, ExprLike]) -> Expr:
        """Replace variables (inside atoms too)."""
        if not self.symbols().intersection(values):
            return self
        out = const(0)
        for m, c in self.terms:
            term = const(c)
            for name in m:
                term = term * _subs_name(name, values)
            out = out + term
        return out

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The integer value under `values` (every symbol must be given)."""
        return self.subs(values).value

    def divide_exact(self, divisor: ExprLike) -> Expr | None:
        """The quotient when `divisor` (a single term) divides every term, else None."""
        d = as_expr(divisor)
        if len(d.terms) != 1:
            return const(1) if self == d else None
        dm, dc = d.terms[0]
        out: dict[Monomial, int] = {}
        for m, c in self.terms:
            rest = list(m)
            for name in dm:
                if name not in rest:
                    return None
                rest.remove(name)
            if c % dc:
                return None
            out[tuple(rest)] = c // dc
        return Expr(out)

    # -- printing -----------------------------------------------------------------------------
    def render(self, name_of: Callable[[str], str]) -> str:
        """Infix text; `name_of` prints one variable (printers map `%7`, atoms and symbols)."""
        if not self.terms:
            return "0"
        parts: list[str] = []
        for m, c in sorted(self.terms, key=lambda t: (-len(t[0]), t[0])):
            factors = [name_of(n) for n in m]
            if abs(c) != 1 or not factors:
                factors.insert(0, str(abs(c)))
            sign = ("-" if c < 0 else "") if not parts else (" - " if c < 0 else " + ")
            parts.append(sign + "*".join(factors))
        return "".join(parts)

    def __str__(self) -> str:
        return self.render(lambda n: n)

    def __repr__(self) -> str:
        return f"Expr({self})"


def const(value: int) -> Expr:
    return Expr({(): int(value)})


def var(name: str) -> Expr:
    return Expr({(name,): 1})


def as_expr(value: ExprLike) -> Expr:
    return value if isinstance(value, Expr) else const(value)


@lru_cache(maxsize=65536)
def _variables(e: Expr) -> frozenset[str]:
    return frozenset(n for m, _ in e.terms for n in m)


def product(values: Iterable[ExprLike]) -> Expr:
    out = const(1)
    for v in values:
        out = out * as_expr(v)
    return out


def atom(function: str, *args: ExprLike) -> Expr:
    """An opaque call such as `floordiv(s0, 2)`; folded when the arguments are constant."""
    exprs = [as_expr(a) for a in args]
    if all(e.is_const for e in exprs):
        a, b = exprs[0].value, exprs[1].value
        return const({"floordiv": lambda: a // b, "mod": lambda: a % b,
                      "max": lambda: max(a, b), "min": lambda: min(a, b)}[function]())
    if function == "floordiv" and (q := exprs[0].divide_exact(exprs[1])) is not None:
        return q
    if function == "mod" and exprs[0].divide_exact(exprs[1]) is not None:
        return const(0)
    return var(f"{function}({', '.join(str(e) for e in exprs)})")


def split_atom(name: str) -> tuple[str, list[Expr]] | None:
    """`"floordiv(s0, 2)"` → `("floordiv", [s0, 2])`; None for a plain variable."""
    return _split_atom(name)


@lru_cache(maxsize=4096)
def _split_atom(name: str) -> tuple[str, list[Expr]] | None:
    function, paren, rest = name.partition("(")
    if not paren or function not in _ATOM_FUNCTIONS:
        return None
    args, depth, start = [], 0, 0
    body = rest[:-1]
    for i, ch in enumerate(body):
        depth += (ch == "(") - (ch == ")")
        if ch == "," and depth == 0:
            args.append(body[start:i])
            start = i + 1
    args.append(body[start:])
    return function, [parse_expr(a) for a in args]


def _subs_name(name: str, values: Mapping[str, ExprLike]) -> Expr:
    if name in values:
        return as_expr(values[name])
    call = split_atom(name)
    if call is None:
        return var(name)
    return atom(call[0], *[a.subs(values) for a in call[1]])


_TOKEN = re.compile(r"\s*(%?\w+|[-+*(),])")


def parse_expr(text: str) -> Expr:
    """Inverse of `str(expr)`. Raises `ValueError` on anything else."""
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != re.sub(r"\s+", "", text):
        raise ValueError(f"not an integer expression: {text!r}")
    expr, rest = _parse_sum(tokens)
    if rest:
        raise ValueError(f"not an integer expression: {text!r} (stopped at {rest[0]!r})")
    return expr


def _parse_sum(tokens: list[str]) -> tuple[Expr, list[str]]:
    negative = bool(tokens) and tokens[0] == "-"
    left, tokens = _parse_product(tokens[1:] if negative else tokens)
    if negative:
        left = -left
    while tokens and tokens[0] in "+-":
        right, rest = _parse_product(tokens[1:])
        left = left + right if tokens[0] == "+" else left - right
        tokens = rest
    return left, tokens


def _parse_product(tokens: list[str]) -> tuple[Expr, list[str]]:
    left, tokens = _parse_factor(tokens)
    while tokens and tokens[0] == "*":
        right, tokens = _parse_factor(tokens[1:])
        left = left * right
    return left, tokens


def _parse_factor(tokens: list[str]) -> tuple[Expr, list[str]]:
    if not tokens:
        raise ValueError("integer expression ended early")
    head, rest = tokens[0], tokens[1:]
    if head.lstrip("-").isdigit():
        return const(int(head)), rest
    if head == "(":
        inner, rest = _parse_sum(rest)
        if not rest or rest[0] != ")":
            raise ValueError("missing ')' in integer expression")
        return inner, rest[1:]
    if rest and rest[0] == "(" and head in _ATOM_FUNCTIONS:
        a, rest = _parse_sum(rest[1:])
        if not rest or rest[0] != ",":
            raise ValueError(f"{head} takes two arguments")
        b, rest = _parse_sum(rest[1:])
        if not rest or rest[0] != ")":
            raise ValueError("missing ')' in integer expression")
        return atom(head, a, b), rest[1:]
    if not re.fullmatch(r"%?[A-Za-z_0-9]+", head):
        raise ValueError(f"unexpected {head!r} in integer expression")
    return var(head), rest
