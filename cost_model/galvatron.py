"""Time and memory of a training step as Galvatron prices them, on its own profiles.

Every formula is that of Galvatron v3, revision cea12ff (PKU-DAIR/Hetu-Galvatron), in the words of the notes that list
its formulas by section: profile lines (3), one layer (4), embedding and head (5), pipeline (6), memory (7), budget (8).
tests/cost_model/data holds results of its own code, which these functions reproduce. Known weaknesses are kept, as this
module exists to agree with it: gradient synchronisation of the embedding and re-sharding are in no reported time, a
heavy middle stage is seen only through the sum, and above 20 GB a fifth of the memory is set aside.
Times are ms inside and s where reported; memory is MB of 2^20 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .galvatron_profile import Profile

CONTEXT_MB = 1024.0
STATES_PER_PARAMETER = 4  # parameter, gradient and two Adam moments, each as large as the fp32 parameter
RESERVE_ABOVE_GB = 20
RESERVED = 0.2
Zero = Literal["ddp", "zero2", "zero3"]


@dataclass(frozen=True)
class Strategy:
    """How one layer, or embedding and head, lie on a stage's GPUs. `sp` is Ulysses; tp and sp exclude each other."""

    tp: int = 1
    sp: int = 1
    dp: int = 1
    zero: Zero = "ddp"
    checkpoint: bool = False
    cp: int = 1

    @property
    def degree(self) -> int:
        """The degree that divides a layer's compute."""
        return max(self.tp, self.sp)

    @property
    def shards(self) -> int:
        """Size of the group that averages gradients and shards states."""
        return self.dp * self.sp * self.cp

    @property
    def sharding(self) -> Zero:
        """`zero`, but ddp where there is nothing to shard over."""
        return "ddp" if self.shards == 1 else self.zero


@dataclass(frozen=True)
class Setting:
    """What all layers of a plan share. `time_mode`: `batch` prices by the fitted line, `static` by the first point."""

    pp: int
    layers: int
    global_batch: int
    chunks: int
    time_mode: Literal["batch", "static"] = "batch"
    async_reduce: bool = False
    schedule: Literal["pipedream_flush", "gpipe"] = "pipedream_flush"

    def local_batch(self, strategy: Strategy) -> int:
        """Samples of a micro-batch per replica; both divisions round down."""
        return self.global_batch // self.chunks // strategy.dp

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage holds at once: 1F1B, or all of them with GPipe."""
        if self.pp == 1:
            return 1
        return self.chunks if self.schedule == "gpipe" else self.pp - stage


@dataclass(frozen=True)
class LayerTime:
    """ms of one layer and one micro-batch: without and with gradient synchronisation, and the parts of it."""

    plain_ms: float
    synced_ms: float
    forward_ms: float
    backward_ms: float
    reduce_ms: float
    parallel_ms: float
    gather_ms: float
    p2p_ms: float


@dataclass(frozen=True)
class Plan:
    """`layers` has a strategy per layer, `division` the layers of each stage, `buffer_degree` the degree for which the
    search sets a tensor-parallel buffer aside (None: nowhere tensor parallelism, no buffer)."""

    setting: Setting
    division: tuple[int, ...]
    layers: tuple[Strategy, ...]
    embedding: Strategy
    buffer_degree: int | None

    def stage(self, index: int) -> tuple[Strategy, ...]:
        """The strategies of a stage's layers."""
        start = sum(self.division[:index])
        return self.layers[start:start + self.division[index]]


@dataclass(frozen=True)
class Price:
    """Predicted time of a step and, per stage, memory: `memory_mb` exact, `used_mb` as the search compares it with a
    budget (rounded per layer, buffer included)."""

    time_s: float
    samples_per_s: float
    embedding_ms: tuple[float, ...]
    synced_ms: tuple[float, ...]
    plain_ms: tuple[float, ...]
    states_mb: tuple[float, ...]
    activation_mb: tuple[float, ...]
    memory_mb: tuple[float, ...]
    used_mb: tuple[int, ...]


def reduce_ms_per_mb(profile: Profile, group: int, tp: int) -> float:
    """Section 2: inverse all-reduce bandwidth; ranks are strided when tensor parallelism lies inside the group."""
    if group == 1:
        return 0.0
    return 1 / profile.allreduce_mb_per_ms[group, 0 if tp > 1 and group < profile.gpus else 1]


