"""Everything Meshwright raises on purpose, and the warning it gives when it falls back.

A message has three parts: what was given, what was expected, what to do. `MeshwrightError("given", expected="…",
do="…")` puts them together; a single complete sentence is fine too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_LISTED = 60
LONGEST_NAME = 80  # of an unknown name in a message


class MeshwrightError(Exception):
    """Base of all errors of this package: catching it catches every one of them."""

    def __init__(self, given: str, *, expected: str = "", do: str = "") -> None:
        self.given, self.expected, self.do = given, expected, do
        super().__init__(_sentence(given, expected, do))


class InvalidInputError(MeshwrightError, ValueError):
    """An argument of a public call is wrong: a non-module, wrong example inputs, an unhashable option."""


class UnknownNameError(InvalidInputError):
    """A name that is not in a known set (pass, target, option); carries the nearest known name. Of a large set the
    message names the three nearest."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        self.name = str(name)
        self.known = tuple(sorted(known))
        self.nearest = nearest_name(self.name, self.known)
        hint = f"did you mean {self.nearest!r}?" if self.nearest else ""
        expected = f"one of {', '.join(self.known)}" if self.known else "nothing: there is none"
        if len(self.known) > MOST_LISTED:
            near = nearest_names(self.name, self.known, 3)
            expected = (f"one of {len(self.known)} names, the nearest of which are {', '.join(near)}" if near else
                        f"one of {len(self.known)} names, of which none is close")
        shown = self.name if len(self.name) <= LONGEST_NAME else self.name[:LONGEST_NAME] + "…"
        super().__init__(f"unknown {kind} {shown!r}", expected=expected, do=hint)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_unknown_name, (self.given, self.name, self.known))


class UnsupportedError(MeshwrightError):
    """Valid input that Meshwright does not handle, such as an already quantized model."""


class DoesNotFitError(MeshwrightError):
    """No parallel plan fits the GPUs' memory; the message says what binds, what is missing and which change fits."""


class CompileFailure(MeshwrightError, RuntimeError):
    """A compiler (C++ or Triton) rejected a source; `source_path` is the kept file, where there is one."""

    def __init__(self, given: str, *, expected: str = "", do: str = "", source_path: str | None = None) -> None:
        self.source_path = source_path
        super().__init__(given, expected=expected, do=do)


class IndexOutOfRangeError(MeshwrightError, IndexError):
    """An index tensor held a value outside of the dimension it indexes; eager raises `IndexError` for it."""

    def __init__(self, where: str) -> None:
        self.where = where
        super().__init__(f"index out of range in {where}", expected="indices within the dimension they index",
                         do="Run the model without Meshwright to see which operator it was.")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.where,))


class ToolchainError(MeshwrightError, RuntimeError):
    """No usable compiler on this machine."""


class CacheError(MeshwrightError, OSError):
    """The kernel cache can hold nothing, not even in a private temporary directory."""


class ArtifactError(MeshwrightError, ValueError):
    """A saved artifact is damaged, of another version, or does not fit the model it is loaded for."""


class MeshwrightWarning(UserWarning):
    """Meshwright fell back to something slower that is still correct; the message says why."""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    return next(iter(nearest_names(name, known, 1)), None)


def nearest_names(name: str, known: Iterable[str], most: int) -> list[str]:
    """Up to `most` known names that are like `name`, the most alike first."""
    by_lower = {k.lower(): k for k in known}
    return [by_lower[k] for k in difflib.get_close_matches(name.lower(), list(by_lower), n=most, cutoff=0.5)]


def _sentence(given: str, expected: str, do: str) -> str:
    first = f"{given}; expected {expected}" if expected else given
    if not do:
        return first
    return first + do if first.endswith("\n") else f"{first.rstrip('.')}. {do}"


def _rebuild_unknown_name(given: str, name: str, known: tuple[str, ...]) -> UnknownNameError:
    kind = given.removeprefix("unknown ").rpartition(" ")[0]
    return UnknownNameError(kind, name, known)
