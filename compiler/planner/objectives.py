"""Objectives besides the fastest step on given GPUs: each is a series of searches.

    largest-batch       the largest micro-batch of a replica with which a plan fits, and the fastest plan with it
    largest-sequence    the longest sequence (in 1,024 tokens) that fits
    fewest-gpus         the fewest nodes that reach `target_tokens_per_s`, or without a target that fit at all
    energy              of the node counts that divide the cluster's, the one of least energy per token
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

from ...runtime import plan as schema
from ...runtime.errors import InvalidInputError, MeshwrightError
from .plan_model import Answer, Planner, Request
from .space import divisors

OBJECTIVES: tuple[str, ...] = get_args(schema.Objective)
TOKENS = 1024  # a step of largest-sequence
MOST_TOKENS = 1 << 22


def best_for(request: Request, target_tokens_per_s: float | None) -> tuple[Answer, tuple[str, ...]]:
    """The answer, and a line for every step that led to it. Raises `InvalidInputError`."""
    if request.objective == "fewest-gpus":
        return _fewest_gpus(request, target_tokens_per_s)
    if target_tokens_per_s is not None:
        raise InvalidInputError("--target-tokens-per-s", expected="the objective fewest-gpus")
    if request.objective == "largest-batch":
        return _largest_batch(request)
    if request.objective == "largest-sequence":
        return _largest_sequence(request)
    if request.objective == "energy":
        return _least_energy(request)
    return Planner(request).solve(), ()


def resized(request: Request, nodes: int) -> Request:
    """The request on another number of nodes. Raises `InvalidInputError` for clusters from a file."""
    cluster = Planner(request).cluster
    if request.cluster != cluster.name and not request.cluster.lower().endswith(cluster.device.name):
        raise InvalidInputError("a cluster file has one size", expected='a cluster such as "8x8 h100-sxm" to vary')
    return replace(request, cluster=f"{nodes}x{cluster.gpus_per_node} {cluster.device.name}")


def attempt(request: Request, base: Planner | None = None) -> Answer | None:
    """The answer, None where nothing is left to search or nothing fits."""
    try:
        planner = Planner(request) if base is None else base.with_request(**vars(request))
        answer = planner.solve(explain=False)
    except MeshwrightError:
        return None
    return answer if answer.plan is not None else None


def _largest_batch(request: Request) -> tuple[Answer, tuple[str, ...]]:
    base = Planner(request)
    steps, best = list[str](), None
    for samples in divisors(base.batch):
        answer = attempt(replace(request, pins=replace(request.pins, micro_batch=samples)), base)
        if answer is None and best is not None:
            steps.append(f"micro-batch {samples}: does not fit")
            break
        if answer is not None and answer.plan is not None:
            best = answer
            steps.append(f"micro-batch {samples}: {answer.plan.predicted.step_time_s:.3f} s a step")
    return (best, tuple(steps)) if best else (base.solve(), tuple(steps))


def _largest_sequence(request: Request) -> tuple[Answer, tuple[str, ...]]:
    steps = list[str]()

    def tried(units: int) -> Answer | None:
        answer = attempt(replace(request, seq=units * TOKENS))
        steps.append(f"{units * TOKENS} tokens: {'fits' if answer else 'does not fit'}")
        return answer

    best = _largest(tried, max(1, request.seq // TOKENS), MOST_TOKENS // TOKENS)
    return (best, tuple(steps)) if best else (Planner(request).solve(), tuple(steps))


def _largest(tried: Callable[[int], Answer | None], start: int, most: int) -> Answer | None:
    """Doubling, then halving the interval down to an eighth of what fits."""
    low, best = 0, None
    high = start
    while high <= most:
        answer = tried(high)
        if answer is None:
            break
        low, best, high = high, answer, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        answer = tried(middle)
        if answer is None:
            high = middle
        else:
            low, best = middle, answer
    return best


def _fewest_gpus(request: Request, target: float | None) -> tuple[Answer, tuple[str, ...]]:
    """Nodes 1, 2, 4, … up to the cluster's, then those between. A target between two sizes is met by the larger."""
    base, steps = Planner(request), list[str]()
    reached: Answer | None = None
    for nodes in divisors(base.cluster.nodes):
        answer = attempt(resized(request, nodes))
        speed = answer.plan.predicted.tokens_per_s if answer and answer.plan else None
        steps.append(f"{nodes} nodes: " + (f"{speed:,.0f} tokens/s" if speed else "nothing fits"))
        if answer is not None and speed is not None and speed >= (target or 0):
            reached = answer
            break
    if reached is not None:
        return reached, tuple(steps)
    if target is not None:
        raise InvalidInputError(f"{base.cluster.name} does not reach {target:,.0f} tokens/s ({'; '.join(steps)})",
                                do="Allow more nodes.")
    return base.solve(), tuple(steps)


def _least_energy(request: Request) -> tuple[Answer, tuple[str, ...]]:
    base, steps = Planner(request), list[str]()
    best: tuple[float, Answer] | None = None
    for nodes in divisors(base.cluster.nodes):
        answer = attempt(resized(request, nodes))
        if answer is None or answer.plan is None:
            steps.append(f"{nodes} nodes: nothing fits")
            continue
        joules = answer.plan.predicted.energy_joules
        if joules is None:
            raise InvalidInputError(f"no power is known of {base.cluster.name}",
                                    expected="a device with power_w for the objective energy")
        steps.append(f"{nodes} nodes: {joules / 1e3:,.1f} kJ a step")
        if best is None or joules < best[0]:
            best = joules, answer
    return (best[1], tuple(steps)) if best else (base.solve(), tuple(steps))
