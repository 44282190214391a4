"""What published runs reach: outside of it a prediction extrapolates, and the plan says so.

    outside(run, errors_class)      () or why predictions for such a run were compared with nothing like it

`published-errors.json` holds, by class of run, the least and the most of every number below over the runs that the
cost model was fitted to and compared with; `benchmarks/costmodel_published.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache

from .error_band import FILE, ErrorClass

SCHEDULES = ("1f1b", "interleaved")  # of published pipelines; without one every schedule is the same
WORDS = {"gpus": "GPUs", "seq": "tokens per sequence", "parameters": "parameters"}


@dataclass(frozen=True)
class Extent:
    """The numbers of a run that say how far it is from others."""

    gpus: int
    seq: int
    parameters: int
    tp: int
    pp: int
    cp: int
    ep: int


Range = Mapping[str, tuple[int, int]]


def outside(extent: Extent, which: ErrorClass, *, compute: str = "bfloat16", fp8_recipe: str = "",
            schedule: str = "1f1b", ulysses: bool = False) -> tuple[str, ...]:
    """One phrase for everything in which no published run of the class is like this one. `compute`: dtype of products,
    a torch name."""
    found = committed_ranges().get(which)
    if found is None:
        return (f"no published run of {which} was compared",)
    return (*_numbers(extent, found, which), *_kinds(which, compute, fp8_recipe, extent.pp > 1 and schedule, ulysses))


def _numbers(extent: Extent, found: Range, which: ErrorClass) -> Iterator[str]:
    for field in fields(extent):
        value = getattr(extent, field.name)
        least, most = found.get(field.name, (value, value))
        if not least <= value <= most:
            what = f"{value:,} {WORDS[field.name]}" if field.name in WORDS else f"{field.name} {value}"
            yield f"{what}; published runs of {which} have {least:,} to {most:,}"


def _kinds(which: ErrorClass, compute: str, fp8_recipe: str, schedule: str | bool, ulysses: bool) -> Iterator[str]:
    if compute != "bfloat16":
        yield f"products in {compute}; published runs that were compared have bf16 or fp8"
    if fp8_recipe and fp8_recipe not in committed_recipes():
        yield f"fp8 recipe {fp8_recipe}; published runs have {', '.join(committed_recipes())}"
    if schedule and schedule not in SCHEDULES:
        yield f"schedule {schedule}; published pipelines have {' or '.join(SCHEDULES)}"
    if ulysses:
        yield "Ulysses context parallelism; published runs have none or ring"


@lru_cache(maxsize=1)
def _committed() -> tuple[Mapping[str, Range], tuple[str, ...]]:
    return ranges_from_json(FILE.read_text()) if FILE.is_file() else ({}, ())


def committed_ranges() -> Mapping[str, Range]:
    """Least and most by class and number."""
    return _committed()[0]


def committed_recipes() -> tuple[str, ...]:
    """Ways to scale eight-bit products that published runs used."""
    return _committed()[1]


def ranges_from_json(text: str) -> tuple[Mapping[str, Range], tuple[str, ...]]:
    """Raises `ValueError`, in one sentence, for anything but what the benchmark writes; a file of an older one has
    none."""
    from pydantic import TypeAdapter, ValidationError

    try:
        data = json.loads(text)
        ranges = TypeAdapter(dict[str, dict[str, tuple[int, int]]]).validate_python(data.get("range", {}))
        recipes = TypeAdapter(tuple[str, ...]).validate_python(tuple(data.get("fp8_recipes", ())))
    except (ValidationError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a table of ranges: {str(error).splitlines()[0]}") from None
    for which, own in ranges.items():
        bad = next((name for name, (least, most) in own.items() if least > most), None)
        if bad:
            raise ValueError(f"{which}: the range of {bad} is {own[bad]}; expected the least first")
    return ranges, recipes
