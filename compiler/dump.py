"""MESHWRIGHT_DUMP: every step of a compilation as a numbered text file."""

from __future__ import annotations

import itertools
import logging
import re
from typing import Any

from torch import fx

from ..runtime.locks import ForkSafeLock
from .report import Report
from .settings import CompileSettings

log = logging.getLogger(__name__)
_numbers = itertools.count()
_guard = ForkSafeLock()


def dump_graph(settings: CompileSettings, report: Report, step: str, gm: fx.GraphModule) -> None:
    """Write `gm` as readable Python to `<dump>/<number>-<report>-<step>.txt`. A directory that can't be written to is
    a log line, never a failure."""
    if settings.dump_dir is not None:
        dump_text(settings, report, step, str(_readable(gm)))


def dump_text(settings: CompileSettings, report: Report, step: str, text: str) -> None:
    """Write any text as one numbered step."""
    if settings.dump_dir is None:
        return
    with _guard:
        number = next(_numbers)
    name = re.sub(r"[^\w.-]+", "_", f"{number:04d}-{report.name}-{step}") + ".txt"
    try:
        settings.dump_dir.mkdir(parents=True, exist_ok=True)
        (settings.dump_dir / name).write_text(text)
    except OSError as error:
        log.warning("could not write %s: %s", settings.dump_dir / name, error)


def _readable(gm: fx.GraphModule) -> Any:
    return gm.print_readable(print_output=False)
