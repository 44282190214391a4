"""Pausing Python's cyclic garbage collector for a moment that makes many objects, most of which stay or die at once.

A full collection walks every object of the process, torch's and the model library's among them (0.2 s with
transformers loaded), and reading a program of some thousand steps sets one or two off.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from .locks import ForkSafeLock

_guard = ForkSafeLock()
_paused = 0
_was_enabled = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """No automatic collection inside, in any thread. May be nested and entered by several threads; the last one out
    leaves the collector as the first one found it."""
    global _paused, _was_enabled
    with _guard:
        if _paused == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _paused += 1
    try:
        yield
    finally:
        with _guard:
            _paused -= 1
            if _paused == 0 and _was_enabled:
                gc.enable()
