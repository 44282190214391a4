"""What every test shares: strict mode, no network, one kernel cache that survives between runs, golden files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"

# Set before meshwright reads them and inherited by processes that tests start. A value given outside wins.
os.environ.setdefault("MESHWRIGHT_STRICT", "1")
os.environ.setdefault("MESHWRIGHT_CACHE_DIR", str(ROOT / ".pytest_cache" / "meshwright"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What a test plants in the compiler must meet the compiler, not a program that an earlier run kept.
os.environ.setdefault("MESHWRIGHT_GRAPH_CACHE", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Millions of structured-trace records would be formatted for pytest's log capture.
logging.getLogger("torch.__trace").propagate = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-goldens", action="store_true", help="write tests/goldens anew instead of comparing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases marked `sweep` run in `make sweep` (MESHWRIGHT_TEST_SCALE=full) or when `-m` asks for them."""
    if os.environ.get("MESHWRIGHT_TEST_SCALE") == "full" or "sweep" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("sweep")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("cpp/softmax.cpp", text)`: equal to tests/goldens/cpp/softmax.cpp, or written there when refreshing."""

    def check(name: str, text: str) -> None:
        path = GOLDENS / name
        if request.config.getoption("--refresh-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"no golden file {path}: run pytest with --refresh-goldens and read what it wrote"
        assert text == path.read_text(), f"differs from {path} (--refresh-goldens accepts the new text)"

    return check
