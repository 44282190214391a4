"""The plan file: what runs where, and what that is predicted to cost. Versioned JSON, pure data, no code.

    plan_data.py         limits, fingerprints              plan_layout.py       mesh, cuts, options per layer range
    plan_predictions.py  predicted tables, certificate     plan_table.py        the plan as tables for a terminal

A file carries a checksum per section. One that was changed by hand is refused by the name of the section; with
`allow_edited` it opens, because predictions are never trusted anyway: `repriced` makes them anew.
"""

from __future__ import annotations

import json
import os
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from .errors import InvalidInputError
from .plan_data import (
    MAX_BYTES,
    Count,
    Fingerprints,
    Name,
    Number,
    PlanData,
    Positive,
    Text,
    digest,
    first_fault,
    read_limited,
    validated,
)
from .plan_layout import LayerNames, Mesh, Parts, Ranges, Schedule, layout_fault
from .plan_predictions import Beaten, Certificate, Predicted

if TYPE_CHECKING:
    from rich.console import Group

VERSION = 1
Objective = Literal["throughput", "largest-batch", "largest-sequence", "fewest-gpus", "energy"]


class Ask(PlanData):
    """What was asked, in the words of the command line: enough to price the plan again. `model` and `cluster` are names
    or paths and are not opened by reading a plan. `options`: pinned and banned axes and flags, as given."""

    model: Text
    cluster: Text
    seq: Count
    global_batch: Count
    objective: Objective = "throughput"
    imbalance: Number = 1.0
    price_usd_per_gpu_hour: Number | None = None
    options: Annotated[tuple[Text, ...], Field(max_length=200)] = ()


class Model(PlanData):
    """The model as a pipeline: names of its layers (modules) in order, and its parameters."""

    name: Name
    parameters: Positive
    layers: LayerNames


class Training(PlanData):
    """Number formats and optimizer. dtypes are torch's names; `recipe` is how matrix products run ("bf16", "fp8-…").
    `optimizer_bytes_per_parameter`: states and master weights. `fusion`: element-wise operators as written, in fused
    kernels, or compiled. `async_tp`: tensor parallelism's collectives overlap with their own products. `padded_batch`:
    samples that are really computed, above the global batch where micro-batches and replicas don't divide it."""

    parameter_dtype: Name = "bfloat16"
    gradient_dtype: Name = "float32"
    reduce_dtype: Name = "float32"
    recipe: Name = "bf16"
    optimizer: Name = "adamw"
    optimizer_bytes_per_parameter: Number = 12.0
    fusion: Literal["none", "kernels", "compiled"] = "compiled"
    flash_attention: bool = True
    async_tp: bool = False
    padded_batch: Count


