"""The collector stays off while anybody wants it off, and comes back as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from meshwright.runtime.collector import collector_paused


@pytest.fixture(autouse=True)
def on_afterwards() -> Iterator[None]:
    yield
    gc.enable()


def test_nested_pauses_end_with_the_last() -> None:
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_inside_ends_the_pause() -> None:
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()
