"""How other trainers' settings become the cost model's `Training`, and what has no price of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from meshwright.compiler import cli
from meshwright.compiler.planner.foreign import read_deepspeed, read_megatron, read_torchtitan
from meshwright.compiler.planner.foreign_training import training_of
from meshwright.compiler.planner.precision import training_with
from meshwright.cost_model.strategy import Training
from meshwright.runtime.errors import InvalidInputError

CLUSTER = ("--cluster", "1x8 h100-sxm")


def price(path: Path, *words: str) -> Result:
    return CliRunner().invoke(cli.app, ["price", "llama3-8b", *CLUSTER, "--from", str(path), *words])


def test_megatron() -> None:
    training, left = training_of(read_megatron(
        "--bf16 --tensor-model-parallel-size 2 --attention-backend unfused --overlap-grad-reduce --optimizer muon "
        "--context-parallel-size 2 --cp-comm-type allgather"))
    assert training == Training(gradient_bytes=2, reduce_bytes=2, fusion="kernels", flash_attention=False,
                                sequence_parallel=False, prefetch_parameters=False)
    assert [words.split(" (")[0] for words in left] == [
        "the optimizer muon", "activations that tensor parallelism repeats without sequence parallelism",
        "context parallelism by all-gather"]
    fp8, left = training_of(read_megatron("--bf16 --fp8-format hybrid --fp8-recipe blockwise --optimizer sgd"))
    assert (fp8.fp8_recipe, fp8.optimizer) == ("blockwise", "sgd-momentum") and "fp8 blockwise" in left[0]
    wide, left = training_of(read_megatron("--micro-batch-size 1"))
    assert (wide.parameter_bytes, wide.master_bytes, wide.gather_bytes, wide.compute) == (4, 0, 4, "float32")
    assert left == ("activations in float32 (priced at 2 bytes an element)",)


def test_torchtitan() -> None:
    text = ('[model]\nconverters = ["quantize.linear.float8"]\n[parallelism]\ntensor_parallel_degree = 2\n'
            "enable_async_tensor_parallel = true\n[compile]\nenable = true\n")
    training, left = training_of(read_torchtitan(text))
    assert training == Training(parameter_bytes=4, master_bytes=0, fp8_recipe="tensorwise", async_tp=True)
    assert left == ()
    half, _ = training_of(read_torchtitan('[training]\ndtype = "bfloat16"\n'))
    assert (half.parameter_bytes, half.gradient_bytes, half.reduce_bytes) == (2, 2, 4)
    assert (half.optimizer, half.fusion, half.optimizer_bytes) == ("adamw-bf16", "none", 4)


def test_deepspeed() -> None:
    training, left = training_of(read_deepspeed(
        '{"fp16": {"enabled": true}, "data_types": {"grad_accum_dtype": "fp32"}, "optimizer": {"type": "Lamb"}}'))
    assert (training.compute, training.gradient_bytes, training.fusion) == ("float16", 4, "none")
    assert left == ("the optimizer lamb (priced as adamw)",)


def test_the_price_follows_the_file(tmp_path: Path) -> None:
    """Chunks from the layers of a part; what is slower in the file is slower here; the saved plan is priced alike."""
    path, out = tmp_path / "run.sh", tmp_path / "plan.json"
    fast = ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 8 --use-distributed-optimizer "
            "--global-batch-size 32 --seq-length 4096 --bf16 --overlap-grad-reduce --overlap-param-gather")
    path.write_text(fast + " --attention-backend unfused")
    done = price(path, "--json", "-o", str(out))
    assert done.exit_code == 0, done.output
    slow = json.loads(done.stdout)
    assert slow["plan"]["schedule"]["chunks"] == 2 and slow["plan"]["training"]["gradient_dtype"] == "bfloat16"
    shown = CliRunner().invoke(cli.app, ["show", str(out), "--json"])
    again = json.loads(shown.stdout)
    assert again["step_time_s"] == slow["step_time_s"] and not again["differences"]
    path.write_text(fast)
    assert json.loads(price(path, "--json").stdout)["step_time_s"] < 0.99 * slow["step_time_s"]
    path.write_text(fast.replace("-stage 8", "-stage 5"))
    assert "parts of 5 layers in 32 layers and 2 stages" in str(price(path).exception)


@pytest.mark.parametrize("word", ["", "x=1", "fusion=x", "gradient_bytes=nan", "gradient_bytes=99", "async_tp=1",
                                  "software_year=inf", "cuda_graphs=x", "selective_every=1.5"])
def test_training_words_of_a_file_are_checked(word: str) -> None:
    with pytest.raises(InvalidInputError, match="field=value"):
        training_with(Training(), word)
