"""`meshwright show | diff | report | export`: output, JSON, exit codes, one line for every mistake."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.compiler import cli, plan_why
from meshwright.runtime.plan_predictions import Beaten

from ..runtime.plans import GIB, plan

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["meshwright", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out = capsys.readouterr()
        return int(done.value.code or 0), out.out, out.err

    return call


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    plan().save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_show(run: Run, saved: Path, tmp_path: Path) -> None:
    code, out, err = run("show", saved, "--trace", tmp_path / "trace.json")
    assert (code, err) == (0, "") and "tiny on 8 GPUs" in out and "limit" in out and "bubble" in out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    code, out, _ = run("show", saved, "--json")
    data = json.loads(out)
    assert code == 0 and data["plan"]["mesh"]["pp"] == 2 and data["priced_again"] is False
    assert "the predictions are the file's" in data["notes"][0] and "'tiny'" in data["notes"][0]
    assert json.loads(run("show", saved, "--json", "--stored")[1])["notes"] == []


def test_show_what_does_not_fit_exits_with_3(run: Run, tmp_path: Path) -> None:
    made = plan()
    stages = tuple(s.model_copy(update={"limit_bytes": 40 * GIB}) for s in made.predicted.stages)
    plan(predicted=made.predicted.model_copy(update={"stages": stages})).save(tmp_path / "p.json")
    code, out, _ = run("show", tmp_path / "p.json")
    assert code == 3 and "DOES NOT FIT" in out


def test_diff(run: Run, saved: Path) -> None:
    code, out, _ = run("diff", saved, saved)
    assert code == 0 and "both run the same way" in out
    code, out, _ = run("diff", saved, saved, "--json")
    assert code == 0 and json.loads(out)["same_layout"] is True


def test_report(run: Run, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    code, out, err = run("report", saved, "-o", tmp_path / "new" / "plan.html", "--json")
    text = (tmp_path / "new" / "plan.html").read_text()
    assert (code, err) == (0, "") and text.lstrip().startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert json.loads(out)["bytes"] == len(text.encode())


def test_report_with_the_families_it_beat(run: Run, saved: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    other = Beaten(family="without cp", title="tp 4", step_time_ns=200_000_000, binding="bubble")
    monkeypatch.setattr(plan_why, "why_of", lambda *_: plan_why.Why(plan(), (other,), 0.0, 0.05, "assumed"))
    code, _, err = run("report", saved, "-o", tmp_path / "plan.html", "--why")
    text = (tmp_path / "plan.html").read_text()
    assert (code, err) == (0, "") and "without cp" in text and "51.5%" in text and "pure data parallel" not in text


@pytest.mark.parametrize("target", ["torchtitan", "megatron", "deepspeed", "galvatron"])
def test_export(run: Run, saved: Path, tmp_path: Path, target: str) -> None:
    code, out, err = run("export", saved, "--to", target, "-o", tmp_path / "config")
    assert (code, out) == (0, "") and all(line.startswith("cannot express ") for line in err.splitlines())
    code, out, _ = run("export", saved, "--to", target)
    assert out == (tmp_path / "config").read_text()
    code, out, _ = run("export", saved, "--to", target, "--json")
    data = json.loads(out)
    assert data["text"] == (tmp_path / "config").read_text() and data["cannot_express"] and data["expressed"]


@pytest.mark.parametrize("command", ["show {0}", "diff {0} {0}", "report {0} -o {1}/x.html",
                                     "export {0} --to megatron"])
@pytest.mark.parametrize(("text", "message"), [
    (None, "can't be read"), ("{", "is not JSON"), ("{}", "no Meshwright plan"),
    ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deep"),
    ('{"format": "meshwright-plan", "version": 9}', "version 9; this release reads up to version 1"),
    ("tampered", "was changed after it was written, in predicted"),
])
def test_bad_plans_are_one_line(run: Run, tmp_path: Path, command: str, text: str | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if text == "tampered":
        text = plan().to_json().replace('"mfu": 0.41', '"mfu": 0.91')
    if text is not None:
        path.write_text(text)
    code, out, err = run(*command.format(path, tmp_path).split())
    [line] = err.splitlines()
    assert (code, out) == (2, "") and line.startswith("meshwright: ") and message in line


def test_other_mistakes_are_one_line(run: Run, saved: Path, tmp_path: Path) -> None:
    for arguments, message in ((("export", saved, "--to", "megatronn"), "did you mean 'megatron'"),
                               (("report", saved, "-o", tmp_path), "can't be written"),
                               (("show", saved, "--trace", tmp_path / "x.txt"), "ends in .json")):
        code, _, err = run(*arguments)
        [line] = err.splitlines()
        assert code == 2 and message in line
