"""Everything the test suites leave to the sweep, with its counts written to benchmarks/results/sweep-<hardware>.json.

python -m benchmarks.sweep                     all tests at full scale (`make sweep`)
python -m benchmarks.sweep tests/opinfo -n 2   the arguments are pytest's

A suite is a folder of tests, or a file of them where one was asked for. A run of some suites replaces their counts and
keeps those of the others, each with the date and the commit it was run at. A run of part of a suite is printed and not
counted; but tests that failed in the suite's run and pass now are noted in its `passed_later`.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import pytest  # noqa: E402

from benchmarks._harness import RESULTS, hardware_slug, write_result  # noqa: E402


class Collector:
    """A pytest plugin that adds up outcomes, seconds, failures and recorded properties by test folder."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: Counter[str] = Counter()
        self.numbers: dict[str, Counter[str]] = defaultdict(Counter)
        self.sets: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.failed: dict[str, list[str]] = defaultdict(list)
        self.passed: set[str] = set()
        self.whole_suites = True
        self.files: list[str] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        chosen = any(config.getoption(name) for name in ("keyword", "markexpr", "deselect", "lf", "maxfail"))
        self.whole_suites = not chosen and all(map(_is_suite, config.args))
        self.files = [argument for argument in config.args if argument.endswith(".py")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.split("::")[0]
        suite = file if file in self.files else "/".join(file.split("/")[:2])
        self.seconds[suite] += report.duration
        if report.when != "call" and not report.failed:
            return
        self.outcomes[suite][report.outcome] += 1
        if report.failed:
            self.failed[suite].append(report.nodeid)
        elif report.passed:
            self.passed.add(report.nodeid)
        for name, value in report.user_properties:
            self._add(suite, name, value)

    def _add(self, suite: str, name: str, value: Any) -> None:
        if isinstance(value, (int, float)):
            self.numbers[suite][name] += value
        elif isinstance(value, (list, dict)):
            self.sets[suite][name].update(map(str, value))

    def suites(self, measured: dict[str, str]) -> dict[str, Any]:
        """What each suite counted; `seconds` adds up its tests, which run side by side."""
        return {
            s: {
                "measured": measured,
                "outcomes": dict(c),
                "failed": sorted(self.failed[s]),
                "seconds": round(self.seconds[s], 1),
                **dict(self.numbers[s]),
                **{n: sorted(v) for n, v in self.sets[s].items()},
            }
            for s, c in self.outcomes.items()
        }


def _is_suite(argument: str) -> bool:
    """True for `tests`, `tests/opinfo` and `tests/fuzz/test_planted.py`, false for a test in a file."""
    return Path(argument).exists()


def _earlier_suites() -> dict[str, Any]:
    """What runs on this hardware counted so far, of suites that still exist."""
    path = RESULTS / f"sweep-{hardware_slug()}.json"
    before = json.loads(path.read_text())["suites"] if path.exists() else {}
    return {s: counts for s, counts in before.items() if (ROOT / s).exists()}


def _with_passed_later(suites: dict[str, Any], passed: set[str], measured: dict[str, str]) -> dict[str, Any]:
    """`suites` with a note at those whose failures are among `passed`."""
    out = {}
    for suite, counts in suites.items():
        now = {test: measured for test in counts["failed"] if test in passed}
        later = {**counts.get("passed_later", {}), **now}
        out[suite] = {**counts, "passed_later": later} if later else counts
    return out


def _commit() -> str:
    """The commit tested, with `-dirty` when a tracked file other than a result differs; empty outside of git."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    os.environ["MESHWRIGHT_TEST_SCALE"] = "full"
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    measured = {"date": now, "commit": _commit()}
    collector, started = Collector(), time.perf_counter()
    arguments = sys.argv[1:] or ["-n", "auto", "--maxprocesses=8"]
    status = int(pytest.main(["-q", "--timeout=3600", *arguments], plugins=[collector]))
    print(f"{time.perf_counter() - started:.0f} s")
    suites, before = collector.suites(measured), _earlier_suites()
    if collector.whole_suites and status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        kept = {s: counts for s, counts in before.items() if not any(s.startswith(f"{new}/") for new in suites)}
        after = dict(sorted({**kept, **suites}.items()))
    else:
        print(json.dumps(suites, indent=1))
        after = _with_passed_later(before, collector.passed, measured)
    if after != before:
        print("written to", write_result("sweep", {"suites": after}))
    return status


if __name__ == "__main__":
    sys.exit(main())
