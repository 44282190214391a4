"""How one layer runs (`LayerStrategy`), what all layers of a training run share (`Training`), and where the ranks of a
pipeline stage lie (`Placement`). Pure data with its checks; `layer_price.py` turns it into seconds and bytes.

A stage owns D = G/p GPUs. Dense parts use them as tp · cp · dp, experts as etp · ep · edp. tp above 1 implies sequence
parallelism in Megatron's sense (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models",
MLSys 2023): what tensor parallelism does not divide is divided along the sequence, so every activation is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, get_args

from .cluster import Cluster, ClusterError, whole
from .group import Group
from .model import RECOMPUTE_MODES, RecomputeMode

CpKind = Literal["ring", "ulysses"]
Axis = Literal["tp", "cp", "dp", "zero", "replicate", "pp", "etp", "ep", "edp"]
ORDER = ("tp", "cp", "dp", "pp")  # Megatron-LM's default, innermost first


class StrategyError(ValueError):
    """A way to run a layer that can't be: one sentence that says what was given and what was expected."""


@dataclass(frozen=True)
class LayerStrategy:
    """Degrees per stage. `zero`: 0 plain data parallelism, 1 shards the optimizer, 2 gradients too, 3 parameters too;
    `shard`: size of the sharding group inside dp, 0 for all of dp (a divisor of dp is HSDP: shards repeat in dp/shard
    groups). Ring context parallelism is Liu et al., arXiv:2310.01889; Ulysses is Jacobs et al., arXiv:2309.14509.
    `variant` names a rewrite of the layer; it changes its `LayerKind`, nothing here. Raises `StrategyError`."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    cp_kind: CpKind = "ring"
    zero: int = 0
    shard: int = 0
    recompute: RecomputeMode = "none"
    variant: str = ""

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "dp", "ep", "etp"):
            try:
                whole(name, getattr(self, name))
            except ClusterError as error:
                raise StrategyError(str(error)) from None
        if self.zero not in (0, 1, 2, 3):
            raise StrategyError(f"ZeRO stage {self.zero}; expected 0, 1, 2 or 3")
        if self.shard < 0 or (self.shard and self.dp % self.shard):
            raise StrategyError(f"shards over {self.shard} of {self.dp} data-parallel ranks; expected a divisor")
        if self.gpus % (self.ep * self.etp):
            raise StrategyError(f"ep {self.ep} · etp {self.etp} on a stage of {self.gpus} GPUs; expected a divisor")
        if self.cp_kind not in get_args(CpKind):
            raise StrategyError(f"context parallelism {self.cp_kind!r}; expected ring or ulysses")
        if self.recompute not in RECOMPUTE_MODES:
            raise StrategyError(f"recomputation {self.recompute!r}; expected one of {', '.join(RECOMPUTE_MODES)}")

    @property
    def gpus(self) -> int:
        """D: GPUs of the stage."""
        return self.tp * self.cp * self.dp

    @property
    def edp(self) -> int:
        """How often an expert's weights are repeated within the stage."""
        return self.gpus // (self.ep * self.etp)

    @property
    def shards(self) -> int:
        """Into how many parts ZeRO cuts the states of dense parameters: context-parallel ranks hold the same ones."""
        return (self.shard or self.dp) * self.cp

    @property
    def layout(self) -> tuple[int, int, int, str]:
        """What a neighbour must share for activations to stay where they are: micro-batch rows by dp, sequence by
        cp (and its kind) and tp."""
        return self.tp, self.cp, self.dp, self.cp_kind if self.cp > 1 else ""


Fusion = Literal["none", "kernels", "compiled"]
Dispatch = Literal["all-to-all", "once per node"]
CudaGraphs = Literal["none", "router", "step"]
OptimizerName = Literal["adamw", "adamw-8bit", "adamw-bf16", "sgd", "sgd-momentum"]
OPTIMIZER_STATE_BYTES: dict[str, float] = {
    "adamw": 8, "adamw-8bit": 2.0625, "adamw-bf16": 4, "sgd": 0, "sgd-momentum": 4}
"""Bytes of moments per parameter, master weights apart. 8-bit: two moments of a byte, and a fp32 scale for each block
of 128 of both (Dettmers et al., arXiv:2110.02861, with blocks of 2048; libraries use smaller ones now)."""


