"""Grouping: which nodes share a kernel, and which must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from meshwright.codegen.group import Group, group

from ..differential import trace


def groups_of(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: bool = False) -> list[Group]:
    return group(trace(lambda *a: (function(*a),), inputs, dynamic).graph)[0]


X = torch.randn(4, 6, 8)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("name", "function"), [
    ("pointwise chain", lambda x: torch.tanh(x * 2 + 1).neg()),
    ("layer norm with residual", lambda x: F.layer_norm(x + x.sin(), (8,))),
    ("softmax", lambda x: torch.softmax(x, -1)),
    ("softmax over an inner dimension", lambda x: torch.softmax(x, 1)),
    ("views fold", lambda x: (x.transpose(0, 1).reshape(6, 32) + 1).view(6, 4, 8).permute(1, 0, 2) * 2),
    ("rotary halves", lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1) * x.cos() + x),
    ("mean of squares", lambda x: x.pow(2).mean()),
])
def test_one_kernel(name: str, function: Callable[..., Any], dynamic: bool) -> None:
    assert len(groups_of(function, X, dynamic=dynamic)) == 1, name


def test_a_matrix_product_separates() -> None:
    found = groups_of(lambda x, w: torch.relu(torch.relu(x) @ w), torch.randn(4, 8), torch.randn(8, 8))
    assert len(found) == 2


def test_no_cycle_through_an_outside_node() -> None:
    """relu feeds both a product and the sum that follows it: one kernel for both would wait for itself."""
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        return y @ w + y
    found = groups_of(function, torch.randn(8, 8), torch.randn(8, 8))
    assert len(found) == 2
    assert [len(g.built.outputs) for g in found] == [1, 1]


def test_reductions_over_different_rows_stay_apart() -> None:
    found = groups_of(lambda x: x.sum(0).unsqueeze(0) + x.sum(1).unsqueeze(1), torch.randn(8, 8))
    assert len(found) >= 2


def test_neighbours_that_read_the_same_tensor_join() -> None:
    found = group(trace(lambda x: (x.sum(0), (x * x).sum(0)), [torch.randn(32, 8)]).graph)[0]
    assert len(found) == 1 and len(found[0].built.outputs) == 2


def test_equal_layers_give_equal_kernels() -> None:
    def layers(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = F.gelu(x @ w)
        return x
    found = groups_of(layers, torch.randn(4, 8), torch.randn(8, 8))
    assert len(found) == 3 and len({g.built.key for g in found}) == 1


def test_random_numbers_and_sorting_are_left_to_aten() -> None:
    gm = trace(lambda x: (torch.sort(x)[0] + torch.bernoulli(x.sigmoid()),), [torch.rand(8)])
    inside = {str(n.target) for g in group(gm.graph)[0] for n in g.nodes}
    assert "aten.add.Tensor" in inside
    assert not any("sort" in t or "bernoulli" in t for t in inside)


def test_refusals_say_why() -> None:
    _, rejected = group(trace(lambda x, m: (x[m > 0],), [torch.randn(8), torch.ones(8, dtype=torch.long)]).graph)
    assert all(r.reason for r in rejected)


def test_grouping_twice_gives_the_same() -> None:
    gm = trace(lambda x: (F.layer_norm(x, (8,)).sum(0),), [X])
    first, second = group(gm.graph)[0], group(gm.graph)[0]
    assert [g.built.key for g in first] == [g.built.key for g in second]


def test_what_the_ir_has_no_form_for_is_refused_not_raised() -> None:
    """min of bools, index_select of a scalar and a gather of nothing run as ATen; the rest of the graph still fuses."""
    def function(m: torch.Tensor, x: torch.Tensor, none: torch.Tensor) -> tuple[torch.Tensor, ...]:
        picked = x.index_select(0, torch.zeros(1, dtype=torch.long))
        return m.min(0)[0], picked, torch.tanh(m * 2.0), x[None].gather(0, none)
    none = torch.zeros(2, 0, dtype=torch.long)
    found, rejected = group(trace(function, [torch.ones(4, 3, dtype=torch.bool), torch.tensor(1.0), none]).graph)
    assert any("tanh" in str(n.target) for g in found for n in g.nodes)
    assert all(any(why in r.reason for r in rejected) for why in ("scalar", "b1", "another rank"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_sums_of_different_lengths_keep_their_own_loops(dynamic: bool) -> None:
    found = groups_of(lambda x, y: x.sum(1) + y.sum(1), torch.randn(8, 24), torch.randn(8, 16), dynamic=dynamic)
    for g in found:
        lengths = {str(n.args[0].meta["val"].shape[1]) for n in g.nodes if n.target is torch.ops.aten.sum.dim_IntList}
        assert len(lengths) <= 1


def test_equally_empty_tensors_of_other_shapes_share_no_loop() -> None:
    """[13, 0, 33] and the four rows picked from it have as many elements, none: a loop of 13 must not pick."""
    def function(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.cos().sum() + x.abs().index_select(0, index).sum()
    found = groups_of(function, torch.randn(13, 0, 33), torch.tensor([0, 1, 0, 1]))
    texts = [str(g.built.kernel) for g in found]
    assert any("expect" in text for text in texts)
    assert not any("expect" in text and "0: 13" in text for text in texts)
