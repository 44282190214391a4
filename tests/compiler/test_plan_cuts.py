"""What a search left out is printed with its reasons, values with one reason together."""

from __future__ import annotations

import io

from rich.console import Console

from meshwright.compiler.plan_cuts import cuts, cuts_table
from meshwright.compiler.planner.space import Left

LEFT = [Left("tp", "3", "tp 3 does not divide 32 heads of Block"), Left("tp", "16", "leaves NVLink"),
        Left("tp", "5", "tp 5 does not divide 32 heads of Block"), Left("pp", "64", "34 layers for 64 stages"),
        *(Left("cp", f"{2**i} at dp 1", "samples enough") for i in range(10))]


def test_values_with_one_reason_stand_together() -> None:
    found = cuts(LEFT)
    assert [(c.axis, c.values[:2], c.reasons) for c in found] == [
        ("tp", ("3", "5"), 2), ("tp", ("16",), 1), ("pp", ("64",), 1), ("cp", ("1 at dp 1", "2 at dp 1"), 1)]
    assert sum(len(c.values) for c in found) == len(LEFT)
    assert found[3].shown.endswith("32 at dp 1 and 4 more")


def test_every_reason_is_printed() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(cuts_table([*LEFT, Left("cp", "[red]2", "[link]x")]))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    for part in ("tp 3 does not divide 32 heads of Block (and the like)", "leaves NVLink", "34 layers for 64 stages",
                 "samples enough", "[red]2", "[link]x"):
        assert part in text
