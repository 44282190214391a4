"""The planner under Galvatron's formulas: equal to brute force, no slower than its own plans, honest when none fits."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.compiler.planner.galvatron import (
    Ask,
    DoesNotFit,
    Found,
    embedding_strategies,
    galvatron_config,
    layer_strategies,
    search,
)
from meshwright.cost_model import galvatron as cost
from meshwright.cost_model.galvatron import Plan, Setting, Strategy
from meshwright.cost_model.galvatron_profile import Profile, read_profile
from meshwright.runtime.errors import InvalidInputError

DATA = Path(__file__).parents[2] / "cost_model" / "data" / "galvatron"
PROFILE = read_profile(DATA, 8)


def all_plans(profile: Profile, ask: Ask) -> Iterator[Plan]:
    """Every plan of the space, layers of a stage in one order only; the buffer is the smallest that its rule allows."""
    for pp, chunks in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if ask.layers % pp or pp > profile.gpus or (pp > 1 and chunks < pp) or ask.global_batch % chunks:
            continue
        if ask.chunks not in (None, chunks):
            continue
        setting, gpus, whole = Setting(pp, ask.layers, ask.global_batch, chunks), 8 // pp, ask.global_batch // chunks
        options = [s for s in layer_strategies(gpus) if whole % s.dp == 0 and ask.keep(s)]
        stages = list(itertools.combinations_with_replacement(options, ask.layers // pp))
        for embedding in embedding_strategies(gpus):
            if whole % embedding.dp or not ask.keep(embedding):
                continue
            for division in itertools.product(stages, repeat=pp):
                layers = tuple(itertools.chain(*division))
                used = (*layers, embedding)
                degree = max(s.degree for s in used) if any(s.tp > 1 for s in used) else None
                yield Plan(setting, (ask.layers // pp,) * pp, layers, embedding, degree)


def brute_force(profile: Profile, ask: Ask) -> float:
    usable = cost.usable_mb(ask.memory_gb)
    prices = (cost.price(profile, plan) for plan in all_plans(profile, ask))
    return min((p.time_s for p in prices if max(p.used_mb) <= usable), default=math.inf)


def random_case(seed: int) -> tuple[Profile, Ask]:
    """A profile with links up to 300 times slower, so that synchronisation matters, and a space one can list."""
    draw = random.Random(seed)
    slow = draw.choice([1.0, 10.0, 300.0])
    profile = replace(PROFILE, parameter_mb=draw.uniform(100, 2000),
                      allreduce_mb_per_ms={k: v / slow for k, v in PROFILE.allreduce_mb_per_ms.items()})
    pp = draw.choice([1, 2, 2, 4])
    gpus = 8 // pp
    few = set(draw.sample(layer_strategies(gpus), min(len(layer_strategies(gpus)), {1: 5, 2: 4, 4: 3}[pp])))
    few |= set(draw.sample(embedding_strategies(gpus), 2))
    layers = {1: draw.randint(1, 4), 2: draw.choice([2, 4, 6]), 4: 4}[pp]
    batch, chunks = draw.choice([(8, 2), (8, 4), (16, 4), (32, 8)])
    memory_gb = draw.choice([4, 6, 8, 12, 18, 26])
    return profile, Ask(layers, memory_gb, batch, chunks if pp < 4 else max(chunks, 4), keep=few.__contains__)


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_equals_brute_force(first: int) -> None:
    for seed in range(first, first + 15):
        profile, ask = random_case(seed)
        best = brute_force(profile, ask)
        try:
            found = search(profile, ask)
        except InvalidInputError as error:
            assert "no strategy is left" in str(error) and best == math.inf
            continue
        if isinstance(found, DoesNotFit):
            assert best == math.inf, seed
            continue
        assert found.price.time_s == pytest.approx(best, rel=1e-9), seed
        assert max(found.price.used_mb) <= cost.usable_mb(ask.memory_gb)


@pytest.mark.parametrize(("memory_gb", "published"), [(16, 9.9925), (24, 11.8177), (36, 14.0054), (80, 17.1723)])
def test_at_least_as_fast_as_its_own_search(memory_gb: float, published: float) -> None:
    started = time.process_time()
    found = search(PROFILE, Ask(32, memory_gb, 64, 8))
    assert time.process_time() - started < 1.0
    assert isinstance(found, Found)
    assert round(found.price.samples_per_s, 4) >= published
    assert max(found.price.used_mb) <= cost.usable_mb(memory_gb)
    assert len(found.plan.layers) == 32 and sum(found.plan.division) == 32


def test_searched_chunks_are_never_worse_than_fixed_ones() -> None:
    searched = search(PROFILE, Ask(32, 24, 64))
    assert isinstance(searched, Found)
    for chunks in (1, 2, 4, 8, 16, 32, 64):
        fixed = search(PROFILE, Ask(32, 24, 64, chunks))
        if isinstance(fixed, Found):
            assert searched.price.time_s <= fixed.price.time_s * (1 + 1e-12)


def test_depth_costs_little() -> None:
    started = time.process_time()
    assert isinstance(search(PROFILE, Ask(1024, 640, 64, 8)), Found)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize("ask", [Ask(96, 36, 64, 8), Ask(96, 36, 64), Ask(30, 8, 64, 4), Ask(3, 2, 8, 8)])
def test_the_nearest_change_fits_and_is_the_smallest(ask: Ask) -> None:
    def fits(**change: float) -> bool:
        return isinstance(search(PROFILE, replace(ask, **change)), Found)

    bad = search(PROFILE, ask)
    assert isinstance(bad, DoesNotFit)
    assert bad.missing_gib > 0 and f"{bad.missing_gib:.2f} GiB are missing" in bad.sentence()
    tried = range(int(ask.memory_gb) + 1, bad.memory_gb + 1)
    assert [gb for gb in tried if fits(memory_gb=gb)] == [bad.memory_gb]
    tried = range(ask.layers - 1, (bad.layers or 1) - 1, -1)
    assert [n for n in tried if fits(layers=n)] == ([bad.layers] if bad.layers else [])
    if bad.chunks:
        assert fits(chunks=bad.chunks)


def test_the_exported_plan_has_the_fields_of_its_own() -> None:
    import json

    shipped = json.loads(next(DATA.rglob("galvatron_config_*.json")).read_text())
    mixed = (Strategy(2, 1, 2, "zero2", True), Strategy(1, 2, 2, "zero3"), Strategy(1, 1, 4, "zero3"))
    plan = Plan(Setting(2, 6, 64, 8), (3, 3), mixed * 2, Strategy(1, 4, 1), 4)
    config = galvatron_config(plan)
    assert list(config) == list(shipped)
    assert {k: type(v) for k, v in config.items()} == {k: type(v) for k, v in shipped.items()}
    assert config["tp_sizes_enc"] == "2,2,1,2,2,1" and config["use_sp"] == "0,1,0,0,1,0"
    assert config["dp_types_enc"] == "0,1,1,0,1,1" and config["checkpoint"] == "1,0,0,1,0,0"
    assert (config["pp_division"], config["vtp"], config["vsp"], config["embed_sdp"]) == ("3,3", 4, 1, 0)


@pytest.mark.parametrize(("ask", "message"), [
    (lambda: Ask(0, 36, 64), "layers 0; expected a positive number"),
    (lambda: Ask(32, math.nan, 64), "memory nan; expected a positive number"),
    (lambda: Ask(32, 36, 64, 7),
     "7 chunks for a global batch of 64; expected a divisor of the batch. The nearest is 8"),
    (lambda: search(PROFILE, Ask(32, 36, 64, keep=lambda s: False)), "no strategy is left"),
])
def test_bad_asks_are_refused(ask, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ask()
