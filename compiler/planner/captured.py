"""Descriptions of a model for any micro-batch, captured once and kept on disk.

A capture depends on the model's configuration, the sizes, the libraries and this package's own code; all of these make
the key under which the cache directory keeps it. `module:callable` may import anything and is captured every time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ...cost_model.model import LayerKind, ModelDescription, interpolated, model_from_json
from ...runtime import cache
from ...runtime.errors import MeshwrightError
from ..models import config_name

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "transformers")


class ModelAtAnyBatch:
    """The model that `spec` names at `seq` tokens; `kinds(b)` are its layers for `b` samples. Raises what
    `capture_model` raises."""

    def __init__(self, spec: str, seq: int, dtype: str = "bfloat16", imbalance: float = 1.0) -> None:
        self.spec, self.seq, self.dtype, self.imbalance = spec, seq, dtype, imbalance
        self._at: dict[int, ModelDescription] = {}

    @cached_property
    def one(self) -> ModelDescription:
        """The description for one sample: names, order, sizes."""
        return self.at(1)

    def at(self, samples: int) -> ModelDescription:
        """The description for that many samples. Numbers are a straight line in them from two samples on, found from
        captures of 2 and 4; where they are not whole (uneven imbalance), another capture is made."""
        if samples not in self._at:
            self._at[samples] = self._captured(samples) if samples in (1, 2, 4) else self._line(samples)
        return self._at[samples]

    def kinds(self, samples: int) -> tuple[LayerKind, ...]:
        """The kinds of layers for that many samples."""
        return self.at(samples).kinds

    def _line(self, samples: int) -> ModelDescription:
        try:
            return interpolated(self.at(2), self.at(4), samples)
        except ValueError:
            return self._captured(samples)

    def _captured(self, samples: int) -> ModelDescription:
        key = _key(self.spec, self.seq, samples, self.dtype, self.imbalance)
        kept = cache.get_json(key) if key else None
        if kept is not None:
            try:
                return model_from_json(json.dumps(kept))
            except ValueError:
                pass  # an entry that this release can't read is made anew
        from .capture_model import capture_model

        made = capture_model(self.spec, seq=self.seq, micro_batch=samples, dtype=self.dtype, imbalance=self.imbalance)
        if key:
            try:
                cache.put_json(key, made.as_dict())
            except (MeshwrightError, OSError):
                pass  # it is only slower without
        return made


def _key(spec: str, seq: int, samples: int, dtype: str, imbalance: float) -> str | None:
    """None for what can't be kept."""
    path = Path(spec)
    content = spec
    folder = os.path.isdir(spec)  # False, unlike is_dir, where the name itself is impossible
    if folder or path.suffix == ".json":
        try:
            content = (path / "config.json" if folder else path).read_text()
        except (OSError, ValueError):
            return None
        content += "\0" + config_name(path / "config.json" if folder else path)
    elif ":" in spec:
        return None
    return cache.key_of("model description", content, str(seq), str(samples), dtype, repr(imbalance), _code())


@lru_cache(maxsize=1)
def _code() -> str:
    """Versions of the libraries, and a digest of the code that captures."""
    found = hashlib.sha256()
    for name in LIBRARIES:
        found.update(f"{name} {_version(name)}\0".encode())
    own = [*sorted((ROOT / "compiler" / "planner").glob("*.py")), ROOT / "compiler" / "records.py",
           ROOT / "compiler" / "aten.py", ROOT / "compiler" / "models.py", ROOT / "cost_model" / "model.py",
           ROOT / "cost_model" / "records.py", ROOT / "runtime" / "torch_compat.py"]
    for file in own:
        if file.name in _CAPTURING or file.parent.name != "planner":
            found.update(file.read_bytes())
    return found.hexdigest()


_CAPTURING = frozenset(f"{name}.py" for name in (
    "capture_model", "experts", "fused", "gpu_operators", "hf_tracing", "joint", "layers", "meta_model",
    "model_presets", "parts", "state", "structure"))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def digest_of(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
