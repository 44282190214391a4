"""Random planning problems small enough to enumerate, and their optimum by enumeration.

Enumeration shares nothing with the planner but the tables and the schedules' orders: it walks all cuts and all options
of every stage, counts what is held by walking each order, and runs the orders on arrays of plans at once.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from meshwright.compiler.planner.problem import Option, Outer, Plan, Problem, Reshard, Transfer
from meshwright.cost_model.schedules import ScheduleName, awaited, orders


def instance(seed: int) -> Problem:
    """A problem of 3 to 5 layers of 2 or 3 kinds with at least 8 options each, for 2 to 3 outer tuples. Capacities run
    from too little for any plan to plenty."""
    draw = random.Random(seed)
    kinds, count = draw.randint(2, 3), draw.randint(3, 5)
    layers = [*range(kinds), *(draw.randrange(kinds) for _ in range(count))][:max(count, kinds)]
    draw.shuffle(layers)
    mixing = draw.random() < 0.25 and len(layers) <= 4
    layouts = draw.randint(1, 3)
    outers = [_outer(draw, kinds, layouts, len(layers)) for _ in range(draw.randint(2, 3))]
    scale = draw.choice([0.25, 0.5, 0.6, 0.7, 0.8, 1.0, 1.3, 4.0])
    typical = max(sum(o.static_bytes + o.saved_bytes for o in outer.options[0]) // len(outer.options[0])
                  for outer in outers) * len(layers)
    return Problem(kinds=tuple(f"kind{i}" for i in range(kinds)), layers=tuple(layers), gpus=12, global_batch=24,
                   capacity_bytes=int(typical * scale), outers=tuple(outers), mixing=mixing)


def _outer(draw: random.Random, kinds: int, layouts: int, layers: int) -> Outer:
    shapes: list[tuple[int, int, ScheduleName, int]] = [
        (p, 1, name, m) for p in (1, 2, 3, 4) for name in ("gpipe", "1f1b", "zb-h1") for m in (1, 2, 3, 4, 6, 8)]
    shapes += [(p, 2, "interleaved", m) for p in (1, 2) for m in (2, 4, 6)]
    weights = [p * (4 if v > 1 else 1) for p, v, _, _ in shapes]
    p, v, name, m = draw.choices([s for s in shapes if s[0] * s[1] <= layers],
                                 [w for s, w in zip(shapes, weights, strict=True) if s[0] * s[1] <= layers])[0]
    most = draw.choice([6, 40, 10**6])
    table = [[Reshard(forward_ns=draw.randint(1, most // 3), backward_ns=draw.randint(1, most // 3),
                      saved_bytes=draw.randint(0, 9)) if a != b else Reshard() for b in range(layouts)]
             for a in range(layouts)]
    transfer = [[Transfer(forward_ns=draw.randint(0, most // 3), backward_ns=draw.randint(0, most // 3))
                 for _ in range(layouts)] for _ in range(layouts)]
    return Outer(p=p, v=v, schedule=name, m=m, options=tuple(_options(draw, layouts, p, m, most) for _ in range(kinds)),
                 reshard=tuple(map(tuple, table)), transfer=tuple(map(tuple, transfer)))


def _options(draw: random.Random, layouts: int, p: int, m: int, most: int) -> tuple[Option, ...]:
    """Faster ones hold more, mostly; families of two to four."""
    found: list[Option] = []
    families, target = 0, draw.randint(8, 10)
    while len(found) < target:
        first = last = draw.randrange(layouts)
        for _ in range(draw.randint(2, 4)):
            if draw.random() < 0.1:
                first, last = draw.randrange(layouts), draw.randrange(layouts)
            slow = draw.random()
            found.append(Option(
                name=f"option{len(found)}", family=f"family{families}",
                forward_ns=int(most * (1 + slow * draw.random()) * p / m) + draw.randint(0, 3),
                input_gradient_ns=int(most * (1 + slow) * p / m) + draw.randint(0, 3),
                weight_gradient_ns=int(most * draw.random() * p / m), sync_ns=draw.randint(0, most // 2),
                optimizer_ns=draw.randint(0, most // 4), static_bytes=draw.randint(5, 40),
                saved_bytes=int((1 - slow) * 60 / m) + draw.randint(0, 4), saved_until_w_bytes=draw.randint(0, 30 // m),
                transient_bytes=draw.randint(0, 12), layout_in=first, layout_out=last))
        families += 1
    return tuple(found)


def sharpened(seed: int) -> Problem:
    """`instance(seed)`; of every eight one gets a byte less than anything needs, one exactly the least that fits."""
    problem = instance(seed)
    if seed % 8 > 1:
        return problem
    least = min(e.least_bytes for e in enumerate_plans(problem))
    return problem.model_copy(update={"capacity_bytes": least - 1 + seed % 8})


@dataclass(frozen=True)
class Enumerated:
    """An outer tuple, enumerated: its optimum (None: nothing fits), the plans looked at and how many of them fit, the
    least bytes that any plan needs on its fullest stage, and the least time without a limit of memory."""

    step_ns: int | None
    plan: Plan | None
    plans: int
    fitting: int
    least_bytes: int
    unlimited_ns: int


def enumerate_plans(problem: Problem) -> list[Enumerated]:
    """J of every plan of every outer tuple."""
    return [_enumerate_tuple(problem, index, outer) for index, outer in enumerate(problem.outers)]


def optimum_ns(enumerated: list[Enumerated]) -> int | None:
    """The least step time over all tuples; None when nothing fits."""
    return min((e.step_ns for e in enumerated if e.step_ns is not None), default=None)


def _enumerate_tuple(problem: Problem, index: int, outer: Outer) -> Enumerated:
    best: tuple[int, Plan] | None = None
    plans = fitting = 0
    least, unlimited = 1 << 62, 1 << 62
    for ends in _cuts(len(problem.layers), outer):
        choices, steps, bytes_needed = _all_of_cut(problem, outer, ends)
        if len(steps) == 0:
            continue
        plans += len(steps)
        fits = bytes_needed <= problem.capacity_bytes
        fitting += int(fits.sum())
        least, unlimited = min(least, int(bytes_needed.min())), min(unlimited, int(steps.min()))
        if fits.any():
            row = int(np.where(fits, steps, 1 << 62).argmin())
            if best is None or steps[row] < best[0]:
                best = int(steps[row]), Plan(outer=index, ends=ends, options=tuple(map(int, choices[row])))
    return Enumerated(best and best[0], best and best[1], plans, fitting, least, unlimited)


def _cuts(layers: int, outer: Outer) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, layers), outer.parts - 1):
        ends = (*inner, layers)
        sizes = [b - a for a, b in itertools.pairwise((0, *ends))]
        if outer.v == 1 or max(sizes) - min(sizes) <= 1:
            yield ends


def _all_of_cut(problem: Problem, outer: Outer,
                ends: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(options [plans, layers], step times, bytes of the fullest stage) of every plan with these cuts."""
    layers, p = problem.layers, outer.p
    spans = [range(a, b) for a, b in itertools.pairwise((0, *ends))]
    stages = []
    for stage in range(p):
        own = [layer for span in spans[stage::p] for layer in span]
        combos = []
        for combo in itertools.product(*(range(len(outer.options[layers[layer]])) for layer in own)):
            families = {(layers[layer], outer.options[layers[layer]][o].family)
                        for layer, o in zip(own, combo, strict=True)}
            if problem.mixing or len(families) == len({kind for kind, _ in families}):
                combos.append(combo)
        stages.append((own, np.array(combos, dtype=np.int64).reshape(-1, len(own))))
    counts = [len(combos) for _, combos in stages]
    index = np.indices(counts).reshape(p, -1) if all(counts) else np.zeros((p, 0), np.int64)
    choices = np.zeros((index.shape[1], len(layers)), np.int64)
    for (own, combos), rows in zip(stages, index, strict=True):
        choices[:, own] = combos[rows]
    return choices, *_price(problem, outer, spans, choices)


