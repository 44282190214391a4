"""`mw.plan`: capture the model, walk its strategy space, search, and write what was found as a plan.

    plan = mw.plan("llama3-8b", cluster="8x8 h100-sxm", seq=8192, global_batch=1024, tp=4)
    answer = Planner(Request(…)).solve()          the same with everything that the commands show
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, get_args

from ...cost_model.calibration import calibration_for
from ...cost_model.cluster import Cluster
from ...cost_model.strategy import CudaGraphs, Dispatch, Fusion, Training
from ...runtime import plan as schema
from ...runtime.errors import DoesNotFitError, InvalidInputError, UnsupportedError
from ...runtime.plan_data import Fingerprints
from ..cluster_command import load_cluster
from .captured import ModelAtAnyBatch
from .group_search import WITHIN, GroupSearch, Searched
from .infeasible import WhyNot, why_not
from .plan_file import NOT_RUNNABLE, PlanWriter, fingerprints
from .pricing import Pricer
from .search import Found
from .space import Pins, Space

LARGEST = 1 << 31


class NothingToSearchError(InvalidInputError):
    """No layout divides the GPUs, the batch and the sequence under the pins."""


@dataclass(frozen=True)
class Request:
    """What to plan. `model` and `cluster` as on the command line. `pad_batch`: compute a larger batch where the given
    one can't be divided. Raises `InvalidInputError`."""

    model: str
    cluster: str
    seq: int
    global_batch: int
    pins: Pins = field(default_factory=Pins)
    training: Training = field(default_factory=Training)
    mixing: bool = False
    imbalance: float = 1.0
    price_usd_per_gpu_hour: float | None = None
    pad_batch: bool = False
    objective: schema.Objective = "throughput"
    within: float = WITHIN

    def __post_init__(self) -> None:
        for name in ("seq", "global_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < LARGEST:
                raise InvalidInputError(f"{name} {value!r}", expected="a whole number of at least 1")
        if not 1 <= self.imbalance <= 1000:
            raise InvalidInputError(f"imbalance {self.imbalance:g}", expected="1 to 1000")
        price = self.price_usd_per_gpu_hour
        if price is not None and not 0 <= price < 1e6:
            raise InvalidInputError(f"a GPU price of {price:g} USD an hour", expected="0 or more")

    def words(self) -> tuple[str, ...]:
        """Options as on the command line."""
        flags = [("--mixing", self.mixing), ("--pad-batch", self.pad_batch)]
        optimizer = () if self.training.optimizer == "adamw" else (f"--optimizer {self.training.optimizer}",)
        usual, own = vars(Training()), vars(self.training)
        training = (f"--training {k}={v}" for k, v in own.items() if k != "optimizer" and v != usual[k])
        return (*self.pins.words(), *(word for word, on in flags if on), *optimizer, *training)


@dataclass(frozen=True)
class Answer:
    """`plan` is None where nothing fits; then `why_not` says what binds and what change fits."""

    request: Request
    planner: Planner
    searched: Searched
    plan: schema.Plan | None
    why_not: WhyNot | None
    capture_s: float
    search_s: float

    @property
    def found(self) -> Found:
        """The search's answer, where there is a plan."""
        assert isinstance(self.searched.result, Found)
        return self.searched.result


class Planner:
    """Plans for one request. Raises `InvalidInputError` for what can't be planned."""

    def __init__(self, request: Request, model: ModelAtAnyBatch | None = None) -> None:
        self.request = request
        self.cluster: Cluster = load_cluster(request.cluster)
        self.model = model or ModelAtAnyBatch(request.model, request.seq, imbalance=request.imbalance)

    @cached_property
    def batch(self) -> int:
        """Samples that are computed: the global batch, or, with `pad_batch` and where no layout divides it, the next
        multiple of the GPUs or of the largest factor of them, halved, that the batch reaches."""
        batch, odd = self.request.global_batch, self.cluster.gpus
        while not odd % 2:
            odd //= 2
        if not self.request.pad_batch or self._divides(batch):
            return batch
        step = self.cluster.gpus
        while step > odd and step > batch:
            step //= 2
        return int(-(-batch // step) * step)

    def _divides(self, batch: int) -> bool:
        d = self.model.one
        return any(True for _ in Space(d.kinds, d.order, d.seq, self.cluster, batch, self.request.pins).groups())

    @cached_property
    def space(self) -> Space:
        d = self.model.one
        trainable = sum(p.count for k in d.kinds for p in k.parameters if p.trainable)
        if not trainable:
            raise UnsupportedError(f"{d.name} has no trainable parameters", expected="a training step: inference is "
                                   "not planned yet")
        return Space(d.kinds, d.order, d.seq, self.cluster, self.batch, self.request.pins)

    @cached_property
    def pricer(self) -> Pricer:
        return Pricer(self.model, self.space, self.request.training, calibration_for(self.cluster.device.name))

    def search(self) -> Searched:
        """Raises `NothingToSearchError` when the pins leave nothing."""
        if not any(True for _ in self.space.groups()):
            raise NothingToSearchError(self._empty(), do="Change a pin, the batch, or use --pad-batch.")
        found = GroupSearch(self.pricer, mixing=self.request.mixing, within=self.request.within).run()
        if not found.problem.outers:
            raise NothingToSearchError("no schedule is left with these pins and bans")
        return found

    def _pin_fault(self) -> str:
        """The first pin that can't be whatever the others are; empty when there is none."""
        pins, gpus, product, words = self.request.pins, self.cluster.gpus, 1, list[str]()
        for name in ("tp", "cp", "dp", "pp"):
            degree = getattr(pins, name)
            if degree is None:
                continue
            product *= degree
            words.append(f"{name} {degree}")
            if product > gpus or gpus % product:
                return f"{' · '.join(words)} does not divide {gpus} GPUs"
        for name, count in (("micro_batches", pins.micro_batches), ("dp", pins.dp), ("micro_batch", pins.micro_batch)):
            if count is not None and self.batch % count:
                return f"{name.replace('_', '-')} {count} does not divide the batch of {self.batch}"
        layers = [k for k in self.space.kinds if k.vocabulary is None]
        refused = [self.space.refusal(k, pins.tp or 1, 1, "ring") for k in layers]
        if pins.pp is not None and pins.pp > len(self.space.order):
            return f"pp {pins.pp} for {len(self.space.order)} layers"
        return refused[0] or "" if refused and all(refused) else ""

    def _empty(self) -> str:
        fault = self._pin_fault()
        if fault:
            return f"a pin can't hold: {fault}"
        reasons = [x for x in self.space.left if not x.reason.startswith("pinned")]
        first = "; ".join(f"{x.axis} {x.value}: {x.reason}" for x in reasons[:3])
        return (f"nothing divides {self.cluster.gpus} GPUs and a batch of {self.batch} with these pins"
                + (f" ({first})" if first else ""))

    def solve(self, *, explain: bool = True) -> Answer:
        """Capture, search, and the plan or (with `explain`) the reason why there is none."""
        started = time.perf_counter()
        for samples in (1, 2, 4) if self.batch > 1 else (1,):
            self.model.at(samples)
        captured = time.perf_counter()
        searched = self.search()
        plan = self.write(searched) if isinstance(searched.result, Found) else None
        reason = None if plan is not None or not explain else why_not(self)
        return Answer(self.request, self, searched, plan, reason, captured - started, time.perf_counter() - captured)

    def write(self, searched: Searched) -> schema.Plan:
        """The plan file of what was found."""
        assert isinstance(searched.result, Found)
        return self.writer(searched).write(searched.result.plan, self.ask(), self.batch)

    def writer(self, searched: Searched) -> PlanWriter:
        """Writes plans of a search."""
        from ... import __version__

        return PlanWriter(self.model, self.pricer, searched, __version__)

    def fingerprints(self, ask: schema.Ask) -> Fingerprints:
        """Of what predictions depend on, as it is now."""
        return fingerprints(self.model, self.pricer, ask)

    def ask(self) -> schema.Ask:
        """The request, as a plan file keeps it."""
        r = self.request
        return schema.Ask(model=r.model, cluster=r.cluster, seq=self.model.one.seq, global_batch=r.global_batch,
                          objective=r.objective, imbalance=r.imbalance, options=r.words(),
                          price_usd_per_gpu_hour=r.price_usd_per_gpu_hour)

    def with_request(self, **changed: Any) -> Planner:
        """Another request; the model's captures are shared where its size stays."""
        other = replace(self.request, **changed)
        same = (other.model, other.seq, other.imbalance) == (self.request.model, self.request.seq,
                                                             self.request.imbalance)
        return Planner(other, self.model if same else None)


def plan(model: str, cluster: str, *, seq: int, global_batch: int, mixing: bool = False, imbalance: float = 1.0,
         runnable_only: bool = False, pad_batch: bool = False, price_usd_per_gpu_hour: float | None = None,
         optimizer: str = "adamw", **pins: Any) -> schema.Plan:
    """The fastest parallel plan of `model` on `cluster`, with a bound that says how good it is.

    `model`: a preset, a Hugging Face `config.json` or its directory, or `module:callable`; `cluster`:
    `"8x8 h100-sxm"` or a file. `pins` fix axes: `tp`, `cp`, `dp`, `pp`, `ep`, `etp`, `zero`, `recompute`, `schedule`,
    `interleave`, `micro_batches`, `micro_batch`, `banned` (names as of `--ban`). `mixing` lets every layer take its own
    layout. Raises `InvalidInputError` for bad input and `DoesNotFitError`, with the binding constraint and a change
    that fits, when nothing fits.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InvalidInputError(f"a model of type {type(model).__name__}",
                                expected="a preset's name, a config.json, or module:callable")
    if runnable_only:
        refuse_runnable_only()
    answer = Planner(Request(os.fspath(model), cluster, seq, global_batch, pins_from(pins), training_from(optimizer),
                             mixing, imbalance, price_usd_per_gpu_hour, pad_batch)).solve()
    if answer.plan is None:
        assert answer.why_not is not None
        raise DoesNotFitError(answer.why_not.sentence())
    return answer.plan


def pins_from(values: dict[str, Any]) -> Pins:
    """Raises `InvalidInputError` for an unknown axis."""
    from dataclasses import fields

    from ...runtime.errors import UnknownNameError

    known = [f.name for f in fields(Pins)]
    for name in values:
        if name not in known:
            raise UnknownNameError("axis", name, known)
    if "banned" in values:
        values = {**values, "banned": frozenset(values["banned"])}
    return Pins(**values)


def training_from(optimizer: str) -> Training:
    """Raises `UnknownNameError` for an optimizer without a table of bytes."""
    from ...cost_model.strategy import OPTIMIZER_STATE_BYTES
    from ...runtime.errors import UnknownNameError

    if optimizer not in OPTIMIZER_STATE_BYTES:
        raise UnknownNameError("optimizer", optimizer, OPTIMIZER_STATE_BYTES)
    return Training(optimizer=optimizer)  # type: ignore[arg-type]


def training_with(training: Training, word: str) -> Training:
    """With one `field=value` as `Request.words` writes it. Raises `InvalidInputError`."""
    name, _, value = word.partition("=")
    usual = vars(Training()).get(name)
    try:
        if isinstance(usual, bool):
            made: Any = {"True": True, "False": False}[value]
        elif isinstance(usual, str):
            made = value
        else:
            number = float(value)
            made = int(number) if isinstance(usual, int) and number.is_integer() else number
        known = {"fusion": get_args(Fusion), "dispatch": get_args(Dispatch),
                 "cuda_graphs": get_args(CudaGraphs)}.get(name)
        if usual is None or (known and made not in known) or (name == "software_year" and not 2000 <= made <= 2100):
            raise ValueError
        return replace(training, **{name: made})
    except (ValueError, KeyError):
        raise InvalidInputError(f"training {word[:60]!r}", expected="field=value as a priced plan has it") from None


def refuse_runnable_only() -> None:
    """No option can be executed yet."""
    raise InvalidInputError(f"no option is runnable ({NOT_RUNNABLE})", do="Leave runnable-only out.")
