"""Seconds of computation of one layer on one GPU: its captured operators, divided by a strategy, priced one by one.

What is divided how
  products with weights   by cp along the tokens; by tp along the weights: column (the output's width) for those that
                          start a block, row (the input's width) for the one that ends it (Shoeybi et al.,
                          arXiv:1909.08053). A product ends a block when its result is as wide as the layer's input and
                          it comes after attention or takes the feed-forward width.
  grouped products        by ep along the experts and by etp along their width; a GPU gets etp · rows / (tp · cp) rows
  attention               by tp along the heads, by cp along the sequence: masked blocks are shared evenly
  everything else         by tp · cp along the sequence

The head of a model is a column product; its loss is taken over the divided vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from .model import LayerKind, RecomputeMode, Saved
from .op_price import Rates
from .records import OpRecord
from .strategy import LayerStrategy, StrategyError, Training

Split = Literal["column", "row", "activations", "experts"]
PRODUCT_KINDS = ("gemm", "conv", "attention")


@dataclass
class Seconds:
    """Seconds of computation by what bounds them, and operators that the dispatcher sees. `column_s`: of `gemm_s`, the
    column products."""

    gemm_s: float = 0.0
    attention_s: float = 0.0
    memory_s: float = 0.0
    column_s: float = 0.0
    operators: int = 0
    host_s: float = 0.0
    dispatch_s: float = field(default=0.0, compare=False)

    @property
    def gpu_s(self) -> float:
        return self.gemm_s + self.attention_s + self.memory_s

    @property
    def launch_s(self) -> float:
        """What the host takes beyond the GPU's own time."""
        return max(0.0, self.operators * self.dispatch_s - self.gpu_s) + self.host_s

    @property
    def total_s(self) -> float:
        return self.gpu_s + self.launch_s


@dataclass(frozen=True)
class LayerSeconds:
    """One micro-batch: forward, what a recomputation mode runs again, the gradients of activations and of weights."""

    forward: Seconds
    again: Seconds
    input_gradient: Seconds
    weight_gradient: Seconds


def layer_seconds(kind: LayerKind, strategy: LayerStrategy, rates: Rates) -> LayerSeconds:
    """Price the operators of one layer. Raises `StrategyError` for experts that the strategy can't divide."""
    check_experts(kind, strategy)
    fused = fuses(kind, rates.training) and bool(kind.fused_forward)
    forward_bytes = kind.fused_forward if fused else tuple(r.bytes_moved for r in kind.forward)
    backward_bytes = kind.fused_backward if fused else tuple(r.bytes_moved for r in kind.backward)
    delayed = set(kind.weight_only)
    work = _Divided(kind, strategy, rates)
    # a compiler's backward regions hold what min-cut runs again already
    again = () if fused and strategy.recompute == "min-cut" else saved_of(kind, strategy.recompute,
                                                                          rates.training).recomputed
    backward = list(zip(range(len(kind.backward)), kind.backward, backward_bytes, strict=True))
    return LayerSeconds(
        work.seconds(((i, r, b) for i, (r, b) in enumerate(zip(kind.forward, forward_bytes, strict=True))), False),
        work.seconds(((i, kind.forward[i], forward_bytes[i]) for i in again), False),
        work.seconds(((i, r, b) for i, r, b in backward if i not in delayed), True),
        work.seconds(((i, r, b) for i, r, b in backward if i in delayed), True, weights=True))


