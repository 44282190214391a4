"""`meshwright plan`, `why`, `price`, `verify`, `sweep`: tables, JSON, files, exit codes, one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from meshwright.compiler import cli
from meshwright.runtime.plan import Plan

ASK = ["llama3-8b", "--cluster", "1x8 h100-sxm", "--seq", "8192", "--global-batch", "32"]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def refused(*words: str) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    done = subprocess.run([sys.executable, "-m", "meshwright", *words], capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 2, (done.stdout, done.stderr)
    [line] = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    done = run("plan", *ASK, "--pp", "1", "-o", str(path), "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["fits"] and data["gap"] < 0.05 and data["plan"]["mesh"]["gpus"] == 8
    assert all(set(x) == {"axis", "value", "reason"} and x["reason"] for x in data["left_out"])
    return path


def test_plan_prints_tables_and_what_it_is_worth() -> None:
    done = run("plan", *ASK, "--pp", "1", "--tp", "1")
    assert done.exit_code == 0, done.output
    for text in ("pp 1, ", "step time by stage", "memory by stage", "outer tuples", "values of axes left out"):
        assert text in " ".join(done.stdout.split())


def test_pins_and_bans_hold() -> None:
    done = run("plan", *ASK, "--tp", "2", "--no-pp", "--no-cp", "--ban", "zero3", "--no-recompute", "--json")
    assert done.exit_code == 0, done.output
    found = Plan.from_json(json.dumps({**json.loads(done.stdout)["plan"]}), allow_edited=True)
    assert found.mesh.pp == 1
    assert all(r.options.tp == 2 and r.options.cp == 1 and r.options.zero < 3 and r.options.recompute == "none"
               for r in found.layers)
    assert set(found.ask.options) == {"--tp 2", "--cp 1", "--pp 1", "--recompute none", "--ban zero3"}


def test_verify_holds_and_finds_an_edit(saved: Path, tmp_path: Path) -> None:
    done = run("verify", str(saved))
    assert done.exit_code == 0 and done.stdout.startswith("holds:"), done.output
    edited = json.loads(saved.read_text())
    edited["certificate"]["lower_bound_ns"] += 1
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    assert "was changed after it was written, in certificate" in refused("verify", str(tmp_path / "plan.json"))


def test_why_lists_families_with_what_holds_them_back(saved: Path) -> None:
    done = run("why", str(saved), "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    families = {b["family"]: b for b in data["beaten"]}
    assert "with tp" in families and "with pp" not in families  # pp was pinned; tp may cut embedding and head only
    step_ns = data["step_time_s"] * 1e9
    assert all(b["step_time_ns"] is None or b["step_time_ns"] >= 0.95 * step_ns for b in data["beaten"])
    assert families["no ZeRO"]["step_time_ns"] > 1.05 * step_ns  # the states fit only where tp divides them
    assert families["with tp"]["binding"].startswith("exposed")
    near = [b for b in data["beaten"] if b["near_tie"]]
    assert all(b["step_time_ns"] <= (1 + data["near_tie_share"]) * step_ns for b in near)


def test_price_of_the_own_layout(tmp_path: Path) -> None:
    done = run("price", *ASK, "--tp", "2", "--zero", "1", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["plan"]["schedule"]["micro_batches"] == 8 and data["plan"]["layers"][1]["options"]["dp"] == 4
    arguments = tmp_path / "run.sh"
    arguments.write_text("--tensor-model-parallel-size 2\n--sequence-parallel\n--use-distributed-optimizer\n"
                         "--micro-batch-size 1\n--global-batch-size 32\n--seq-length 8192\n--bf16\n"
                         "--num-layers 32\n")
    read = run("price", "llama3-8b", "--cluster", "1x8 h100-sxm", "--from", str(arguments), "--json")
    assert read.exit_code == 0, read.output
    assert json.loads(read.stdout)["step_time_s"] == pytest.approx(data["step_time_s"], rel=0.05)
    large = run("price", *ASK)
    assert large.exit_code == 3 and "DOES NOT FIT" in large.stdout


def test_price_refuses_what_can_not_be() -> None:
    assert "tp 3 · cp 1 · pp 1 do not divide 8 GPUs" in refused("price", *ASK, "--tp", "3")
    assert "do not divide the batch" in refused("price", *ASK, "--micro-batch", "3")
    experts = ("price", "mixtral-8x7b", "--cluster", "2x8 h100-sxm", "--seq", "4096", "--global-batch", "64")
    assert "ep 16 does not divide 8 experts" in refused(*experts, "--ep", "16")
    assert "etp 4 with tp 1" in refused(*experts, "--etp", "4")


def test_sweep_marks_what_nothing_is_better_than() -> None:
    done = run("sweep", "llama3-8b", "--cluster", "4x8 h100-sxm", "--seq", "8192", "--global-batch", "32",
               "--gpu-price", "2", "--tokens", "1e12", "--values", "1,2", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [row["gpus"] for row in rows] == [8, 16] and rows[1]["pareto"]
    assert rows[0]["pareto"] == (rows[0]["usd"] < rows[1]["usd"])  # it is slower: it has to be cheaper
    assert rows[0]["days"] == pytest.approx(1e12 / rows[0]["tokens_per_s"] / 86400)
    assert rows[0]["usd_per_million_tokens"] == pytest.approx(2 * 8 / 3600 / rows[0]["tokens_per_s"] * 1e6)
    assert rows[0]["tokens_per_s"] < rows[1]["tokens_per_s"] <= 2.05 * rows[0]["tokens_per_s"]


def test_what_does_not_fit_exits_with_3(tmp_path: Path) -> None:
    words = ("plan", *ASK, "--no-zero", "--no-tp", "--no-pp", "--no-cp")
    done = run(*words, "-o", str(tmp_path / "plan.json"), "--json")
    assert done.exit_code == 3 and not (tmp_path / "plan.json").exists()
    data = json.loads(done.stdout)
    assert not data["fits"] and data["missing_gib"] > 10 and data["changes"]


def test_fewest_gpus_for_a_target() -> None:
    done = run("plan", *ASK[:2], "4x8 h100-sxm", *ASK[3:], "--objective", "fewest-gpus", "--target-tokens-per-s",
               "120000", "--pp", "1", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["plan"]["mesh"]["gpus"] == 16 and data["tokens_per_s"] >= 120000
    assert [step.split()[0] for step in data["steps"]] == ["1", "2", "4", "8", "16"]


@pytest.mark.parametrize(("words", "message"), [
    (("plan", "lama3-8b", *ASK[1:]), "did you mean 'llama3-8b'"),
    (("plan", ASK[0], "--cluster", "1x8 h100-sxn", *ASK[3:]), "nearest: h100-sxm"),
    (("plan",), "plan needs MODEL and --cluster"),
    (("plan", *ASK, "--tp", "2", "--no-tp"), "--no-tp and --tp 2"),
    (("plan", *ASK, "--runnable-only"), "no option is runnable"),
    (("plan", *ASK, "--objective", "speed"), "unknown objective"),
    (("plan", *ASK, "--dp", "3"), "dp 3 does not divide 8 GPUs"),
])
def test_mistakes_are_one_line(words: tuple[str, ...], message: str) -> None:
    assert message in refused(*words)


def test_a_pin_that_can_not_be_is_the_reason() -> None:
    for words, reason in ((("--tp", "3"), "tp 3 does not divide 8 GPUs"),
                          (("--tp", "128"), "tp 128 does not divide 8 GPUs"),
                          (("--tp", "4", "--pp", "4"), "tp 4 · pp 4 does not divide 8 GPUs"),
                          (("--micro-batches", "3"), "micro-batches 3 does not divide the batch of 32")):
        assert f"a pin can't hold: {reason}" in str(run("plan", *ASK, *words).exception)


def test_a_file_needs_its_folder_before_anything_is_searched(tmp_path: Path) -> None:
    assert "there is no folder" in refused("plan", *ASK, "-o", str(tmp_path / "no" / "p.json"))
    assert not (tmp_path / "no").exists()
    assert "it is a folder" in refused("price", *ASK, "-o", str(tmp_path))


def test_flags_have_no_double_negation() -> None:
    text = run("plan", "--help").stdout
    assert "--no-no" not in text and "--no-tp" in text and "Expert parallelism" in " ".join(text.split())