class Plan(PlanData):
    """A plan, checked when it is made: cuts and ranges cover the model, degrees multiply to the stage's GPUs, micro-
    batches to the batch, and every predicted stage adds up to the step time. Raises pydantic's `ValidationError`."""

    format: Literal["meshwright-plan"] = "meshwright-plan"
    version: Literal[1] = 1
    ask: Ask
    model: Model
    mesh: Mesh
    parts: Parts
    layers: Ranges
    schedule: Schedule
    training: Training
    predicted: Predicted
    certificate: Certificate | None = None
    beaten: Annotated[tuple[Beaten, ...], Field(max_length=1000)] = ()
    fingerprints: Fingerprints

    @model_validator(mode="after")
    def _check(self) -> Plan:
        fault = layout_fault(self.mesh, self.schedule, self.model.layers, self.parts, self.layers)
        fault = fault or self._batch_fault()
        if not fault and len(self.predicted.stages) != self.mesh.pp:
            fault = f"predicted: {len(self.predicted.stages)} stages of {self.mesh.pp}"
        if not fault and len(self.predicted.layers) != len(self.layers):
            fault = f"predicted: {len(self.predicted.layers)} layer ranges of {len(self.layers)}"
        for i, stage in enumerate(self.predicted.stages):
            chunks = {len(stage.costs.forward_ns), len(stage.costs.input_gradient_ns),
                      len(stage.costs.weight_gradient_ns)}
            if not fault and chunks != {self.schedule.chunks}:
                fault = f"predicted: stage {i} has costs of {chunks} chunks, not {self.schedule.chunks}"
        if fault:
            raise ValueError(fault)
        return self

    def _batch_fault(self) -> str | None:
        schedule, batch = self.schedule, self.training.padded_batch
        if schedule.micro_batches * schedule.micro_batch_samples != batch:
            return (f"{schedule.micro_batches} micro-batches of {schedule.micro_batch_samples} samples are not the "
                    f"{batch} of training.padded_batch")
        if batch < self.ask.global_batch:
            return f"training.padded_batch {batch} is less than the global batch {self.ask.global_batch}"
        bad = next((r for r in self.layers if schedule.micro_batch_samples % r.options.dp), None)
        if bad is None:
            return None
        return f"dp {bad.options.dp} does not divide a micro-batch of {schedule.micro_batch_samples} samples"

    @property
    def gap(self) -> float | None:
        """By which share of its step time the plan may at most be improved; None without a certificate."""
        return None if self.certificate is None else self.certificate.gap(self.predicted.step_time_ns)

    @property
    def runnable(self) -> bool:
        """Whether every layer's options can be executed."""
        return all(r.options.runnable for r in self.layers)

    @property
    def title(self) -> str:
        """`pp 4 1f1b, 32 micro-batches · tp 8 · sp · dp 2`; where layers differ, the options that most of them have and
        how many those are."""
        counts: Counter[str] = Counter()
        for r in self.layers:
            counts[r.options.title] += r.count
        (main, count), *others = counts.most_common()
        rest = f" in {count} of {counts.total()} layers" if others else ""
        return f"{self.schedule.title} · {main}{rest}"

    def stages_of_ranges(self) -> list[int]:
        """The stage that holds each of the layer ranges."""
        at = {name: i for i, name in enumerate(self.model.layers)}
        starts = [at[p.first] for p in self.parts]
        return [self.parts[bisect_right(starts, at[r.first]) - 1].stage for r in self.layers]

    def to_json(self) -> str:
        """The plan with a checksum per section, as `from_json` reads it."""
        sections = self.model_dump(mode="json")
        return json.dumps({**sections, "checksums": checksums(sections)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, what: str = "plan", *, allow_edited: bool = False) -> Plan:
        """Raises `InvalidInputError`, one line: too large, nested too deep, a newer version, changed after it was
        written (unless `allow_edited`), or not of the schema."""
        data = read_limited(text, what)
        _check_version(data, what)
        sums = data.pop("checksums", None)
        if not allow_edited:
            _check_sums(data, sums, what)
        return validated(cls, json.dumps(data), what)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan: all of it, or, where that fails, nothing. Raises `InvalidInputError`."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_edited: bool = False) -> Plan:
        """The plan in a file. Its predictions are those of the day it was made: compare `fingerprints` and see
        `repriced`. Raises `InvalidInputError`, as `from_json` does."""
        try:
            size = os.stat(path).st_size
            if size > MAX_BYTES:
                raise InvalidInputError(f"{os.fspath(path)} has {size} bytes", expected=f"at most {MAX_BYTES}")
            text = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            if isinstance(error, InvalidInputError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise InvalidInputError(f"{os.fspath(path)} can't be read: {reason}") from None
        return cls.from_json(text, os.fspath(path), allow_edited=allow_edited)

    def repriced(self, now: Fingerprints, price: Callable[[Plan], Predicted]) -> Plan:
        """This plan with predictions made by `price` under the inputs of `now`. The certificate and the plans it beat
        belong to the old inputs and are kept only where those are the same. Raises `InvalidInputError` when the new
        prices don't fit the plan."""
        same = not self.fingerprints.differences(now)
        changed = {"predicted": price(self), "fingerprints": now, "certificate": self.certificate if same else None,
                   "beaten": self.beaten if same else ()}
        fields = {name: getattr(self, name) for name in Plan.model_fields}
        try:
            return Plan(**{**fields, **changed})
        except ValidationError as error:
            raise InvalidInputError(f"the new prices don't fit the plan: {first_fault(error)}") from None

    def table(self) -> Group:
        """The plan as tables; `rich.print` shows them."""
        from .plan_table import plan_table

        return plan_table(self)


def checksums(sections: dict[str, Any]) -> dict[str, str]:
    """A digest for every section of a plan."""
    return {name: digest(value) for name, value in sections.items()}


def write_atomically(path: Path, text: str) -> None:
    """All of the file or none of it: written beside it, then renamed; folders are not made. Raises
    `InvalidInputError`."""
    in_a_folder(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".meshwright-", dir=path.parent) as folder:
            work = Path(folder) / "new"  # made by open(), so that the usual permissions hold
            with work.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(work, path)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} can't be written: {getattr(error, 'strerror', None) or error}") from None


def in_a_folder(path: Path) -> None:
    """Raises `InvalidInputError` where a file of that name has no folder to be in, or is one."""
    if not os.path.isdir(path.parent):  # False, unlike is_dir, where the name itself is impossible
        raise InvalidInputError(f"{path} can't be written: there is no folder {path.parent}", do="Make it first.")
    if os.path.isdir(path):
        raise InvalidInputError(f"{path} can't be written: it is a folder", expected="a file name")


def _check_version(data: dict[str, Any], what: str) -> None:
    if data.get("format") != "meshwright-plan":
        raise InvalidInputError(f"{what} is no Meshwright plan", expected='JSON with "format": "meshwright-plan"')
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InvalidInputError(f"{what} has the version {str(version)[:40]!r}",
                                expected=f"a number from 1 to {VERSION}")
    if version > VERSION:
        raise InvalidInputError(f"{what} is a plan of version {version}; this release reads up to version {VERSION}",
                                do="Install a newer Meshwright, or plan again with this one.")


def _check_sums(data: dict[str, Any], sums: Any, what: str) -> None:
    if not isinstance(sums, dict):
        raise InvalidInputError(f"{what} has no checksums", expected="a plan that meshwright saved")
    changed = [name for name, found in checksums(data).items() if sums.get(name) != found]
    changed += [f"{str(name)[:40]} (gone)" for name in sums if name not in data]
    if changed:
        raise InvalidInputError(f"{what} was changed after it was written, in {', '.join(changed)}",
                                expected="what meshwright saved",
                                do="Plan again, or price the changed layout with meshwright price.")
