"""Everything the test suites leave to the sweep, with its counts written to benchmarks/results/sweep-<hardware>.json.

python -m benchmarks.sweep                     all tests at full scale (`make sweep`)
python -m benchmarks.sweep tests/opinfo -n 2   the arguments are pytest's
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import pytest  # noqa: E402

from benchmarks._harness import write_result  # noqa: E402


class Collector:
    """A pytest plugin that adds up outcomes, seconds and recorded properties by test folder."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: Counter[str] = Counter()
        self.numbers: dict[str, Counter[str]] = defaultdict(Counter)
        self.sets: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        suite = "/".join(report.nodeid.split("::")[0].split("/")[:2])
        self.seconds[suite] += report.duration
        if report.when != "call" and not report.failed:
            return
        self.outcomes[suite][report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)
        for name, value in report.user_properties:
            self._add(suite, name, value)

    def _add(self, suite: str, name: str, value: Any) -> None:
        if isinstance(value, (int, float)):
            self.numbers[suite][name] += value
        elif isinstance(value, (list, dict)):
            self.sets[suite][name].update(map(str, value))

    def document(self, seconds: float, status: int) -> dict[str, Any]:
        suites = {
            s: {
                "outcomes": dict(c),
                "seconds": round(self.seconds[s], 1),
                **dict(self.numbers[s]),
                **{n: sorted(v) for n, v in self.sets[s].items()},
            }
            for s, c in sorted(self.outcomes.items())
        }
        return {"wall_seconds": round(seconds, 1), "exit_status": status, "failed": self.failed, "suites": suites}


def main() -> int:
    os.environ["MESHWRIGHT_TEST_SCALE"] = "full"
    collector, started = Collector(), time.perf_counter()
    arguments = sys.argv[1:] or ["-n", "auto", "--maxprocesses=8"]
    status = int(pytest.main(["-q", "--timeout=3600", *arguments], plugins=[collector]))
    print("written to", write_result("sweep", collector.document(time.perf_counter() - started, status)))
    return status


if __name__ == "__main__":
    sys.exit(main())
