"""A child forked while another thread holds a lock of ours does not wait for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meshwright.runtime import cache, packing
from meshwright.runtime.locks import ForkSafeLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def in_child(step: Callable[[], bool]) -> bool:
    """`step()` in a forked child; False also when it takes 20 s."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # kills
        right = False
        try:
            right = step()
        finally:
            os._exit(0 if right else 1)
    return os.waitpid(child, 0)[1] == 0


def while_held(hold: Callable[[Callable[[], object]], object], step: Callable[[], bool]) -> bool:
    """`step` in a child forked while `hold(wait)` runs in a thread, whose `wait` lasts until the fork has happened."""
    inside, forked = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, args=(lambda: inside.set() or forked.wait(60),))
    thread.start()
    assert inside.wait(60)
    try:
        return in_child(step)
    finally:
        forked.set()
        thread.join()


def test_a_lock_is_free_in_the_child_and_still_held_in_the_parent() -> None:
    lock = ForkSafeLock()

    def hold(wait: Callable[[], object]) -> None:
        with lock:
            wait()

    def take() -> bool:
        with lock, lock:
            return True

    assert while_held(hold, take)
    assert not while_held(hold, lambda: not take())


def test_it_excludes_other_threads() -> None:
    lock, order, inside = ForkSafeLock(), [], threading.Event()

    def other() -> None:
        inside.set()
        with lock:
            order.append("other")

    with lock:
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(60)
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_packing_goes_on_in_a_child_forked_while_a_weight_is_packed() -> None:
    weight, other = torch.ones(4), torch.ones(2)

    def hold(wait: Callable[[], object]) -> None:
        packing.packed([weight], "held", lambda w: wait() and w + 1)

    def pack() -> bool:
        return all(torch.equal(packing.packed([w], "held", lambda w: w + 1), w + 1) for w in (other, weight))

    assert while_held(hold, pack)


def test_a_build_goes_on_in_a_child_forked_while_another_is_built(tmp_path: Path) -> None:
    kernels = cache.KernelCache(tmp_path)

    def hold(wait: Callable[[], object]) -> None:
        with kernels._guard, cache._caches_guard:
            wait()

    def build() -> bool:
        path = kernels.get_or_build(cache.key_of("a"), ".so", lambda path: path.write_text("kernel"))
        return path.read_text() == "kernel" and cache.default_cache() is not None

    assert while_held(hold, build)
