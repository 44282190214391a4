"""The least memory of any plan, against enumeration of every cut and option, and against the search itself."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path

import pytest

from meshwright.compiler.planner.captured import ModelAtAnyBatch
from meshwright.compiler.planner.evaluate import evaluate
from meshwright.compiler.planner.group_search import GroupSearch
from meshwright.compiler.planner.infeasible import fits
from meshwright.compiler.planner.memory_only import MemoryOnly
from meshwright.compiler.planner.plan_model import Planner, Request
from meshwright.compiler.planner.pricing import Choice
from meshwright.compiler.planner.search import Found
from meshwright.compiler.planner.space import Pins
from meshwright.cost_model.in_flight import in_flight

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
         "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3, "vocab_size": 2048,
         "max_position_embeddings": 1 << 16}
EXPERTS = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
           "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, config in (("llama", LLAMA), ("experts", EXPERTS)):
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(config))
    return path


@lru_cache(maxsize=8)
def model(path: str, seq: int) -> ModelAtAnyBatch:
    return ModelAtAnyBatch(path, seq)


def planner(path: Path, cluster: str, seq: int, batch: int, pins: Pins | None = None) -> Planner:
    return Planner(Request(str(path), cluster, seq, batch, pins or Pins()), model(str(path), seq))


def with_memory(one: Planner, capacity_bytes: int) -> Planner:
    """The same ask on GPUs with so much memory for a plan."""
    other = Planner(one.request, one.model)
    more = capacity_bytes - one.space.capacity_bytes
    device = one.cluster.device
    other.cluster = replace(one.cluster, device=replace(device, memory_bytes=device.memory_bytes + more))
    return other


def enumerated(one: Planner) -> int:
    """The least of the fullest stage over all groups, cuts and options. Layers of a kind on a stage are equal, and any
    sum of theirs is linear in how many take which option: the least is where all take one."""
    order, best = one.space.order, 1 << 62
    for group in one.space.groups():
        tables = one.pricer.full(group)
        for name, v in one.space.schedules(group):
            if v > 1:
                continue
            schedule = tables.outer(name, v).order
            for inner in combinations(range(1, len(order)), group.p - 1):
                ends = (0, *inner, len(order))
                best = min(best, max(
                    _stage([tables.choices[k] for k in dict.fromkeys(order[a:b])],
                           [order[a:b].count(k) for k in dict.fromkeys(order[a:b])],
                           in_flight(schedule, s), in_flight(schedule, s, until="W"))
                    for s, (a, b) in enumerate(zip(ends, ends[1:], strict=False))))
    return best


def _stage(kinds: list[tuple[Choice, ...]], counts: list[int], until_b: int, until_w: int) -> int:
    """Zero-bubble H1's two counts need not be at one moment: both at once is above it, never below."""
    def total(choices: tuple[Choice, ...]) -> int:
        own = [c.option for c in choices]
        return sum(n * (o.static_bytes + until_b * o.saved_bytes + until_w * o.saved_until_w_bytes)
                   for o, n in zip(own, counts, strict=True)) + max(o.transient_bytes for o in own)

    return min((total(choices) for choices in product(*kinds)), default=1 << 62)


def cases() -> Iterator[tuple[str, str, int, int, Pins]]:
    drawn = random.Random(7)
    for _ in range(8):
        pins = drawn.choice([Pins(), Pins(zero=drawn.choice([0, 1, 2])), Pins(recompute="none"), Pins(tp=2),
                             Pins(micro_batch=drawn.choice([1, 2, 4])), Pins(schedule="gpipe"), Pins(pp=2),
                             Pins(banned=frozenset({"zero3", "full"}))])
        yield (drawn.choice(["llama", "experts"]), drawn.choice(["1x2 h100-sxm", "1x4 h100-sxm", "2x2 a100-80"]),
               drawn.choice([256, 512]), drawn.choice([4, 8]), pins)


@pytest.mark.parametrize(("name", "cluster", "seq", "batch", "pins"), list(cases()))
def test_least_memory_is_that_of_enumeration_and_of_the_search(folder: Path, name: str, cluster: str, seq: int,
                                                               batch: int, pins: Pins) -> None:
    one = planner(folder / name, cluster, seq, batch, pins)
    assert MemoryOnly(one.pricer).decides()
    least = MemoryOnly(one.pricer).least()
    assert least is not None and least.capacity_bytes == enumerated(one)
    alone = GroupSearch(one.pricer).problem([least.outer])
    assert max(s.total_bytes for s in evaluate(alone, least.plan).memory) == least.capacity_bytes
    assert fits(with_memory(one, least.capacity_bytes)) and not fits(with_memory(one, least.capacity_bytes - 1))
    enough, little = (GroupSearch(with_memory(one, least.capacity_bytes + n).pricer).run().result for n in (0, -1))
    assert isinstance(enough, Found) and enough.evaluation.fits
    assert not isinstance(little, Found) or _interleaved(one, little)


def _interleaved(one: Planner, found: Found) -> bool:
    return "interleaved" in [o.title for o in GroupSearch(one.pricer).run().problem.outers][found.plan.outer]


def test_what_is_not_decided_says_so(folder: Path) -> None:
    one = planner(folder / "llama", "1x2 h100-sxm", 256, 8, Pins(pp=2, schedule="zb-h1"))
    assert not MemoryOnly(one.pricer).decides()
    assert fits(one)


def test_an_estimate_of_a_shorter_sequence_is_that_of_its_capture(folder: Path) -> None:
    one = planner(folder / "llama", "1x4 h100-sxm", 1024, 8)
    half = planner(folder / "llama", "1x4 h100-sxm", 512, 8)
    estimated = MemoryOnly(one.pricer, tokens=0.5, one_sample=True)
    captured = MemoryOnly(half.pricer, one_sample=True)
    bytes_ = {name: [h[:3] for group, _ in only.groups() for own in only._held(group, set()) for h in own]
              for name, only in (("estimated", estimated), ("captured", captured))}
    assert len(bytes_["estimated"]) == len(bytes_["captured"]) > 10
    for a, b in zip(bytes_["estimated"], bytes_["captured"], strict=True):
        assert a == pytest.approx(b, rel=0.05, abs=1e5)
