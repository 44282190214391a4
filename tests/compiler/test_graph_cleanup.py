"""Cleaning ATen graphs: what becomes one node, what vanishes, and what must stay as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from meshwright.compiler.graph_cleanup import clean_up

aten = torch.ops.aten


def traced(function: Callable[..., Any], *inputs: torch.Tensor, symbolic: bool = False) -> fx.GraphModule:
    return make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*inputs)


def calls(gm: fx.GraphModule) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in gm.graph.nodes if n.op == "call_function"]


def cleaned(function: Callable[..., Any], *inputs: torch.Tensor, symbolic: bool = False) -> fx.GraphModule:
    """The cleaned graph, after checking that it gives the same bits and that the original is untouched."""
    gm = traced(function, *inputs, symbolic=symbolic)
    before = str(gm.graph)
    out = clean_up(gm)
    out.graph.lint()
    assert str(gm.graph) == before
    theirs, ours = ([t.clone() for t in inputs] for _ in range(2))
    want, got = gm(*theirs), out(*ours)
    for g, w in zip(_flat(got), _flat(want), strict=True):
        assert torch.equal(g, w) and g.stride() == w.stride()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return out


def _flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in _flat(v)]


X = torch.arange(12.0).reshape(3, 4)


def test_equal_computations_are_done_once() -> None:
    def masks(x: torch.Tensor) -> torch.Tensor:
        rows = [((1 - x[:, None, :]) * -3.0).exp() for _ in range(12)]
        return sum(rows[1:], rows[0] + 0.5)

    assert calls(cleaned(masks, X)).count("exp.default") == 1
    assert calls(cleaned(masks, X, symbolic=True)).count("exp.default") == 1


@pytest.mark.parametrize("function", [
    lambda x: x.add(1) + x.add(1.0) + x.add(True),  # equal in Python, not in ATen
    lambda x: x.mul(0.0).sum() + x.mul(-0.0).sum(),
    lambda x: x.sum(0).sum() + x.sum(1).sum(),
    lambda x: x.to(torch.int32).sum() + x.to(torch.int64).sum(),
], ids=["number types", "signed zeros", "dims", "dtypes"])
def test_what_differs_in_an_argument_stays_apart(function: Callable[..., Any]) -> None:
    before, after = calls(traced(function, X)), calls(cleaned(function, X))
    assert after == before


def test_equal_results_that_are_both_returned_stay_two_tensors() -> None:
    out = cleaned(lambda x: (x.exp(), x.exp(), x.exp() * 2), X)
    assert calls(out).count("exp.default") == 2
    a, b, _ = out(X)
    assert a.data_ptr() != b.data_ptr()


def test_equal_results_returned_through_views_stay_two_tensors() -> None:
    a, b = cleaned(lambda x: (x.exp().t(), x.exp().view(-1)), X)(X)
    assert a.data_ptr() != b.data_ptr()


def test_a_result_is_shared_with_one_that_is_returned() -> None:
    assert calls(cleaned(lambda x: (x.exp() + 1, x.exp()), X)) == ["exp.default", "add.Tensor"]


def test_random_numbers_are_drawn_as_often_as_before() -> None:
    gm = traced(lambda x: torch.rand_like(x) + torch.rand_like(x) + aten.bernoulli.p(x, 0.5) * 0, X)
    assert clean_up(gm) is gm
    unused = traced(lambda x: (torch.rand_like(x), torch.rand_like(x))[1], X)
    assert calls(clean_up(unused)) == ["rand_like.default"] * 2


def test_nothing_read_before_a_write_stands_for_what_is_read_after_it() -> None:
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        before = x.exp()
        x.add_(y)
        return before + x.exp()

    assert calls(cleaned(step, X, X)).count("exp.default") == 2


def test_tensors_that_are_written_stay_apart() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        a, b = x.exp(), x.exp()
        b.view(-1).mul_(2)
        return a + b

    out = cleaned(step, X)
    assert calls(out).count("exp.default") == 2


def test_a_copy_of_what_is_written_later_stays() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        old = x.clone()
        x.add_(1)
        return old + x

    assert "clone.default" in calls(cleaned(step, X))


@pytest.mark.parametrize("function", [
    lambda x: aten.alias(x) + 1,
    lambda x: aten.detach(x) + 1,
    lambda x: x.expand(3, 4) + 1,
    lambda x: aten.slice(x, 0, 0, 2**63 - 1) + 1,
    lambda x: aten.slice(aten.slice(x, 1, 0, 4), 0) + 1,
    lambda x: x.permute(0, 1) + 1,
    lambda x: aten.view(x, [3, 4]) + 1,
    lambda x: x.clone() + 1,
    lambda x: aten._to_copy(x, dtype=torch.float32) + 1,
], ids=["alias", "detach", "expand", "slice", "slices", "permute", "view", "clone", "to"])
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "dynamic"])
def test_no_ops_vanish(function: Callable[..., Any], symbolic: bool) -> None:
    if symbolic:
        assert len(calls(cleaned(lambda x: function(x[:3, :4]), torch.randn(3, 4)))) <= 2
    assert calls(cleaned(function, X)) == ["add.Tensor"]


def test_slices_and_expands_that_take_everything_of_a_symbolic_size_vanish() -> None:
    def take(x: torch.Tensor) -> torch.Tensor:
        return x[:, :].expand(x.shape[0], x.shape[1]) + 1

    assert [c for c in calls(cleaned(take, torch.randn(5, 7), symbolic=True)) if "sym_size" not in c] == ["add.Tensor"]


@pytest.mark.parametrize("function", [
    lambda x: (x + 1, aten.alias(x)),
    lambda x: x.clone(),
    lambda x: x.clone().t(),
    lambda x: x.t().clone(memory_format=torch.contiguous_format) + 1,
    lambda x: x[1:].clone().as_strided((2, 2), (1, 1), 1) + 1,
    lambda x: x[1:] + 1,
    lambda x: x.to(torch.float64) + 1,
    lambda x: x[:1].expand(3, 4) + 1,
], ids=["returned alias", "returned copy", "returned view of a copy", "layout", "strides", "slice", "dtype", "expand"])
def test_what_changes_something_stays(function: Callable[..., Any]) -> None:
    before, after = calls(traced(function, X)), calls(cleaned(function, X))
    assert after == before


def test_views_of_what_was_replaced_are_views_of_the_new_memory() -> None:
    """Their fake values say where they live: the program builder reads it there."""
    def parts(x: torch.Tensor) -> torch.Tensor:
        low = x[1:]
        return low.clone()[:, 1:3].t() + low.clone().split(2, 1)[1].t()

    out = cleaned(parts, X)
    assert "clone.default" not in calls(out)
    x = next(n for n in out.graph.nodes if n.op == "placeholder").meta["val"]
    view, part = (next(n for n in out.graph.nodes if n.name == name).meta["val"] for name in ("slice_2", "getitem_1"))
    assert view.untyped_storage()._cdata == part.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert (view.storage_offset(), part.storage_offset()) == (5, 6)


def test_dead_nodes_vanish_and_effects_stay() -> None:
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.sin().cos()
        y.copy_(x)
        return x + 1

    assert calls(cleaned(step, X, X)) == ["copy_.default", "add.Tensor"]


def test_sizes_that_depend_on_data_stay_apart() -> None:
    def chosen(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.nonzero() + 1, x.nonzero() + 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gm = make_fx(chosen, tracing_mode="symbolic")(X)
    assert calls(clean_up(gm)).count("nonzero.default") == 2


def test_a_compiled_graph_computes_equal_masks_once() -> None:
    """Twelve layers, one mask: what the graph reports is what the program calls."""
    from meshwright.compiler.backend import recent_reports

    def layers(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            bias = (1.0 - mask[:, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
            x = torch.bmm(x, x) * 0.1 + bias.sort(-1).values  # sorting is the library's: one call each
        return x

    x, mask = torch.randn(2, 5, 5), torch.ones(2, 5, dtype=torch.int64)
    torch._dynamo.reset()
    compiled = torch.compile(layers, backend="meshwright", fullgraph=True)
    with torch.no_grad():
        compiled(x, mask)
        torch.testing.assert_close(compiled(x, mask), layers(x, mask))
    steps = recent_reports()[-1].graphs[-1].program.steps
    assert sum(getattr(s, "op", "").startswith("aten.sort") for s in steps) == 1


def test_results_of_operators_without_a_value_are_left_alone() -> None:
    """Under gradient checkpointing a random operator is wrapped in one that saves the generator's state, whose results
    (a tuple in a tuple) carry no fake value in every place."""
    from torch.utils.checkpoint import checkpoint

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = torch.nn.Linear(8, 8)

        def attend(self, x: torch.Tensor) -> torch.Tensor:
            heads = self.inside(x).view(2, 6, 2, 4).transpose(1, 2)
            mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
            return torch.nn.functional.dropout(mixed.transpose(1, 2).reshape(2, 6, 8), 0.5).expand(2, 6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = x + checkpoint(self.attend, x, use_reentrant=False)
            return x

    model, x = Block(), torch.randn(2, 6, 8)
    fast = torch.compile(model, backend="meshwright", options={"strict": True})
    for _ in range(2):
        found = []
        for call in (fast, model):
            torch.manual_seed(3)
            out = call(x)
            found.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
