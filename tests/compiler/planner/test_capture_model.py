"""What a captured description says equals what real runs of small models do."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meshwright.compiler.planner.capture_model import describe
from meshwright.compiler.planner.meta_model import on_meta
from meshwright.cost_model.model import ModelDescription, interpolated
from meshwright.runtime.errors import MeshwrightError, UnsupportedError

from .unseen import Frobnicator, Quux, tokens


def described(model: nn.Module, *args: torch.Tensor, micro_batch: int = 2, seq: int = 32,
              **options: Any) -> ModelDescription:
    return describe(on_meta("model", copy.deepcopy(model), args, {}), seq=seq, micro_batch=micro_batch, **options)


def flops(model: ModelDescription, way: str) -> int:
    return sum(getattr(model.kinds[k], f"flops_{way}") for k in model.order)


def counted(model: nn.Module, *args: torch.Tensor) -> tuple[int, int]:
    """FLOPs of forward and backward as torch counts them in a real run, attention taken apart into products."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(*args)["loss"]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def held_bytes(call: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd holds after a real forward, each piece of memory once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        call(x)
    return sum(s.nbytes() for s in held.values())


@pytest.mark.parametrize("groups", [4, 2])
def test_flops_of_an_unseen_model_equal_torchs_counter(groups: int) -> None:
    model = Frobnicator(groups=groups, fused=False)
    found = described(model, *tokens())
    assert (flops(found, "forward"), flops(found, "backward")) == counted(model, *tokens())


def test_fused_attention_computes_its_scores_again_in_the_backward_pass() -> None:
    model = Frobnicator()
    found, (forward, backward) = described(model, *tokens()), counted(model, *tokens())
    scores = 2 * (2 * 4) * 32 * 32 * 16  # FLOP of one product: batch × heads, queries, keys, head size
    assert flops(found, "forward") == forward
    assert flops(found, "backward") == backward + 3 * scores
    assert found.kinds[1].causal_flops_forward == 2 * scores
    assert found.kinds[1].causal_flops_backward == 5 * scores


def test_layers_of_an_unseen_model() -> None:
    model = Frobnicator()
    found = described(model, *tokens())
    assert [k.name for k in found.kinds] == ["embedding", "Quux", "head"]
    assert found.order == (0, 1, 1, 1, 2)
    assert found.modules == ("before stack.0", "stack.0", "stack.1", "stack.2", "after stack.2")
    layer = found.kinds[1]
    assert (layer.heads, layer.kv_heads, layer.ffn, layer.experts, layer.vocabulary) == (4, 2, 160, None, None)
    assert found.kinds[0].vocabulary == found.kinds[2].vocabulary == 100
    assert [(b.role, b.shape, b.bytes) for b in layer.inputs] == [("chain", (2, 32, 64), 2 * 32 * 64 * 4)]
    assert found.parameter_count == sum(p.numel() for p in model.parameters())
    assert found.seq == 32 and found.tokens == 64


@pytest.mark.parametrize(("groups", "fused", "extra"), [
    (4, False, 0),
    (2, False, 0),
    (4, True, 16),  # the state of the random generator, two numbers of 8 bytes, which the CPU's kernel does not keep
    (2, True, 16 + 2 * (2 * 2 * 32 * 16 * 4)),  # in fp32 a GPU's kernel wants as many key heads as query heads
])
def test_saved_activations_equal_a_real_run(groups: int, fused: bool, extra: int) -> None:
    model = Frobnicator(groups=groups, fused=fused)
    saved = described(model, *tokens()).kinds[1].saved
    x = torch.randn(2, 32, 64, requires_grad=True)
    assert saved["none"].bytes == held_bytes(model.stack[0], model, x) + extra
    compiled = torch.compile(model.stack[0], backend="aot_eager_decomp_partition")
    compiled(x)
    assert saved["min-cut"].bytes == held_bytes(compiled, model, x) + extra
    assert saved["full"].bytes == x.numel() * 4


