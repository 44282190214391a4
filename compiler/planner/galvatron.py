"""The best plan under Galvatron's cost formulas, and what would have to change where none fits.

Space (Galvatron v3, revision cea12ff): pipeline degree, tensor parallelism or Ulysses and data parallelism in powers of
two whose product is the number of GPUs; per layer ZeRO-2 or ZeRO-3 (ddp where dp is 1) and checkpointing; a choice of
its own for embedding and head; stages of equal length; 1F1B. Chunks divide the global batch and dp divides a chunk: the
formulas round both divisions down and would otherwise train fewer samples than they count.

The formulas of a step's time are a maximum of sums over layers (`_lines`), so each case of the outer loop (pipeline
degree, chunks, embedding, tensor-parallel buffer) is a problem of `counts.py`. Cases are taken by their lower bound,
until the next bound is no better than the best plan: the result is the optimum, there is no memory grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...cost_model import galvatron as cost
from ...cost_model.galvatron import Plan, Price, Setting, Strategy
from ...cost_model.galvatron_profile import Profile
from ...runtime.errors import InvalidInputError
from .counts import Counts, Pool, lower_bound, minimise

Keep = Callable[[Strategy], bool]


@dataclass(frozen=True)
class Ask:
    """What to plan: `chunks` None searches every divisor of the global batch; `keep` restricts the layers' strategies
    and those of the embedding. Raises `InvalidInputError` for what can't be planned."""

    layers: int
    memory_gb: float
    global_batch: int
    chunks: int | None = None
    keep: Keep = lambda strategy: True

    def __post_init__(self) -> None:
        for name, value in (("layers", self.layers), ("global batch", self.global_batch), ("memory", self.memory_gb)):
            if not (math.isfinite(value) and value > 0):
                raise InvalidInputError(f"{name} {value}", expected="a positive number")
        if self.chunks is not None and (self.chunks < 1 or self.global_batch % self.chunks):
            near = min(divisors(self.global_batch), key=lambda d: (abs(d - (self.chunks or 0)), d))
            raise InvalidInputError(f"{self.chunks} chunks for a global batch of {self.global_batch}",
                                    expected="a divisor of the batch", do=f"The nearest is {near}.")


@dataclass(frozen=True)
class Found:
    """The fastest plan that fits. Of `cases` of the outer loop, `solved` had to be searched; the bounds of the others
    exclude them."""

    plan: Plan
    price: Price
    cases: int
    solved: int


@dataclass(frozen=True)
class DoesNotFit:
    """No plan fits: the closest one still lacks `missing_gib` on `stage` of `pp`. With `memory_gb` (whole GB), with
    `layers` or with `chunks` instead of what was asked, a plan fits; None where that alone can't help."""

    needed_mb: int
    usable_mb: float
    stage: int
    pp: int
    memory_gb: int
    layers: int | None
    chunks: int | None

    @property
    def missing_gib(self) -> float:
        """GiB per GPU that the plan of least memory needs above what may be used."""
        return (self.needed_mb - self.usable_mb) / 1024

    def sentence(self) -> str:
        """The reason and the nearest changes that fit."""
        changes = [f"{self.memory_gb} GB per GPU"]
        changes += [f"{self.layers} layers"] if self.layers else []
        changes += [f"{self.chunks} chunks"] if self.chunks else []
        where = f"stage {self.stage} of {self.pp}" if self.pp > 1 else "every GPU"
        return (f"no plan fits: the one of least memory needs {self.needed_mb / 1024:.2f} GiB on {where}, of which "
                f"{self.usable_mb / 1024:.2f} GiB may be used: {self.missing_gib:.2f} GiB are missing. What fits: "
                f"{' or '.join(changes)}")


