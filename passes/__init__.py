"""Rewrites of a model or its graphs; `register_pass` adds one (docs/how-to-register-a-pass.md)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Candidate as Candidate
    from .base import Pass as Pass
    from .base import PassContext as PassContext
    from .base import Predicted as Predicted
    from .base import Refused as Refused
    from .registry import known_passes as known_passes
    from .registry import register_pass as register_pass
    from .registry import unregister_pass as unregister_pass

_HOME = {"Candidate": ".base", "Pass": ".base", "PassContext": ".base", "Predicted": ".base", "Refused": ".base",
         "known_passes": ".registry", "register_pass": ".registry", "unregister_pass": ".registry"}

__all__ = ["Candidate", "Pass", "PassContext", "Predicted", "Refused", "known_passes", "register_pass",
           "unregister_pass"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