class _Divided:
    def __init__(self, kind: LayerKind, strategy: LayerStrategy, rates: Rates) -> None:
        self.kind, self.s, self.rates = kind, strategy, rates
        self.share = strategy.tp * strategy.cp
        self.roles = splits(kind)
        self.turns: dict[tuple[bool, tuple[int, int]], int] = {}
        attention = sum(r.flops for r in kind.forward if r.kind == "attention")
        self.unmasked = 1 - 0.5 * kind.causal_flops_forward / attention if attention else 1.0
        self.fp8 = rates.fp8 and kind.vocabulary is None

    def seconds(self, operators: Iterable[tuple[int, OpRecord, int]], backward: bool, weights: bool = False) -> Seconds:
        t = self.rates.training
        host = t.fusion != "compiled" and t.cuda_graphs != "step"
        out = Seconds(dispatch_s=self.rates.software.eager_op_s if host else 0.0)
        fused = fuses(self.kind, t)
        for index, record, moved_bytes in operators:
            if record.kind not in PRODUCT_KINDS and fused and not moved_bytes:
                continue  # part of a neighbour's kernel
            out.operators += 1
            if record.kind == "attention":
                out.attention_s += self._attention_s(record, backward)
            elif record.kind in PRODUCT_KINDS:
                if record.op == "grouped_mm" and not out.host_s and t.cuda_graphs == "none":
                    out.host_s = self.rates.software.expert_pass_s
                role = self._role(index, record, backward, weights)
                seconds = self._product_s(record, role, backward, weights)
                out.gemm_s += seconds
                out.column_s += seconds if role == "column" else 0.0
            else:
                out.memory_s += self.rates.memory_s(moved_bytes / self.share) + self.rates.calibration.kernel_s
        return out

    def _role(self, index: int, record: OpRecord, backward: bool, weights: bool) -> Split:
        """How a product is divided. A backward product belongs to a weight by its sizes; weights of the same sizes take
        turns, which costs the same in every order."""
        if not backward:
            return self.roles.forward.get(index, "activations")
        if record.op.startswith("grouped_mm"):
            return "experts"
        if len(record.shape) != 4 or record.shape[0] != 1:
            return "activations"
        _, m, k, n = record.shape  # an input's gradient [tokens, n] · [n, k], a weight's [k, tokens] · [tokens, n]
        key = _pair(m, n) if weights else (n, k)
        found = (self.roles.either_way if weights else self.roles.of_weight).get(key, ("column",))
        turn = self.turns[weights, key] = self.turns.get((weights, key), -1) + 1
        return found[turn % len(found)]

    def _attention_s(self, record: OpRecord, backward: bool) -> float:
        if len(record.shape) != 6:
            return self.rates.product_s(1, 1, 1, record.flops / 2 / self.share)
        batch, heads, queries, keys, head_size, _ = record.shape
        scores = batch * heads * queries * keys * self.unmasked / self.share
        return self.rates.attention_s(scores, head_size, record.flops * self.unmasked / self.share,
                                      record.bytes_moved / self.share, backward=backward)

    def _product_s(self, record: OpRecord, role: Split, backward: bool, weights: bool) -> float:
        if len(record.shape) != 4:
            flops_s = self.rates.product_s(1, record.elements ** 0.5 / self.share, max(1.0, record.flops / 2
                                           / max(1, record.elements)), record.elements ** 0.5)
            return max(flops_s, self.rates.memory_s(record.bytes_moved / self.share))
        if role == "experts":
            return self._experts_s(record.shape, weights)
        batch, m, k, n = (float(d) for d in record.shape)
        tp, cp = self.s.tp, self.s.cp
        if role == "activations":
            return self.rates.product_s(batch / tp if batch > 1 else 1, m / (cp if batch > 1 else self.share), k, n)
        if weights:  # [k, tokens] · [tokens, n], added to the gradients that are there
            k /= cp
            m, n = (m, n / tp) if role == "column" else (m / tp, n)
            accumulated_s = self.rates.memory_s(m * n * (2 * self.rates.training.gradient_bytes - 2))
            return self.rates.product_s(1, m, k, n, fp8=self.fp8) + accumulated_s
        output = (role == "column") != backward  # the input's gradient turns the weights around
        m, k, n = m / cp, k if output else k / tp, n / tp if output else n
        return self.rates.product_s(1, m, k, n, fp8=self.fp8, quantized=m * k)

    def _experts_s(self, shape: tuple[int, ...], weights: bool) -> float:
        """[rows of all experts, k] · [experts, k, n]: a batch of one product per local expert."""
        experts, rows, k, n = shape
        etp, local = self.s.etp, experts / self.s.ep
        own_rows = rows * etp / self.share / local  # per expert
        hidden = self.kind.inputs[0].shape[-1] if self.kind.inputs else k
        k_own, n_own = (k, n / etp) if k == hidden else (k / etp, n)
        if weights:
            accumulated_s = self.rates.memory_s(local * k_own * n_own * (2 * self.rates.training.gradient_bytes - 2))
            return self.rates.product_s(local, k_own, own_rows, n_own, fp8=self.fp8, grouped=True) + accumulated_s
        return self.rates.product_s(local, own_rows, k_own, n_own, fp8=self.fp8, quantized=local * own_rows * k_own,
                                    grouped=True)