def search(profile: Profile, ask: Ask) -> Found | DoesNotFit:
    """The fastest plan for `ask`, or why there is none."""
    tables: dict[Setting, _Tables] = {}
    cases = list(_cases(profile, ask, tables, ask.chunks))
    if not cases:
        raise InvalidInputError("no strategy is left of the whole space", expected="one for layers and embedding")
    order = sorted(((case.bound(), i) for i, case in enumerate(cases)))
    best, value, solved = None, math.inf, 0
    fastest: dict[Any, tuple[float, tuple[int, ...]] | None] = {}
    for bound, i in order:
        if bound >= value or bound == math.inf:
            break
        solved += 1
        found = cases[i].solve(value, fastest)
        if found is not None:
            value, best = found[0], cases[i].plan(found[1])
    if best is None:
        return _nearest(profile, ask, cases, tables)
    return Found(best, cost.price(profile, best), len(cases), solved)


def layer_strategies(gpus: int) -> list[Strategy]:
    """Every strategy of a layer on a stage of `gpus` GPUs, simplest first."""
    return [Strategy(s.tp, s.sp, s.dp, s.zero, checkpoint) for s in embedding_strategies(gpus)
            for checkpoint in (False, True)]


def embedding_strategies(gpus: int) -> list[Strategy]:
    """Every strategy of embedding and head, simplest first."""
    found = []
    for degree in _powers(gpus):
        dp = gpus // degree
        for tp, sp in [(degree, 1), (1, degree)] if degree > 1 else [(1, 1)]:
            zeros: tuple[cost.Zero, ...] = ("zero2", "zero3") if dp > 1 else ("ddp",)
            found += [Strategy(tp, sp, dp, zero) for zero in zeros]
    return found


def galvatron_config(plan: Plan) -> dict[str, Any]:
    """The plan as Galvatron's own search writes it (`galvatron_config_*.json`): lists are comma-separated, a degree of
    Ulysses stands among the tp sizes with `use_sp` 1, dp type 1 is ZeRO-3 and 0 the default type."""
    setting, layers, embedding = plan.setting, plan.layers, plan.embedding

    def listed(values: Iterable[int]) -> str:
        return ",".join(map(str, values))

    return {
        "pp_deg": setting.pp,
        "tp_sizes_enc": listed(s.degree for s in layers),
        "tp_consecutive_flags": listed(1 for _ in layers),
        "dp_types_enc": listed(int(s.zero == "zero3") for s in layers),
        "use_sp": listed(int(s.sp > 1) for s in layers),
        "checkpoint": listed(int(s.checkpoint) for s in layers),
        "global_bsz": setting.global_batch,
        "chunks": setting.chunks,
        "pp_division": listed(plan.division),
        "pipeline_type": setting.schedule,
        "default_dp_type": "zero2",
        "vtp": embedding.degree,
        "vsp": int(embedding.sp > 1),
        "embed_sdp": int(embedding.zero == "zero3"),
    }


@dataclass(frozen=True)
class _Tables:
    """Per strategy of a setting: ms without synchronisation, ms that it adds, and MB by stage."""

    plain_ms: dict[Strategy, float]
    sync_ms: dict[Strategy, float]
    used_mb: dict[Strategy, tuple[int, ...]]


