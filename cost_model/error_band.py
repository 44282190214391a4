"""How far predicted step times were off where others published them, and which devices nobody published runs of.

    error_band(calibration, training, "dense", device)   (0.08, 0.1): a step may take 8 % less to 10 % more
    near_tie(calibration, training, "dense", device)     (0.07, why): two plans this close can't be told apart
    doubt(calibration, device)                           "" or why these numbers were not compared with that device

`published-errors.json` holds, by chip and class of run, median and 90th percentile of |predicted / measured - 1| over
configurations that were predicted by numbers fitted without them; `benchmarks/costmodel_published.py` writes it. Where
fewer than `FEWEST` of a class ran on a chip, all chips' runs of that class stand in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .calibration import CHIP, FAMILY, FOLDER, Calibration, calibration_for, file_of
from .strategy import Training

ModelClass = Literal["dense", "mixture of experts"]
ErrorClass = Literal["dense bf16", "fp8 or experts"]
EVERY_CHIP = "every chip"
FEWEST = 8  # configurations of a class on a chip for figures of its own
FILE = FOLDER / "published-errors.json"


@dataclass(frozen=True)
class PublishedErrors:
    """Of `configurations` predicted without their own source or model family: |error| at the median and at nine in ten.
    Raises `ValueError` for figures that can't be: 90th percentiles from 1 up say nothing about how slow a step may
    be."""

    configurations: int
    median: float
    p90: float

    def __post_init__(self) -> None:
        if not (self.configurations > 0 and 0 <= self.median <= self.p90 < 1):
            raise ValueError(f"errors of {self.configurations} configurations: median {self.median:g}, 90 % "
                             f"{self.p90:g}; expected 0 to below 1, in this order")

    @property
    def band(self) -> tuple[float, float]:
        """Shares of the predicted time that nine in ten measured ones were at most below and above it: |predicted /
        measured - 1| up to e is measured / predicted from 1 / (1 + e) to 1 / (1 - e)."""
        return self.p90 / (1 + self.p90), self.p90 / (1 - self.p90)


def error_class(training: Training, model: ModelClass) -> ErrorClass:
    """The class of a run: what is most often off is what is newest."""
    return "fp8 or experts" if training.fp8_recipe or model != "dense" else "dense bf16"


def published_errors(calibration: Calibration, training: Training, model: ModelClass,
                     device: str | None = None) -> tuple[PublishedErrors, str] | None:
    """The figures that hold for such a run and, in words, which runs they are from. None where `doubt` says why.
    `device`: a preset's name; None for the one that the calibration is of."""
    device = calibration.device if device is None else device
    if doubt(calibration, device):
        return None
    which, chip = error_class(training, model), CHIP.get(device, device)
    found = committed_errors()
    own = found.get(chip, {}).get(which)
    where = chip if own and own.configurations >= FEWEST else EVERY_CHIP
    errors = found.get(where, {}).get(which)
    if errors is None:
        return None
    return errors, f"{errors.configurations} published configurations, {which}, {where}: 90 % of predictions"


def error_band(calibration: Calibration, training: Training, model: ModelClass,
               device: str | None = None) -> tuple[float, float] | None:
    """(low, high): nine in ten published steps of such runs took at most `low` less and `high` more than predicted, as
    shares of the predicted time. None for numbers that were compared with no published run: see `doubt`, which gives
    the reason, and `published_errors` for the runs behind the band and their median."""
    found = published_errors(calibration, training, model, device)
    return found[0].band if found else None


def near_tie(calibration: Calibration, training: Training, model: ModelClass, device: str) -> tuple[float, str]:
    """The share within which two predicted steps are equal, and in words why it is that: nine in ten predictions were
    off by at most so much. What two layouts have in common does not cancel: ratios of published pairs were off by as
    much as single steps. A device that was compared with no run takes all chips' runs."""
    found = published_errors(calibration, training, model, device)
    if found:
        return found[0].p90, f"{found[1]} were off by less"
    which = error_class(training, model)
    errors = committed_errors()[EVERY_CHIP][which]
    return errors.p90, f"{device} was not compared: {errors.configurations} published configurations, {which}, of " \
                       f"other chips: 90 % of predictions were off by less"


def doubt(calibration: Calibration, device: str) -> str:
    """Why predictions for `device` with these numbers were not compared with any published run, as one sentence that
    starts with "uncalibrated"; "" where they were. GPUs of one chip (H100 SXM and H200) share its numbers."""
    chip = CHIP.get(device, device)
    if file_of(chip).is_file():
        if calibration == calibration_for(chip):
            return ""
        return f"uncalibrated: the numbers for {device} are not those that were fitted to published runs"
    if calibration.device and calibration.device == FAMILY.get(device):
        return (f"uncalibrated: no published run of {device} was fitted; it takes the numbers of "
                f"{calibration.device}, of its family")
    return f"uncalibrated: no published run of {device or 'this device'} was fitted; it takes defaults"


@lru_cache(maxsize=1)
def committed_errors() -> Mapping[str, Mapping[str, PublishedErrors]]:
    """The committed figures by chip (or `EVERY_CHIP`) and class."""
    return errors_from_json(FILE.read_text()) if FILE.is_file() else {}


def errors_from_json(text: str) -> Mapping[str, Mapping[str, PublishedErrors]]:
    """Raises `ValueError`, in one sentence, for anything but what the benchmark writes."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(dict[str, dict[str, PublishedErrors]]).validate_python(json.loads(text)["errors"])
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a table of errors: {str(error).splitlines()[0]}") from None
