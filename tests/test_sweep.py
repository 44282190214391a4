"""The sweep's result file: suites measured apart stay beside each other, part of a suite is not taken for all of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import sweep


def _result(monkeypatch: pytest.MonkeyPatch, folder: Path, suites: dict) -> None:
    monkeypatch.setattr(sweep, "RESULTS", folder)
    monkeypatch.setattr(sweep, "hardware_slug", lambda: "here")
    (folder / "sweep-here.json").write_text(json.dumps({"suites": suites}))


def test_other_suites_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _result(monkeypatch, tmp_path, {"tests/fuzz": {"seconds": 1}, "tests/opinfo": {"seconds": 2}, "tests/gone": {}})
    assert sweep._with_other_suites({"tests/opinfo": {"seconds": 3}}) == {
        "tests/fuzz": {"seconds": 1},
        "tests/opinfo": {"seconds": 3},
    }


@pytest.mark.parametrize(
    ("arguments", "options", "whole"),
    [
        (["tests"], {}, True),
        (["tests/fuzz", "tests/test_sweep.py"], {}, True),
        (["tests/fuzz/test_fuzz.py"], {}, False),
        (["tests/test_sweep.py::test_other_suites_are_kept"], {}, False),
        (["tests/fuzz"], {"keyword": "cpp"}, False),
        (["tests"], {"maxfail": 1}, False),
    ],
)
def test_part_of_a_suite_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], options: dict, whole: bool
) -> None:
    monkeypatch.chdir(sweep.ROOT)
    collector = sweep.Collector()
    collector.pytest_configure(SimpleNamespace(args=arguments, getoption=options.get))
    assert collector.whole_suites == whole


def test_failures_are_listed_with_their_suite() -> None:
    collector = sweep.Collector()
    for outcome, name in (("passed", "test_a"), ("failed", "test_b")):
        collector.pytest_runtest_logreport(
            pytest.TestReport(f"tests/fuzz/test_fuzz.py::{name}", ("", 0, ""), {}, outcome, None, "call",
                              user_properties=[("cases", 2)], duration=1.5)
        )
    assert collector.suites({"commit": "0"}) == {
        "tests/fuzz": {"measured": {"commit": "0"}, "outcomes": {"passed": 1, "failed": 1}, "seconds": 3.0, "cases": 4,
                       "failed": ["tests/fuzz/test_fuzz.py::test_b"]}
    }
