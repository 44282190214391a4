"""What does not fit gets the binding constraint and changes that fit: each is applied and planned, and nothing nearer
of its sort fits, by searching everything nearer."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright.compiler.planner import plan_model
from meshwright.compiler.planner.captured import ModelAtAnyBatch
from meshwright.compiler.planner.group_search import GroupSearch, Searched
from meshwright.compiler.planner.infeasible import Change, WhyNot, _nearest_values, applied, more_than
from meshwright.compiler.planner.memory_only import MemoryOnly
from meshwright.compiler.planner.plan_model import Planner, Request
from meshwright.compiler.planner.search import Found, NothingFits
from meshwright.compiler.planner.space import MODES, Pins
from meshwright.runtime.errors import MeshwrightError

from .planning import NODE, planner

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
          "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3, "vocab_size": 2048,
          "max_position_embeddings": 1 << 16}
LARGER = {**CONFIG, "hidden_size": 2560, "intermediate_size": 8192, "num_attention_heads": 20,
          "num_key_value_heads": 20, "num_hidden_layers": 30, "vocab_size": 32000}


def written(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def searched(one: Planner) -> bool:
    """Whether a search, not the answer's own arithmetic, finds a plan."""
    try:
        return isinstance(GroupSearch(one.pricer, within=0.5).run().result, Found)
    except MeshwrightError:
        return False


def small_gpus(folder: Path, capacity_bytes: int, nodes: str) -> str:
    """A cluster whose GPUs leave a plan so much memory."""
    usable = 79.11 * 2**30 - 1.2e9
    path = folder / f"cluster-{capacity_bytes}.yaml"
    path.write_text(f"meshwright_cluster: 1\ndevice: h100-sxm\nnodes: {nodes[0]}\ngpus_per_node: {nodes[2]}\n"
                    f"reserved_memory_gib: {(usable - capacity_bytes) / 2**30!r}\n")
    return str(path)


