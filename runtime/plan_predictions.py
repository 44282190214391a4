"""What a plan is predicted to do. None of it is a measurement, and none of it is trusted when a plan is loaded: it is
priced again.

All times are whole nanoseconds of one step, all bytes are of one GPU. A stage's time adds up exactly:

    compute + optimizer + Σ exposed communication + bubble = step time
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .plan_data import MAX_LAYERS, MAX_TUPLES, Amount, Amounts, Name, Number, PlanData, Positive, Share, Text


class StageCosts(PlanData):
    """What the timeline is drawn from: per micro-batch and chunk the forward and the two gradients, exposed
    communication included; per transfer to the next and the previous stage; and once, at the end of a step,
    synchronisation and optimizer. As `cost_model.pipeline.StageCosts`."""

    forward_ns: tuple[Amount, ...]
    input_gradient_ns: tuple[Amount, ...]
    weight_gradient_ns: tuple[Amount, ...]
    send_forward_ns: Amount = 0
    send_backward_ns: Amount = 0
    sync_ns: Amount = 0
    optimizer_ns: Amount = 0


class StagePrediction(PlanData):
    """One stage. `exposed_ns`: by collective, what no computation hides. `memory_bytes`: by category, at the moment of
    the stage's peak; `limit_bytes`: what may be used of a GPU."""

    compute_ns: Amount
    optimizer_ns: Amount = 0
    exposed_ns: Amounts = {}
    bubble_ns: Amount = 0
    costs: StageCosts
    memory_bytes: Amounts
    limit_bytes: Amount

    @property
    def total_ns(self) -> int:
        return self.compute_ns + self.optimizer_ns + sum(self.exposed_ns.values()) + self.bubble_ns

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values())

    @property
    def missing_bytes(self) -> int:
        """What the stage needs above its limit, 0 when it fits."""
        return max(0, self.peak_bytes - self.limit_bytes)


class RangePrediction(PlanData):
    """The layers of one range of the plan, together: their part of what their stage computes, exposes and holds.
    `low_confidence` says why the numbers lie outside of what the cost model was fitted to; empty where they don't."""

    compute_ns: Amount
    exposed_ns: Amounts = {}
    memory_bytes: Amounts = {}
    low_confidence: Text = ""


class ErrorBand(PlanData):
    """A step may take `low` less to `high` more (shares of its time) for the reason in `source`: which runs the model
    was compared with."""

    low: Share
    high: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    source: Text


class Predicted(PlanData):
    """Prices of a plan, made by `writer` (a Meshwright version). `mfu`: FLOPs of the model over the GPUs' peak, idle
    ones included. Energy and money only where the cluster states power and price."""

    kind: Literal["prediction"] = "prediction"
    writer: Name
    step_time_ns: Positive
    tokens_per_s: Number
    mfu: Share | None = None
    error_band: ErrorBand | None = None
    low_confidence: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    energy_joules: Number | None = None
    cost_usd: Number | None = None
    stages: Annotated[tuple[StagePrediction, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    layers: Annotated[tuple[RangePrediction, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    reshard_ns: Amount = 0

    @model_validator(mode="after")
    def _check(self) -> Predicted:
        for i, stage in enumerate(self.stages):
            if stage.total_ns != self.step_time_ns:
                raise ValueError(f"stages.{i}: compute, optimizer, exposed communication and bubble are "
                                 f"{stage.total_ns} ns, the step {self.step_time_ns} ns")
        return self

    @property
    def step_time_s(self) -> float:
        return self.step_time_ns / 1e9

    @property
    def fits(self) -> bool:
        return not any(stage.missing_bytes for stage in self.stages)

    @property
    def tightest(self) -> int:
        """The stage with the least memory to spare."""
        return min(range(len(self.stages)), key=lambda i: self.stages[i].limit_bytes - self.stages[i].peak_bytes)


class TupleResult(PlanData):
    """One outer tuple of the search: no plan of it is faster than `bound_ns` (None: none fits); `value_ns` is the best
    plan found in it (None: not searched, or none found)."""

    title: Name
    state: Literal["solved", "searched", "bounded", "infeasible"]
    bound_ns: Amount | None = None
    value_ns: Amount | None = None


class Refusal(PlanData):
    """A value of an axis that was left out of the search, and why. `axis` is tp, cp, ep, pp …"""

    axis: Name
    value: Name
    reason: Text


class Certificate(PlanData):
    """How good the plan is, from code that shares no pruning with the search: no plan of the space takes less than
    `lower_bound_ns`. `tuples` accounts for every outer tuple. `recheck`: the command that computes it anew."""

    problem_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    lower_bound_ns: Amount
    proof: Literal["bound", "enumerated", "cp-sat"] = "bound"
    tuples: Annotated[tuple[TupleResult, ...], Field(max_length=MAX_TUPLES)]
    refused: Annotated[tuple[Refusal, ...], Field(max_length=10_000)] = ()
    recheck: Text

    def gap(self, step_time_ns: int) -> float:
        """By which share of its step time the plan may at most be improved; 0 proves it optimal."""
        return max(0.0, 1 - self.lower_bound_ns / step_time_ns)

    def count(self, state: str) -> int:
        """Outer tuples in that state."""
        return sum(t.state == state for t in self.tuples)


class Beaten(PlanData):
    """The best plan of a family that the plan beat. `binding`: what holds it back (the busiest stage, the memory of
    stage 0, …). `near_tie`: within the error band; of those and the plan itself,
    `preferred` marks the simplest where that is not the plan. No step time: nothing of the family fits, and
    `missing_bytes` says by how much, or, where those are 0, there is no such plan."""

    family: Name
    title: Text
    step_time_ns: Positive | None
    missing_bytes: Amount = 0
    binding: Text
    near_tie: bool = False
    preferred: bool = False
