"""Names that interpreted copies of printed modules see."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton")
from meshwright.runtime.triton_launch import load_module


def test_range_takes_the_interpreters_scalars() -> None:
    """They are arrays of one element, which NumPy 2.4 does not convert to an integer."""
    module = load_module("import triton\nlibdevice = None\n", interpret=True)
    size = SimpleNamespace(handle=SimpleNamespace(data=np.array([20])))
    assert list(module.range(0, size, 8)) == [0, 8, 16]
