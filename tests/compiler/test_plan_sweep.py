"""A sweep's Pareto set, over each of its axes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from meshwright.compiler import cli
from meshwright.compiler.plan_sweep import Row, _is_best


def rows(*points: tuple[int, int, float | None]) -> list[Row]:
    """Rows of (value, GPUs, tokens/s or None where nothing fits)."""
    def plan(speed: float | None) -> Any:
        return None if speed is None else SimpleNamespace(predicted=SimpleNamespace(tokens_per_s=speed))

    return [Row(value, gpus, plan(speed), None, None, None) for value, gpus, speed in points]


@pytest.mark.parametrize(("over", "points", "best"), [
    ("gpus", ((1, 8, 100.0), (2, 16, 190.0), (4, 32, 180.0)), [True, True, False]),
    ("gpus", ((1, 8, 80.0), (2, 16, 190.0)), [False, True]),  # cheaper a token and faster
    ("gpus", ((1, 8, None), (2, 16, 190.0)), [False, True]),
    ("seq", ((1024, 8, 100.0), (2048, 8, 90.0), (4096, 8, 95.0)), [True, False, True]),
    ("batch", ((32, 8, 100.0), (64, 8, 120.0), (128, 8, 110.0)), [True, True, False]),
    ("batch", ((32, 8, 100.0), (64, 8, 100.0)), [True, False])])
def test_the_pareto_set(over: str, points: tuple[tuple[int, int, float | None], ...], best: list[bool]) -> None:
    made = rows(*points)
    assert [_is_best(row, made, over) for row in made] == best


def test_pins_hold_and_what_does_not_fit_says_why() -> None:
    ask = ["sweep", "llama3-8b", "--cluster", "2x8 h100-sxm", "--seq", "8192", "--global-batch", "32", "--pp", "1",
           "--zero", "0", "--values", "1"]
    done = CliRunner().invoke(cli.app, [*ask, "--tp", "8"])
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "nodes" in text and "tp 8" in text
    none = CliRunner().invoke(cli.app, [*ask, "--tp", "1"])
    assert none.exit_code == 3 and "no plan found fits" in " ".join(none.stdout.split())
