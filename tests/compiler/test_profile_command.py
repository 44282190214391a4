"""`meshwright profile` and `--profile`: measured here with one and two processes, used by plans, refused when bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import meshwright as mw
from meshwright.compiler.cli import app
from meshwright.compiler.plan_answers import planner_of
from meshwright.compiler.plan_files import priced_plan
from meshwright.compiler.profile_command import load_profile, measure_profile, steps_of
from meshwright.compiler.profiler.build import measured_cluster
from meshwright.compiler.profiler.clock import Clock
from meshwright.compiler.profiler.ranks import Place, torchrun_place
from meshwright.cost_model.machine_profile import MachineProfile
from meshwright.cost_model.profile_fit import fitted_compute, fitted_links
from meshwright.runtime.errors import InvalidInputError, MeshwrightError
from meshwright.runtime.plan import Plan

from ..cost_model.profiles import CPU, GPU, profile


def json_of(*arguments: str) -> Any:
    """What a command prints with --json, run in this process."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "cpu.json"
    path.write_text(profile(CPU, 2).to_json())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
        "intermediate_size": 128, "num_key_value_heads": 4, "architectures": ["LlamaForCausalLM"]}))
    return str(folder)


# -- measuring ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MachineProfile, list[str]]:
    """Two processes of one thread, quickly."""
    path, seen = tmp_path_factory.mktemp("measured") / "profile.json", list[str]()
    report = measure_profile(path, "cpu", 2, 1, True, None, seen.append)
    assert report is not None and report.path == str(path)
    return path, report.profile, seen


def test_two_processes_measure_themselves_and_their_links(measured: tuple[Path, MachineProfile, list[str]]) -> None:
    path, found, seen = measured
    assert load_profile(path) == found and os.listdir(path.parent) == ["profile.json"]
    assert (found.backend, found.nodes, found.ranks_per_node) == ("gloo", 1, 2)
    assert found.device.name == "cpu" and 1e9 < found.device.peak_flops_per_s["float32"] < 1e13
    assert [c.processes for c in found.compute] == [1, 2] and found.overlap_loss is not None
    [link] = found.links
    assert 1e-7 < link.latency_s < 0.1 and 1e7 < link.bandwidth_bytes_per_s < 1e12
    assert {p.collective for p in found.tables.collectives} >= {"all-reduce", "all-gather", "point-to-point"}
    assert len(seen) <= steps_of("cpu", 2, True) and seen[-1] == "fitting"


def test_the_points_give_the_scalars_again(measured: tuple[Path, MachineProfile, list[str]]) -> None:
    _, found, _ = measured
    assert fitted_compute(found.device, found.tables) == found.compute
    launch_s, links = fitted_links(measured_cluster(found.device, 1, 2), found.tables.collectives)
    assert (launch_s, links) == (found.collective_launch_s, found.links)


def test_the_command_writes_a_file_and_says_what_it_found(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "meshwright", "profile", "-o", str(tmp_path / "own.json"), "--quick",
                           "--device", "cpu"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout and "no links were measured" in done.stdout and "Traceback" not in done.stderr
    found = load_profile(tmp_path / "own.json")
    assert found.backend == "none" and not found.links and found.overlap_loss is None
    assert [c.processes for c in found.compute] == [1]


def test_no_process_is_left_when_a_rank_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import multiprocessing

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(MeshwrightError, match=r"the process group \(gloo, 2 ranks\) can't start"):
        measure_profile(tmp_path / "p.json", "cpu", 2, 1, True, None, lambda what: None)
    assert not multiprocessing.active_children() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("asked", "message"), [
    (dict(path="none/p.json"), "there is no folder"), (dict(device="tpu"), "unknown device 'tpu'"),
    (dict(ranks=1000), "1000 ranks of 1 thread"), (dict(threads=1000), "1 ranks of 1000 thread"),
    (dict(name="x"), "a CPU is always cpu"),
])
def test_bad_asks_are_one_line(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = dict(path="p.json", device="cpu", ranks=None, threads=1, quick=True, name=None)
    given = {**usual, **asked}
    with pytest.raises(InvalidInputError) as caught:
        measure_profile(tmp_path / given.pop("path"), **given, progress=lambda what: None)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_torchrun_says_where_a_rank_is() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "x",
                   "MASTER_PORT": "1"}
    place = torchrun_place(environment)
    assert place == Place(5, 8, 1, 4) and place.nodes == 2
    assert torchrun_place({}) is None
    for wrong in ({"RANK": "six"}, {"LOCAL_RANK": "3"}, {"RANK": "8"}):
        with pytest.raises(InvalidInputError):
            torchrun_place({**environment, **wrong})


def test_a_clock_waits_for_all_ranks_and_takes_the_slowest() -> None:
    given: list[float] = []

    def agree(value: float) -> float:
        given.append(value)
        return max(value, 0.5)

    assert Clock("cpu", agree).seconds(lambda: None) == 0.5
    assert len(given) == 3 and Clock("cpu", agree).late() is True
    assert Clock("cpu").late() is False and Clock("cpu", deadline=0.0).late() is True


