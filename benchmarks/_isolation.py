"""Proof that our default legs do not use Inductor's compiler.

Dynamo and AOTAutograd themselves import a good part of the `torch._inductor` package on torch 2.13 (its config, caches,
decompositions and, through flex attention, even modules under `codegen`), so the package as a whole can't be blocked.
What is blocked is what turns a graph into code: without `compile_fx` (the entry that every use of Inductor as a backend
goes through) and `graph` (the lowering of FX graphs) no Inductor kernel can be made.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

BLOCKED = (
    "torch._inductor.compile_fx",
    "torch._inductor.compile_fx_ext",
    "torch._inductor.compile_fx_subproc",
    "torch._inductor.compile_fx_async",
    "torch._inductor.graph",
    "torch._inductor.freezing",
    "torch._inductor.fx_passes.pre_grad",
    "torch._inductor.fx_passes.joint_graph",
    "torch._inductor.fx_passes.post_grad",
    "torch._inductor.fx_passes.freezing_patterns",
    "torch._inductor.fx_passes.mkldnn_fusion",
)


class InductorUsed(ImportError):
    """Something tried to import a blocked module."""


class _Guard:
    """A meta-path finder that raises for blocked modules and remembers that it did."""

    def __init__(self) -> None:
        self.fired: list[str] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in BLOCKED:
            self.fired.append(name)
            raise InductorUsed(f"{name} is blocked in this leg")
        return None


@contextlib.contextmanager
def inductor_blocked() -> Iterator[None]:
    """Inside, importing any of `BLOCKED` raises, also where it was imported before. `AssertionError` at the end when
    one was asked for, even if the asker swallowed the error."""
    guard = _Guard()
    hidden = _hide()
    sys.meta_path.insert(0, guard)
    try:
        yield
    finally:
        sys.meta_path.remove(guard)
        _restore(hidden)
    assert not guard.fired, f"Inductor's compiler was asked for: {', '.join(sorted(set(guard.fired)))}"


def _hide() -> dict[str, ModuleType]:
    found = {}
    for name in BLOCKED:
        module = sys.modules.pop(name, None)
        if module is not None:
            found[name] = module
            parent, _, attribute = name.rpartition(".")
            vars(sys.modules[parent]).pop(attribute, None)
    return found


def _restore(hidden: dict[str, ModuleType]) -> None:
    for name, module in hidden.items():
        sys.modules[name] = module
        parent, _, attribute = name.rpartition(".")
        setattr(sys.modules[parent], attribute, module)
