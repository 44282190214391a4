"""`meshwright plan`: tables, JSON, Galvatron's plan file, exit codes, one line for every mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "cost_model" / "data" / "galvatron"


def plan(folder: Path, *more: str, layers: int = 32, gb: str = "36", gpus: int = 8) -> subprocess.CompletedProcess[str]:
    asked = ["--galvatron-profiles", str(folder), "--layers", str(layers), "--gpus", str(gpus), "--memory-gb", gb,
             "--global-batch", "64", *more]
    return subprocess.run([sys.executable, "-m", "meshwright", "plan", *asked], capture_output=True, text=True,
                          timeout=60, check=False)


def test_tables_and_plan_file(tmp_path: Path) -> None:
    done = plan(DATA, "--chunks", "8", "-o", str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr
    assert "14.0054 samples/s" in done.stdout and "ZeRO-3 · checkpoint" in done.stdout and "limit" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["pp_deg"] == 2 and written["checkpoint"].count("1") == 20


def test_json() -> None:
    done = plan(DATA, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["fits"] and max(data["used_mb"]) <= data["usable_mb"] and data["plan"]["global_bsz"] == 64
    assert data["samples_per_s"] == pytest.approx(64 / data["step_time_s"])


def test_what_does_not_fit_exits_with_3(tmp_path: Path) -> None:
    done = plan(DATA, "--chunks", "8", "-o", str(tmp_path / "plan.json"), layers=96)
    assert (done.returncode, done.stdout) == (3, "")
    [line] = done.stderr.splitlines()
    assert "13.17 GiB are missing" in line and "53 GB per GPU or 64 layers" in line
    assert not (tmp_path / "plan.json").exists()
    done = plan(DATA, "--json", layers=96)
    assert done.returncode == 3 and json.loads(done.stdout)["fits"] is False


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not JSON"), ('{"overlap_coe": NaN}', "'overlap_coe' is nan"), ('{"overlap_coe": -1}', "is -1"),
    ("{}", "the key 'overlap_coe' is missing"), ('{"a":' * 10_000 + "1" + "}" * 10_000, "overlap_coefficient.json"),
])
def test_a_bad_profile_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    folder = Path(shutil.copytree(DATA, tmp_path / "profiles"))
    (folder / "hardware" / "overlap_coefficient.json").write_text(text)
    refused(plan(folder), message)


def test_a_bad_ask_is_one_line(tmp_path: Path) -> None:
    refused(plan(tmp_path / "none"), "is not a folder of Galvatron profiles")
    refused(plan(tmp_path), "has no allreduce_bandwidth_*.json for 8 GPUs")
    refused(plan(DATA, gpus=6), "for 6 GPUs")
    refused(plan(DATA, gb="nan"), "memory nan")
    refused(plan(DATA, "--chunks", "0"), "0 chunks")
    refused(plan(DATA, "-o", str(DATA)), "can't be written")


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("meshwright: ") and message in line