# -- files ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not JSON"), ("[]", "holds a JSON list; expected a profile that meshwright saved"),
    ('{"a":' * 10_000 + "1" + "}" * 10_000, "is nested too deep"),
    ('{"format": "meshwright-plan"}', "is no Meshwright profile"),
    ('{"format": "meshwright-profile", "version": 2}', "is a profile of version 2; this release reads up to version 1"),
    ('{"format": "meshwright-profile", "version": true}', "has the version 'True'"),
    ('{"format": "meshwright-profile", "version": 1, "overlap_loss": NaN}', "NaN is no JSON value"),
    ('{"format": "meshwright-profile", "version": 1}', "is missing; expected it in every profile"),
])
def test_a_bad_profile_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InvalidInputError, match="bad.json") as caught:
        load_profile(tmp_path / "bad.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_profile_ends_the_command_with_2(tmp_path: Path, planted: Path) -> None:
    data = json.loads(planted.read_text())
    data["links"][0]["latency_s"] = -1
    (tmp_path / "bad.json").write_text(json.dumps(data))
    done = subprocess.run([sys.executable, "-m", "meshwright", "plan", "bert-base", "--seq", "128",
                           "--global-batch", "8",
                           "--cluster", "1x2 cpu", "--profile", str(tmp_path / "bad.json")], capture_output=True,
                          text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("meshwright: ") and "bad.json: links.0.latency_s is -1 s" in line


def test_profiles_that_a_plan_cant_use_are_refused(model: str, tmp_path: Path, planted: Path) -> None:
    with pytest.raises(InvalidInputError, match="gone.json can't be read: No such file"):
        plan(model, tmp_path / "gone.json")
    with pytest.raises(InvalidInputError, match=r"of cpu \(Planted CPU\), the cluster of h100-sxm"):
        mw.plan(model, "1x8 h100-sxm", seq=64, global_batch=8, profile=planted)


# -- plans ----------------------------------------------------------------------------------------
def plan(model: str, path: Path | str, **more: Any) -> Plan:
    return mw.plan(model, "1x2 cpu", seq=64, global_batch=8, profile=str(path), **more)


def test_a_plan_is_made_under_a_profile_and_says_so(model: str, planted: Path, tmp_path: Path) -> None:
    made = plan(model, planted)
    facts = made.fingerprints.profile.facts
    assert facts["profiled"] == "2026-12-01T00:00:00+00:00 on Planted CPU"
    assert made.ask.options == (f"--profile {planted}",)
    assert made.fingerprints.cluster.facts["device"] == "Planted CPU"
    made.save(tmp_path / "plan.json")
    again = priced_plan(tmp_path / "plan.json")
    assert again.priced and again.differences == () and again.plan.predicted == made.predicted
    assert planner_of(made).request.profile == str(planted)


def test_a_plan_under_another_profile_says_so_and_is_priced_again(model: str, planted: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(planted.read_text())
    made = plan(model, own, tp=1, pp=1)
    made.save(tmp_path / "plan.json")
    slow = profile(CPU, 2)
    slower = slow.compute[0].model_copy(update={"kernel_s": 1e-3, "eager_op_s": 1e-3})
    (tmp_path / "slow.json").write_text(slow.model_copy(update={"compute": (slower,)}).to_json())
    shown = priced_plan(tmp_path / "plan.json", profile=str(tmp_path / "slow.json"))
    assert any("kernel_s was 4e-06, is 0.001" in line for line in shown.differences)
    assert shown.plan.predicted.step_time_s > 2 * made.predicted.step_time_s
    (tmp_path / "slow.json").rename(own)  # the same after the plan's own file was measured again
    again = priced_plan(tmp_path / "plan.json")
    assert again.differences == shown.differences and again.plan.predicted == shown.plan.predicted
    own.unlink()
    [note] = priced_plan(tmp_path / "plan.json").notes
    assert note.startswith("the predictions are the file's: ") and "own.json can't be read" in note


def test_a_gpus_profile_changes_the_plans_time(model: str, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(profile(GPU, 8).to_json())
    asked: dict[str, Any] = dict(seq=64, global_batch=8, tp=1, pp=1)
    usual = mw.plan(model, "1x8 h100-sxm", **asked)
    own = mw.plan(model, "1x8 h100-sxm", **asked, profile=tmp_path / "gpu.json")
    assert own.predicted.step_time_s != usual.predicted.step_time_s
    assert usual.fingerprints.differences(own.fingerprints)


def test_a_cluster_file_names_its_profile(model: str, planted: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(planted.read_text())
    (tmp_path / "cluster.yaml").write_text("meshwright_cluster: 1\ndevice: cpu\nnodes: 1\ngpus_per_node: 2\n"
                                           "profile: own.json\n")
    made = mw.plan(model, str(tmp_path / "cluster.yaml"), seq=64, global_batch=8)
    assert made.fingerprints.cluster.facts["device"] == "Planted CPU"
    assert made.predicted.step_time_ns == plan(model, planted).predicted.step_time_ns


def test_commands_take_a_profile(model: str, planted: Path, tmp_path: Path) -> None:
    with_profile = ("--profile", str(planted))
    asked = (model, "--seq", "64", "--global-batch", "8", *with_profile, "--cluster")
    assert json_of("price", *asked, "1x2 cpu")["step_time_s"] > 0
    assert [row["gpus"] for row in json_of("sweep", *asked, "2x2 cpu")["rows"]] == [2, 4]
    [level] = json_of("cluster", "1x2 cpu", *with_profile)["cluster"]["levels"]
    assert level["latency_s"] == pytest.approx(6e-5, rel=0.1)
    saved = str(tmp_path / "plan.json")
    made = json_of("plan", *asked, "1x2 cpu", "-o", saved)
    assert json_of("show", saved)["step_time_s"] == json_of("show", saved, *with_profile)["step_time_s"] == \
        made["step_time_s"]
    assert json_of("diff", saved, saved, *with_profile)["same_layout"] is True
    assert json_of("why", saved, *with_profile)["step_time_s"] == made["step_time_s"]
    assert CliRunner().invoke(app, ["show", saved, "--stored", *with_profile]).exit_code != 0
