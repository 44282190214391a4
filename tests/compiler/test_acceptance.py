"""The lossless rule, and what acceptance does with kernels that break it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from meshwright.codegen.cpp import compile_kernels
from meshwright.codegen.group import Group, group
from meshwright.compiler.acceptance import Acceptance, Region, difference, kernel_names

from ..differential import trace


def region(function, *inputs: torch.Tensor) -> tuple[Group, dict, list[torch.Tensor]]:
    gm = trace(lambda *a: (function(*a),), inputs)
    (found,) = group(gm.graph)[0]
    env = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    return found, env, Region(found).run(env)


def judge(found: Group, env, eager, kernel, **options) -> Acceptance:
    names = kernel_names([found])
    judged = Acceptance({names[found.built.key]: kernel}, names, {}, **options)
    judged.judge(found, env, eager)
    return judged


def true_kernel(found: Group):
    name = kernel_names([found])[found.built.key]
    return compile_kernels([found.built.kernel.renamed(name)])[name]


SOFTMAX = (lambda x: torch.softmax(x * 3, -1), torch.randn(64, 33))


def test_a_right_kernel_is_kept_and_timed() -> None:
    found, env, eager = region(*SOFTMAX)
    (verdict,) = judge(found, env, eager, true_kernel(found)).verdicts.values()
    assert verdict.ok or verdict.reason.startswith("slower")
    assert verdict.kernel_s and verdict.eager_s


@pytest.mark.parametrize(("name", "spoil"), [
    ("one element off", lambda out: out.view(-1)[5].add_(1e-4)),
    ("last row unwritten", lambda out: out[-1].fill_(float("nan"))),
    ("scaled", lambda out: out.mul_(1 + 1e-5)),
    ("zeroed", lambda out: out.zero_()),
])
def test_a_wrong_kernel_is_dropped_with_the_reason(name: str, spoil) -> None:
    found, env, eager = region(*SOFTMAX)
    right = true_kernel(found)

    def wrong(buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        right(buffers, sizes)
        spoil(buffers[-1])
    (verdict,) = judge(found, env, eager, wrong, measure=False).verdicts.values()
    assert not verdict.ok and found.built.outputs[0].name in verdict.reason


def test_a_kernel_wrong_only_for_extreme_values_is_caught() -> None:
    found, env, eager = region(lambda x: torch.exp(x) + 1, torch.rand(64))
    right = true_kernel(found)

    def wrong(buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        right(buffers, sizes)
        buffers[-1][buffers[0] < -1] = 0.5
    (verdict,) = judge(found, env, eager, wrong, measure=False).verdicts.values()
    assert not verdict.ok and "adversarial" in verdict.reason


def test_a_slow_kernel_is_dropped() -> None:
    found, env, eager = region(*SOFTMAX)
    right = true_kernel(found)

    def slow(buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        for _ in range(2000):
            right(buffers, sizes)
    (verdict,) = judge(found, env, eager, slow).verdicts.values()
    assert not verdict.ok and verdict.reason.startswith("slower")


def test_inputs_stay_as_they_were() -> None:
    found, env, eager = region(*SOFTMAX)
    before = {n: v.clone() for n, v in env.items()}
    judge(found, env, eager, true_kernel(found))
    assert all(torch.equal(v, before[n]) for n, v in env.items())


def test_difference_of_integers_is_exact() -> None:
    a = torch.arange(10)
    b = a.clone()
    b[3] += 1
    assert difference(a, a.clone(), None) == "" and "1 of 10" in difference(b, a, None)


def test_cancellation_is_not_held_against_a_kernel() -> None:
    """(x + 1e6) - 1e6 - x is rounding noise in any order: what eager loses by one ulp of input, ours may lose too."""
    found, env, eager = region(lambda x: ((x + 1e4) - 1e4 - x).sum(-1), torch.randn(16, 64))
    (verdict,) = judge(found, env, eager, true_kernel(found), measure=False).verdicts.values()
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("view", [
    lambda: torch.randn(64, 1).expand(64, 33), lambda: torch.randn(64, 99)[:, ::3], lambda: torch.randn(33, 64).t(),
])
def test_adversarial_inputs_keep_the_strides_a_kernel_was_made_for(view) -> None:
    found, env, eager = region(SOFTMAX[0], view())
    (verdict,) = judge(found, env, eager, true_kernel(found), measure=False).verdicts.values()
    assert verdict.ok, verdict.reason


def test_results_of_an_operator_with_several_are_not_mistaken_for_its_inputs() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x, 1, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5)
    found, env, eager = region(both, torch.randn(64, 33))
    for node in Region(found).nodes:  # as the recorded run leaves them
        if node.target is torch.ops.aten.var_mean.correction:
            env[node] = torch.var_mean(*(env[a] if a in env else a for a in node.args), **node.kwargs)
    (verdict,) = judge(found, env, eager, true_kernel(found), measure=False).verdicts.values()
    assert verdict.ok, verdict.reason
