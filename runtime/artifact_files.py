"""The files of a saved model, and their schema.

    program.json          this manifest: versions, where values come from and go, checksums
    graph.json            the Program (runtime/program_json.py) without its kernels
    kernels/NAME.ir       kernel IR, one file per kernel
    weights.safetensors   Parameters, buffers and constants the program reads
    sources/              the printed program and kernels of the machine that saved it: to read, never run

Writing is atomic: a directory beside the target, then one rename. Reading executes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ArtifactError
from .program import Program
from .program_json import MAX_BYTES, check_limits, parse_json, program_from_json, program_to_json

FORMAT = 1  # docs/artifacts.md says when this grows
_NAME = re.compile(r"[A-Za-z_]\w{0,200}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Source(_Strict):
    """Where a program input or an output leaf comes from.

    input: position among the example's leaves; weight: name in weights.safetensors; size: (input leaf, dim); output:
    position among the program's outputs; value: a constant.
    """

    kind: Literal["input", "weight", "size", "output", "value"]
    index: int = 0
    dim: int = 0
    name: str = ""
    value: bool | int | float | str | None = None


class Leaf(_Strict):
    """What is known of one leaf of the example: a tensor's dtype and shape (an int, or a symbol's name for a size that
    may differ), or a plain value that must be given again."""

    tensor: bool
    dtype: str = ""
    shape: list[int | str] = Field(default_factory=list)
    value: bool | int | float | str | None = None


class Weight(_Strict):
    """Layout of a weight: safetensors keeps values only."""

    shape: list[int]
    strides: list[int]


class Manifest(_Strict):
    """program.json."""

    format: int
    meshwright: str
    torch: str
    device: str
    machine: str
    isa: str
    model: str
    parameters: list[str]
    arguments: list[str]
    argument_structure: dict[str, Any]
    leaves: list[Leaf]
    inputs: list[Source]
    outputs: list[Source]
    output_structure: dict[str, Any]
    ranges: dict[str, list[int]]
    weights: dict[str, Weight]
    timings: dict[str, dict[str, float]] = Field(default_factory=dict)  # of methods, by what they were taken for
    checksums: dict[str, str]


def write_artifact(directory: Path, manifest: Manifest, program: Program, weights: dict[str, torch.Tensor],
                   sources: dict[str, str]) -> None:
    """Write all files, then move them into place. Raises `ArtifactError` when the target is something else or can't be
    written to; what was there before then stays as it was."""
    from safetensors import SafetensorError

    try:
        if directory.exists() and not (directory.is_dir() and (not any(directory.iterdir())
                                                               or (directory / "program.json").exists())):
            raise ArtifactError(f"{directory} exists and is no artifact", do="Choose a new directory.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            _write_files(work, manifest, program, weights, sources)
            _swap(work, directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"could not write {directory}: {error}",
                            do="Choose a writable directory on a disk with room for the model's weights.") from error


def _write_files(work: Path, manifest: Manifest, program: Program, weights: dict[str, torch.Tensor],
                 sources: dict[str, str]) -> None:
    from safetensors.torch import save_file

    (work / "graph.json").write_text(program_to_json(replace(program, kernels={})))
    for name, text in program.kernels.items():
        _write(work / "kernels" / f"{name}.ir", text)
    for name, text in sources.items():
        _write(work / "sources" / name, text)
    save_file({k: v.contiguous() for k, v in weights.items()}, str(work / "weights.safetensors"))
    sums = {str(f.relative_to(work)): _digest(f) for f in sorted(work.rglob("*"))
            if f.is_file() and "sources" not in f.relative_to(work).parts}
    (work / "program.json").write_text(manifest.model_copy(update={"checksums": sums}).model_dump_json(indent=1))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def _swap(work: Path, directory: Path) -> None:
    """Put `work` in the place of `directory`."""
    os.chmod(work, 0o755)
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
        os.replace(directory, old / "artifact")
        os.replace(work, directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(work, directory)


def read_artifact(directory: Path) -> tuple[Manifest, Program, dict[str, torch.Tensor]]:
    """Manifest, program (with kernel texts) and weights. Raises `ArtifactError` for anything missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = _read_manifest(directory)
    for name, wanted in manifest.checksums.items():
        if _digest(_inside(directory, name)) != wanted:
            raise ArtifactError(f"{directory / name} is damaged: its checksum differs", do="Save the model again.")
    for needed in ("graph.json", "weights.safetensors"):
        if needed not in manifest.checksums:
            raise ArtifactError(f"{directory / 'program.json'} has no checksum of {needed}")
    kernels = {Path(n).stem: _inside(directory, n).read_text() for n in manifest.checksums if n.startswith("kernels/")}
    program = replace(program_from_json((directory / "graph.json").read_text()), kernels=kernels)
    try:
        flat = load_file(str(directory / "weights.safetensors"))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{directory / 'weights.safetensors'} can't be read: {error}") from None
    return manifest, program, {k: _laid_out(k, v, manifest) for k, v in flat.items()}


def _read_manifest(directory: Path) -> Manifest:
    path = directory / "program.json"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_BYTES} bytes")
        data = parse_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{directory} holds no saved model ({error})",
                            expected="a directory written by compiled.save(directory)") from None
    check_limits(data)
    version = data.get("format") if isinstance(data, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"{path} has format version {version!r}", expected=f"version {FORMAT}",
                            do="Save the model again with this version of Meshwright.")
    try:
        return Manifest.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{path} is malformed at {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _inside(directory: Path, name: str) -> Path:
    """A file of the artifact; names that would lead elsewhere are refused."""
    parts = Path(name).parts
    plain = len(parts) in (1, 2) and all(_NAME.fullmatch(p.split(".")[0]) for p in parts)
    path = directory / name
    if not plain or path.is_symlink() or not path.is_file() or path.stat().st_size > (1 << 45):
        raise ArtifactError(f"the artifact names a file {name!r} that is missing or not its own")
    return path


def _laid_out(name: str, value: torch.Tensor, manifest: Manifest) -> torch.Tensor:
    layout = manifest.weights.get(name)
    if layout is None or layout.shape != list(value.shape) or len(layout.strides) != value.dim():
        raise ArtifactError(f"weight {name!r} has shape {list(value.shape)}, program.json says otherwise")
    if list(value.stride()) == layout.strides:
        return value
    span = sum((n - 1) * s for n, s in zip(layout.shape, layout.strides, strict=True)) + 1
    if any(s < 0 for s in layout.strides) or span > max(1, value.numel()) * 2:
        raise ArtifactError(f"weight {name!r} has impossible strides {layout.strides}")
    return torch.empty_strided(layout.shape, layout.strides, dtype=value.dtype).copy_(value)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
