"""What one layer costs on one GPU under a strategy: seconds and bytes, each with its parts.

    price = layer_price.price_layer(kind, strategy, training, placement, calibration, software)
    price.forward_s, price.input_gradient_s, price.weight_gradient_s   per micro-batch, with exposed communication
    price.sync_s, price.optimizer_s                                    once a step
    price.memory                                                       bytes by category

`reshard_price` is what bringing an activation from one layer's layout to the next one's costs, `transfer_price` what
sending it to the next stage does. `integers` rounds once, for tables that are searched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from .calibration import Calibration, Software, committed_software
from .cluster import Cluster
from .collectives import all_to_all_s, point_to_point_s
from .layer_communication import ACTIVATION_BYTES, Collective, LayerTraffic, parameters_per_gpu
from .layer_compute import LayerSeconds, layer_seconds
from .layer_memory import LayerMemory, layer_memory
from .model import LayerKind
from .op_price import Rates
from .strategy import LayerStrategy, Placement, StrategyError, Training

UPDATE_PASSES = 2  # an optimizer reads and writes its states once, and gradients and parameters as well
CLEARED, SCALED, NORM = 1, 2, 1
"""Passes over gradients once a step beside the update: those that are kept are cleared (written) and divided by the
number of replicas (read, written); the norm for clipping reads what the update reads. Megatron-LM's
`param_and_grad_buffer.py` and `clip_grads.py` do this, torch's FSDP divides as well."""
FIXED_CONTEXT_BYTES = 1.2e9  # assumption: driver context, cuBLAS workspaces and communicators of a process


@dataclass(frozen=True)
class LayerPrice:
    """Seconds of one layer: computation by pass, collectives with what is exposed of them, and its memory."""

    compute: LayerSeconds
    collectives: tuple[Collective, ...]
    optimizer_s: float
    memory: LayerMemory

    def exposed_s(self, *phases: str) -> float:
        """Communication of these phases that no computation hides."""
        return sum(c.exposed_s for c in self.collectives if c.phase in phases)

    @property
    def forward_s(self) -> float:
        return self.compute.forward.total_s + self.exposed_s("forward")

    @property
    def input_gradient_s(self) -> float:
        """B, with what runs again before it and all communication of the backward pass."""
        return (self.compute.again.total_s + self.compute.input_gradient.total_s
                + self.exposed_s("again", "backward"))

    @property
    def weight_gradient_s(self) -> float:
        return self.compute.weight_gradient.total_s

    @property
    def sync_s(self) -> float:
        """Gradient reduction and gathering of parameters that the step has to wait for."""
        return self.exposed_s("last backward", "first forward")

    def integers(self) -> dict[str, int]:
        """Nanoseconds and bytes, rounded up: the fields of `compiler.planner.problem.Option` by name."""
        seconds = {"forward_ns": self.forward_s, "input_gradient_ns": self.input_gradient_s,
                   "weight_gradient_ns": self.weight_gradient_s, "sync_ns": self.sync_s,
                   "optimizer_ns": self.optimizer_s}
        m = self.memory
        sizes = {"static_bytes": m.static_bytes, "saved_bytes": m.saved_until_b_bytes,
                 "saved_until_w_bytes": m.saved_until_w_bytes,
                 "transient_bytes": m.transient_bytes + m.communication_bytes}
        return {**{k: math.ceil(v * 1e9) for k, v in seconds.items()}, **{k: math.ceil(v) for k, v in sizes.items()}}


