"""Integer expressions: canonical form, text round trip, substitution, division."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.codegen.expr import Expr, atom, const, parse_expr, var

NAMES = ("p0", "r0", "s0", "s1", "%3")
VALUES = {"p0": 5, "r0": 3, "s0": 7, "s1": 2, "%3": 11}


def expressions() -> st.SearchStrategy[Expr]:
    leaf = st.one_of(st.integers(-9, 9).map(const), st.sampled_from(NAMES).map(var))
    divided = st.tuples(st.sampled_from(("floordiv", "mod")), st.sampled_from(("s0", "p0")), st.integers(1, 6)).map(
        lambda t: atom(t[0], var(t[1]), t[2]))
    return st.recursive(st.one_of(leaf, divided), lambda e: st.one_of(
        st.tuples(e, e).map(lambda t: t[0] + t[1]), st.tuples(e, e).map(lambda t: t[0] - t[1]),
        st.tuples(e, e).map(lambda t: t[0] * t[1])), max_leaves=6)


@given(expressions())
def test_text_reads_back(e: Expr) -> None:
    assert parse_expr(str(e)) == e


@given(expressions(), expressions())
def test_arithmetic_is_that_of_integers(a: Expr, b: Expr) -> None:
    x, y = a.evaluate(VALUES), b.evaluate(VALUES)
    assert (a + b).evaluate(VALUES) == x + y
    assert (a - b).evaluate(VALUES) == x - y
    assert (a * b).evaluate(VALUES) == x * y
    assert a + b == b + a and hash(a * b) == hash(b * a)


@given(expressions(), st.integers(1, 5))
def test_exact_division_undoes_multiplication(a: Expr, n: int) -> None:
    assert (a * n).divide_exact(n) == a


def test_division_that_does_not_go_is_none() -> None:
    assert (var("s0") * 3).divide_exact(2) is None
    assert (var("s0") + 4).divide_exact(var("s0")) is None


def test_substitution_is_simultaneous() -> None:
    swapped = (var("p0") * 10 + var("r0")).subs({"p0": var("r0"), "r0": var("p0")})
    assert swapped == var("r0") * 10 + var("p0")


def test_atoms_are_opened_by_symbols_only() -> None:
    e = atom("floordiv", var("s0") + 1, 2) * 3
    assert e.symbols() == {"s0"} and e.variables() != {"s0"}
    assert e.evaluate({"s0": 8}) == 12


@pytest.mark.parametrize("text", ["", "1 +", "s0 s1", "__import__('os')", "floordiv(s0)", "(1", "2 ** 3", "s0.x"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_expr(text)
