"""Exports: every field of a plan is in the file or on the list, what is in the file reads back, nothing is in both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshwright.compiler.planner.export import TARGETS, Export, contents, export, listed, schema_paths
from meshwright.compiler.planner.foreign import Contents, Layout, read_deepspeed, read_foreign
from meshwright.runtime.errors import UnknownNameError
from meshwright.runtime.plan import Plan
from meshwright.runtime.plan_layout import LayerRange, Part

from ...runtime import plans
from ...runtime.plans import uniform

ALONE = {"tp": 1, "sequence_parallel": False, "dp": 4, "zero_shard": 4}
PLANS: dict[str, Plan] = {
    "mixed": plans.plan(),
    "uniform": uniform(),
    "deep": uniform(pp=4, blocks=10, zero=3),
    "interleaved": uniform(chunks=2, schedule="interleaved", recompute="full"),
    "gpipe": uniform(schedule="gpipe", zero=2),
    "zero bubble": uniform(schedule="zb-h1"),
    "no pipeline": uniform(pp=1, zero=3),
    "hsdp": uniform(dp=4, zero=3, zero_shard=2, replica=3),
    "ring": uniform(cp=2, cp_kind="ring", zero=3, zero_shard=4, dp=2),
    "ulysses": uniform(**{**ALONE, "cp": 2, "cp_kind": "ulysses", "zero": 3, "zero_shard": 8}),
    "all-gather": uniform(cp=2, cp_kind="all-gather", zero=2, zero_shard=4),
    "part of dp and cp": uniform(cp=2, cp_kind="ring", dp=3, zero=3, zero_shard=3),
    "experts": uniform(experts=8, ep=2, etp=2, zero=3),
    "experts, etp 1": uniform(experts=8, ep=4, etp=1),
    "experts, no ep": uniform(experts=8),
    "plain": uniform(**{**ALONE, "zero": 0, "zero_shard": 1}),
    "selective": uniform(recompute="selective"),
    "min-cut": uniform(recompute="min-cut", around={"recompute": "min-cut"}),
    "full everywhere": uniform(recompute="full", around={"recompute": "full"}),
    "embedding differs": uniform(around={"zero": 3}),
    "padded": uniform(batch=15),
    "other precision": uniform(training={"parameter_dtype": "float16", "gradient_dtype": "float16",
                                         "reduce_dtype": "float16", "recipe": "fp16", "optimizer": "sgd"}),
    "fp8": uniform(training={"recipe": "fp8-tensorwise", "async_tp": True, "fusion": "kernels"}),
    "as written": uniform(training={"fusion": "none", "flash_attention": False, "optimizer": "adam"}),
    "a rewrite": uniform(variant="w8a8"),
    "tp without sp": uniform(sequence_parallel=False),
    "pp inside dp": uniform(mesh={"order": ("tp", "cp", "pp", "dp"), "expert_order": ("etp", "ep", "pp", "edp")}),
    "cp inside tp": uniform(mesh={"order": ("cp", "tp", "dp", "pp")}),
}


def covered(path: str, table: Any) -> bool:
    return any(path == key or path.startswith(f"{key}.") for key in table)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PLANS)
def test_every_field_is_in_the_file_or_on_the_list(name: str, target: str) -> None:
    made = export(PLANS[name], target)
    paths = list(schema_paths())
    assert "layers.options.tp" in paths and "predicted.stages.costs.forward_ns" in paths and len(paths) > 70
    neither = [p for p in paths if not covered(p, made.expressed) and not covered(p, made.cannot)]
    both = [p for p in paths if covered(p, made.expressed) and covered(p, made.cannot)]
    unknown = [p for p in (*made.expressed, *made.cannot) if not any(covered(known, [p]) for known in paths)]
    assert not neither and not both and not unknown
    assert all(made.cannot.values()) and all(made.expressed.values())


def titles(made: Export) -> dict[str, str]:
    return {**{p: "file" for p in made.expressed}, **made.cannot}


FIELDS = {  # path: two plans that differ in it, and in what follows from it
    "ask.seq": (uniform(), uniform(seq=8192)),
    "ask.global_batch": (uniform(), PLANS["padded"]),
    "mesh.pp": (uniform(pp=2), uniform(pp=4)),
    "schedule.stages": (uniform(pp=2), uniform(pp=4)),
    "mesh.order": (uniform(), PLANS["pp inside dp"]),
    "mesh.expert_order": (uniform(), uniform(mesh={"expert_order": ("ep", "etp", "edp", "pp")})),
    "mesh.gpus": (uniform(zero=3), uniform(dp=4, zero=3, zero_shard=4)),
    "parts.first": (uniform(pp=4, blocks=8), uniform(pp=4, blocks=9)),
    "parts.last": (uniform(pp=4, blocks=8), uniform(pp=4, blocks=9)),
    "parts.stage": (uniform(pp=2), uniform(pp=4)),
    "parts.chunk": (uniform(pp=4), PLANS["interleaved"]),
    "schedule.chunks": (uniform(), PLANS["interleaved"]),
    "schedule.name": (uniform(), uniform(schedule="gpipe")),
    "schedule.micro_batches": (uniform(), uniform(micro_batches=16)),
    "schedule.micro_batch_samples": (uniform(), uniform(replica=2)),
    "layers.options.tp": (uniform(pp=1), uniform(pp=1, tp=4)),
    "layers.options.sequence_parallel": (uniform(), PLANS["tp without sp"]),
    "layers.options.cp": (uniform(zero=3), PLANS["ring"]),
    "layers.options.cp_kind": (PLANS["ring"], uniform(cp=2, cp_kind="all-gather", zero=3, zero_shard=4)),
    "layers.options.dp": (uniform(zero=3), uniform(dp=4, zero=3, zero_shard=4)),
    "layers.options.ep": (uniform(experts=8, etp=2), uniform(experts=8, ep=2, etp=2)),
    "layers.options.etp": (uniform(experts=8, ep=2), uniform(experts=8, ep=2, etp=2)),
    "layers.options.zero": (uniform(zero=2), uniform(zero=3)),
    "layers.options.zero_shard": (uniform(dp=4, zero=3, zero_shard=2), uniform(dp=4, zero=3, zero_shard=4)),
    "layers.options.recompute": (uniform(), uniform(recompute="full")),
    "layers.options.variant": (uniform(), PLANS["a rewrite"]),
    "layers.first": (uniform(blocks=8), uniform(blocks=12)),
    "layers.last": (uniform(blocks=8), uniform(blocks=12)),
    "layers.count": (uniform(blocks=8), uniform(blocks=12)),
    "training.parameter_dtype": (uniform(), PLANS["other precision"]),
    "training.gradient_dtype": (uniform(), uniform(training={"gradient_dtype": "bfloat16",
                                                             "reduce_dtype": "bfloat16"})),
    "training.reduce_dtype": (uniform(), uniform(training={"reduce_dtype": "bfloat16"})),
    "training.recipe": (uniform(), PLANS["fp8"]),
    "training.optimizer": (uniform(), PLANS["as written"]),
    "training.optimizer_bytes_per_parameter": (uniform(), uniform(training={"optimizer_bytes_per_parameter": 8.0})),
    "training.fusion": (uniform(), PLANS["as written"]),
    "training.flash_attention": (uniform(), PLANS["as written"]),
    "training.async_tp": (uniform(), PLANS["fp8"]),
    "training.padded_batch": (uniform(), uniform(micro_batches=16)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", FIELDS)
def test_a_field_said_to_be_in_the_file_changes_it(path: str, target: str) -> None:
    """Two plans that differ in a field give two files, or one of them says that the field is lost."""
    one, two = (export(p, target) for p in FIELDS[path])
    if path in one.expressed and path in two.expressed:
        assert one.text != two.text
    else:
        assert path in one.cannot or path in two.cannot


def test_all_fields_that_a_target_expresses_are_varied() -> None:
    said = {p for plan in PLANS.values() for target in TARGETS for p in export(plan, target).expressed}
    assert said == set(FIELDS)


SAME = {  # path of the plan's field: the layout's
    "layers.options.tp": ("tp", lambda p: main(p).tp),
    "layers.options.sequence_parallel": ("sequence_parallel", lambda p: main(p).sequence_parallel),
    "layers.options.cp": ("cp", lambda p: main(p).cp), "layers.options.cp_kind": ("cp_kind", lambda p: main(p).cp_kind),
    "layers.options.zero": ("zero", lambda p: main(p).zero),
    "layers.options.zero_shard": ("zero_shard", lambda p: main(p).zero_shard),
    "layers.options.recompute": ("recompute", lambda p: main(p).recompute),
    "mesh.pp": ("pp", lambda p: p.mesh.pp), "mesh.order": ("order", lambda p: p.mesh.order),
    "schedule.name": ("schedule", lambda p: p.schedule.name),
    "schedule.chunks": ("chunks", lambda p: p.schedule.chunks),
    "schedule.micro_batches": ("micro_batches", lambda p: p.schedule.micro_batches),
    "schedule.micro_batch_samples": ("micro_batch", lambda p: p.schedule.micro_batch_samples // main(p).dp),
    "training.padded_batch": ("global_batch", lambda p: p.training.padded_batch),
    "training.recipe": ("recipe", lambda p: p.training.recipe),
    "training.gradient_dtype": ("gradient_dtype", lambda p: p.training.gradient_dtype),
    "training.optimizer": ("optimizer", lambda p: p.training.optimizer),
    "training.fusion": ("fusion", lambda p: p.training.fusion),
    "training.async_tp": ("async_tp", lambda p: p.training.async_tp),
    "ask.seq": ("seq", lambda p: p.ask.seq), "parts.first": ("parts", lambda p: contents(p) if p.mesh.pp > 1 else None),
}


def main(plan: Plan) -> Any:
    return max(plan.layers, key=lambda r: r.count).options


@pytest.mark.parametrize("target", ["torchtitan", "megatron", "deepspeed"])
@pytest.mark.parametrize("name", [n for n in PLANS if n != "mixed"])
def test_what_is_expressed_reads_back(name: str, target: str) -> None:
    plan = PLANS[name]
    made = export(plan, target)
    found: Layout = read_foreign(made.text)
    assert found.source == target and not found.ignored or target == "deepspeed"
    on = found.on(plan.mesh.gpus // (plan.mesh.pp * main(plan).cp if target == "deepspeed" else 1))
    for path, (field, wanted) in SAME.items():
        if path in made.expressed and (target != "deepspeed" or path not in NOT_THERE):
            assert getattr(on, field) == wanted(plan), f"{path}: {getattr(on, field)} in\n{made.text}"
    if "layers.options.dp" in made.expressed:
        assert on.dp == main(plan).dp
    if plan.layers[1].experts and {"layers.options.ep", "layers.options.etp"} <= set(made.expressed):
        assert (on.ep, on.etp) == (main(plan).ep, main(plan).etp)


# written as the absence of a key: DeepSpeed's script decides, and its defaults are another matter
NOT_THERE = {"parts.first", "mesh.pp", "schedule.name", "schedule.chunks", "training.async_tp"}


def test_blocks_recomputed_at_the_start_of_every_part_read_back() -> None:
    plan = uniform()
    ranges = []
    for r in plan.layers:
        if r.kind == "Block":
            at = plan.model.layers.index(r.first)
            full = r.options.model_copy(update={"recompute": "full"})
            ranges += [LayerRange(first=r.first, last=r.first, count=1, kind="Block", options=full),
                       LayerRange(first=plan.model.layers[at + 1], last=r.last, count=r.count - 1, kind="Block",
                                  options=r.options)]
        else:
            ranges.append(r)
    rows = plan.predicted.layers[:1] * len(ranges)
    made = export(plans.plan(**{**{n: getattr(plan, n) for n in Plan.model_fields}, "layers": tuple(ranges),
                                "predicted": plan.predicted.model_copy(update={"layers": rows})}), "megatron")
    layout = read_foreign(made.text)
    assert (layout.recompute, layout.recompute_blocks) == ("full", 1)
    assert made.expressed["layers.options.recompute"] == "--recompute-granularity"


def test_the_mixed_plan_says_what_is_lost() -> None:
    made = export(PLANS["mixed"], "torchtitan")
    lost = listed(made.lost)
    said = "layers.options.recompute: the file says full for all layers, the plan has none in 4 of them"
    assert any(said in line for line in lost)
    assert all(f"# cannot express {line}" in made.text for line in lost)
    assert not any("prediction" in line or "about the search" in line for line in lost)


def test_mixed_recomputation_and_zero_are_rounded_to_less_memory() -> None:
    """A file that is slower than its plan, never one that runs out of memory."""
    assert 'mode = "full"' in export(PLANS["mixed"], "torchtitan").text
    assert "--recompute-method uniform" in export(PLANS["mixed"], "megatron").text
    selective = PLANS["selective"]
    assert "--recompute-granularity full" in export(selective, "megatron").text
    assert set(json.loads(export(selective, "galvatron").text)["checkpoint"]) == {"1", ","}
    assert 'fsdp_reshard_after_forward = "always"' in export(PLANS["embedding differs"], "torchtitan").text


def test_galvatron_keeps_options_per_layer() -> None:
    data = json.loads(export(PLANS["mixed"], "galvatron").text)
    assert data["pp_deg"] == 2 and data["checkpoint"] == "0,0,0,0,1,1,1,1" and data["pp_division"] == "4,4"
    assert data["tp_sizes_enc"] == "2,2,2,2,2,2,2,2" and data["chunks"] == 8 and data["global_bsz"] == 16
    ulysses = json.loads(export(PLANS["ulysses"], "galvatron").text)
    assert set(ulysses["use_sp"].split(",")) == {"1"} and set(ulysses["dp_types_enc"].split(",")) == {"1"}


GALVATRON = {  # path of the plan's field: what the file must hold for it
    "layers.options.tp": lambda o, d, i: o.tp == 1 or (flag(d, "tp_sizes_enc", i), flag(d, "use_sp", i)) == (o.tp, 0),
    "layers.options.cp": lambda o, d, i: o.cp == 1 or (flag(d, "tp_sizes_enc", i), flag(d, "use_sp", i)) == (o.cp, 1),
    "layers.options.zero": lambda o, d, i: o.dp * o.cp == 1 or flag(d, "dp_types_enc", i) == (o.zero == 3),
    "layers.options.recompute": lambda o, d, i: flag(d, "checkpoint", i) == (o.recompute == "full"),
}


def numbers(data: dict[str, Any], key: str) -> list[int]:
    return [int(n) for n in data[key].split(",")]


def flag(data: dict[str, Any], key: str, layer: int) -> int:
    return numbers(data, key)[layer]


@pytest.mark.parametrize("name", PLANS)
def test_what_galvatron_expresses_is_the_plan(name: str) -> None:
    plan = PLANS[name]
    made = export(plan, "galvatron")
    data = json.loads(made.text)
    layers = [r.options for r in plan.layers if r.kind == "Block" for _ in range(r.count)]
    assert data["pp_deg"] == plan.mesh.pp and data["global_bsz"] == plan.training.padded_batch
    assert data["chunks"] == plan.schedule.micro_batches and len(numbers(data, "checkpoint")) == len(layers)
    for path, same in GALVATRON.items():
        if path in made.expressed:
            assert all(same(o, data, i) for i, o in enumerate(layers)), path
    if "parts.first" in made.expressed:
        assert numbers(data, "pp_division") == [p.blocks for p in contents(plan) or ()]
    if "schedule.name" in made.expressed:
        assert data["pipeline_type"] == ("gpipe" if plan.schedule.name == "gpipe" else "pipedream_flush")
    if {"layers.options.tp", "layers.options.zero", "layers.options.cp"} <= set(made.expressed):
        outer = plan.layers[0].options
        assert (data["vtp"], data["vsp"]) == (max(outer.tp, outer.cp), int(outer.cp > 1))
        assert data["embed_sdp"] == (outer.zero == 3 and outer.dp * outer.cp > 1)


def test_deepspeed_is_its_json() -> None:
    made = export(PLANS["hsdp"], "deepspeed")
    data = json.loads(made.text)
    assert data["zero_optimization"] == {"stage": 3, "mics_shard_size": 2} and data["bf16"] == {"enabled": True}
    assert "mesh.pp" in made.cannot and read_deepspeed(made.text).zero == 3


def test_other_shapes_of_models_are_on_the_list() -> None:
    plan = uniform(blocks=2)
    names = ("before encoder.0", "encoder.0", "between encoder.0 and decoder.0", "decoder.0", "after decoder.0")
    data = {n: getattr(plan, n) for n in Plan.model_fields}
    shared = plan.layers[0].options
    ranges = tuple(LayerRange(first=n, last=n, count=1, kind="x", options=shared) for n in names)
    other = plans.plan(**{
        **data, "model": plan.model.model_copy(update={"layers": names}), "layers": ranges,
        "parts": (Part(stage=0, first=names[0], last=names[1]), Part(stage=1, first=names[2], last=names[4])),
        "predicted": plan.predicted.model_copy(update={"layers": plan.predicted.layers[:1] * 5})})
    assert contents(other) is None
    for target in TARGETS:
        made = export(other, target)
        assert "parts.first" in made.cannot
        if target != "galvatron":
            read_foreign(made.text)
    assert contents(plan) == (Contents(True, 1, False), Contents(False, 1, True))


def test_unknown_targets_have_a_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'megatron'"):
        export(PLANS["uniform"], "megatronn")


def test_names_from_a_plan_stay_inside_of_comments() -> None:
    for text in ("x\n--load /etc/passwd", "x\n[model]\nname = 'y'", "x\r\nz\x85\u2028w"):
        plan = uniform(variant=text, training={"recipe": text, "optimizer": text})
        for target in ("torchtitan", "megatron"):
            for line in export(plan, target).text.splitlines():
                assert "passwd" not in line and "'y'" not in line and "w" not in line[:1] or line.startswith("#")
