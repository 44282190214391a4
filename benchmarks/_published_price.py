"""Step time and memory of a `Run`, through the planner's own problem and `evaluate`."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks._published_rows import Run
from meshwright.compiler.planner.evaluate import Evaluation, evaluate
from meshwright.compiler.planner.problem import Option, Outer, Plan, Problem, Reshard, Transfer
from meshwright.cost_model.calibration import Calibration, Software
from meshwright.cost_model.cluster import Cluster
from meshwright.cost_model.layer_price import LayerPrice, hidden_bytes, price_layer, transfer_price
from meshwright.cost_model.model import ModelDescription, RecomputeMode, interpolated, model_from_json
from meshwright.cost_model.records import OpRecord
from meshwright.cost_model.strategy import LayerStrategy, Placement

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE: tuple[RecomputeMode, ...] = ("none", "selective", "full")  # least memory last


@dataclass(frozen=True)
class Prediction:
    """Of the cheapest feasible way to fill in what was not published; `low_s`, `high_s` over all feasible ways."""

    run: Run
    step_s: float
    low_s: float
    high_s: float
    evaluation: Evaluation
    prices: dict[str, LayerPrice]


# -- descriptions ---------------------------------------------------------------------------------
def cache_folder() -> Path:
    """Where captures are kept between runs of the benchmark."""
    import platformdirs

    from meshwright.runtime.settings import settings
    base = settings().cache_dir or Path(platformdirs.user_cache_dir("meshwright", appauthor=False))
    return Path(base) / "captures"


@lru_cache(maxsize=4096)
def description(model: str, seq: int, micro_batch: int) -> ModelDescription:
    """Captured for micro-batches of 1, 2 and 4, interpolated from the last two for others. A configuration whose
    `every_other_window` is not 0 has layers in turn that see so many tokens, and all of them."""
    config = json.loads(model)
    window = config.pop("every_other_window", 0)
    if window:
        return _windowed(description(json.dumps(config, sort_keys=True), seq, micro_batch), window)
    if micro_batch not in (1, 2, 4):
        return interpolated(description(model, seq, 2), description(model, seq, 4), micro_batch)
    return _captured(model, seq, micro_batch)


def _windowed(model: ModelDescription, window: int) -> ModelDescription:
    """With a copy of each block whose attention is a band of scores: a fused kernel leaves out the others."""
    kinds, order = list(model.kinds), list(model.order)
    for index, kind in enumerate(model.kinds):
        own = [i for i, k in enumerate(order) if k == index]
        if kind.vocabulary is None and any(r.kind == "attention" for r in kind.forward):
            for i in own[::2]:
                order[i] = len(kinds)
            kinds.append(replace(kind, name=f"{kind.name} window", causal_flops_forward=0, causal_flops_backward=0,
                                 forward=tuple(_band(r, window) for r in kind.forward),
                                 backward=tuple(_band(r, window) for r in kind.backward)))
    return replace(model, kinds=tuple(kinds), order=tuple(order))


def _band(record: OpRecord, window: int) -> OpRecord:
    if record.kind != "attention" or len(record.shape) != 6 or record.shape[3] <= window:
        return record
    batch, heads, queries, keys, *rest = record.shape
    return replace(record, flops=record.flops * window // keys, shape=(batch, heads, queries, window, *rest))


def _captured(model: str, seq: int, micro_batch: int) -> ModelDescription:
    import transformers

    from meshwright.cost_model import model as format_of_descriptions
    code = "".join(p.read_text() for p in sorted((Path(__file__).parent.parent / "compiler" / "planner").glob("*.py"))
                   if p.stem in ("capture_model", "fused", "joint", "structure", "experts", "parts", "gpu_operators"))
    key = hashlib.sha256(f"{model} {seq} {micro_batch} {transformers.__version__} {format_of_descriptions.VERSION} "
                         f"{code}".encode()).hexdigest()[:24]
    path = cache_folder() / f"{key}.json"
    if path.is_file():
        return model_from_json(path.read_text())
    from meshwright.compiler.planner.capture_model import capture_model
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "model"
        config.mkdir()
        (config / "config.json").write_text(model)
        found = capture_model(str(config), seq=seq, micro_batch=micro_batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(found.as_dict()))
    temporary.replace(path)
    return found


# -- a run ----------------------------------------------------------------------------------------
def predict(run: Run, calibration: Calibration, software: Software) -> Prediction | None:
    """None when nothing that was published leaves a way that fits."""
    found = [(filled, *priced) for filled in ways(run) if (priced := price(filled, calibration, software))]
    fitting = [f for f in found if f[1].fits] or found
    if not fitting:
        return None
    best = min(fitting, key=lambda f: f[1].step_ns)
    steps = [f[1].step_ns / 1e9 for f in fitting]
    return Prediction(best[0], best[1].step_ns / 1e9, min(steps), max(steps), best[1], best[2])


def ways(run: Run) -> Iterator[Run]:
    """All ways to fill in a micro-batch and chunks that were not published."""
    layers = json.loads(run.model)
    depth = int(layers.get("num_hidden_layers") or layers["n_layer"])
    micro_batches = [run.micro_batch] if run.micro_batch else [
        b for b in MICRO_BATCHES if run.global_batch % (run.dp * b) == 0]
    chunks = [run.v] if run.v else [v for v in range(1, depth // run.pp + 1) if depth % (run.pp * v) == 0]
    for b, v in product(micro_batches, chunks):
        if v == 1 or (run.global_batch // (run.dp * b)) % run.pp == 0:
            yield replace(run, micro_batch=b, v=v)


def strategy_of(run: Run, mode: RecomputeMode) -> LayerStrategy:
    return LayerStrategy(run.tp, run.cp, run.dp, run.ep, run.etp, zero=run.zero, recompute=mode)


@lru_cache(maxsize=256)
def placement_of(gpu: str, nodes: int, gpus_per_node: int, pp: int) -> Placement:
    return Placement(Cluster.parse(f"{nodes}x{gpus_per_node} {gpu}"), pp)


def price(run: Run, calibration: Calibration, software: Software) -> tuple[Evaluation, dict[str, LayerPrice]] | None:
    """Evaluate a run whose micro-batch and chunks are filled in. A stack's recomputation is of its blocks: Megatron-LM,
    llm-foundry and torchtitan run embedding and head once. Where recomputation is not published, a layer runs
    without; on a stage that would not fit, layers one by one keep products only, then their inputs only."""
    assert run.micro_batch and run.v
    model = description(run.model, run.seq, run.micro_batch)
    placement = placement_of(run.gpu, run.nodes, run.gpus_per_node, run.pp)
    m = run.global_batch // (run.dp * run.micro_batch)
    if m < 1 or run.pp * run.v > len(model.order):
        return None
    modes: tuple[RecomputeMode, ...] = (run.recompute,) if run.recompute else RECOMPUTE
    own: list[tuple[RecomputeMode, ...]] = [("none",) if run.recompute and k.vocabulary else modes for k in model.kinds]
    prices = [[price_layer(kind, strategy_of(run, mode), run.training, placement, calibration, software)
               for mode in of_kind] for kind, of_kind in zip(model.kinds, own, strict=True)]
    options = tuple(tuple(Option(name=mode, **p.integers()) for mode, p in zip(of_kind, priced, strict=True))
                    for of_kind, priced in zip(own, prices, strict=True))
    inner = model.kinds[model.order[len(model.order) // 2]]
    moved = transfer_price(hidden_bytes(inner), strategy_of(run, modes[0]), placement, calibration)
    transfer = Transfer(forward_ns=round(moved.forward_s * 1e9), backward_ns=round(moved.backward_s * 1e9))
    outer = Outer(p=run.pp, v=run.v, schedule="1f1b" if run.v == 1 else "interleaved", m=m, options=options,
                  reshard=((Reshard(),),), transfer=((transfer,),))
    capacity = int(placement.cluster.usable_memory_bytes - FIXED_BYTES)
    problem = Problem(kinds=tuple(k.name for k in model.kinds), layers=model.order, gpus=run.gpus,
                      global_batch=run.global_batch, capacity_bytes=capacity, outers=(outer,))
    ends = cuts(len(model.order), run.pp, run.v)
    if run not in _RECOMPUTED:  # memory, and so what is recomputed, does not depend on calibrations
        _RECOMPUTED[run] = _fewest_recomputed(problem, ends, len(modes))
    chosen = _RECOMPUTED[run]
    evaluation = evaluate(problem, Plan(outer=0, ends=ends, options=chosen))
    return evaluation, {model.kinds[k].name: prices[k][o] for k, o in zip(model.order, chosen, strict=True)}


_RECOMPUTED: dict[Run, tuple[int, ...]] = {}


def _fewest_recomputed(problem: Problem, ends: tuple[int, ...], modes: int) -> tuple[int, ...]:
    """The options of the plan with the fewest recomputed layers that fits, or that recomputes everything."""
    chosen = [0] * len(problem.layers)
    stage_of = [part % problem.outers[0].p for part in Plan(outer=0, ends=ends, options=()).part_of_layer()]
    while True:
        plan = Plan(outer=0, ends=ends, options=tuple(chosen))
        evaluation = evaluate(problem, plan)
        full = [s for s, memory in enumerate(evaluation.memory) if memory.missing_bytes]
        more = [next((i for mode in range(modes - 1) for i, at in enumerate(stage_of)
                      if at == s and chosen[i] == mode), None) for s in full]
        if not any(i is not None for i in more):
            return plan.options
        for i in more:
            if i is not None:
                chosen[i] += 1


FIXED_BYTES = 2e9


def cuts(layers: int, p: int, v: int) -> tuple[int, ...]:
    """Where parts end: the layers between embedding and head spread evenly, as Megatron-LM does, embedding and head
    with the first and the last part; where that leaves a rest, embedding and head count as layers."""
    parts = p * v
    if parts == 1:
        return (layers,)
    inner = layers - 2
    if inner % parts:  # embedding and head count as layers, as with account_for_embedding_in_pipeline_split
        sizes = [layers // parts + (i < layers % parts) for i in range(parts)]
    else:
        sizes = [inner // parts + (i in (0, parts - 1)) for i in range(parts)]
    ends = [sum(sizes[:i + 1]) for i in range(parts)]
    return tuple(ends)


def plain(value: Any) -> Any:
    """For JSON."""
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value