@dataclass(frozen=True)
class Training:
    """What all layers share.

    `parameter_bytes`, `gradient_bytes`, `master_bytes`: per parameter, of the copy that is computed with (or, with ZeRO
    3, sharded), of the accumulated gradient, and of the optimizer's own copy (0 where the parameters are that copy).
    `reduce_bytes`, `gather_bytes`: per parameter on the wire in gradient reduction and in gathering. `compute`: dtype
    of products, a torch name; `fp8_recipe` names how operands of the layers' products are scaled to eight bits, or to
    four ("nvfp4").
    `fusion`: element-wise operators as written, in hand-written fused kernels, or compiled; `fused_loss`: the loss is
    one kernel also where the others are as written. `attention_kernel`, `software`: names of `calibration.Software`'s
    coefficients; `software_year`: when the stack was released.
    `dispatch`: how rows travel to experts, one copy for each expert, or over the network one for each node (DeepEP;
    DeepSeek-V3's report, arXiv:2412.19437, section 3.2.2). `sequence_parallel` False: tensor parallelism as it was
    before (all-reduces), of time only. `overlap_experts`: rows travel to experts and back while another micro-batch
    computes (DeepSeek-V3's DualPipe, Megatron-LM's `overlap_moe_expert_parallel_comm`). `cuda_graphs`: what the host
    replays instead of launching it: a whole step, or what leads up to sending rows to experts. `selective_every`:
    selective recomputation runs every so many-th product again (torchtitan's: 2), 1 for none. Frozen parameters are the
    model's own (`ParameterGroup.trainable`).
    """

    optimizer: OptimizerName = "adamw"
    parameter_bytes: float = 2
    gradient_bytes: float = 4
    master_bytes: float = 4
    reduce_bytes: float = 4
    gather_bytes: float = 2
    compute: str = "bfloat16"
    fp8_recipe: str = ""
    fusion: Fusion = "compiled"
    fused_loss: bool = False
    flash_attention: bool = True
    attention_kernel: str = ""
    async_tp: bool = False
    dispatch: Dispatch = "all-to-all"
    sequence_parallel: bool = True
    overlap_gradients: bool = True
    prefetch_parameters: bool = True
    overlap_experts: bool = False
    cuda_graphs: CudaGraphs = "none"
    selective_every: int = 1
    software: str = ""
    software_year: float = 2026.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZER_STATE_BYTES:
            raise StrategyError(f"optimizer {self.optimizer!r}; expected one of {', '.join(OPTIMIZER_STATE_BYTES)}")
        if not isinstance(self.selective_every, int) or self.selective_every < 1:
            raise StrategyError(f"selective_every is {self.selective_every}; expected a whole number of at least 1")
        for name in ("parameter_bytes", "gradient_bytes", "master_bytes", "reduce_bytes", "gather_bytes"):
            if not 0 <= getattr(self, name) <= 16:
                raise StrategyError(f"{name} is {getattr(self, name)}; expected 0 to 16 bytes per parameter")

    @property
    def optimizer_bytes(self) -> float:
        """Per trainable parameter: moments and master copy."""
        return OPTIMIZER_STATE_BYTES[self.optimizer] + self.master_bytes


@dataclass(frozen=True, eq=False)  # compared by identity: what is derived from it is kept by it
class Placement:
    """The mesh of a plan: p stages on a cluster, ranks laid out in `order`, innermost axis first. Experts take the same
    ranks: etp where tp is, ep and edp where dp is, cp flattened into them. Raises `ClusterError`."""

    cluster: Cluster
    p: int = 1
    order: tuple[str, ...] = ORDER

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(ORDER):
            raise ClusterError(f"rank order {', '.join(self.order)}; expected each of {', '.join(ORDER)} once")

    @cached_property
    def stage_gpus(self) -> int:
        """D. Raises `ClusterError` unless p divides the cluster."""
        if self.cluster.gpus % self.p:
            raise ClusterError(f"{self.p} stages on {self.cluster.gpus} GPUs; expected a divisor")
        return self.cluster.gpus // self.p

    def group(self, strategy: LayerStrategy, axis: Axis) -> Group:
        """The communicator of an axis: `zero` shards dense states (cp and the sharding part of dp), `replicate` repeats
        them; etp, ep, edp are the experts'. Raises `ClusterError`."""
        return _group(self, strategy.tp, strategy.cp, strategy.dp, strategy.ep, strategy.etp, strategy.shard, axis)


@lru_cache(maxsize=1 << 16)
def _group(placement: Placement, tp: int, cp: int, dp: int, ep: int, etp: int, shard: int, axis: Axis) -> Group:
    shard = shard or dp
    if axis in ("etp", "ep", "edp"):
        edp = tp * cp * dp // (ep * etp)
        sizes = {"etp": etp, "ep": ep, "edp": edp, "pp": placement.p}
        parts: dict[str, tuple[str, ...]] = {"tp": ("etp",), "cp": (), "dp": ("ep", "edp"), "pp": ("pp",)}
        wanted: tuple[str, ...] = (axis,)
    else:
        sizes = {"tp": tp, "cp": cp, "shard": shard, "replicate": dp // shard, "pp": placement.p}
        parts = {"tp": ("tp",), "cp": ("cp",), "dp": ("shard", "replicate"), "pp": ("pp",)}
        wanted = {"dp": ("shard", "replicate"), "zero": ("cp", "shard")}.get(axis, (axis,))
    order = [name for a in placement.order for name in parts[a]]
    return Group.of(placement.cluster, sizes, order, wanted)
