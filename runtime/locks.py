"""Locks that a forked child never finds taken.

A fork copies the memory of a process and only the thread that forks. A lock which another thread holds at that moment
(one that packs a weight or compiles, while a data loader forks its workers) is never released in the child. What these
locks guard is written in steps that leave nothing half done behind, so the child may go on with new ones.
"""

from __future__ import annotations

import os
import threading
import weakref


class ForkSafeLock:
    """A reentrant lock for `with`, renewed in every forked child. It must not be held by the thread that forks."""

    def __init__(self) -> None:
        self.renew()
        _locks.add(self)

    def renew(self) -> None:
        """A new lock, free, in place of one whose owner did not come along."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
