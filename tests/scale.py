"""How much of a large suite runs: a seeded sample by default, everything in `make sweep` (MESHWRIGHT_TEST_SCALE=full).

Cases outside the sample carry the marker `sweep`; `tests/conftest.py` deselects them unless the scale is full.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest

FULL = os.environ.get("MESHWRIGHT_TEST_SCALE", "") == "full"
SAMPLE_SEED = 20


def sampled(items: Sequence[Any], count: int, *, always: Sequence[Any] = (), seed: int = SAMPLE_SEED) -> list[Any]:
    """`items` as pytest parameters: `count` of them (and `always`) run in every test run, the others in the sweep."""
    drawn = random.Random(seed).sample(range(len(items)), min(count, len(items)))
    chosen = {*drawn, *(i for i, item in enumerate(items) if item in always)}
    return [
        pytest.param(x, id=str(x)) if i in chosen else pytest.param(x, id=str(x), marks=pytest.mark.sweep)
        for i, x in enumerate(items)
    ]


def size(sample: int, full: int) -> int:
    """`sample`, or `full` in the sweep."""
    return full if FULL else sample
