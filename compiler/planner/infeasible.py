"""Why nothing fits: the binding stage of the plan of least memory, what is missing, and changes that fit when tried.

Memory needs no times: per tuple and layout, the least that a stage can hold is a sum over its layers. The tuple of
least memory is then cut exactly by `nearest.py`. A change is only named after a search has found a plan with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ...runtime.errors import MeshwrightError
from .group_search import GroupSearch
from .nearest import GIB, Nearest, nearest
from .pricing import Choice, GroupTables
from .problem import Option, Problem
from .search import Found
from .space import Group, Pins

if TYPE_CHECKING:
    from .plan_model import Planner

MOST_TUPLES = 2
LOOSE = 0.9  # a plan that fits is wanted, not a fast one


@dataclass(frozen=True)
class Change:
    """A change of the request with which a plan was found."""

    what: str
    request: dict[str, Any]


@dataclass(frozen=True)
class WhyNot:
    """`nearest`: the plan of least memory found, under `capacity_bytes`; None where no option exists at all."""

    nearest: Nearest | None
    problem: Problem
    context_bytes: int
    changes: tuple[Change, ...]

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
                "memory_bytes": {"static": near.memory.static_bytes, "activations": near.memory.activation_bytes,
                                 "working-set": near.memory.transient_bytes} if near else None,
                "changes": [{"what": c.what, **c.request} for c in self.changes]}


def why_not(planner: Planner) -> WhyNot:
    """Called after a search that found nothing. Raises `MeshwrightError` where a plan fits after all."""
    problem, found = least_memory(planner)
    if found is not None and found.missing_bytes(problem) <= 0:
        raise MeshwrightError(f"nothing was found to fit, yet {found.title} does",
                              do="This is a bug: please report it with the command.")
    context = round(planner.space.cluster.usable_memory_bytes) - planner.pricer.capacity_bytes
    changes = [] if found is None else [Change(
        f"{found.missing_bytes(problem) / GIB:.2f} GiB more memory per GPU",
        {"memory_bytes_per_gpu": planner.pricer.capacity_bytes + context + found.missing_bytes(problem)})]
    changes += _changes(planner)
    return WhyNot(found, problem, context, tuple(changes))


def least_memory(planner: Planner) -> tuple[Problem, Nearest | None]:
    """The plan of least memory, among the tuples whose stages hold least on average."""
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
def _changes(planner: Planner) -> Iterator[Change]:
    """Pins to give up, more nodes, shorter sequences: the first of each sort that fits."""
    pins = planner.request.pins
    for f in fields(Pins):
        if f.name != "banned" and getattr(pins, f.name) is not None:
            loose = Pins(**{g.name: getattr(pins, g.name) for g in fields(Pins) if g.name != f.name})
            if fits(planner.with_request(pins=loose)):
                yield Change(f"--{f.name.replace('_', '-')} {getattr(pins, f.name)} left out", {"without": f.name})
                return
    cluster, name = planner.cluster, planner.request.cluster
    size, _, device = name.partition(" ")
    if "x" in size and device and planner.request.cluster == cluster.name:
        for factor in (2, 3, 4, 6, 8, 12, 16, 32):
            larger = f"{cluster.nodes * factor}x{cluster.gpus_per_node} {device.strip()}"
            if fits(planner.with_request(cluster=larger)):
                yield Change(f'--cluster "{larger}"', {"cluster": larger})
                return


def fits(planner: Planner) -> bool:
    """Whether a search finds any plan."""
    try:
        searched = GroupSearch(planner.pricer, within=LOOSE, most_work=0).run()
    except MeshwrightError:
        return False
    return isinstance(searched.result, Found)

