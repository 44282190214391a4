"""Configurations of other trainers: what they say is read, what can't be priced is refused by name, nothing is run."""

from __future__ import annotations

import tracemalloc

import pytest

from meshwright.compiler.planner.foreign import (
    Contents,
    Layout,
    read_deepspeed,
    read_foreign,
    read_megatron,
    read_torchtitan,
)
from meshwright.runtime.errors import InvalidInputError

TITAN = """
[training]
local_batch_size = 8
global_batch_size = 512
seq_len = 8192
[optimizer]
name = "AdamW"
lr = 3e-4
[parallelism]
data_parallel_replicate_degree = 2
data_parallel_shard_degree = 4
tensor_parallel_degree = 8
context_parallel_degree = 2
pipeline_parallel_degree = 4
pipeline_parallel_schedule = "Interleaved1F1B"
pipeline_parallel_microbatch_size = 2
pipeline_parallel_split_points = "layers.4"
enable_async_tensor_parallel = true
[compile]
enable = true
[activation_checkpoint]
mode = "full"
"""
MEGATRON = """#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 8   # one node
    --pipeline-model-parallel-size 16
    --num-layers-per-virtual-pipeline-stage 3
    --sequence-parallel --use-distributed-optimizer
)
torchrun --nproc_per_node 8 ${MASTER} pretrain_gpt.py ${MODEL_PARALLEL_ARGS[@]} --micro-batch-size 1 \\
    --global-batch-size=1536 --seq-length 2048 --bf16 --accumulate-allreduce-grads-in-fp32 --data-path "$DATA"
"""


def test_torchtitan() -> None:
    layout = read_torchtitan(TITAN)
    assert layout == Layout(
        "torchtitan", tp=8, sequence_parallel=True, cp=2, cp_kind="all-gather", dp=8, dp_shard=4, instances=2, etp=8,
        zero=2, pp=4, chunks=2, schedule="interleaved", micro_batch=2, global_batch=512, seq=8192, recompute="full",
        recipe="bf16", gradient_dtype="float32", optimizer="adamw", fusion="compiled", async_tp=True,
        ignored=("parallelism.pipeline_parallel_split_points",))
    on = layout.on(512)
    assert (on.dp, on.zero_shard, on.micro_batches) == (8, 8, 32)


def test_torchtitan_names_a_key_with_a_slip() -> None:
    layout = read_torchtitan("[parallelism]\ntensor_paralel_degree = 4\nmodule_order = 1\n")
    assert layout.ignored == ("parallelism.module_order", "parallelism.tensor_paralel_degree (unknown; did you mean "
                              "parallelism.tensor_parallel_degree?)")


def test_torchtitan_says_little() -> None:
    layout = read_torchtitan('[activation_checkpoint]\nmode = "none"\n').on(16)
    assert (layout.dp, layout.zero, layout.zero_shard, layout.micro_batch, layout.global_batch) == (16, 3, 16, 8, 128)
    alone = read_torchtitan("[parallelism]\ndata_parallel_replicate_degree = 4\ndata_parallel_shard_degree = 1\n"
                            '[activation_checkpoint]\nmode = "none"\n').on(4)
    assert (alone.dp, alone.zero, alone.zero_shard) == (4, 0, 1)


def test_torchtitan_parts() -> None:
    text = ('[parallelism]\npipeline_parallel_degree = 2\nmodule_fqns_per_model_part = [["tok_embeddings", "layers.0"],'
            ' ["layers.1", "layers.2", "norm", "output"]]\n[activation_checkpoint]\nmode = "none"\n')
    assert read_torchtitan(text).parts == (Contents(True, 1, False), Contents(False, 2, True))
    for bad in ('["layers.1"]', '["layers.0", "rm -rf"]', "[]", "3"):
        with pytest.raises(InvalidInputError, match="module_fqns_per_model_part is not understood"):
            read_torchtitan(f"[parallelism]\nmodule_fqns_per_model_part = [{bad}]\n")


@pytest.mark.parametrize(("name", "recipe"), [("", "fp8-tensorwise"), ('recipe_name = "rowwise"', "fp8-rowwise"),
                                              ('recipe_name = "rowwise_with_gw_hp"', "fp8-rowwise")])
def test_torchtitan_recipes(name: str, recipe: str) -> None:
    text = f'[model]\nconverters = ["quantize.linear.float8"]\n[quantize.linear.float8]\n{name}\n'
    assert read_torchtitan(text).recipe == recipe
    assert read_torchtitan('[model]\nconverters = ["quantize.linear.mx"]\n').recipe == "mxfp8"


def test_megatron() -> None:
    layout = read_megatron(MEGATRON)
    assert layout == Layout(
        "megatron", tp=8, sequence_parallel=True, etp=8, zero=1, pp=16, schedule="interleaved", micro_batch=1,
        global_batch=1536, seq=2048, blocks_per_part=3, recipe="bf16", gradient_dtype="float32", optimizer="adamw",
        fusion="kernels", overlap_gradients=False, overlap_parameters=False)
    on = layout.on(1024)
    assert (on.dp, on.zero_shard, on.micro_batches) == (8, 8, 192)