def test_flash_attention_saves_no_scores() -> None:
    """q, k, v and the output in bf16, one fp32 number per query and head, three numbers of the random generator."""
    attention = Frobnicator().to(torch.bfloat16)
    saved = described(attention, *tokens(seq=256), seq=256).kinds[1].saved["selective"].bytes
    row = 2 * 256 * 2  # bytes of one bf16 number for each token
    products = (64 + 32 + 32 + 64 + 160 + 160) * row  # queries, keys, values, projection, both halves of the gate
    assert saved == (64 + products // row) * row + 64 * row + 2 * 4 * 256 * 4 + 24


def test_selective_recomputation_repeats_no_product() -> None:
    layer = described(Frobnicator(), *tokens()).kinds[1]
    assert layer.recomputed_flops("none") == layer.recomputed_flops("selective") == 0
    last = 2 * 64 * 160 * 64  # nothing in the backward pass reads the result of the last product
    assert layer.recomputed_flops("full") == layer.flops_forward - last
    sizes = [layer.saved[m].bytes for m in ("none", "min-cut", "selective", "full")]
    assert sizes == sorted(sizes, reverse=True)


def test_dropout_saves_a_byte_per_element() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList(nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.stack:
                x = layer(x)
            return x

    found = described(Dropping(), torch.randn(4, 8, requires_grad=True), micro_batch=4, seq=1)
    assert found.kinds[1].saved["none"].bytes == 4 * 8 * (4 + 1)  # what the product reads, and the mask


# -- folding --------------------------------------------------------------------------------------
def test_verified_folding_gives_the_same_description() -> None:
    def untimed(model: ModelDescription) -> ModelDescription:
        return dataclasses.replace(model, kinds=tuple(dataclasses.replace(k, capture_s=0.0) for k in model.kinds))

    model = Frobnicator()
    assert untimed(described(model, *tokens())) == untimed(described(model, *tokens(), verify_folding=True))


def test_verification_finds_layers_that_read_their_own_number() -> None:
    class Alternating(Quux):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if self.number % 2 else super().forward(x).relu()

    model = Frobnicator()
    model.stack = nn.ModuleList(Alternating(64, 4, 2, 160, i, True) for i in range(3))
    assert described(model, *tokens()).order == (0, 1, 1, 1, 2)
    with pytest.raises(UnsupportedError, match=r"stack\.1 differs in forward from the layers it was grouped with"):
        described(model, *tokens(), verify_folding=True)


@pytest.mark.parametrize("change", [
    lambda layer: setattr(layer, "size", torch.Size((16,))),
    lambda layer: setattr(layer, "one", nn.Linear(64, 160, bias=False)),
    lambda layer: layer.ask.weight.requires_grad_(False),
    lambda layer: layer.register_forward_hook(lambda *_: None),
    lambda layer: setattr(layer.two, "weight", layer.one.weight),
    lambda layer: setattr(layer, "a", nn.LayerNorm(64, eps=1e-3)),
])
def test_what_makes_a_layer_different(change: Callable[[Any], None]) -> None:
    from meshwright.compiler.planner.layers import fingerprint

    layers = [Quux(64, 4, 2, 160, 0, True) for _ in range(2)]
    assert fingerprint(layers[0]) == fingerprint(layers[1])
    change(layers[1])
    assert fingerprint(layers[0]) != fingerprint(layers[1])


def test_functions_that_layers_hold_are_compared_by_what_they_do() -> None:
    from meshwright.compiler.planner.layers import fingerprint

    layers = [Quux(64, 4, 2, 160, 0, True) for _ in range(3)]
    for layer, way in zip(layers, ("tanh", "tanh", "none"), strict=True):
        layer.bend = functools.partial(torch.nn.functional.gelu, approximate=way)
        layer.method = layer.mix
    assert fingerprint(layers[0]) == fingerprint(layers[1]) != fingerprint(layers[2])


def test_frozen_layers_are_a_kind_of_their_own_and_compute_less() -> None:
    model = Frobnicator()
    model.stack[1].requires_grad_(False)
    found = described(model, *tokens())
    trained, frozen = (found.kinds[found.order[i]] for i in (1, 2))
    assert found.order[1] == found.order[3] != found.order[2]
    assert [p.trainable for p in frozen.parameters] == [False]
    assert frozen.flops_backward < trained.flops_backward
    assert frozen.saved["none"].bytes < trained.saved["none"].bytes


def test_branches_side_by_side_are_no_layers() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(part(x) for part in self.parts)

    found = described(Branches(), torch.randn(4, 8), micro_batch=4, seq=1)
    assert [k.name for k in found.kinds] == ["Branches"]
    assert found.kinds[0].flops_forward == 3 * 2 * 4 * 8 * 8


def test_what_happens_between_layers_is_a_part_of_its_own() -> None:
    class Scaling(Frobnicator):
        def forward(self, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            x = self.table(tokens)
            for layer in self.stack:
                x = layer(x * 2.0)
            return self.project(x)

    found = described(Scaling(), *tokens())
    assert [found.kinds[k].name for k in found.order] == ["embedding", "Quux", "between", "Quux", "between", "Quux",
                                                          "head"]
    between = next(k for k in found.kinds if k.name == "between")
    assert [r.op for r in between.forward] == [r.op for r in between.backward] == ["mul"]


# -- ties -----------------------------------------------------------------------------------------
def test_tied_weights_count_once() -> None:
    found = described(Frobnicator(tied=True), *tokens())
    assert found.parameter_count == sum(p.numel() for p in Frobnicator(tied=True).parameters())
    head = found.kinds[-1]
    assert sum(p.count for p in head.tied) == 100 * 64
    assert head.parameter_count == 2 * 64
    assert head.flops_forward == 2 * 64 * 64 * 100


def test_one_module_that_runs_three_times_is_owned_once() -> None:
    model = Frobnicator()
    model.stack = nn.ModuleList([model.stack[0]] * 3)
    found = described(model, *tokens())
    assert len(found.order) == 5
    assert found.parameter_count == sum(p.numel() for p in model.parameters())
    first, second = (found.kinds[found.order[i]] for i in (1, 2))
    assert first.parameters == second.tied and not second.parameters and first.forward == second.forward


# -- other micro-batches --------------------------------------------------------------------------
def test_two_captures_give_every_micro_batch() -> None:
    model = Frobnicator(rows=1000)
    two, three, five = (described(model, *tokens(n), micro_batch=n) for n in (2, 3, 5))
    between = interpolated(two, three, 5)
    for a, b in zip(between.kinds, five.kinds, strict=True):
        assert dataclasses.replace(a, capture_s=0.0) == dataclasses.replace(b, capture_s=0.0)
    assert between.micro_batch == 5


# -- what can't be captured -----------------------------------------------------------------------
class Picking(nn.Module):
    """A loop over the experts that were hit, as many write it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]))
        return out


def test_a_loop_over_hit_experts_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Picking())
    with pytest.raises(UnsupportedError, match=r"model: 1 \(Picking\) decides by the values of tensors"):
        described(model, torch.randn(8, 16))


def test_a_part_that_has_no_backward_pass_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.gammainc(x, x)  # torch has no derivative by the first

    with pytest.raises(UnsupportedError, match="Odd can't be traced forward and backward"):
        described(Odd(), torch.randn(2, 4, requires_grad=True))


def test_a_model_that_fails_is_named() -> None:
    with pytest.raises(MeshwrightError, match=r"model fails in 1 \(Linear\) without data"):
        described(nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5)), torch.randn(2, 4))


def test_fused_bytes_leave_out_what_a_kernel_keeps_to_itself() -> None:
    """x -> product -> gelu -> times two -> product: the two element-wise operators read one tensor and write one."""
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(nn.functional.gelu(self.up(x)) * 2)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Two(), Two()])

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            for layer in self.layers:
                x = layer(x)
            return {"loss": x.sum()}

    model = described(Stack(), torch.zeros(2, 16, 8, requires_grad=True), seq=16)
    kind = next(k for k in model.kinds if k.name.startswith("Two"))
    element_wise = [i for i, r in enumerate(kind.forward) if r.kind == "pointwise"]
    wide = 2 * 16 * 32 * 4
    assert sum(kind.forward[i].bytes_moved for i in element_wise) == 4 * wide
    assert sum(kind.fused_forward[i] for i in element_wise) == 2 * wide
    products = [kind.backward[i] for i in kind.weight_only if kind.backward[i].kind == "gemm"]
    assert sorted(r.shape for r in products) == [(1, 8, 32, 32), (1, 32, 32, 8)]
    assert [r.shape for r in kind.forward if r.kind == "gemm"] == [(1, 32, 8, 32), (1, 32, 32, 8)]
