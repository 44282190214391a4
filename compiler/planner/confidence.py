"""How sure a plan's predictions are: the band that published runs give, and what there was nothing to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...cost_model.error_band import ModelClass, doubt, error_class, published_errors
from ...cost_model.fitted_range import Extent, outside
from ...cost_model.model import ModelDescription
from ...cost_model.pipeline import StageCosts
from ...cost_model.strategy import LayerStrategy
from ...runtime.plan_predictions import ErrorBand
from .pricing import Pricer
from .problem import Outer

BUSY_LINKS = 0.1  # of a step: with less, a transfer that queues behind another or slows a product down is noise


def model_class(model: ModelDescription) -> ModelClass:
    """By whether it has experts."""
    return "mixture of experts" if any(kind.experts for kind in model.kinds) else "dense"


def band_of(pricer: Pricer, model: ModelDescription) -> ErrorBand | None:
    """The band of published runs of its class on its GPU; None where no run was compared."""
    found = published_errors(pricer.calibration, pricer.training, model_class(model), pricer.space.cluster.device.name)
    if found is None:
        return None
    errors, source = found
    low, high = errors.band
    return ErrorBand(low=low, high=high, source=source)


def doubts(pricer: Pricer, model: ModelDescription, outer: Outer, strategies: Sequence[LayerStrategy],
           costs: Sequence[StageCosts], step_ns: int) -> Iterator[str]:
    """Reasons not to rely on a plan's predictions."""
    cluster, training = pricer.space.cluster, pricer.training
    reason = doubt(pricer.calibration, cluster.device.name)
    if reason:
        yield reason
    extent = Extent(cluster.gpus, model.seq, model.parameter_count, max(s.tp for s in strategies), outer.p,
                    max(s.cp for s in strategies), max(s.ep for s in strategies))
    for reason in outside(extent, error_class(training, model_class(model)), compute=training.compute,
                          fp8_recipe=training.fp8_recipe, schedule=outer.schedule,
                          ulysses=any(s.cp > 1 and s.cp_kind == "ulysses" for s in strategies)):
        yield f"outside the fitted range: {reason}"
    share = max(links_busy_ns(c, outer) for c in costs) / step_ns
    if share > BUSY_LINKS:
        yield (f"transfers between stages keep a GPU's links busy for {share:.0%} of the step; here they only delay "
               "the next stage")


def links_busy_ns(costs: StageCosts, outer: Outer) -> int:
    """How long a stage's sends take in a step: activations to the next stage, gradients to the previous one."""
    return outer.m * outer.v * (costs.send_forward_ns + costs.send_backward_ns)
