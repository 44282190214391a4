"""A graph that is pending until a first call has settled what runs: the shell of fresh graphs and of kept ones."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ..runtime.locks import ForkSafeLock
from .build_program import Runner
from .report import Report
from .settings import CompileSettings
from .watch import deadline


class PendingGraph(ABC):
    """A boxed callable. Calling it is thread-safe: calls go one by one until `_first_call` has set `_run`, which then
    gets the arguments and the graph's `constants`. `deadline`: the end of the user's time limit, see `watch`."""

    def __init__(self, constants: Sequence[Any], settings: CompileSettings, report: Report) -> None:
        self.constants, self.settings, self.report = constants, settings, report
        self.deadline = deadline(settings, report)
        self._lock = ForkSafeLock()
        self._run: Runner | None = None
        self._process = os.getpid()

    def __call__(self, args: list[Any]) -> list[Any]:
        if self._run is None:
            with self._lock:
                if self._run is None:
                    return self._first_call(args)
        run = self._run
        inputs = [*args, *self.constants]
        args.clear()
        return run(inputs)

    @abstractmethod
    def _first_call(self, args: list[Any]) -> list[Any]:
        """The first call, and those after it until what runs is compiled."""

    def _in_new_process(self) -> bool:
        """True once in a forked child: what the parent's threads had not finished must be started again there."""
        known, self._process = self._process, os.getpid()
        return known != self._process
