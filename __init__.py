"""Meshwright compiles PyTorch models: `meshwright.compile(model, example_inputs)`.

Only public names live here, and each is imported at its first use: `import meshwright` loads neither torch nor a room.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "compile": ".compiler.api",
    "load": ".compiler.api",
    "refresh": ".compiler.api",
    "plan": ".compiler.planner.plan_model",
    "Cluster": ".cost_model.cluster",
    "MeshwrightError": ".runtime.errors",
    "MeshwrightWarning": ".runtime.errors",
}

if TYPE_CHECKING:
    from . import passes as passes
    from .compiler.api import compile as compile
    from .compiler.api import load as load
    from .compiler.api import refresh as refresh
    from .compiler.planner.plan_model import plan as plan
    from .cost_model.cluster import Cluster as Cluster
    from .runtime.errors import MeshwrightError as MeshwrightError
    from .runtime.errors import MeshwrightWarning as MeshwrightWarning

__all__ = ["Cluster", "MeshwrightError", "MeshwrightWarning", "__version__", "compile", "load", "passes", "plan",
           "refresh"]


def __getattr__(name: str) -> Any:
    if name == "passes":
        return importlib.import_module(".passes", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
