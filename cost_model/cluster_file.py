"""Cluster files: YAML (so JSON too), version 1, every number's unit in its field's name.

    meshwright_cluster: 1
    device: h100-sxm
    nodes: 8
    gpus_per_node: 8
    reserved_memory_gib: 4            # optional, like everything below
    price_usd_per_gpu_hour: 2.5
    power_w_per_gpu: 700
    profile: h100.json                # of meshwright profile; relative to this file
    links:                            # innermost first; without it the device's usual ones
    - {name: NVLink, joins_gpus: 8, latency_us: 3.4, bandwidth_gb_per_s: 450, efficiency: 0.82,
       in_switch_efficiency: 0.85}
    - {name: InfiniBand, joins_gpus: 64, latency_us: 14, bandwidth_gb_per_s: 400 Gbit/s, nics_per_node: 8}

A quantity is a number in the field's unit, or text with a unit of the same kind. A stranger's file is safe to open:
tags, aliases and deep nesting are refused before anything is built, and no more than 64 KiB are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .cluster import LINKS_OF_FILE, Cluster, ClusterError, LinkLevel, preset_cluster, refuse_mixed, shorten

VERSION = 1
MAX_BYTES = 64 << 10
MAX_DEPTH = 8

_BANDWIDTH = {"GB/s": 1.0, "MB/s": 1e-3, "TB/s": 1e3, "Gbit/s": 1 / 8, "Tbit/s": 1e3 / 8}
_TIME = {"us": 1.0, "µs": 1.0, "ns": 1e-3, "ms": 1e3, "s": 1e6}
_MEMORY = {"GiB": 1.0, "MiB": 2.0**-10, "GB": 1e9 / 2**30, "MB": 1e6 / 2**30}
_POWER = {"W": 1.0, "kW": 1e3}
_PRICE = {"USD": 1.0}
_FRACTION = {"%": 0.01}
_QUANTITY = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?)\s*(\S*)", re.IGNORECASE)


def _quantity(kind: str, units: dict[str, float], least: float = 0.0, most: float = math.inf) -> BeforeValidator:
    """A number in the unit whose factor is 1, or text with one of `units`; the case of letters counts (Gb is no GB). A
    positive number outside of `least` to `most` has been given in another unit."""
    unit = next(iter(units))

    def convert(value: object) -> float:
        expected = f"expected {kind}: a number, or one with {' or '.join(units)}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return plausible(float(value))
            except OverflowError:
                raise ValueError(f"is too large; {expected}") from None
        found = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
        if found is None or (found[2] and found[2] not in units):
            raise ValueError(f"is {_given(value)}; {expected}")
        return plausible(float(found[1]) * (units[found[2]] if found[2] else 1.0))

    def plausible(number: float) -> float:
        if math.isfinite(number) and number > 0 and not least <= number <= most:
            raise ValueError(f"is {number:g} {unit}; expected {least:g} to {most:g} {unit}: is the unit right?")
        return number

    return BeforeValidator(convert)


def _given(value: object) -> str:
    if isinstance(value, str):
        return shorten(value)
    return "empty" if value is None else str(value)[:60] if isinstance(value, (int, float)) else \
        f"of type {type(value).__name__}"


def _one_device(value: object) -> object:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        refuse_mixed(", ".join(value))
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LinkFile(_Strict):
    """One link level of a file; `bandwidth_gb_per_s` is 10⁹ bytes/s per direction of one GPU's port, or of one NIC."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    joins_gpus: int
    latency_us: Annotated[float, _quantity("a time in µs", _TIME, 0.01, 1e6)]
    bandwidth_gb_per_s: Annotated[float, _quantity("a bandwidth in GB/s", _BANDWIDTH, 1e-3, 1e5)]
    efficiency: Annotated[float, _quantity("a fraction", _FRACTION)] = 1.0
    nics_per_node: int | None = None
    in_switch_efficiency: Annotated[float | None, _quantity("a fraction", _FRACTION)] = None


class ClusterFile(_Strict):
    """The document. `meshwright_cluster` is its version."""

    meshwright_cluster: int
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    device: Annotated[str, BeforeValidator(_one_device)]
    nodes: int
    gpus_per_node: int
    reserved_memory_gib: Annotated[float, _quantity("a memory size in GiB", _MEMORY, 1e-3, 1e5)] = 0.0
    price_usd_per_gpu_hour: Annotated[float | None, _quantity("a price in USD", _PRICE)] = None
    power_w_per_gpu: Annotated[float | None, _quantity("a power in W", _POWER, 1, 1e5)] = None
    links: Annotated[list[LinkFile], Field(min_length=1, max_length=8)] | None = None
    profile: Annotated[str, Field(min_length=1, max_length=1000)] | None = None


