"""The integer search over counts equals enumeration, on random problems with memory limits and negative weights."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import pytest

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


def problem(seed: int) -> tuple[list[float], list[Pool]]:
    draw = random.Random(seed)
    lines = draw.randint(1, 4)
    least = draw.choice([0.0, -3.0])
    pools = []
    for _ in range(draw.randint(1, 3)):
        options, count = draw.randint(1, 4), draw.randint(1, 4)
        memory = tuple(draw.randint(1, 30) for _ in range(options))
        values = tuple(tuple(draw.uniform(least, 10.0) for _ in range(lines)) for _ in range(options))
        pools.append(Pool(count, draw.randint(count * min(memory) - 2, count * max(memory)), memory, values))
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
    assert 0 < infeasible <= 35  # of this sample: most problems have a solution to compare


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
    # The bound mixes options in real shares; making three shares whole moves at most two layers to another option.
    spread = max(max(column) - min(column) for column in zip(*pool.values, strict=True))
    assert found[0] <= lower_bound([0.0, 3.0], [pool]) + 2 * spread
