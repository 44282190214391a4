"""The sweep's result file: suites measured apart stay beside each other, part of a suite is not taken for all of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import sweep


def test_suites_that_still_exist_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "hardware_slug", lambda: "here")
    assert sweep._earlier_suites() == {}
    suites = {"tests/fuzz": {"seconds": 1}, "tests/gone": {}}
    (tmp_path / "sweep-here.json").write_text(json.dumps({"suites": suites}))
    assert sweep._earlier_suites() == {"tests/fuzz": {"seconds": 1}}


def test_failures_that_pass_later_are_noted() -> None:
    before = {"tests/fuzz": {"failed": ["a", "b"]}, "tests/opinfo": {"failed": []}}
    noted = sweep._with_passed_later(before, {"b", "c"}, {"commit": "1"})
    assert noted == {**before, "tests/fuzz": {"failed": ["a", "b"], "passed_later": {"b": {"commit": "1"}}}}


@pytest.mark.parametrize(
    ("arguments", "options", "whole"),
    [
        (["tests"], {}, True),
        (["tests/fuzz", "tests/test_sweep.py"], {}, True),
        (["tests/fuzz/test_fuzz.py"], {}, True),
        (["tests/test_sweep.py::test_suites_that_still_exist_are_kept"], {}, False),
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