def read_cluster(path: Path) -> Cluster:
    """The cluster that the file at `path` describes. Raises `ClusterError`, one sentence that starts with the path."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ClusterError(f"{path} can't be read: {reason}") from None
    try:
        if len(data) > MAX_BYTES:
            raise ClusterError(f"the file is larger than {MAX_BYTES >> 10} KiB; expected a cluster description")
        found = cluster_from_text(data.decode())
        return replace(found, profile=str(path.parent / found.profile)) if found.profile else found
    except UnicodeDecodeError:
        raise ClusterError(f"{path}: not UTF-8 text; expected YAML") from None
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from None


def cluster_from_text(text: str) -> Cluster:
    """The cluster that a YAML document describes. Raises `ClusterError`."""
    document = _load(text)
    if not isinstance(document, dict):
        raise ClusterError(f"the document is {_given(document)}; expected fields such as device, nodes, gpus_per_node")
    version = document.get("meshwright_cluster")
    if isinstance(version, bool) or version != VERSION:
        given = "no field meshwright_cluster" if version is None else f"meshwright_cluster is {_given(version)}"
        raise ClusterError(f"{given}; expected {VERSION}, the version that this release reads")
    try:
        file = ClusterFile.model_validate(document)
        refuse_mixed(file.device)
        return _build(file)
    except ValidationError as error:
        raise ClusterError(_first(error)) from None


def _build(file: ClusterFile) -> Cluster:
    usual = preset_cluster(file.device, file.nodes, file.gpus_per_node)
    levels = usual.levels if file.links is None else tuple(
        LinkLevel(v.name, v.latency_us * 1e-6, v.bandwidth_gb_per_s * 1e9, v.joins_gpus, v.nics_per_node, v.efficiency,
                  v.in_switch_efficiency)
        for v in file.links)
    return replace(
        usual, name=file.name or usual.name, levels=levels, reserved_memory_bytes=file.reserved_memory_gib * 2**30,
        power_w=usual.power_w if file.power_w_per_gpu is None else file.power_w_per_gpu,
        price_usd_per_gpu_hour=file.price_usd_per_gpu_hour,
        profile=file.profile or "",
        source=usual.source if file.links is None else LINKS_OF_FILE)


def _first(error: ValidationError) -> str:
    """pydantic's first complaint as one sentence; the next ones follow once that is mended."""
    found = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in found["loc"])
    message, given = found["msg"], found["input"]
    sentences: dict[str, Callable[[], str]] = {
        "value_error": lambda: message.removeprefix("Value error, ") if "mixed GPU types" in message
        else f"{where} {message.removeprefix('Value error, ')}",
        "missing": lambda: f"{where} is missing; expected it in every cluster file",
        "extra_forbidden": lambda: f"unknown field {shorten(where)}; expected one of {_fields(found['loc'])}",
        "int_type": lambda: f"{where} is {_given(given)}; expected a whole number",
        "string_type": lambda: f"{where} is {_given(given)}; expected text",
    }
    usual = f"{where} is {_given(given)}; {message[:1].lower()}{message[1:]}"
    return sentences.get(found["type"], lambda: usual)()


def _fields(where: tuple[int | str, ...]) -> str:
    return ", ".join((LinkFile if where[0] == "links" else ClusterFile).model_fields)


def _load(text: str) -> Any:
    """The YAML document as plain data. Its events are looked at first: building recurses and expands."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ClusterError("the document has an anchor or alias (&, *); expected plain fields")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                raise ClusterError(f"the document is nested deeper than {MAX_DEPTH} levels; expected at most a list of "
                                   "links")
        _refuse_repeats(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except ClusterError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise ClusterError(f"not a YAML document: {' '.join(str(error).split())[:200]}") from None


def _refuse_repeats(node: yaml.Node | None) -> None:
    """YAML keeps the last of two equal fields; nobody means that."""
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise ClusterError(f"the field {shorten(twice)} is given twice; expected it once")
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            _refuse_repeats(child[1] if isinstance(child, tuple) else child)