def _price(problem: Problem, outer: Outer, spans: list[range],
           choices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def of(layer: int, name: str) -> np.ndarray:
        return np.array([getattr(o, name) for o in outer.options[problem.layers[layer]]], np.int64)[choices[:, layer]]

    zero, p, parts = np.zeros(len(choices), np.int64), outer.p, len(spans)
    moved = {name: np.array([[getattr(r, name) for r in row] for row in outer.reshard])
             for name in ("forward_ns", "backward_ns", "saved_bytes")}
    time = {name: [zero.copy() for _ in spans] for name in ("F", "B", "W")}
    until_b, until_w = [zero.copy() for _ in spans], [zero.copy() for _ in spans]
    for part, span in enumerate(spans):
        for layer in span:
            time["F"][part] += of(layer, "forward_ns")
            time["B"][part] += of(layer, "input_gradient_ns")
            time["W"][part] += of(layer, "weight_gradient_ns")
            until_b[part] += of(layer, "saved_bytes")
            until_w[part] += of(layer, "saved_until_w_bytes")
            if layer + 1 in span:
                pair = of(layer, "layout_out"), of(layer + 1, "layout_in")
                time["F"][part] += moved["forward_ns"][pair]
                time["B"][part] += moved["backward_ns"][pair]
                until_b[part] += moved["saved_bytes"][pair]
    if outer.schedule != "zb-h1":
        for part in range(parts):
            time["B"][part] = time["B"][part] + time["W"][part]
            until_b[part] = until_b[part] + until_w[part]
            until_w[part] = zero
    forward, backward = [zero] * p, [zero] * p
    for part in range(parts - 1):
        pair = of(spans[part][-1], "layout_out"), of(spans[part + 1][0], "layout_in")
        for sends, stage, name in ((forward, part % p, "forward_ns"), (backward, (part + 1) % p, "backward_ns")):
            sends[stage] = np.maximum(sends[stage], np.array([[getattr(t, name) for t in row]
                                                              for row in outer.transfer])[pair])
    ends = _run(outer, time, forward, backward, zero)
    steps, fullest = zero, zero
    for stage in range(p):
        own = [layer for span in spans[stage::p] for layer in span]
        steps = np.maximum(steps, ends[stage] + sum(of(la, "sync_ns") + of(la, "optimizer_ns") for la in own))
        held = peak = zero
        for op in orders(outer.order)[stage]:
            part = op.chunk * p + stage
            if op.kind == "F":
                held = held + until_b[part] + until_w[part]
            held = held - (until_b[part] if op.kind == "B" else 0) - (until_w[part] if op.kind == "W" else 0)
            peak = np.maximum(peak, held)
        transient = np.max(np.stack([of(layer, "transient_bytes") for layer in own]), axis=0)
        fullest = np.maximum(fullest, peak + transient + sum(of(layer, "static_bytes") for layer in own))
    return steps, fullest


def _run(outer: Outer, time: dict[str, list[np.ndarray]], forward: list[np.ndarray], backward: list[np.ndarray],
         zero: np.ndarray) -> list[np.ndarray]:
    """When each stage's last operation ends, for all plans at once."""
    order, p = orders(outer.order), outer.p
    done: dict[object, np.ndarray] = {}
    position, now = [0] * p, [zero] * p
    while any(position[s] < len(order[s]) for s in range(p)):
        for s in range(p):
            while position[s] < len(order[s]):
                op = order[s][position[s]]
                needed = awaited(outer.order, s, op)
                if needed is not None and needed not in done:
                    break
                if needed is not None:
                    sent = (forward if op.kind == "F" else backward)[needed[0]]
                    now[s] = np.maximum(now[s], done[needed] + sent)
                now[s] = now[s] + time[op.kind][op.chunk * p + s]
                done[s, op] = now[s]
                position[s] += 1
    return now


def large_instance(layers: int = 1000, gpus: int = 1024, stages: tuple[int, ...] = (1, 2, 4, 8, 16), batch: int = 512,
                   capacity_gib: float = 64.0, period: int = 0) -> Problem:
    """A transformer of 4 kinds of layers: embedding, 3 dense ones, experts (with `period` every period-th one is dense
    as well), head; 30 options each (5 degrees of tensor parallelism, recomputation off, selective or full, ZeRO
    1 or 3). Prices are round numbers in the proportions of a model of 1e9 parameters a layer, not a measurement."""
    kinds = [1] * 3 + [1 if period and i % period == 0 else 2 for i in range(layers - 5)]
    outers: list[Outer] = []
    for p in stages:
        for m in (batch // 8, batch // 4, batch // 2):
            shapes: list[tuple[int, ScheduleName]] = [(1, "1f1b")]
            shapes += [(1, "zb-h1"), (2, "interleaved")] if p > 1 else []
            outers += [_large_outer(p, v, name, m, gpus // p, batch) for v, name in shapes]
    return Problem(kinds=("embedding", "dense", "experts", "head"), layers=(0, *kinds, 3), gpus=gpus,
                   global_batch=batch, capacity_bytes=int(capacity_gib * 2**30), outers=tuple(outers))


def _large_outer(p: int, v: int, schedule: ScheduleName, m: int, gpus: int, batch: int) -> Outer:
    layouts = 5
    table = tuple(tuple(Reshard(forward_ns=20_000, backward_ns=20_000, saved_bytes=2**20) if a != b else Reshard()
                        for b in range(layouts)) for a in range(layouts))
    transfer = tuple(tuple(Transfer(forward_ns=30_000, backward_ns=30_000) for _ in range(layouts))
                     for _ in range(layouts))
    kinds = ((0.4, 0.2), (1.0, 1.0), (3.0, 1.2), (0.4, 1.5))  # parameters and work relative to a dense layer
    return Outer(p=p, v=v, schedule=schedule, m=m, reshard=table, transfer=transfer, options=tuple(
        tuple(_large_option(size, work, 2**i, zero, recompute, i, gpus, m, batch)
              for i in range(layouts) for zero in (1, 3) for recompute in ("none", "selective", "full"))
        for size, work in kinds))


def _large_option(size: float, work: float, tp: int, zero: int, recompute: str, layout: int, gpus: int, m: int,
                  batch: int) -> Option:
    dp, parameters = gpus // tp, size * 1e8
    forward = int(work * 4e8 * batch / m / gpus * (1 + 0.03 * layout)) + (40_000 if zero == 3 else 0) + 8_000 * layout
    again = {"none": 0.0, "selective": 0.15, "full": 1.0}[recompute]
    saved = {"none": 34, "selective": 18, "full": 2}[recompute] * work * 8192 * 2048 * batch / m / gpus
    weights = parameters * (18 / gpus if zero == 3 else 6 / tp + 12 / gpus)
    return Option(name=f"tp{tp}-zero{zero}-{recompute}", family=f"tp{tp}", forward_ns=forward,
                  input_gradient_ns=forward + int(again * forward),
                  weight_gradient_ns=int(0.95 * forward),
                  sync_ns=int(parameters / tp / 500) if dp > 1 else 0,
                  optimizer_ns=int(parameters / gpus),
                  static_bytes=int(weights), saved_bytes=int(saved),
                  saved_until_w_bytes=int(saved / 4),
                  transient_bytes=int(work * 2**28 / tp), layout_in=layout, layout_out=layout)