def layer_time(profile: Profile, setting: Setting, strategy: Strategy) -> LayerTime:
    """Section 4: one layer and one micro-batch. ZeRO-3 gathers in every micro-batch and never overlaps; p2p is spread
    over all layers of the model; with dp 1 no synchronisation is charged, also where sp or cp shard."""
    batch = setting.local_batch(strategy)
    samples, group = batch / strategy.degree, strategy.shards
    forward = profile.layer_static_ms * samples if setting.time_mode == "static" else profile.layer_ms(samples)
    backward = 2 * forward + (forward if strategy.checkpoint else 0.0)
    reduce = (group - 1) / group * profile.parameter_mb / strategy.tp * reduce_ms_per_mb(profile, group, strategy.tp)
    message = profile.hidden_mb_per_sample * batch
    parallel = 0.0
    if strategy.tp > 1:
        parallel = 6 * profile.allgather[strategy.tp].time_ms(message)
    elif strategy.sp > 1:
        parallel = 4 * profile.all2all[strategy.sp].time_ms(message)
    parallel *= 1.5 if strategy.checkpoint else 1.0
    gather = 0.5 * reduce if strategy.sharding == "zero3" else 0.0
    p2p = setting.pp * 2 * message / profile.p2p_mb_per_ms[setting.pp] if setting.pp > 1 else 0.0
    rest = parallel + gather + p2p / setting.layers
    plain = forward + backward + rest
    together = max(reduce, backward) + (profile.overlap - 1) * min(reduce, backward)
    synced = forward + together + rest if strategy.dp > 1 else plain
    return LayerTime(plain, synced, forward, backward, reduce, parallel, gather, p2p)


def embedding_time_ms(profile: Profile, setting: Setting, strategy: Strategy, *, synced: bool = False) -> list[float]:
    """Section 5: embedding and head per stage, one micro-batch; middle stages have none. The pipeline time uses the
    value without synchronisation."""
    batch, group = setting.local_batch(strategy), strategy.shards
    samples = batch / strategy.degree / strategy.cp
    compute = profile.other_static_ms * samples if setting.time_mode == "static" else profile.other_ms(samples)
    gather = profile.allgather[strategy.tp].time_ms(profile.hidden_mb_per_sample * batch) if strategy.tp > 1 else 0.0
    stages = [0.0] * setting.pp
    for stage, place in _places(setting):
        share = 1.0 if setting.pp == 1 else 0.5
        message = profile.other_memory[place].states_mb[strategy.tp] / 8
        reduce = message * reduce_ms_per_mb(profile, group, strategy.tp) * (group - 1) / group
        forward = reduce / 2 if strategy.sharding == "zero3" else 0.0
        backward = forward
        if synced:
            backward = reduce if strategy.sharding == "zero3" else reduce / 2
        stages[stage] = (_overlapped(forward, share * compute, profile.overlap)
                         + _overlapped(backward, 2 * share * compute, profile.overlap) + 2 * share * gather)
    return stages


def pipeline_time_ms(plain_ms: Sequence[float], synced_ms: Sequence[float], chunks: int) -> float:
    """Section 6: time of a step from each stage's time per micro-batch (embedding included, no synchronisation) and
    its layers' time with synchronisation. What synchronisation adds beyond the stages before it is a tail."""
    first, rest, waits = plain_ms[0], math.fsum(plain_ms[1:]), min(len(plain_ms) - 1, chunks - 1)
    by_last = first + rest + plain_ms[-1] * (chunks - 1)
    by_first = max(waits * first, rest) + first * max(0, chunks + 1 - len(plain_ms))
    tail, passed = 0.0, 0.0
    for plain, synced in zip(plain_ms, synced_ms, strict=True):
        passed += plain
        tail = max(tail, synced - passed)
    return max(by_last, by_first) + tail


def shard_ratio(setting: Setting, strategy: Strategy) -> float:
    """Section 7: the part of a layer's model states that one GPU keeps."""
    kind, unit = strategy.sharding, 1 / strategy.shards + 0.003
    if kind == "ddp":
        return 1.0
    if setting.chunks == 1:
        return unit if kind == "zero3" else 7 / 8 * unit + 1 / 8
    if setting.async_reduce:
        return 7 / 8 * unit + 1 / 8 if kind == "zero3" else 6 / 8 * unit + 2 / 8
    return 5 / 4 * unit if kind == "zero3" else 5 / 4 * (7 / 8 * unit + 1 / 8)


