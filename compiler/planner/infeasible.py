"""Why nothing fits: the binding stage of the plan of least memory, what is missing, and the nearest changes that fit.

Memory needs no times: `memory_only.py` finds the least that any plan needs, exactly, in milliseconds, and so tries many
changes, each sort from the smallest on. Where pins leave only schedules that it does not decide (interleaved,
zero-bubble H1), the tuples of least memory are cut by `nearest.py`, and changes are tried by searches.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ...runtime.errors import MeshwrightError
from .evaluate import evaluate
from .group_search import GroupSearch
from .memory_only import Least, MemoryOnly
from .nearest import GIB, Nearest, nearest
from .pricing import Choice, GroupTables
from .problem import Option, Problem
from .search import Found
from .space import MODES, Group, Pins, divisors

if TYPE_CHECKING:
    from .plan_model import Planner

MOST_TUPLES = 2
LOOSE = 0.9  # a plan that fits is wanted, not a fast one
TOKENS = 1024  # a step of shorter sequences, or an eighth of the asked one where that is less


@dataclass(frozen=True)
class Change:
    """A change of the request with which a plan fits. `request`: `memory_bytes_per_gpu`, `pins` (None: left out),
    `banned`, `cluster` or `seq`, as `applied` takes it."""

    what: str
    request: dict[str, Any]


@dataclass(frozen=True)
class WhyNot:
    """`nearest`: the plan of least memory found, under `capacity_bytes`; None where no option exists at all.
    `capture_s`: of what it took, seconds in which the model was captured at another length."""

    nearest: Nearest | None
    problem: Problem
    context_bytes: int
    changes: tuple[Change, ...]
    allocator_share: float = 0.0
    capture_s: float = 0.0

    @property
    def missing_bytes(self) -> int:
        return self.nearest.missing_bytes(self.problem) if self.nearest else 0

    def sentence(self) -> str:
        """One line: what binds, what is missing, what fits."""
        if self.nearest is None:
            return "no plan fits: no layout has options for all layers"
        changes = "; ".join(c.what for c in self.changes)
        return self.nearest.sentence(self.problem) + (f". What fits: {changes}" if changes else "")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        near = self.nearest
        return {"fits": False, "reason": self.sentence(), "missing_gib": self.missing_bytes / GIB,
                "stage": near.stage if near else None, "outer": near.title if near else None,
                "needed_bytes": near.memory.total_bytes + self.context_bytes if near else None,
                "memory_bytes": self._categories() if near else None,
                "changes": [{"what": c.what, **c.request} for c in self.changes]}

    def _categories(self) -> dict[str, int]:
        assert self.nearest is not None
        m, more = self.nearest.memory, 1 + self.allocator_share
        activations, working = int(m.activation_bytes / more), int(m.transient_bytes / more)
        return {"static": m.static_bytes, "activations": activations, "working-set": working,
                "allocator": m.activation_bytes + m.transient_bytes - activations - working}


def why_not(planner: Planner) -> WhyNot:
    """Called after a search that found nothing. Raises `MeshwrightError` where a plan fits after all."""
    problem, found = least_memory(planner)
    if found is not None and found.missing_bytes(problem) <= 0:
        raise MeshwrightError(f"nothing was found to fit, yet {found.title} does",
                              do="This is a bug: please report it with the command.")
    context = round(planner.space.cluster.usable_memory_bytes) - planner.pricer.capacity_bytes
    changes: list[Change] = []
    if found is not None:
        changes.append(Change(f"{found.missing_bytes(problem) / GIB:.2f} GiB more memory per GPU",
                              {"memory_bytes_per_gpu": found.capacity_bytes + context}))
    changes += [*_loosened(planner), *_more_nodes(planner)]
    started = time.perf_counter()
    shorter, searching_s = _shorter(planner) if found is not None else (None, 0.0)
    changes += [shorter] if shorter else []
    return WhyNot(found, problem, context, tuple(changes), planner.pricer.allocator_share,
                  time.perf_counter() - started - searching_s)


def least_memory(planner: Planner) -> tuple[Problem, Nearest | None]:
    """The plan of least memory: of all that the pins leave, or, where `MemoryOnly` does not decide, among the tuples
    whose stages hold least on average."""
    only = MemoryOnly(planner.pricer)
    if not only.decides():
        return _least_of_few(planner)
    least = only.least()
    search = GroupSearch(planner.pricer)
    return (search.problem([]), None) if least is None else (search.problem([least.outer]), _nearest_of(least, planner))


def _nearest_of(least: Least, planner: Planner) -> Nearest:
    memory = evaluate(GroupSearch(planner.pricer).problem([least.outer]), least.plan).memory
    stage = max(range(len(memory)), key=lambda s: memory[s].total_bytes)
    return Nearest(least.plan, stage, memory[stage], least.capacity_bytes, least.capacity_bytes - 1, True,
                   least.outer.title)


def _least_of_few(planner: Planner) -> tuple[Problem, Nearest | None]:
    search, space = GroupSearch(planner.pricer), planner.space
    estimates = []
    for group in space.groups():
        outers = search.pricer.relaxed(group).outers(space)
        if outers:
            estimates.append((_estimate(planner, group), group))
    outers = []
    for _, group in sorted(estimates, key=lambda e: e[0])[:MOST_TUPLES]:
        slim = _slim(planner, planner.pricer.full(group))
        outers += slim.outers(space)[:1]
    problem = search.problem(outers)
    return problem, nearest(problem) if outers else None


def _estimate(planner: Planner, group: Group) -> float:
    """Bytes of stage 0 of the mean stage, every layer with its least memory."""
    tables = planner.pricer.relaxed(group)
    counts, total = Counter(planner.space.order), 0.0
    held = min(group.p, group.m)
    for kind, own in enumerate(tables.choices):
        if not own:
            return float("inf")
        total += counts[kind] / group.p * min(
            c.option.static_bytes + held * (c.option.saved_bytes + c.option.saved_until_w_bytes) for c in own)
    return total


def _slim(planner: Planner, tables: GroupTables) -> GroupTables:
    """Options of the layout of least memory only, and of those what no other holds less than in every way."""
    counts, held = Counter(planner.space.order), min(tables.group.p, tables.group.m)

    def weight(o: Option) -> int:
        return o.static_bytes + held * (o.saved_bytes + o.saved_until_w_bytes) + o.transient_bytes

    best = None
    for layout in range(len(tables.layouts)):
        own = [[c for c in choices if c.option.layout_in == layout] for choices in tables.choices]
        if all(own):
            total = sum(counts[k] / tables.group.p * min(weight(c.option) for c in choices)
                        for k, choices in enumerate(own))
            if best is None or total < best[0]:
                best = total, own
    if best is None:
        return tables
    kept = tuple(tuple(_smallest(own)) for own in best[1])
    return GroupTables(tables.group, tables.layouts, kept, tables.reshard, tables.transfer)


def _smallest(own: list[Choice]) -> list[Choice]:
    def row(c: Choice) -> tuple[int, int, int]:
        o = c.option
        return o.static_bytes, o.saved_bytes + o.saved_until_w_bytes, o.transient_bytes

    rows = [row(c) for c in own]
    return [c for i, c in enumerate(own) if not any(
        (rows[j] != rows[i] or j < i) and all(a <= b for a, b in zip(rows[j], rows[i], strict=True))
        for j in range(len(own)) if j != i)]


# -- changes --------------------------------------------------------------------------------------
def applied(planner: Planner, change: Change) -> Planner:
    """The planner of the changed request."""
    asked = change.request
    if "memory_bytes_per_gpu" in asked:
        other, cluster = planner.with_request(), planner.cluster
        memory = cluster.device.memory_bytes + asked["memory_bytes_per_gpu"] - cluster.usable_memory_bytes
        other.cluster = replace(cluster, device=replace(cluster.device, memory_bytes=memory))
        return other
    if "pins" in asked or "banned" in asked:
        pins = replace(planner.request.pins, **asked.get("pins", {}))
        return planner.with_request(pins=replace(pins, banned=frozenset(asked.get("banned", pins.banned))))
    return planner.with_request(**asked)


def fits(planner: Planner, *, one_sample: bool = False) -> bool:
    """Whether any plan fits."""
    if too_few(planner, planner.cluster.gpus):
        return False
    try:
        only = MemoryOnly(planner.pricer, one_sample=one_sample)
        if only.decides():
            return only.fits()
        searched = GroupSearch(planner.pricer, within=LOOSE, most_work=0).run()
    except MeshwrightError:
        return False
    return isinstance(searched.result, Found)


def too_few(planner: Planner, gpus: int) -> bool:
    """Whether weights, gradients and optimizer alone, cut into as many parts as there are GPUs, are too large."""
    trained = min(planner.model.one.parameter_count, sum(
        p.count for k in planner.space.order for p in planner.space.kinds[k].parameters if p.trainable))
    t = planner.request.training
    return trained * (t.parameter_bytes + t.gradient_bytes + t.optimizer_bytes) > gpus * planner.space.capacity_bytes


def _helps(planner: Planner, change: Change) -> bool:
    try:
        return fits(applied(planner, change))
    except MeshwrightError:  # another pin or ban excludes it
        return False


def _loosened(planner: Planner) -> Iterator[Change]:
    """Of every pin the nearest value that fits, else without it; of every ban, whether lifting it does; all of them
    left out where no single one helps."""
    pins = planner.request.pins
    found = False
    for f in fields(Pins):
        value, word = getattr(pins, f.name), f.name.replace("_", "-")
        if f.name == "banned" or value is None:
            continue
        for other in (*_nearest_values(planner, f.name, value), None):
            change = Change(f"--{word} {other} instead of --{word} {value}" if other is not None else
                            f"--{word} {value} left out", {"pins": {f.name: other}})
            if _helps(planner, change):
                yield change
                found = True
                break
    for name in sorted(pins.banned):
        change = Change(f"--ban {name} left out", {"banned": sorted(pins.banned - {name})})
        if _helps(planner, change):
            yield change
            found = True
    if not found and len(pins.words()) > 1 and fits(planner.with_request(pins=Pins())):
        nothing = {f.name: None for f in fields(Pins) if f.name != "banned"}
        yield Change("all pins and bans left out", {"pins": nothing, "banned": []})


def _nearest_values(planner: Planner, axis: str, value: Any) -> list[Any]:
    """Other values of an axis, the nearest first; of recomputation and ZeRO, those that hold less."""
    if axis == "recompute":
        return list(MODES[MODES.index(value) + 1:])
    if axis == "zero":
        return list(range(value + 1, 4))
    if axis in ("schedule", "interleave"):
        return []
    whole = planner.batch if axis in ("micro_batch", "micro_batches") else planner.cluster.gpus
    return sorted((n for n in divisors(whole) if n != value), key=lambda n: (round(abs(math.log(n / value)), 9), n))


def _more_nodes(planner: Planner) -> Iterator[Change]:
    """The fewest of `more_than` that fit."""
    cluster, name = planner.cluster, planner.request.cluster
    size, _, device = name.partition(" ")
    if "x" not in size or not device or name != cluster.name:
        return
    for nodes in more_than(cluster.nodes):
        if too_few(planner, nodes * cluster.gpus_per_node):
            continue
        larger = f"{nodes}x{cluster.gpus_per_node} {device.strip()}"
        change = Change(f'--cluster "{larger}"', {"cluster": larger})
        if _helps(planner, change):
            yield change
            return


def more_than(nodes: int) -> list[int]:
    """Larger numbers of nodes: every one up to 16, in eighths up to twice as many, then in quarters of each doubling up
    to 32 times as many."""
    found = {*range(nodes + 1, 17), *(nodes * (8 + k) // 8 for k in range(1, 9)),
             *(nodes * 2**j * (4 + k) // 4 for j in range(1, 5) for k in range(1, 5))}
    return sorted(n for n in found if n > nodes)


def _shorter(planner: Planner) -> tuple[Change | None, float]:
    """The longest sequence that fits, and the seconds that looking for it took, captures apart. It is estimated from
    what grows with the samples, then captured and decided, at most three lengths."""
    if too_few(planner, planner.cluster.gpus):
        return None, 0.0
    seq = planner.model.one.seq
    unit, spent = min(TOKENS, max(1, seq // 8)), 0.0

    def estimated(units: int) -> bool:
        return MemoryOnly(planner.pricer, tokens=units * unit / seq, one_sample=True).fits()

    started = time.perf_counter()
    low, high = 0, -(-seq // unit)
    possible = MemoryOnly(planner.pricer).decides() and estimated(1)
    while possible and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if estimated(middle) else (low, middle)
    spent += time.perf_counter() - started
    for units in range(low, max(0, low - 3), -1):
        change = Change(f"--seq {units * unit}", {"seq": units * unit})
        other = applied(planner, change)
        try:
            other.model.at(1)
        except MeshwrightError:
            return None, spent
        started = time.perf_counter()
        found = fits(other, one_sample=True)
        spent += time.perf_counter() - started
        if found:
            return change, spent
    return None, spent
