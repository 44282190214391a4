"""Whatever is wrong with what the planning commands are given: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.compiler import cli

Refused = Callable[..., str]
DEEP = "[" * 10_000 + "]" * 10_000
DEEP_OBJECT = '{"a":' * 10_000 + "1" + "}" * 10_000
CLUSTER = "meshwright_cluster: 1\ndevice: h100-sxm\nnodes: 1\ngpus_per_node: 8\n"
LINK = CLUSTER + "links:\n- {{name: n, joins_gpus: 8, latency_us: {0}, bandwidth_gb_per_s: {1}}}\n"
ASK = ("bert-large", "--cluster", "1x8 h100-sxm", "--seq", "512", "--global-batch", "32")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run the command line in this process and return its one line."""
    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["meshwright", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capsys.readouterr()
        assert (done.value.code, out, len(err.splitlines())) == (2, "", 1), (done.value.code, out, err)
        assert err.startswith("meshwright: ") and len(err) < 800
        return err

    return call


@pytest.mark.parametrize(("model", "message"), [
    ("lama3-8b", "did you mean 'llama3-8b'"), ("", "unknown model"), ("os:system", "os:system"),
    ("nosuch:thing", "nosuch"), (":", "module:callable"), ("x" * 5000, "unknown model"),
    ("llama3-8b\0", "unknown model"),
    ("/dev/null", "unknown model"), ("/nonexistent/config.json", "No such file")])
def test_models(refused: Refused, model: str, message: str) -> None:
    assert message in refused("plan", model, *ASK[1:])


@pytest.mark.parametrize(("content", "message"), [
    ("", "no JSON"), (bytes(range(256)), "no JSON"), (DEEP, "nested too deeply"), (DEEP_OBJECT, "nested too deeply"),
    ("[1]", "names no model_type"), ('{"model_type": "lama"}', "did you mean"),
    ('{"model_type": true}', "no model_type"),
    ('{"model_type": "llama", "hidden_size": -5}', "hidden_size is -5"),
    ('{"model_type": "llama", "hidden_size": NaN}', ""), ('{"model_type": "llama", "hidden_size": 1e400}', ""),
    ('{"model_type": "llama", "num_hidden_layers": ' + "9" * 6000 + "}", "no JSON"),
    ('{"model_type": "llama", "num_hidden_layers": 999999999999}', ""),
    ('{"model_type": "llama", "num_hidden_layers": 0}', "has no layers"),
    ('{"model_type": "llama", "hidden_size": "4096"}', "")])
def test_configurations(refused: Refused, tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused("plan", path, *ASK[1:])


@pytest.mark.parametrize(("cluster", "message"), [
    ("8x8 h100-sxn", "nearest: h100-sxm"), ("8x8 h100", "nearest: h100-sxm"), ("8x8", "is not understood"),
    ("0x8 h100-sxm", "expected"), ("-1x8 h100-sxm", "is not understood"), ("1x8 h100-sxm a100-80", "mixed GPU types"),
    ("999999999x999999999 h100-sxm", "GPUs"), ("1x100 gb200", "at most the 72"),
    ("NaNx8 h100-sxm", "is not understood"),
    ("/nonexistent.yaml", "No such file"), ("/tmp", "is not understood")])
def test_clusters(refused: Refused, cluster: str, message: str) -> None:
    assert message in refused("plan", "bert-large", "--cluster", cluster)


@pytest.mark.parametrize(("content", "message"), [
    ("", "expected fields"), (bytes(range(256)), "not UTF-8"), (DEEP, "nested deeper"),
    (LINK.format("3.4", "400 parsec"), "bandwidth_gb_per_s is '400 parsec'"),
    (LINK.format("3 GB", "400"), "latency_us is '3 GB'"), (LINK.format("3", "450e9"), "is the unit right?"),
    (LINK.format("-3", "400"), "latency"), (LINK.format(".nan", "400"), "latency"),
    (CLUSTER + "reserved_memory_gib: 4 GHz\n", "'4 GHz'"),
    (CLUSTER + "reserved_memory_gib: .nan\n", "reserved memory"),
    (CLUSTER + "reserved_memory_gib: -4\n", "reserved memory"), (CLUSTER + "power_w_per_gpu: .inf\n", "power_w"),
    (CLUSTER + "price_usd_per_gpu_hour: -1\n", "price_usd_per_gpu_hour"), (CLUSTER + "nodes: 2\n", "given twice"),
    (CLUSTER + "nodez: 2\n", "unknown field 'nodez'"),
    (CLUSTER.replace(": 1\n", ": 2\n", 1), "meshwright_cluster is 2"),
    ("a: &a [1]\nb: *a\n", "anchor"), ("!!python/object/apply:os.system ['echo hi']\n", "not a YAML"),
    (CLUSTER.replace("nodes: 1", "nodes: " + "9" * 5000), ""),
    (CLUSTER.replace("nodes: 1", "nodes: 1.5"), "whole number"),
    (CLUSTER.replace("h100-sxm", "[h100-sxm, a100-80]"), "mixed GPU types"), ("# x\n" * 50_000, "larger than")])
def test_cluster_files(refused: Refused, tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "ours.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused("plan", "bert-large", "--cluster", path)


@pytest.mark.parametrize(("words", "message"), [
    (("--tp", "3"), "tp 3 does not divide 8 GPUs"), (("--tp", "0"), "--tp"), (("--tp", "x"), "--tp"),
    (("--tp", "9" * 20), "tp"), (("--tp", "1.5"), "--tp"), (("--zero", "4"), "--zero"), (("--pp", "1000"), "pp 1000"),
    (("--recompute", "half"), "expected one of full, none, selective"),
    (("--schedule", "zigzag"), "unknown schedule"),
    (("--ban", "nothing"), "unknown ban"), (("--optimizer", "adam"), "did you mean 'adamw'"),
    (("--precision", "fp9"), "unknown precision"), (("--training", "x"), "field=value"),
    (("--training", "gradient_bytes=nan"), "gradient_bytes"), (("--imbalance", "nan"), "imbalance"),
    (("--imbalance", "0.5"), "imbalance 0.5"), (("--gpu-price", "nan"), "price"), (("--gpu-price", "-1"), "price"),
    (("--prove", "nan"), "prove"), (("--objective", "fastest"), "unknown objective"),
    (("--objective", "fewest-gpus", "--target-tokens-per-s", "nan"), "target-tokens-per-s"),
    (("--micro-batches", "3"), "micro-batches 3 does not divide"), (("--seq", "4294967296"), "seq"),
    (("--global-batch", "2147483648"), "global_batch"), (("-o", "/nonexistent/x.json"), "no folder"),
    (("-o", "/tmp"), "folder"),
    (("--workload", "offload"), "'offload' is not planned"), (("--nosuch",), "see meshwright plan --help"),
    (("--runnable-only",), "meshwright export PLAN"),
    (("--tp", "2", "--cp", "2", "--dp", "2", "--pp", "2"), "16|divide"),
    (("--galvatron-profiles", "/nonexistent", "--layers", "4", "--gpus", "8", "--memory-gb", "16"), "/nonexistent"),
    (("--zero", "3", "--ban", "zero3"), "zero"), (("--no-zero", "--ban", "zero0"), "zero")])
def test_options(refused: Refused, words: tuple[str, ...], message: str) -> None:
    line = refused("plan", *ASK, *words)
    assert any(part in line for part in message.split("|")), line


@pytest.mark.parametrize("command", [("show",), ("why",), ("verify",), ("report", "-o", "page.html"),
                                     ("export", "--to", "megatron")])
@pytest.mark.parametrize(("content", "message"), [
    ("", "JSON"), (bytes(range(256)), "JSON"), (DEEP, "nested"), (DEEP_OBJECT, "nested"), ("[]", "plan"),
    (json.dumps({"format": "meshwright-plan", "version": 2}), "plan of version 2; this release reads up to version 1"),
    (json.dumps({"format": "meshwright-plan", "version": 10**300}), "plan of version"),
    (json.dumps({"format": "meshwright-plan", "version": "1"}), "has the version '1'"),
    (json.dumps({"format": "meshwright-plan", "version": 1}), "no checksums")])
def test_plan_files(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...],
                    content: str | bytes, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(*command, path)
    assert "No such file" in refused(*command, tmp_path / "nothing.json")
    assert "directory" in refused(*command, tmp_path)


@pytest.mark.parametrize(("words", "message"), [
    (("--over", "x"), "unknown axis of a sweep"), (("--over", "seq"), "without --values"),
    (("--values", "a"), "whole numbers"),
    (("--values", "0"), "whole numbers"), (("--values", ","), "whole numbers"),
    (("--values", "1," * 100), "whole numbers"),
    (("--tokens", "nan"), "tokens"), (("--gpu-price", "inf"), "price")])
def test_sweeps(refused: Refused, words: tuple[str, ...], message: str) -> None:
    assert message in refused("sweep", *ASK, *words)
