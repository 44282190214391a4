"""The integer search over counts equals enumeration, on random problems with memory limits and negative weights."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from meshwright.compiler.planner.counts import Pool, lower_bound, minimise


def vectors(count: int, options: int) -> Iterator[tuple[int, ...]]:
    if options == 1:
        yield (count,)
        return
    for n in range(count + 1):
        for rest in vectors(count - n, options - 1):
            yield (n, *rest)


def value(offsets: Sequence[float], pools: Sequence[Pool], counts: Sequence[Sequence[int]]) -> float:
    return max(offset + sum(n * v[j] for pool, own in zip(pools, counts, strict=True)
                            for n, v in zip(own, pool.values, strict=True)) for j, offset in enumerate(offsets))


def enumerated(offsets: Sequence[float], pools: Sequence[Pool]) -> float:
    fitting = [[own for own in vectors(pool.count, len(pool.memory))
                if sum(n * m for n, m in zip(own, pool.memory, strict=True)) <= pool.capacity] for pool in pools]
    return min((value(offsets, pools, counts) for counts in itertools.product(*fitting)), default=math.inf)


def solved_by_milp(offsets: Sequence[float], pool: Pool) -> float:
    """The optimum by another solver (HiGHS), to its own tolerance: minimise t with every line at most t."""
    columns, options = np.array(pool.values).T, len(pool.memory)
    lines = np.hstack([columns, -np.ones((len(offsets), 1))])
    count, memory = np.array([[*[1.0] * options, 0.0]]), np.array([[*map(float, pool.memory), 0.0]])
    found = milp(np.array([*[0.0] * options, 1.0]), integrality=[*[1] * options, 0],
                 bounds=Bounds([*[0.0] * options, -np.inf], [*[float(pool.count)] * options, np.inf]),
                 constraints=[LinearConstraint(lines, -np.inf, -np.array(offsets)),
                              LinearConstraint(count, pool.count, pool.count),
                              LinearConstraint(memory, -np.inf, pool.capacity)], options={"mip_rel_gap": 0.0})
    assert found.success, found.message
    return float(found.fun)


def problem(seed: int) -> tuple[list[float], list[Pool]]:
    draw = random.Random(seed)
    lines = draw.randint(1, 4)
    least = draw.choice([0.0, -3.0])
    pools = []
    for _ in range(draw.randint(1, 3)):
        options, count = draw.randint(1, 4), draw.randint(1, 4)
        memory = tuple(draw.randint(1, 30) for _ in range(options))
        values = tuple(tuple(draw.uniform(least, 10.0) for _ in range(lines)) for _ in range(options))
        least_capacity = count * min(memory) - (2 if draw.random() < 0.3 else 0)  # a few problems have no solution
        pools.append(Pool(count, draw.randint(least_capacity, count * max(memory)), memory, values))
    return [draw.uniform(-5, 5) for _ in range(lines)], pools


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_equals_enumeration(first: int) -> None:
    infeasible = 0
    for seed in range(first, first + 50):
        offsets, pools = problem(seed)
        best, found = enumerated(offsets, pools), minimise(offsets, pools)
        if found is None:
            infeasible += 1
            assert best == lower_bound(offsets, pools) == math.inf, seed
            continue
        assert found[0] == pytest.approx(best, rel=1e-9, abs=1e-9), seed
        assert value(offsets, pools, found[1]) == pytest.approx(best, rel=1e-9, abs=1e-9), seed
        assert lower_bound(offsets, pools) <= best + 1e-9, seed
    assert 0 < infeasible < 25


def test_nothing_below_the_incumbent() -> None:
    pool = Pool(3, 10, (1,), ((2.0,),))
    assert minimise([1.0], [pool], below=7.0) is None
    assert minimise([1.0], [pool], below=7.1) == (7.0, ((3,),))


def test_a_thousand_layers() -> None:
    draw = random.Random(1)
    memory = tuple(draw.randint(100, 3000) for _ in range(12))
    pool = Pool(1000, 1_200_007, memory, tuple((1e5 / m + draw.random(), 1e4 / m) for m in memory))
    found = minimise([0.0, 3.0], [pool])
    assert found is not None and found[0] >= lower_bound([0.0, 3.0], [pool])
    assert value([0.0, 3.0], [pool], found[1]) == pytest.approx(found[0], rel=1e-9)
    assert found[0] == pytest.approx(solved_by_milp([0.0, 3.0], pool), rel=1e-7)
