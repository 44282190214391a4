"""The passes Meshwright knows by name: its own, and those third parties add with `register_pass`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..runtime.errors import InvalidInputError, UnknownNameError
from ..runtime.locks import ForkSafeLock
from .base import Pass

# Built-in names and where each lives; imported when first used. `fuse` is done by the ATen engine itself (the driver
# hands it the settings), so it has no entry here but is a name users may give.
ENGINE_PASSES = ("fuse",)
_BUILT_IN: dict[str, tuple[str, str]] = {}
_registered: dict[str, Callable[[], Pass]] = {}
_guard = ForkSafeLock()


def register_pass(make: Callable[[], Pass] | Pass, *, name: str | None = None, replace: bool = False) -> None:
    """Make a pass known by its name, so that `passes=[name]` and `disable=[name]` find it; it then runs by default
    when it is lossless.

    `make` is a `Pass` object or a callable without arguments that gives one (its class, usually). Raises
    `InvalidInputError` when it is no pass, or when the name is taken and `replace` is False.
    """
    made = make if isinstance(make, Pass) and not isinstance(make, type) else None
    factory = (lambda: made) if made is not None else make
    sample = factory() if callable(factory) else None
    if not isinstance(sample, Pass):
        raise InvalidInputError(f"{make!r}",
                                expected="a Pass: an object with name, lossless, level and find(target, context)")
    if sample.level == "aten":
        raise InvalidInputError(f"pass {sample.name!r} at level 'aten'", expected="level 'module' or 'graph'",
                                do="ATen graphs have no real inputs to check a rewrite on; see the how-to page.")
    key = name or sample.name
    with _guard:
        if key in known_passes() and not replace:
            raise InvalidInputError(f"a pass named {key!r} exists", do="Choose another name, or pass replace=True.")
        _registered[key] = factory  # type: ignore[assignment]


def unregister_pass(name: str) -> None:
    """Forget a pass that `register_pass` added. Raises `UnknownNameError`."""
    with _guard:
        if name not in _registered:
            raise UnknownNameError("registered pass", name, _registered)
        del _registered[name]


def known_passes() -> tuple[str, ...]:
    """Every name that `passes=` and `disable=` accept, in the order the passes run."""
    return (*_BUILT_IN, *ENGINE_PASSES, *(n for n in _registered if n not in _BUILT_IN))


def make_pass(name: str) -> Pass | None:
    """The pass called `name` with its default options; None for one the ATen engine runs itself.

    Raises `UnknownNameError` with the nearest name.
    """
    if name in _registered:
        return _registered[name]()
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name]
        made = getattr(importlib.import_module(module, __package__), attribute)()
        return made  # type: ignore[no-any-return]
    check_name(name)
    return None


def check_name(name: str) -> None:
    """Raise `UnknownNameError` unless `name` is a known pass."""
    if name not in known_passes():
        raise UnknownNameError("pass", name, known_passes())