def fuses(kind: LayerKind, training: Training) -> bool:
    """Whether neighbouring element-wise operators of a layer are one kernel."""
    loss = kind.vocabulary is not None and kind.inputs_chain
    return training.fusion != "none" or (training.fused_loss and loss)


def saved_of(kind: LayerKind, mode: RecomputeMode, training: Training) -> Saved:
    """What a mode keeps and runs again; of the products that `selective` would keep, every `selective_every`-th runs
    again, but not the last one, whose result leaves the layer."""
    saved, every = kind.saved[mode], training.selective_every
    if mode != "selective" or every == 1:
        return saved
    products = [i for i, r in enumerate(kind.forward) if r.kind == "gemm"][:-1]
    dropped = [i for i in products[every - 1::every] if i not in saved.recomputed]
    kept = max(0, saved.bytes - sum(kind.forward[i].bytes_written for i in dropped))
    return Saved(kept, tuple(sorted({*saved.recomputed, *dropped})), min(kept, saved.weight_bytes))


def check_experts(kind: LayerKind, strategy: LayerStrategy) -> None:
    """Raises `StrategyError` where ep does not divide a layer's experts, or etp their width. Layers without experts
    take any."""
    if kind.experts and kind.experts % strategy.ep:
        raise StrategyError(f"ep {strategy.ep} of {kind.experts} experts; expected a divisor")
    if kind.experts and kind.expert_ffn and kind.expert_ffn % strategy.etp:
        raise StrategyError(f"etp {strategy.etp} of experts {kind.expert_ffn} wide; expected a divisor")


# -- which product is divided how -----------------------------------------------------------------
@dataclass(frozen=True)
class Splits:
    """`forward`: role of every product by its position; `of_weight`: roles of weights by their sizes (k, n);
    `either_way`: the same by the two sizes in ascending order."""

    forward: dict[int, Split]
    of_weight: dict[tuple[int, int], tuple[Split, ...]]
    either_way: dict[tuple[int, int], tuple[Split, ...]]

    @property
    def blocks(self) -> int:
        return sum(role == "row" for role in self.forward.values())


def splits(kind: LayerKind) -> Splits:
    """The role of each product of a layer."""
    hidden = width(kind)
    forward: dict[int, Split] = {}
    of_weight: dict[tuple[int, int], tuple[Split, ...]] = {}
    either_way: dict[tuple[int, int], tuple[Split, ...]] = {}
    attended = False
    for i, record in enumerate(kind.forward):
        if record.kind == "attention":
            attended = True
        if record.kind != "gemm":
            continue
        if record.op.startswith("grouped_mm"):
            forward[i] = "experts"
            continue
        if len(record.shape) != 4 or record.shape[0] != 1:
            forward[i] = "activations"
            attended = attended or len(record.shape) == 4
            continue
        _, _, k, n = record.shape
        ends = n == hidden and kind.vocabulary is None and (attended or (k == kind.ffn and k != hidden))
        attended = attended and not ends
        forward[i] = "row" if ends else "column"
        of_weight[k, n] = (*of_weight.get((k, n), ()), forward[i])
        either_way[_pair(k, n)] = (*either_way.get(_pair(k, n), ()), forward[i])
    return Splits(forward, of_weight, either_way)


def width(kind: LayerKind) -> int | None:
    """Size of the hidden states that enter a layer."""
    return next((b.shape[-1] for b in kind.inputs if b.role == "chain" and b.shape), None)


def _pair(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a <= b else (b, a)