@dataclass(frozen=True)
class _Case:
    setting: Setting
    embedding: Strategy
    buffer_degree: int | None
    strategies: tuple[Strategy, ...]
    tables: _Tables
    embedding_ms: tuple[float, ...]
    capacity_mb: tuple[int, ...]

    @property
    def per_stage(self) -> int:
        return self.setting.layers // self.setting.pp

    def least_mb(self, stage: int) -> int:
        """Memory of the layer strategy that needs least."""
        return min(self.tables.used_mb[s][stage] for s in self.strategies)

    def bound(self) -> float:
        """No plan of this case takes less time (ms)."""
        return lower_bound(*self._problem())

    def solve(self, below: float, fastest: dict[Any, Any]) -> tuple[float, Counts] | None:
        """(ms, counts per stage and strategy) of the fastest plan, if faster than `below`. Stages whose synchronisation
        can't matter, and whose time never helps another, are solved alone; `fastest` keeps their answers."""
        offsets, pools = self._problem()
        weights = _lines(self.setting, self.embedding_ms, self._tails())
        joint, alone = [], {}
        for stage, pool in enumerate(pools):
            if any(w.sync[stage] or w.plain[stage] < 0 for w in weights):
                joint.append(stage)
                continue
            key = (self.setting, stage, pool.capacity, self.strategies)
            if key not in fastest:
                plain = tuple((self.tables.plain_ms[s],) for s in self.strategies)
                fastest[key] = minimise([0.0], [Pool(pool.count, pool.capacity, pool.memory, plain)])
            if fastest[key] is None:
                return None
            value, (alone[stage],) = fastest[key]
            offsets = [o + w.plain[stage] * value for o, w in zip(offsets, weights, strict=True)]
        found = minimise(offsets, [pools[s] for s in joint], below)
        if found is None:
            return None
        counts = {**alone, **dict(zip(joint, found[1], strict=True))}
        return found[0], tuple(counts[stage] for stage in range(self.setting.pp))

    def plan(self, counts: Counts) -> Plan:
        """The plan of a solution; equal layers of a stage lie together, those that save most memory first."""
        layers: list[Strategy] = []
        for stage in counts:
            taken = sorted(zip(self.strategies, stage, strict=True), key=lambda one: _position(one[0]))
            layers += [s for s, n in taken for _ in range(n)]
        used = {*layers, self.embedding}
        degree = max(s.degree for s in used) if any(s.tp > 1 for s in used) else None
        return Plan(self.setting, (self.per_stage,) * self.setting.pp, tuple(layers), self.embedding, degree)

    def _problem(self) -> tuple[list[float], list[Pool]]:
        lines = _lines(self.setting, self.embedding_ms, self._tails())
        tables, pools = self.tables, []
        for stage in range(self.setting.pp):
            values = tuple(tuple(line.plain[stage] * tables.plain_ms[s] + line.sync[stage] * tables.sync_ms[s]
                                 for line in lines) for s in self.strategies)
            pools.append(Pool(self.per_stage, self.capacity_mb[stage],
                              tuple(tables.used_mb[s][stage] for s in self.strategies), values))
        return [line.offset for line in lines], pools

    def _tails(self) -> list[int]:
        """The stages whose synchronisation may last longer than all stages before it take."""
        most = self.per_stage * max(self.tables.sync_ms[s] for s in self.strategies)
        least = self.per_stage * min(self.tables.plain_ms[s] for s in self.strategies)
        return [stage for stage in range(self.setting.pp)
                if most > math.fsum(self.embedding_ms[:stage + 1]) + stage * least]


@dataclass(frozen=True)
class _Line:
    """One of the sums whose maximum is a step's time: weights of each stage's time and of what synchronising adds."""

    offset: float
    plain: tuple[float, ...]
    sync: tuple[float, ...]


def _lines(setting: Setting, embedding_ms: Sequence[float], tails: Sequence[int]) -> list[_Line]:
    """The pipeline time of `cost.pipeline_time_ms`, max(T1, T2) + max(0, tail of a stage), as a maximum of sums: T1 and
    both sides of the maximum in T2, each with no tail and with that of every stage in `tails`."""
    pp, chunks = setting.pp, setting.chunks
    bases = [[1.0] * (pp - 1) + [float(chunks)]]
    if pp > 1:
        again = float(max(0, chunks + 1 - pp))
        bases += [[min(pp - 1, chunks - 1) + again] + [0.0] * (pp - 1), [again] + [1.0] * (pp - 1)]
    lines = []
    for base in bases:
        for tail in (None, *tails):
            before = 0 if tail is None else tail
            plain = [w - 1 if stage < before else w for stage, w in enumerate(base)]
            offset = math.fsum(w * ms for w, ms in zip(plain, embedding_ms, strict=True))
            if tail is not None:
                offset -= embedding_ms[tail]
            lines.append(_Line(offset, tuple(plain), tuple(float(stage == tail) for stage in range(pp))))
    return lines


