"""Objectives besides the fastest step on given GPUs: each is a series of searches, and claims what these tried.

    largest-batch       the largest micro-batch of a replica with which a plan fits, and the fastest plan with it: the
                        divisors of the batch from the largest down
    largest-sequence    the longest sequence tried that fits, in steps of 1,024 tokens: doubled from the asked one, then
                        halved between the last that fits and the first that does not, down to an eighth
    fewest-gpus         the fewest GPUs that reach `target_tokens_per_s`, or without a target that fit at all: divisors
                        of a node's GPUs, then every number of nodes, upward; only those whose memory suffices are
                        searched, and those whose peak does
    energy              of the divisors of a node's GPUs and of the number of nodes, the one of least energy per step.
                        Energy is the GPUs' rated power × time, an upper bound: 8 H100 drew 76 to 82 % of a node's rated
                        power in training (Latif et al., arXiv:2412.08602; Newkirk et al., arXiv:2506.14551, who find
                        estimates from rated power 27 to 37 % off). What waiting GPUs draw was not published for these
                        devices, so the least energy is the least GPU time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

from ...cost_model.cluster import Cluster, size_and_device
from ...runtime import plan as schema
from ...runtime.errors import InvalidInputError
from .infeasible import fits, too_few
from .plan_model import Answer, NothingToSearchError, Planner, Request
from .space import divisors

OBJECTIVES: tuple[str, ...] = get_args(schema.Objective)
TOKENS = 1024  # a step of largest-sequence, or the asked length where that is shorter
MOST_TOKENS = 1 << 22

Tried = tuple[Answer | None, str]  # the answer where a plan fits, else why there is none


def best_for(request: Request, target_tokens_per_s: float | None) -> tuple[Answer, tuple[str, ...]]:
    """The answer, and a line for every step that led to it. Raises `InvalidInputError`."""
    if target_tokens_per_s is not None and request.objective != "fewest-gpus":
        raise InvalidInputError("--target-tokens-per-s", expected="the objective fewest-gpus")
    if target_tokens_per_s is not None and not isinstance(target_tokens_per_s, (int, float)):
        raise InvalidInputError(f"target_tokens_per_s {str(target_tokens_per_s)[:40]!r}", expected="a number above 0")
    if target_tokens_per_s is not None and not 0 < target_tokens_per_s < 1e18:
        raise InvalidInputError(f"--target-tokens-per-s {target_tokens_per_s:g}", expected="a number above 0")
    if request.objective == "fewest-gpus":
        return _fewest_gpus(request, target_tokens_per_s)
    if request.objective == "largest-batch":
        return _largest_batch(request)
    if request.objective == "largest-sequence":
        return _largest_sequence(request)
    if request.objective == "energy":
        return _least_energy(request)
    return Planner(request).solve(), ()


def resized(request: Request, nodes: int, gpus_per_node: int | None = None) -> Request:
    """The request on another number of nodes. Raises `InvalidInputError` for clusters from a file."""
    found = size_and_device(request.cluster)
    if found is None:
        raise InvalidInputError("a cluster file has one size", expected='a cluster such as "8x8 h100-sxm" to vary')
    return replace(request, cluster=f"{nodes}x{gpus_per_node or found[1]} {found[2].lower()}")


def attempt(request: Request, base: Planner | None = None) -> Tried:
    """The answer, or why there is none: nothing is left to search, or nothing fits. Raises `InvalidInputError`."""
    planner = Planner(request) if base is None else base.with_request(**vars(request))
    try:
        answer = planner.solve(explain=False)
    except NothingToSearchError as error:
        return None, str(error)
    return (answer, "") if answer.plan is not None else (None, "no plan found fits")


def _largest_batch(request: Request) -> tuple[Answer, tuple[str, ...]]:
    if request.pins.micro_batch is not None:
        raise InvalidInputError(f"--micro-batch {request.pins.micro_batch} and --objective largest-batch",
                                expected="one of them")
    base, steps = Planner(request), list[str]()
    for samples in reversed(divisors(base.batch)):
        answer, reason = attempt(replace(request, pins=replace(request.pins, micro_batch=samples)), base)
        if answer is not None:
            whole = ", the whole global batch" if samples == base.batch else ""
            return answer, (*steps, f"micro-batch {samples}{whole}: fits")
        steps.append(f"micro-batch {samples}: {reason}")
    return base.solve(), tuple(steps)


def _largest_sequence(request: Request) -> tuple[Answer, tuple[str, ...]]:
    base, unit, steps = Planner(request), min(TOKENS, request.seq), list[str]()
    fitting: list[int] = []

    def tried(units: int) -> Answer | None:
        tokens = units * unit
        try:
            answer, reason = attempt(replace(request, seq=tokens), base)
        except InvalidInputError as error:  # beyond what the model takes
            if not fitting:
                raise
            answer, reason = None, str(error)
        steps.append(f"{tokens} tokens: {'fits' if answer else reason}")
        fitting.extend([tokens] if answer else [])
        return answer

    best = _largest(tried, request.seq // unit, MOST_TOKENS // unit)
    if best is None:
        return base.solve(), tuple(steps)
    return best, (*steps, f"{max(fitting)} tokens are the most that were tried and fit")


def _largest(tried: Callable[[int], Answer | None], start: int, most: int) -> Answer | None:
    """Doubling up to `most`, then halving the interval between what fits and what does not down to an eighth."""
    low, best, high = 0, None, start
    while True:
        answer = tried(high)
        if answer is None:
            break
        low, best, high = high, answer, 2 * high
        if high > most:
            return best
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        answer = tried(middle)
        if answer is None:
            high = middle
        else:
            low, best = middle, answer
    return best


def _sizes(cluster: Cluster) -> Iterator[tuple[int, int]]:
    """(nodes, GPUs per node), upward."""
    yield from ((1, gpus) for gpus in divisors(cluster.gpus_per_node))
    yield from ((nodes, cluster.gpus_per_node) for nodes in range(2, cluster.nodes + 1))


def _fewest_gpus(request: Request, target: float | None) -> tuple[Answer, tuple[str, ...]]:
    base, steps = Planner(request), list[str]()
    for nodes, gpus in _sizes(base.cluster):
        most = _most_tokens_per_s(base, nodes * gpus) if target is not None else None
        if target is not None and most is not None and most < target:
            steps.append(f"{nodes * gpus} GPUs: at most {most:,.0f} tokens/s at their peak")
            continue
        other = resized(request, nodes, gpus)
        if _lacks_memory(base.with_request(**vars(other))):
            steps.append(f"{nodes * gpus} GPUs: no plan fits")
            continue
        answer, reason = attempt(other, base)
        if answer is None or answer.plan is None:
            steps.append(f"{nodes * gpus} GPUs: {reason}")
            continue
        speed = answer.plan.predicted.tokens_per_s
        steps.append(f"{nodes * gpus} GPUs: {speed:,.0f} tokens/s")
        if speed >= (target or 0):
            return answer, tuple(steps)
    if target is not None:
        raise InvalidInputError(f"{base.cluster.name} does not reach {target:,.0f} tokens/s ({'; '.join(steps[-3:])})",
                                do="Allow more nodes.")
    return base.solve(), tuple(steps)


def _lacks_memory(planner: Planner) -> bool:
    """Whether layouts are left, and none of them fits."""
    if too_few(planner, planner.cluster.gpus):
        return True
    return any(True for _ in planner.space.groups()) and not fits(planner)


def _most_tokens_per_s(base: Planner, gpus: int) -> float | None:
    """No plan is faster: the model's FLOPs, half of what causal attention masks left out, at the GPUs' highest peak."""
    model, peaks = base.model.one, base.cluster.device.peak_flops_per_s
    flops = sum(kind.flops_forward + kind.flops_backward - (kind.causal_flops_forward + kind.causal_flops_backward) / 2
                for kind in (model.kinds[k] for k in model.order))
    return max(peaks.values()) * gpus * model.seq / flops if peaks and flops else None


def _least_energy(request: Request) -> tuple[Answer, tuple[str, ...]]:
    base, steps = Planner(request), list[str]()
    best: tuple[float, Answer] | None = None
    for nodes, gpus in _sizes(base.cluster):
        if base.cluster.nodes % nodes:
            continue
        answer, reason = attempt(resized(request, nodes, gpus), base)
        if answer is None or answer.plan is None:
            steps.append(f"{nodes * gpus} GPUs: {reason}")
            continue
        joules = answer.plan.predicted.energy_joules
        if joules is None:
            raise InvalidInputError(f"no power is known of {base.cluster.name}",
                                    expected="a device with power_w for the objective energy")
        steps.append(f"{nodes * gpus} GPUs: {joules / 1e3:,.3g} kJ a step")
        if best is None or joules < best[0]:
            best = joules, answer
    return (best[1], tuple(steps)) if best else (base.solve(), tuple(steps))
