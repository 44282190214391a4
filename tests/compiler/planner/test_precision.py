"""Number formats by name, what devices can multiply, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import meshwright as mw
from meshwright.compiler.planner.plan_model import NOT_PLANNED, Planner, Request, refuse_workload
from meshwright.compiler.planner.precision import PRECISIONS, training_from
from meshwright.runtime.errors import InvalidInputError, MeshwrightError, UnknownNameError
from meshwright.runtime.plan import Plan

from .planning import model

LLAMA = "llama3-8b"


def priced(device: str, precision: str) -> Plan:
    request = Request(LLAMA, f"1x8 {device}", 8192, 32, training=training_from(precision=precision))
    found = Planner(request, model(LLAMA, 8192)).solve(explain=False).plan
    assert found is not None
    return found


def test_fewer_bits_are_faster_and_the_plan_says_what_runs() -> None:
    steps = {}
    for precision, recipe in (("bf16", "bf16"), ("mxfp8", "mxfp8"), ("nvfp4", "nvfp4")):
        found = priced("gb300", precision)
        assert found.training.recipe == recipe
        steps[precision] = found.predicted.step_time_ns
    assert steps["nvfp4"] < steps["mxfp8"] < steps["bf16"]
    assert steps["bf16"] < 4 * steps["nvfp4"]  # attention and head stay as they are


def test_what_was_never_compared_is_doubted() -> None:
    doubts = " ".join(priced("gb300", "nvfp4").predicted.low_confidence)
    assert "nvfp4" in doubts and "0.85" in doubts
    assert not any("mxfp8" in d for d in priced("b200", "mxfp8").predicted.low_confidence)
    assert any("no bfloat16 products" in d for d in priced("v100", "bf16").predicted.low_confidence)
    assert not any("no float16 products" in d for d in priced("v100", "fp16").predicted.low_confidence)


@pytest.mark.parametrize(("device", "precision", "message"), [
    ("a100-80", "fp8-tensorwise", "tensorwise products on a100-80.*expected 16 bits"),
    ("h100-sxm", "nvfp4", "nvfp4 products on h100-sxm.*expected 16 bits, fp8")])
def test_a_device_without_such_products_refuses(device: str, precision: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        mw.plan(LLAMA, f"1x8 {device}", seq=8192, global_batch=32, precision=precision)


def test_names_and_words() -> None:
    assert set(PRECISIONS) >= {"bf16", "fp16", "fp32", "mxfp8", "nvfp4"}
    training = training_from("sgd", "fp32", ("flash_attention=False", "gradient_bytes=2"))
    assert (training.compute, training.optimizer, training.flash_attention, training.gradient_bytes) == (
        "float32", "sgd", False, 2)
    with pytest.raises(UnknownNameError, match="did you mean 'mxfp8'"):
        training_from(precision="mxfp9")
    for word in ("gradient_bytes=99", "compute=int3", "nothing=1", "fusion=some"):
        with pytest.raises(MeshwrightError):
            training_from(words=(word,))


def test_workloads_that_are_not_planned_are_refused_by_name() -> None:
    refuse_workload("training")
    for name, instead in NOT_PLANNED.items():
        with pytest.raises(MeshwrightError) as caught:
            mw.plan(LLAMA, "1x8 h100-sxm", seq=8192, global_batch=8, workload=name)
        assert name in str(caught.value) and instead in str(caught.value)
    with pytest.raises(UnknownNameError, match="'inference'"):
        refuse_workload("inferrence")


def test_configuration_objects_and_clusters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                                      num_attention_heads=8, num_key_value_heads=4, vocab_size=1000)
    config.save_pretrained(tmp_path)
    cluster = mw.Cluster.parse("1x4 h100-sxm")
    found, same = (mw.plan(one, cluster, seq=512, global_batch=8) for one in (config, tmp_path))
    assert found.predicted.step_time_ns == same.predicted.step_time_ns
    assert Path(found.ask.model, "config.json").is_file() and found.ask.cluster == "1x4 h100-sxm"
    with pytest.raises(InvalidInputError, match="a model of type int"):
        mw.plan(3, cluster, seq=512, global_batch=8)
    with pytest.raises(InvalidInputError, match="a cluster of type int"):
        mw.plan(tmp_path, 3, seq=512, global_batch=8)
    slower = replace(cluster, levels=(replace(cluster.levels[0], latency_s=1.0),))
    with pytest.raises(InvalidInputError, match="a changed cluster"):
        mw.plan(tmp_path, slower, seq=512, global_batch=8)
