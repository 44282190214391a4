"""Bytes of one layer on one GPU, by category. Closed forms; nothing depends on how much memory there is.

    weights      parameters · parameter bytes, cut into dp · cp parts by ZeRO 3
    gradients    trainable parameters · gradient bytes, cut by ZeRO 2 and 3
    optimizer    trainable parameters · (moments + master copy), cut by ZeRO 1, 2 and 3; experts over edp
    saved        the mode's saved activations / (tp · cp), per micro-batch: sequence parallelism divides all of them
    transient    what lives only while the layer runs: two layers' gathered parameters under ZeRO 3 (the next one is
                 fetched early), whole gradients before ZeRO 2 and 3 scatter them, what recomputation brings back,
                 two of the largest gradients of activations
    communication  the gathered input of a block under tp, rows under way to experts, keys and values of a neighbour
    allocator    a share of what comes and goes (saved, transient, communication) on top: `allocator_bytes`

Sources: Rajbhandari et al., arXiv:1910.02054, section 3 (ZeRO); Korthikanti et al., section 4 (activations).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .layer_communication import ACTIVATION_BYTES, parameters_per_gpu
from .layer_compute import PRODUCT_KINDS, fuses, saved_of, splits, width
from .model import LayerKind, Saved
from .strategy import LayerStrategy, Training

ALLOCATOR_SHARE = 0.12
"""Default margin. Of 55 published peaks half are above the prediction by more than 12 % of the predicted dynamic memory
(`allocator` in benchmarks/results/costmodel_published.json). Nine in ten would take 75 %, but with that two in
three published runs would be said not to fit (`refused`), and they did run. The largest excesses don't look like an
allocator's: those of four layers of Llama-3-405B are 4 GiB at tp 2 with 4,096 tokens and with twice as many."""


def allocator_bytes(dynamic_bytes: float, share: float = ALLOCATOR_SHARE) -> int:
    """Margin for what an allocator holds beyond the tensors in use: rounded sizes, blocks that fit nothing, several
    streams. `dynamic_bytes`: what comes and goes on a stage at its peak, that is saved activations, the largest
    transient and communication buffers; weights, gradients and optimizer states are laid out once and take none. Whole
    bytes, rounded up, as a memory category of its own ("allocator"). A table may scale these bytes by 1 + `share`
    instead: the peak over a schedule and the largest transient scale with them. Raises `ValueError` for a share or
    bytes that are negative or not finite."""
    if not (math.isfinite(dynamic_bytes) and dynamic_bytes >= 0 and math.isfinite(share) and share >= 0):
        raise ValueError(f"allocator margin of {share:g} of {dynamic_bytes:g} bytes; expected finite numbers from 0 up")
    return math.ceil(dynamic_bytes * share)