@pytest.mark.parametrize("layout", ["E(" + "t" * 15_000 + ")*9999L", "Et*9999" + "|t*9999" * 4, "t" * 30_000])
def test_a_long_megatron_layout_is_refused_before_it_takes_memory(layout: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInputError, match="over 20000 layers"):
            read_megatron(f"--pipeline-model-parallel-layout '{layout}'")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_megatron_layout_and_recomputation() -> None:
    layout = read_megatron("--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout 'Et*2|(ttt|)*6,tL' "
                           "--recompute-granularity full --recompute-method block --recompute-num-layers 2 "
                           "--context-parallel-size 2 --cp-comm-type a2a --use-tp-pp-dp-mapping")
    assert layout.parts is not None and layout.chunks == 2 and layout.schedule == "interleaved"
    assert layout.parts[0] == Contents(True, 2, False) and layout.parts[-1] == Contents(False, 1, True)
    assert [p.blocks for p in layout.parts] == [2, 3, 3, 3, 3, 3, 3, 1]
    assert (layout.recompute, layout.recompute_blocks, layout.cp_kind) == ("full", 2, "ulysses")
    assert layout.order == ("tp", "cp", "pp", "dp")
    assert read_megatron("--recompute-activations").recompute == "none"


def test_megatron_fsdp_and_copies() -> None:
    layout = read_megatron("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
                           "--num-distributed-optimizer-instances 4 --fp8-format hybrid --fp8-recipe tensorwise").on(64)
    assert (layout.zero, layout.zero_shard, layout.recipe) == (3, 16, "fp8-tensorwise")


def test_megatron_yaml() -> None:
    layout = read_foreign("model_parallel:\n  tensor_model_parallel_size: 4\n  sequence_parallel: true\n"
                          "micro_batch_size: 2\nglobal_batch_size: 64\nrecompute_granularity: null\n")
    assert (layout.tp, layout.sequence_parallel, layout.micro_batch, layout.recompute) == (4, True, 2, "none")


def test_deepspeed() -> None:
    layout = read_deepspeed('{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": true},'
                            '"zero_optimization": {"stage": 3, "mics_shard_size": 4, "overlap_comm": true}}')
    assert layout.ignored == ("zero_optimization.overlap_comm",)
    on = layout.on(16)
    assert (on.dp, on.zero, on.zero_shard, on.micro_batches) == (16, 3, 4, 2)


def test_the_format_is_recognised() -> None:
    assert [read_foreign(t).source for t in (TITAN, MEGATRON, '{"train_batch_size": 8}')] == [
        "torchtitan", "megatron", "deepspeed"]


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty"), (" \n", "is empty"), ('{"format": "meshwright-plan"}', "meshwright show PLAN prices it"),
    ("hello", "none found"), ("a: &x [1]\nb: *x\n", "has an alias"), ("- 1", "none found"),
    ("[" * 10_000, "none found"), ("{" * 10_000, "not JSON"), ("{]", "not JSON"), ("x" * ((1 << 20) + 1), "at most"),
    ("--tensor-model-parallel-size ${TP}", "is '${TP}'; expected a value"),
    ("--tensor-model-parallel-size two", "is 'two'; expected a whole number"),
    ("--tensor-model-parallel-size 0", "is '0'; expected a whole number from 1"),
    ("--tensor-model-parallel-size '8", "quotes don't match"),
    ("--cp-comm-type p2p a2a --context-parallel-size 2", "one kind for all layers"),
    ("--cp-comm-type a2a+p2p --context-parallel-size 2", "one kind for all layers"),
    ("--recompute-granularity half", "full or selective"),
    ("--recompute-granularity selective --recompute-modules moe", "expected core_attn"),
    ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 4", "units of 1"),
    ("--fp4-format e2m1 --fp4-recipe custom", "fp4-recipe is 'custom'"),
    ("--fp8-format hybrid --fp8-recipe x", "fp8-recipe is 'x'"),
    ("--pipeline-model-parallel-layout Et|mL", "no m: multi-token"),
    ("--pipeline-model-parallel-layout Et*9999|" + "(t*99|)*999", "over 20000"),
    ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|t|L", "3 parts for 2 stages"),
    ("--use-megatron-fsdp --data-parallel-sharding-strategy all", "one of no_shard"),
    ("[parallelism]\ntensor_parallel_degree = '8'\n", "is '8'; expected a whole number"),
    ("[parallelism]\ntensor_parallel_degree = true\n", "is 'True'; expected a whole number"),
    ("[parallelism]\npipeline_parallel_schedule = 'DualPipeV'\n", "expected one of 1F1B"),
    ("[parallelism]\nfsdp_reshard_after_forward = 'yes'\n", "default, always or never"),
    ("[activation_checkpoint]\nmode = 'memory_budget'\n", "expected one of none, full, selective"),
    ("[activation_checkpoint]\nselective_ac_option = '2'\n", "recomputes every 2th layer"),
    ("[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_microbatch_size = 3\n", "no multiple of"),
    ('{"zero_optimization": {"stage": 4}}', "expected 0 to 3"), ('{"bf16": {"enabled": 1}}', "true or false"),
    ('{"optimizer": {"type": 3}}', "expected a text"), ('{"data_types": {"grad_accum_dtype": "x"}}', "fp32, bf16"),
])
def test_what_can_not_be_read_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_foreign(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("layout", "gpus", "message"), [
    (Layout("megatron", tp=8), 12, "do not divide 12 GPUs"), (Layout("megatron", tp=8), 4, "do not divide 4 GPUs"),
    (Layout("torchtitan", dp=4), 8, "has dp 4; on 8 GPUs dp is 8"),
    (Layout("megatron", global_batch=12), 8, "do not divide the batch of 12"),
    (Layout("megatron", instances=3, zero=1), 8, "3 copies of sharded states over 8"),
])
def test_layouts_that_do_not_lie_in_the_gpus(layout: Layout, gpus: int, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        layout.on(gpus)
