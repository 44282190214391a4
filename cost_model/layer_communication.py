"""The collectives of one layer: what moves, over which group, when, and behind which computation it can hide.

    what                                            bytes of the tensor                        hides behind
    tp  F  all-gather before a block's column       tokens / cp · hidden · 2                   nothing (asynchronous
           products, reduce-scatter after its row                                              tp: its products)
    tp  B  all-gather of the output's gradient      the same                                   the same
           all-gather of the saved input            the same                                   input gradients of
                                                                                               column products
           reduce-scatter of the input's gradient   the same                                   their weights' gradients
    ring   keys and values go round, cp - 1 steps   2 · tokens / cp · kv heads / tp · size · 2 attention
        B  with their gradients                     twice that                                 attention
    Ulysses  four all-to-alls around attention      tokens / cp · width / tp · 2               nothing
    experts  all-to-all over ep, there and back     rows / (tp · cp) · hidden · 2              nothing (overlapped:
                                                                                               a part of the pass)
           all-gather, reduce-scatter over etp      etp times that                             nothing
    ZeRO 3   parameters, before F and before B      parameters / tp · 2                        the layer's own pass
    ZeRO 2, 3  reduce-scatter, every micro-batch    parameters / tp · reduce bytes             the layer's backward
    ZeRO 0   all-reduce once a step                 the same                                   the last backward
    ZeRO 1   reduce-scatter once a step             the same                                   the last backward
    ZeRO 1, 2  all-gather of new parameters         parameters / tp · 2                        the first forward
    tied       all-reduce of the gradients of a     table / tp · reduce bytes, over the first  nothing
               table that both ends hold, p > 1     and the last stage, once a step

Sources: Korthikanti et al. (tp), Liu et al. (ring), Jacobs et al. (Ulysses), Rajbhandari et al., arXiv:1910.02054
(ZeRO); expert parameters are reduced over edp only. The layer's own pass stands for its neighbours': layers come in
runs. Without sequence parallelism tp's pairs are all-reduces, and nothing was divided that has to be gathered again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .cluster import Cluster
from .collectives import COLLECTIVES
from .group import Group
from .layer_compute import LayerSeconds, check_experts, splits, width
from .model import LayerKind
from .op_price import Rates
from .overlap import Phase, Window, exposed_by_window
from .strategy import LayerStrategy, Placement, Training

ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Collective:
    """`bytes` of the whole tensor; `seconds` alone; `exposed_s` after its window and its share of the slow-down."""

    name: str
    kind: str
    axis: str
    phase: Phase
    window: Window
    bytes: float
    seconds: float
    exposed_s: float


@dataclass(frozen=True)
class ParameterBytes:
    """Parameters of a layer on one GPU before ZeRO: dense ones (divided by tp), experts' (by ep and etp), trainable and
    all."""

    dense: float
    experts: float
    dense_trainable: float
    experts_trainable: float


def parameters_per_gpu(kind: LayerKind, strategy: LayerStrategy, *, with_tied: bool = False) -> ParameterBytes:
    """Counts, not bytes. Vectors are repeated under tp, and of an embedding what is not the vocabulary's table.
    `with_tied`: with the weights that an earlier layer owns. Raises `StrategyError` as `check_experts` does."""
    check_experts(kind, strategy)
    groups = (*kind.parameters, *(kind.tied if with_tied else ()))
    total = sum(g.count for g in groups)
    trained = sum(g.count for g in groups if g.trainable) / total if total else 0.0
    experts = min(kind.expert_parameters, total)
    repeated = min(kind.vector_parameters, total - experts)
    if kind.vocabulary and not kind.inputs_chain and kind.vocabulary <= total:
        repeated = (total - experts) % kind.vocabulary  # position tables and the like
    dense = (total - experts - repeated) / strategy.tp + repeated
    local = experts / (strategy.ep * strategy.etp)
    return ParameterBytes(dense, local, dense * trained, local * trained)


class LayerTraffic:
    """All collectives of one layer."""

    def __init__(self, kind: LayerKind, strategy: LayerStrategy, training: Training, placement: Placement,
                 rates: Rates, compute: LayerSeconds, cluster: Cluster) -> None:
        self.kind, self.s, self.t, self.placement = kind, strategy, training, placement
        self.rates, self.compute, self.cluster = rates, compute, cluster
        chain = next((b for b in kind.inputs if b.role == "chain"), kind.inputs[0] if kind.inputs else None)
        shape = chain.shape if chain else (1, 1)
        self.tokens = shape[0] * (shape[1] if len(shape) > 1 else 1)
        table = sum(p.count for p in (*kind.parameters, *kind.tied))
        self.hidden = width(kind) or (table // kind.vocabulary if kind.vocabulary else 0)

    def collectives(self) -> tuple[Collective, ...]:
        """Those that share a phase and a window share what it hides (`overlap.py`)."""
        found = [*self._tensor_parallel(), *self._context_parallel(), *self._experts(), *self._sharded(),
                 *self._synced(), *self._tied()]
        return tuple(self._exposed(found))

    # -- one entry per collective -----------------------------------------------------------------
    def _one(self, name: str, kind: str, axis: str, phase: Phase, window: Window, size_bytes: float,
             times: float = 1) -> Iterator[Collective]:
        group = self.placement.group(self.s, axis)  # type: ignore[arg-type]
        if group.size > 1 and size_bytes > 0 and times > 0:
            seconds = times * self._seconds(kind, group, size_bytes)
            yield Collective(name, kind, axis, phase, window, size_bytes * times, seconds, 0.0)

    def _seconds(self, kind: str, group: Group, size_bytes: float) -> float:
        return COLLECTIVES[kind](self.cluster, group, size_bytes)

    def _phases(self) -> tuple[Phase, ...]:
        again = self.s.recompute == "full" and bool(self.kind.saved["full"].recomputed)
        return ("forward", "again") if again else ("forward",)

    def _tensor_parallel(self) -> Iterator[Collective]:
        size = self.tokens / self.s.cp * self.hidden * ACTIVATION_BYTES
        blocks = splits(self.kind).blocks
        window: Window = "products" if self.t.async_tp else "nothing"
        if self.kind.vocabulary:
            yield from self._vocabulary_parallel(size, window)
            return
        for phase in self._phases():
            yield from self._one("gather inputs", "all-gather", "tp", phase, window, size, blocks)
            if phase == "forward":
                yield from self._one("scatter outputs", "reduce-scatter", "tp", phase, window, size, blocks)
            else:  # the last output is not needed again
                yield from self._one("scatter outputs", "reduce-scatter", "tp", phase, window, size, max(0, blocks - 1))
        yield from self._one("gather gradients", "all-gather", "tp", "backward", window, size, blocks)
        if self.compute.weight_gradient.gemm_s and self.t.sequence_parallel:
            yield from self._one("gather saved inputs", "all-gather", "tp", "backward", "input gradients of products",
                                 size, blocks)
        scattered: Window = "weight gradients of products" if self.t.sequence_parallel else window
        yield from self._one("scatter input gradients", "reduce-scatter", "tp", "backward", scattered, size, blocks)

    def _vocabulary_parallel(self, size: float, window: Window) -> Iterator[Collective]:
        """An embedding ends in a reduce-scatter; a head starts with an all-gather, and its loss reduces three numbers
        per token."""
        if self.kind.inputs_chain:
            for phase in self._phases():
                yield from self._one("gather inputs", "all-gather", "tp", phase, window, size)
                yield from self._one("loss", "all-reduce", "tp", phase, "nothing", self.tokens / self.s.cp * 4, 3)
            yield from self._one("gather saved inputs", "all-gather", "tp", "backward", "input gradients of products",
                                 size)
            yield from self._one("scatter input gradients", "reduce-scatter", "tp", "backward",
                                 "weight gradients of products", size)
        else:
            yield from self._one("scatter outputs", "reduce-scatter", "tp", "forward", window, size)
            yield from self._one("gather gradients", "all-gather", "tp", "backward", window, size)

    def _context_parallel(self) -> Iterator[Collective]:
        for record in self.kind.forward:
            if record.kind != "attention" or len(record.shape) != 6:
                continue
            batch, heads, queries, keys, head_size, kv_heads = record.shape
            local = batch / self.s.cp * head_size / self.s.tp * ACTIVATION_BYTES
            if self.s.cp_kind == "ring":
                block = 2 * keys * max(kv_heads, self.s.tp) * local
                for phase in self._phases():
                    yield from self._one("pass keys and values", "point-to-point", "cp", phase, "attention", block,
                                         self.s.cp - 1)
                yield from self._one("pass keys, values and gradients", "point-to-point", "cp", "backward", "attention",
                                     2 * block, self.s.cp - 1)
                continue
            size = (2 * queries * heads + 2 * keys * max(kv_heads, self.s.cp * self.s.tp)) * local
            for phase in (*self._phases(), "backward"):
                yield from self._one("swap sequence for heads", "all-to-all", "cp", phase, "nothing",  # type: ignore[arg-type]
                                     size / 4, 4)

    def _experts(self) -> Iterator[Collective]:
        grouped = [r for r in self.kind.forward if r.op.startswith("grouped_mm") and len(r.shape) == 4]
        if not grouped:
            return
        size = grouped[0].shape[1] / (self.s.tp * self.s.cp) * self.hidden * ACTIVATION_BYTES
        for phase in (*self._phases(), "backward"):
            yield from self._dispatch(phase, size)  # type: ignore[arg-type]
            yield from self._one("gather rows", "all-gather", "etp", phase, "nothing", size * self.s.etp)  # type: ignore[arg-type]
            yield from self._one("scatter rows", "reduce-scatter", "etp", phase, "nothing",  # type: ignore[arg-type]
                                 size * self.s.etp)

    def _dispatch(self, phase: Phase, size: float) -> Iterator[Collective]:
        """Rows to their experts and back. Where one copy per node crosses the network, a token's rows go to
        n · (1 - (1 - 1/n)^top-k) of n nodes on average; inside the node they spread over its own links."""
        group = self.placement.group(self.s, "ep")
        window: Window = "another micro-batch" if self.t.overlap_experts else "nothing"
        nodes = group.blocks[0]
        if self.t.dispatch == "all-to-all" or nodes < 2 or group.size == nodes or not self.kind.top_k:
            yield from self._one("to experts and back", "all-to-all", "ep", phase, window, size, 2)
            return
        top_k = self.kind.top_k
        reached = nodes * (1 - (1 - 1 / nodes) ** top_k)
        wide = size / top_k * reached  # an all-to-all of it sends what leaves the node
        local = group.members[0]
        inside = Group(local, (local,) * len(group.members), (1,) * len(group.blocks), group.concurrent)
        seconds = max(self._seconds("all-to-all", group, wide), self._seconds("all-to-all", inside, size))
        yield Collective("to experts and back", "all-to-all", "ep", phase, window, 2 * wide, 2 * seconds, 0.0)

    def _parts(self) -> list[tuple[str, str, float, float]]:
        """(what, axis of its shards, parameters that are used here, trainable ones that are kept here) on a GPU. A tied
        table on the stage of its owner is gathered for each of its uses, reduced and updated with its owner."""
        used = parameters_per_gpu(self.kind, self.s, with_tied=True)
        kept = parameters_per_gpu(self.kind, self.s, with_tied=self.placement.p > 1)
        return [("", "zero", used.dense, kept.dense_trainable),
                (" of experts", "edp", used.experts, kept.experts_trainable)]

    def _sharded(self) -> Iterator[Collective]:
        """ZeRO 2 and 3: in every micro-batch."""
        forward: Window = "the layer's forward" if self.t.prefetch_parameters else "nothing"
        backward: Window = "the layer's backward" if self.t.prefetch_parameters else "nothing"
        reduce: Window = "the layer's backward" if self.t.overlap_gradients else "nothing"
        for what, axis, count, trained in self._parts():
            if self.s.zero == 3:
                size = count * self.t.gather_bytes
                yield from self._one(f"gather parameters{what}", "all-gather", axis, "forward", forward, size)
                yield from self._one(f"gather parameters{what}", "all-gather", axis, "backward", backward, size)
            if self.s.zero >= 2:
                size = trained * self.t.reduce_bytes
                yield from self._one(f"reduce gradients{what}", "reduce-scatter", axis, "backward", reduce, size)
                if axis == "zero":
                    yield from self._one("reduce gradients of shards", "all-reduce", "replicate", "backward", reduce,
                                         size / self.s.shards)

    def _synced(self) -> Iterator[Collective]:
        """ZeRO 0 and 1, and parameters after the optimizer of ZeRO 1 and 2: once a step."""
        reduce: Window = "the layer's backward" if self.t.overlap_gradients else "nothing"
        gather: Window = "the layer's forward" if self.t.prefetch_parameters else "nothing"
        for what, axis, _, trained in self._parts():
            size = trained * self.t.reduce_bytes
            if self.s.zero == 0:
                yield from self._one(f"reduce gradients{what}", "all-reduce", axis, "last backward", reduce, size)
                if axis == "zero":
                    yield from self._one("reduce gradients of shards", "all-reduce", "replicate", "last backward",
                                         reduce, size)
                continue
            if self.s.zero == 1:
                yield from self._one(f"reduce gradients{what}", "reduce-scatter", axis, "last backward", reduce, size)
                if axis == "zero":
                    yield from self._one("reduce gradients of shards", "all-reduce", "replicate", "last backward",
                                         reduce, size / self.s.shards)
            if self.s.zero in (1, 2):
                yield from self._one(f"gather parameters{what}", "all-gather", axis, "first forward", gather,
                                     trained * self.t.gather_bytes)

    def _tied(self) -> Iterator[Collective]:
        """Both copies of a tied table get the sum of their gradients after the last micro-batch, when nothing is left
        to hide it behind: Megatron-LM's embedding group. Under ZeRO 2 and 3 each GPU has its shard of it."""
        trained = sum(g.count for g in self.kind.tied if g.trainable) / self.s.tp
        if self.placement.p > 1 and trained:
            size = trained * self.t.reduce_bytes / (self.s.shards if self.s.zero >= 2 else 1)
            seconds = self._seconds("all-reduce", self._ends(), size)
            yield Collective("reduce tied gradients", "all-reduce", "pp", "last backward", "nothing", size, seconds,
                             0.0)

    def _ends(self) -> Group:
        """First and last stage: two ranks of the pipeline's group, in as many blocks as that touches, at most two."""
        group = self.placement.group(self.s, "pp")
        blocks = tuple(min(2, b) for b in group.blocks)
        return Group(2, tuple(2 // b for b in blocks), blocks, group.concurrent, group.even)

    def _exposed(self, found: list[Collective]) -> Iterator[Collective]:
        together: dict[tuple[Phase, Window], float] = {}
        for c in found:
            together[c.phase, c.window] = together.get((c.phase, c.window), 0.0) + c.seconds
        shown = exposed_by_window(together, self.compute, self.rates)
        for c in found:
            share = c.seconds / together[c.phase, c.window]
            yield Collective(c.name, c.kind, c.axis, c.phase, c.window, c.bytes, c.seconds,
                             shown[c.phase, c.window] * share)