def _cases(profile: Profile, ask: Ask, tables: dict[Setting, _Tables], chunks: int | None, *,
           any_depth: bool = False) -> Iterator[_Case]:
    """The outer loop, simplest first; `any_depth` also yields pipelines that don't divide the layers evenly."""
    usable = math.floor(cost.usable_mb(ask.memory_gb))
    for pp in _powers(profile.gpus):
        if ask.layers % pp and not any_depth:
            continue
        for count in [chunks] if chunks else divisors(ask.global_batch):
            if pp > 1 and count < pp:
                continue
            setting, gpus = Setting(pp, ask.layers, ask.global_batch, count), profile.gpus // pp
            whole = ask.global_batch // count
            layers = [s for s in layer_strategies(gpus) if whole % s.dp == 0 and ask.keep(s)]
            if setting not in tables:
                tables[setting] = _price_layers(profile, setting, layers)
            for embedding in embedding_strategies(gpus):
                if whole % embedding.dp or not ask.keep(embedding):
                    continue
                yield from _buffers(profile, setting, embedding, layers, tables[setting], usable)


def _buffers(profile: Profile, setting: Setting, embedding: Strategy, layers: Sequence[Strategy], tables: _Tables,
             usable: int) -> Iterator[_Case]:
    """No tensor parallelism and no buffer, or a buffer for a degree that no strategy exceeds."""
    memory = cost.embedding_memory_mb(profile, setting, embedding)
    milliseconds = tuple(cost.embedding_time_ms(profile, setting, embedding))
    for degree in (None, *_powers(profile.gpus // setting.pp)):
        allowed = [s for s in (*layers, embedding) if (s.tp == 1 if degree is None else s.degree <= degree)]
        if embedding not in allowed[-1:] or len(allowed) == 1:
            continue
        capacity = tuple(usable - cost.fixed_used_mb(m) - cost.buffer_mb(profile, setting, degree) for m in memory)
        yield _Case(setting, embedding, degree, tuple(allowed[:-1]), tables, milliseconds, capacity)


def _price_layers(profile: Profile, setting: Setting, strategies: Iterable[Strategy]) -> _Tables:
    found = _Tables({}, {}, {})
    for strategy in strategies:
        time, memory = cost.layer_time(profile, setting, strategy), cost.layer_memory_mb(profile, setting, strategy)
        found.plain_ms[strategy], found.sync_ms[strategy] = time.plain_ms, time.synced_ms - time.plain_ms
        found.used_mb[strategy] = tuple(cost.layer_used_mb(memory, setting, i) for i in range(setting.pp))
    return found


def _nearest(profile: Profile, ask: Ask, cases: Sequence[_Case], tables: dict[Setting, _Tables]) -> DoesNotFit:
    """Least memory over all cases, and the smallest change of one number that makes room."""
    usable = cost.usable_mb(ask.memory_gb)
    needed, stage, case = _least(cases, math.floor(usable))
    memory_gb = max(math.floor(ask.memory_gb) + 1, needed // 1024)
    while cost.usable_mb(memory_gb) < needed:
        memory_gb += 1
    fitting = [c.setting.pp * min(min(c.capacity_mb[i] // c.least_mb(i) for i in range(c.setting.pp)),
                                  (ask.layers - 1) // c.setting.pp)
               for c in _cases(profile, ask, tables, ask.chunks, any_depth=True)]
    others = [d for d in divisors(ask.global_batch) if ask.chunks not in (None, d)]
    chunks = [d for d in others if (found := list(_cases(profile, ask, tables, d)))
              and _least(found, math.floor(usable))[0] <= usable]
    nearest = min(chunks, key=lambda d: abs(math.log(d / (ask.chunks or 1))), default=None)
    return DoesNotFit(needed, usable, stage, case.setting.pp, memory_gb, max(0, *fitting) or None, nearest)


def _least(cases: Iterable[_Case], usable: int) -> tuple[int, int, _Case]:
    """(MB, stage, case) of the case whose fullest stage needs least."""
    return min(((*max((usable - case.capacity_mb[i] + case.per_stage * case.least_mb(i), i)
                      for i in range(case.setting.pp)), case) for case in cases), key=lambda one: one[0])


def _position(strategy: Strategy) -> tuple[int, int, bool, bool]:
    return -strategy.tp, -strategy.sp, not strategy.checkpoint, strategy.zero != "zero3"


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]