def layer_memory_mb(profile: Profile, setting: Setting, strategy: Strategy) -> tuple[float, float]:
    """Section 7: (model states, activation of one micro-batch in flight) of a layer."""
    states = STATES_PER_PARAMETER * profile.parameter_mb / strategy.tp * shard_ratio(setting, strategy)
    degree = strategy.degree
    per_sample = profile.checkpoint_mb / degree if strategy.checkpoint else profile.activation_mb[degree]
    return states, per_sample * setting.local_batch(strategy)


def embedding_memory_mb(profile: Profile, setting: Setting, strategy: Strategy) -> list[tuple[float, float]]:
    """Section 7: (model states, activation) of embedding and head per stage."""
    stages = [(0.0, 0.0)] * setting.pp
    for stage, place in _places(setting):
        memory = profile.other_memory[place]
        activation = memory.activation_mb[strategy.degree] * setting.local_batch(strategy) * setting.in_flight(stage)
        stages[stage] = (memory.states_mb[strategy.tp] * shard_ratio(setting, strategy), activation)
    return stages


def buffer_mb(profile: Profile, setting: Setting, degree: int | None) -> int:
    """Section 8: the buffer of tensor parallelism, rounded down; none where the search has no tensor parallelism."""
    if degree is None:
        return 0
    samples = setting.global_batch / setting.chunks / (profile.gpus / setting.pp / degree)
    return math.floor(samples * profile.hidden_mb_per_sample)


def usable_mb(memory_gb: float) -> float:
    """Section 8: what a stage may use of a budget. Above 20 GB a fifth is set aside, so 21 GB allow less than 20."""
    budget = memory_gb * 1024
    return budget - math.floor(RESERVED * budget) if memory_gb > RESERVE_ABOVE_GB else budget


def price(profile: Profile, plan: Plan) -> Price:
    """Sections 4 to 8 for a whole plan."""
    setting, stages = plan.setting, range(plan.setting.pp)
    times = {s: layer_time(profile, setting, s) for s in set(plan.layers)}
    memory = {s: layer_memory_mb(profile, setting, s) for s in times}
    embedding = embedding_time_ms(profile, setting, plan.embedding)
    plain = [math.fsum(times[s].plain_ms for s in plan.stage(i)) + embedding[i] for i in stages]
    synced = [math.fsum(times[s].synced_ms for s in plan.stage(i)) for i in stages]
    states = [math.fsum(memory[s][0] for s in plan.stage(i)) for i in stages]
    activation = [math.fsum(memory[s][1] for s in plan.stage(i)) * setting.in_flight(i) for i in stages]
    other = embedding_memory_mb(profile, setting, plan.embedding)
    total = [states[i] + activation[i] + sum(other[i]) + CONTEXT_MB for i in stages]
    used = [sum(layer_used_mb(memory[s], setting, i) for s in plan.stage(i)) + fixed_used_mb(other[i])
            + buffer_mb(profile, setting, plan.buffer_degree) for i in stages]
    time_s = pipeline_time_ms(plain, synced, setting.chunks) / 1000
    return Price(time_s, setting.global_batch / time_s, tuple(embedding), tuple(synced), tuple(plain), tuple(states),
                 tuple(activation), tuple(total), tuple(used))


def layer_used_mb(memory_mb: tuple[float, float], setting: Setting, stage: int) -> int:
    """Section 8: a layer's memory on a stage, rounded up."""
    return math.ceil(memory_mb[0] + memory_mb[1] * setting.in_flight(stage))


def fixed_used_mb(embedding_mb: tuple[float, float]) -> int:
    """Section 8: embedding and context, rounded up together."""
    return math.ceil(embedding_mb[0] + embedding_mb[1] + CONTEXT_MB)


def _places(setting: Setting) -> list[tuple[int, str]]:
    """The stages that hold embedding or head, and the part of the profile that describes them."""
    return [(0, "off")] if setting.pp == 1 else [(0, "first"), (setting.pp - 1, "last")]


def _overlapped(communication: float, compute: float, overlap: float) -> float:
    """Section 5: the longer hides the other, which slows it down meanwhile."""
    slowed = overlap * compute
    return communication if communication >= slowed else compute + communication * (1 - 1 / overlap)
