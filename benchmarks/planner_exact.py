"""The planner's search against enumeration and CP-SAT: `python benchmarks/planner_exact.py [--quick]`.

Random problems that differ in pipeline degree, chunks, schedule, options, kinds of layers, re-sharding, transfers and
capacity (`_planner_instances.py`). On each: J of the plan found equals the optimum over the whole space, by enumeration
and by CP-SAT, in integers; no outer tuple's lower bound is above its optimum; the certificate verifies and how often it
closes the gap; an infeasible problem is recognised, and the least capacity named is the least by enumeration.
Then the same comparison with a fault planted in the planner must fail.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import numpy as np  # noqa: E402

from benchmarks._harness import goal_line, print_table, write_result  # noqa: E402
from benchmarks._planner_instances import Enumerated, enumerate_plans, optimum_ns, sharpened  # noqa: E402
from meshwright.compiler.planner import evaluate as evaluate_module  # noqa: E402
from meshwright.compiler.planner.bound import Bound  # noqa: E402
from meshwright.compiler.planner.certificate import certify, verify  # noqa: E402
from meshwright.compiler.planner.evaluate import evaluate  # noqa: E402
from meshwright.compiler.planner.fronts import Fronts  # noqa: E402
from meshwright.compiler.planner.knapsack import INFINITE  # noqa: E402
from meshwright.compiler.planner.nearest import nearest  # noqa: E402
from meshwright.compiler.planner.problem import Plan, Problem  # noqa: E402
from meshwright.compiler.planner.prove import prove  # noqa: E402
from meshwright.compiler.planner.search import Found, search  # noqa: E402
from meshwright.compiler.planner.tables import Tables  # noqa: E402
from meshwright.cost_model.in_flight import Held  # noqa: E402
from meshwright.runtime.errors import MeshwrightError  # noqa: E402

INSTANCES, QUICK, FAULTY = 504, 48, 64


@dataclass
class Tally:
    """Counts and seconds over all instances; `wrong` names every difference."""

    instances: int = 0
    plans: int = 0
    infeasible: int = 0
    memory_bound: int = 0
    mixed: int = 0
    closed: int = 0
    tuples: int = 0
    cp_sat: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        started = time.process_time()
        found = call()
        self.seconds[name] += time.process_time() - started
        return found


def check(seed: int, tally: Tally, cp_sat_limit_s: float = 120.0) -> None:
    """One instance: every comparison, differences into `tally.wrong`."""
    problem = sharpened(seed)
    enumerated = tally.timed("enumeration", lambda: enumerate_plans(problem))
    best = optimum_ns(enumerated)
    found = tally.timed("search", lambda: search(problem))
    step_ns = found.evaluation.step_ns if isinstance(found, Found) else None
    _expect(tally, seed, "search", step_ns, best)
    _expect(tally, seed, "nothing left out", found.exact if isinstance(found, Found) else found.proven, True)
    proof = tally.timed("CP-SAT", lambda: prove(problem, None, cp_sat_limit_s))
    if proof.verdict == "timed out":
        tally.counts["CP-SAT timed out"] += 1
    else:
        tally.cp_sat += 1
        _expect(tally, seed, "CP-SAT", proof.step_ns, best)
    for index, own in enumerate(enumerated):
        bound = tally.timed("bounds", lambda i=index: Bound(problem, problem.outers[i]).lower_bound(relative=0.0))
        if bound > (own.step_ns if own.step_ns is not None else INFINITE):
            tally.wrong.append(f"seed {seed}, tuple {index}: bound {bound} above the optimum {own.step_ns}")
    if isinstance(found, Found):
        certificate = tally.timed("certificate", lambda: certify(problem, found.plan))
        _expect(tally, seed, "certificate", verify(problem, certificate), [])
        tally.closed += certificate.gap == 0
    else:
        capacity = tally.timed("nearest", lambda: nearest(problem))
        _expect(tally, seed, "least capacity", capacity and capacity.capacity_bytes,
                min(e.least_bytes for e in enumerated))
    _describe(tally, problem, enumerated, found.plan if isinstance(found, Found) else None)


def _expect(tally: Tally, seed: int, what: str, got: object, wanted: object) -> None:
    if got != wanted:
        tally.wrong.append(f"seed {seed}, {what}: {got} instead of {wanted}")


def _describe(tally: Tally, problem: Problem, enumerated: list[Enumerated], plan: Plan | None) -> None:
    tally.instances += 1
    tally.tuples += len(problem.outers)
    tally.plans += sum(e.plans for e in enumerated)
    tally.infeasible += plan is None
    for outer in problem.outers:
        tally.counts.update([f"p={outer.p}", f"v={outer.v}", outer.schedule])
    tally.counts["mixing allowed"] += problem.mixing
    if plan is None:
        return
    unlimited = min(e.unlimited_ns for e in enumerated)
    tally.memory_bound += optimum_ns(enumerated) != unlimited
    taken: dict[int, set[int]] = {}
    for kind, option in zip(problem.layers, plan.options, strict=True):
        taken.setdefault(kind, set()).add(option)
    tally.mixed += any(len(options) > 1 for options in taken.values())
    tally.counts["optimum re-shards"] += _reshards(problem, plan)


def _reshards(problem: Problem, plan: Plan) -> bool:
    """Whether the plan changes a layout at a price inside a part."""
    outer, parts = problem.outers[plan.outer], plan.part_of_layer()
    chosen = [outer.options[kind][o] for kind, o in zip(problem.layers, plan.options, strict=True)]
    return any(parts[i] == parts[i + 1] and outer.reshard[chosen[i].layout_out][chosen[i + 1].layout_in].forward_ns
               for i in range(len(parts) - 1))


# -- planted faults -------------------------------------------------------------------------------
def _one_less(self: Tables, stage: int) -> tuple[Held, ...]:
    return tuple(Held(tuple(max(0, n - 1) for n in h.until_b), tuple(max(0, n - 1) for n in h.until_w))
                 for h in HELD(self, stage))


def _peak_of_one(schedule: Any, stage: int, until_b: Any, until_w: Any) -> int:
    return sum(until_b) + sum(until_w)


def _no_reshard(self: Fronts, last: int, first: int) -> Any:
    return np.zeros(8, np.int64)


HELD = Tables.held
FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "search: one micro-batch too few in flight": [(Tables, "held", _one_less)],
    "search: re-sharding dropped": [(Fronts, "_reshard", _no_reshard)],
    "everywhere: one micro-batch in flight": [(evaluate_module, "peak_activation_bytes", _peak_of_one),
                                              (Tables, "held", lambda self, stage: (Held((1,) * self.outer.v,
                                                                                         (1,) * self.outer.v),))],
}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The planner with a fault."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, wrong in FAULTS[name]:
            stack.enter_context(mock.patch.object(owner, attribute, wrong))
        yield


def caught(name: str, seed: int) -> bool:
    """Whether the comparison with enumeration notices the fault on this instance."""
    problem = sharpened(seed)
    best = optimum_ns(enumerate_plans(problem))
    with planted(name):
        try:
            found = search(problem)
        except MeshwrightError:
            return True
        step_ns = found.evaluation.step_ns if isinstance(found, Found) else None
    if step_ns != best:
        return True
    return isinstance(found, Found) and not evaluate(problem, found.plan).fits


# -- report ---------------------------------------------------------------------------------------
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} instances, no result file")
    parser.add_argument("--instances", type=int, default=INSTANCES)
    args = parser.parse_args()
    tally, count = Tally(), QUICK if args.quick else args.instances
    for seed in range(count):
        check(seed, tally)
        if seed % 50 == 49:
            print(f"{seed + 1} of {count}, {len(tally.wrong)} differences", flush=True)
    faults = {name: sum(caught(name, seed) for seed in range(min(count, FAULTY))) for name in FAULTS}
    shares = {"infeasible": tally.infeasible / count, "memory-bound": tally.memory_bound / count,
              "mixed optimum": tally.mixed / count,
              "certificate closes the gap": tally.closed / max(1, count - tally.infeasible)}
    print_table("Random problems", ["", ""], [
        ["instances", tally.instances], ["outer tuples", tally.tuples], ["plans enumerated", tally.plans],
        *[[f"share {name}", share] for name, share in shares.items()], *sorted(tally.counts.items()),
        ["solved by CP-SAT", tally.cp_sat], ["differences", len(tally.wrong)]])
    print_table("CPU seconds", ["", ""], [[name, s] for name, s in tally.seconds.items()])
    print_table("Planted faults", ["", f"noticed on, of {min(count, FAULTY)}"], list(faults.items()))
    for line in tally.wrong:
        print(line)
    print(goal_line("share infeasible", shares["infeasible"], 0.10))
    print(goal_line("share memory-bound", shares["memory-bound"], 0.30))
    print(goal_line("share with a mixed optimum", shares["mixed optimum"], 0.20))
    print(goal_line("differences", len(tally.wrong), 0, at_least=False))
    if not args.quick:
        path = write_result("planner_exact", {
            "instances": tally.instances, "outer_tuples": tally.tuples, "plans": tally.plans, "shares": shares,
            "counts": dict(sorted(tally.counts.items())), "solved_by_cp_sat": tally.cp_sat,
            "differences": tally.wrong, "cpu_seconds": dict(tally.seconds), "faults_noticed": faults,
            "faults_tried_on": min(count, FAULTY)})
        print(path.relative_to(ROOT))
    return 1 if tally.wrong or not all(faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