PINS = [Pins(tp=1, recompute="none"), Pins(zero=0, tp=1), Pins(micro_batch=4), Pins(micro_batches=1, cp=1),
        Pins(pp=1, recompute="selective", banned=frozenset({"zero3"})), Pins(dp=4, zero=1), Pins()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelAtAnyBatch:
    return ModelAtAnyBatch(written(tmp_path_factory.mktemp("model"), CONFIG), 2048)


@pytest.mark.parametrize("seed", range(10))
def test_changes_fit_and_nothing_nearer_does(model: ModelAtAnyBatch, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    pins, nodes = PINS[seed % len(PINS)], draw.choice(["1x4", "2x2"])
    free = Planner(Request(model.spec, f"{nodes} h100-sxm", 2048, 8, pins), model)
    pinned, loose = (MemoryOnly(free.with_request(pins=p).pricer).least() for p in (pins, Pins()))
    assert pinned is not None and loose is not None
    least = loose.capacity_bytes if pins != Pins() else pinned.capacity_bytes // 2
    capacity = draw.randint(least, pinned.capacity_bytes - 1)
    one = Planner(Request(model.spec, small_gpus(tmp_path, capacity, nodes), 2048, 8, pins), model)
    found = one.solve()
    assert found.plan is None and found.why_not is not None
    missing = found.why_not.missing_bytes
    assert missing == pinned.capacity_bytes - one.space.capacity_bytes > 0
    changes = found.why_not.changes
    assert "more memory per GPU" in changes[0].what and len(changes) > 1
    for change in changes:
        assert searched(applied(one, change)), change
        for nearer in _nearer(one, change):
            assert not searched(applied(one, nearer)), (change, nearer)


def _nearer(one: Planner, change: Change) -> list[Change]:
    asked = change.request
    if "memory_bytes_per_gpu" in asked:
        return [Change("", {"memory_bytes_per_gpu": asked["memory_bytes_per_gpu"] - 1})]
    if "seq" in asked:
        return [Change("", {"seq": asked["seq"] + step}) for step in (256, 512) if asked["seq"] + step <= 2048]
    if "pins" not in asked or len(asked["pins"]) > 1:
        return []
    [(axis, value)] = asked["pins"].items()
    own = getattr(one.request.pins, axis)
    if axis == "recompute":
        others: list[Any] = list(MODES[MODES.index(own):MODES.index(value) if value else None])
    elif axis == "zero":
        others = list(range(own, value if value is not None else 4))
    else:
        whole = one.batch if axis.startswith("micro") else one.cluster.gpus
        far = abs(math.log(value / own)) if value is not None else math.inf
        others = [n for n in range(1, whole + 1) if whole % n == 0 and abs(math.log(n / own)) < far - 1e-9]
    return [Change("", {"pins": {axis: n}}) for n in others]


def test_shorter_sequences_are_the_longest_that_fit(model: ModelAtAnyBatch, tmp_path: Path) -> None:
    free = Planner(Request(model.spec, "1x4 h100-sxm", 2048, 8, Pins(cp=1, tp=1)), model)
    shorter = MemoryOnly(free.with_request(seq=1536).pricer).least()
    assert shorter is not None
    cluster = small_gpus(tmp_path, shorter.capacity_bytes + 1000, "1x4")
    one = Planner(Request(model.spec, cluster, 2048, 8, Pins(cp=1, tp=1)), model)
    why = one.solve().why_not
    assert why is not None
    [change] = [c for c in why.changes if "seq" in c.request]
    assert change.request["seq"] == 1536 and change.what == "--seq 1536"
    assert searched(applied(one, change)) and not searched(one.with_request(seq=1536 + 256))


def test_the_fewest_more_nodes(tmp_path: Path) -> None:
    """2.7 · 10⁹ parameters at 18 bytes are more than two GPUs of 24 GB hold; with three the batch divides too."""
    one = Planner(Request(written(tmp_path, LARGER), "1x1 rtx-4090", 512, 12))
    why = one.solve().why_not
    assert why is not None
    [change] = [c for c in why.changes if "cluster" in c.request]
    nodes = int(change.request["cluster"].split("x")[0])
    assert 2 < nodes <= 4 and change.what == f'--cluster "{nodes}x1 rtx-4090"'
    assert searched(applied(one, change))
    for fewer in range(2, nodes):  # every number up to 16 is tried
        assert not searched(one.with_request(cluster=f"{fewer}x1 rtx-4090"))


def test_numbers_of_nodes() -> None:
    assert more_than(1)[:16] == list(range(2, 17)) + [20] and more_than(1)[-1] == 32
    assert more_than(64)[:9] == [72, 80, 88, 96, 104, 112, 120, 128, 160] and more_than(64)[-1] == 64 * 32


def test_all_pins_together_where_no_single_one_helps(model: ModelAtAnyBatch, tmp_path: Path) -> None:
    loose = MemoryOnly(Planner(Request(model.spec, "1x4 h100-sxm", 2048, 8), model).pricer).least()
    assert loose is not None
    pins = Pins(tp=1, pp=1, zero=0, recompute="none", micro_batch=2)
    one = Planner(Request(model.spec, small_gpus(tmp_path, loose.capacity_bytes, "1x4"), 2048, 8, pins), model)
    why = one.solve().why_not
    assert why is not None
    [change] = [c for c in why.changes if "all pins" in c.what]
    assert searched(applied(one, change)) and json.dumps(why.as_dict())


def test_an_answer_takes_less_than_a_second() -> None:
    """CPU time, with room for a slow machine; measured were 0.1 s and 0.5 s."""
    for one in (planner("llama3-8b", "1x1 h100-sxm", 8192, 4),
                planner("llama3-8b", NODE, 8192, 64, zero=0, pp=1, tp=1)):
        for samples in (1, 2, 4):
            one.model.at(samples)
        started = time.process_time()
        found = one.solve()
        used = time.process_time() - started - found.capture_s
        assert found.plan is None and found.why_not is not None and used < 3


def test_a_search_that_misses_a_plan_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard against an answer of nothing missing."""
    one = planner("llama3-8b", NODE, 8192, 32)
    problem = GroupSearch(one.pricer).problem([])
    monkeypatch.setattr(plan_model.Planner, "search", lambda self: Searched(problem, (), NothingFits((), True)))
    with pytest.raises(MeshwrightError, match="nothing was found to fit, yet .* does"):
        one.solve()


def test_what_is_said_is_in_the_json() -> None:
    why = planner("llama3-8b", "1x1 h100-sxm", 8192, 4).solve().why_not
    assert isinstance(why, WhyNot) and why.nearest is not None
    data = why.as_dict()
    held = data["memory_bytes"]
    assert sum(held.values()) == why.nearest.memory.total_bytes == data["needed_bytes"] - why.context_bytes
    dynamic = held["activations"] + held["working-set"]
    assert held["allocator"] == pytest.approx(0.12 * dynamic, rel=1e-3)
    assert data["reason"] == why.sentence() and data["changes"][0]["memory_bytes_per_gpu"] >= data["needed_bytes"]


def test_nearest_values() -> None:
    one = planner("llama3-8b", NODE, 8192, 64)
    assert _nearest_values(one, "tp", 4) == [2, 8, 1]
    assert _nearest_values(one, "zero", 1) == [2, 3] and _nearest_values(one, "recompute", "none") == ["selective",
                                                                                                       "full"]
    assert _nearest_values(replace_batch(one, 6), "micro_batch", 3) == [2, 6, 1]


def replace_batch(one: Planner, batch: int) -> Planner:
    return Planner(replace(one.request, global_batch=batch), one.model)