@dataclass(frozen=True)
class LayerMemory:
    """`saved_until_b_bytes`, `saved_until_w_bytes`: per micro-batch in flight, released by its B and by its W. Static:
    weights, gradients, optimizer. `transient_bytes` and `communication_bytes` exist once per stage: its largest."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    saved_until_b_bytes: float
    saved_until_w_bytes: float
    transient_bytes: float
    communication_bytes: float

    @property
    def static_bytes(self) -> float:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def saved_bytes(self) -> float:
        return self.saved_until_b_bytes + self.saved_until_w_bytes


def layer_memory(kind: LayerKind, strategy: LayerStrategy, training: Training, *, owns_tied: bool) -> LayerMemory:
    """`owns_tied`: whether weights that an earlier layer owns are kept here again, as on another pipeline stage."""
    count = parameters_per_gpu(kind, strategy, with_tied=owns_tied)
    dense, experts = strategy.shards, strategy.edp

    def states(per_parameter: float, from_stage: int, trained: bool) -> float:
        a = count.dense_trainable if trained else count.dense
        b = count.experts_trainable if trained else count.experts
        if strategy.zero >= from_stage:
            a, b = a / dense, b / experts
        return per_parameter * (a + b)

    until_b, until_w = _saved(kind, strategy, training)
    gathered = 0.0  # dense parameters and experts are cut over groups of their own, either of which may be one GPU
    used = parameters_per_gpu(kind, strategy, with_tied=True)  # of a tied table, too, a whole one is here for a while
    if strategy.zero == 3:
        whole = (used.dense if dense > 1 else 0.0) + (used.experts if experts > 1 else 0.0)
        gathered += whole * training.gather_bytes * 2
    if strategy.zero >= 2:
        reduced = (used.dense_trainable if dense > 1 else 0.0) + (used.experts_trainable if experts > 1 else 0.0)
        gathered += reduced * training.reduce_bytes
    return LayerMemory(
        states(training.parameter_bytes, 3, False), states(training.gradient_bytes, 2, True),
        states(training.optimizer_bytes, 1, True), until_b, until_w,
        gathered + _working_set(kind, strategy, training), _communication(kind, strategy))


def _saved(kind: LayerKind, strategy: LayerStrategy, training: Training) -> tuple[float, float]:
    """Until B and until W. From B to W the gradients that W reads take the place of what B released."""
    share = strategy.tp * strategy.cp
    fused = fuses(kind, training) and strategy.recompute == "none"  # fused kernels keep what min-cut keeps
    saved = saved_of(kind, "min-cut" if fused else strategy.recompute, training)
    if training.fp8_recipe and training.fusion == "kernels" and kind.vocabulary is None and fused:
        # inputs of products are kept as they were quantised, in half the bytes
        saved = Saved(saved.bytes - saved.weight_bytes // 2, (), saved.weight_bytes // 2)
    kept_for_w = saved.weight_bytes if strategy.recompute in ("none", "min-cut") else saved.bytes
    until_b = max(0, saved.bytes - kept_for_w - kind.gradient_bytes)
    return until_b / share, (saved.bytes - until_b) / share


def _working_set(kind: LayerKind, strategy: LayerStrategy, training: Training) -> float:
    """Two of the largest gradients of activations (an operator's operand and result), and, while a layer is run again,
    everything that running it saves. A fused loss turns the probabilities that it saved into the gradient of the
    logits: one tensor as large as the widest product's result."""
    fused = fuses(kind, training) and bool(kind.fused_backward)
    delayed = set(kind.weight_only)
    if fused:
        sizes = [r.bytes_written / (2 if kind.vocabulary else 1) for r in kind.forward if r.kind in PRODUCT_KINDS]
    else:
        sizes = [float(r.bytes_written) for i, r in enumerate(kind.backward) if i not in delayed]
    again = 0
    if strategy.recompute in ("selective", "full"):
        again = max(0, kind.saved["min-cut" if fused else "none"].bytes
                    - saved_of(kind, strategy.recompute, training).bytes)
    return (2 * max(sizes, default=0) + again) / (strategy.tp * strategy.cp)


def _communication(kind: LayerKind, strategy: LayerStrategy) -> float:
    hidden, total = width(kind) or 0, 0.0
    chain = next((b for b in kind.inputs if b.role == "chain"), None)
    tokens = chain.bytes / max(1, hidden) / ACTIVATION_BYTES if chain else 0.0
    if strategy.tp > 1 and (kind.vocabulary or splits(kind).blocks):
        total += tokens / strategy.cp * hidden * ACTIVATION_BYTES
    for record in kind.forward:
        if record.op.startswith("grouped_mm") and len(record.shape) == 4 and strategy.ep * strategy.etp > 1:
            total += record.shape[1] * strategy.etp / (strategy.tp * strategy.cp) * hidden * ACTIVATION_BYTES
            break
    for record in kind.forward:
        if record.kind == "attention" and len(record.shape) == 6 and strategy.cp > 1:
            batch, _, _, keys, head_size, kv_heads = record.shape
            total += 2 * 2 * batch * keys * max(kv_heads, strategy.tp) * head_size * ACTIVATION_BYTES / (
                strategy.tp * strategy.cp)
            break
    return total