def price_layer(kind: LayerKind, strategy: LayerStrategy, training: Training, placement: Placement,
                calibration: Calibration, software: Software | None = None,
                compute: LayerSeconds | None = None) -> LayerPrice:
    """Price a layer captured for one micro-batch of its whole sequence; `compute` where that is known already. Raises
    `ClusterError` for groups that don't fit the cluster, `StrategyError` for experts that can't be divided so,
    `KeyError` for a recomputation mode that was not captured."""
    rates = Rates(placement.cluster.device, calibration, software or committed_software(), training)
    compute = compute or layer_seconds(kind, strategy, rates)
    cluster = _cluster(placement, calibration)
    traffic = LayerTraffic(kind, strategy, training, placement, rates, compute, cluster)
    memory = layer_memory(kind, strategy, training, owns_tied=placement.p > 1)
    return LayerPrice(compute, traffic.collectives(),
                      _optimizer_s(kind, strategy, training, rates, owns_tied=placement.p > 1), memory)


@lru_cache(maxsize=1024)
def _cluster(placement: Placement, calibration: Calibration) -> Cluster:
    return calibration.cluster(placement.cluster)


def _optimizer_s(kind: LayerKind, strategy: LayerStrategy, training: Training, rates: Rates, *,
                 owns_tied: bool) -> float:
    """The update moves every state in and out, gradients in, parameters out: limited by memory."""
    count = parameters_per_gpu(kind, strategy, with_tied=owns_tied)
    updated = kept = count.dense_trainable + count.experts_trainable
    if strategy.zero:
        updated = count.dense_trainable / strategy.shards + count.experts_trainable / strategy.edp
    if strategy.zero >= 2:
        kept = updated
    per_parameter = (UPDATE_PASSES * training.optimizer_bytes + (1 + NORM) * training.gradient_bytes
                     + training.parameter_bytes)
    passes = CLEARED + (SCALED if strategy.dp * strategy.cp > 1 else 0)
    return rates.memory_s(updated * per_parameter + kept * passes * training.gradient_bytes)


@dataclass(frozen=True)
class MovePrice:
    """Moving an activation and, in the backward pass, its gradient. `saved_bytes`: kept for the backward pass."""

    forward_s: float
    backward_s: float
    saved_bytes: float = 0.0


def reshard_price(activation_bytes: float, before: LayerStrategy, after: LayerStrategy, placement: Placement,
                  calibration: Calibration) -> MovePrice:
    """Bring the hidden states of one micro-batch (`activation_bytes` for all dp · cp · tp ranks' samples of one
    data-parallel rank of `before`) from one layout to another within a stage. Equal layouts cost nothing. Ranks that
    share samples in the layout with the fewest replicas hold everything that the other layout needs: along its tp, then
    along its cp, each an all-to-all. Raises `StrategyError` for layouts of different numbers of GPUs."""
    if before.gpus != after.gpus:
        raise StrategyError(f"layouts of {before.gpus} and {after.gpus} GPUs on one stage; expected the same number")
    if before.layout == after.layout:
        return MovePrice(0.0, 0.0)
    cluster = _cluster(placement, calibration)
    own = activation_bytes * before.dp / before.gpus
    fewest = before if before.dp <= after.dp else after
    groups = [placement.group(fewest, axis) for axis in ("tp", "cp")]
    seconds = sum(all_to_all_s(cluster, g, own) for g in groups if g.size > 1)
    return MovePrice(seconds, seconds)


def transfer_price(activation_bytes: float, strategy: LayerStrategy, placement: Placement,
                   calibration: Calibration) -> MovePrice:
    """Send the hidden states of one micro-batch of one data-parallel rank to the next stage, each GPU its share of the
    sequence, and receive their gradient."""
    if placement.p == 1:
        return MovePrice(0.0, 0.0)
    cluster = _cluster(placement, calibration)
    share = activation_bytes / (strategy.tp * strategy.cp)
    seconds = point_to_point_s(cluster, placement.group(strategy, "pp"), share)
    return MovePrice(seconds, seconds)


def hidden_bytes(kind: LayerKind) -> float:
    """Bytes of the hidden states that enter a layer, of one micro-batch, undivided."""
    return float(sum(b.bytes for b in kind.inputs if b.role == "chain")) or ACTIVATION_BYTES
