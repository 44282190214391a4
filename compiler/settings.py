"""`CompileSettings`: everything one compilation was asked for, resolved once and never changed.

Both entries end here: the keyword arguments of `meshwright.compile`, and the `mode` and `options` that `torch.compile`
hands to the backend. What the environment says (MESHWRIGHT_STRICT, MESHWRIGHT_DUMP, MESHWRIGHT_DISABLE) is folded in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Union

from ..passes.base import Pass
from ..passes.registry import check_name
from ..runtime.errors import InvalidInputError, UnknownNameError
from ..runtime.settings import settings as environment_settings

MODES = ("default", "max")
TARGETS = ("cpu", "cuda")
PassSpec = Union[str, Pass]


@dataclass(frozen=True)
class CompileSettings:
    """Options of one compilation.

    passes: names or `Pass` objects in the order they run, or None for all lossless ones. disable: pass names, or
    `"name:pattern"` to keep a pass away from modules whose qualified name, or that of a module around them, matches a
    shell pattern (`"fuse:encoder.*"`).
    mode: "default", or "max" to also time Inductor on every graph. strict: raise on Meshwright's own failures.
    time_limit_s: seconds all passes, kernels, checks and measurements together may take (None: no limit); a graph whose
    kernels or program are not ready then runs eagerly until they are. target: the device type code is made for, None
    for that of the inputs. dump_dir: where every step is written as text. dynamic: trace with symbolic sizes. check and
    measure: accept replacements only after comparing and timing them.
    """

    passes: tuple[PassSpec, ...] | None = None
    disable: frozenset[str] = frozenset()
    mode: str = "default"
    strict: bool = False
    time_limit_s: float | None = None
    target: str | None = None
    dump_dir: Path | None = None
    dynamic: bool = True
    check: bool = True
    measure: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)  # options of single passes: {"fuse": {...}}

    def disables(self, pass_name: str, module: str | None = None) -> bool:
        """True when `pass_name` is off, everywhere or for the module of this qualified name or one that holds it."""
        from fnmatch import fnmatchcase

        if pass_name in self.disable:
            return True
        if module is None:
            return False
        patterns = [d.partition(":")[2] for d in self.disable if d.startswith(pass_name + ":")]
        parts = module.split(".") if patterns else []
        holders = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatchcase(name, p) for name in holders for p in patterns)

    def wants(self, pass_name: str) -> bool:
        """True when the pass of this name should run: not disabled, and named (or nothing was named)."""
        named = self.passes is None or any((p if isinstance(p, str) else p.name) == pass_name for p in self.passes)
        return named and not self.disables(pass_name)


OPTION_NAMES = tuple(f.name for f in fields(CompileSettings))


def resolve(options: Mapping[str, Any] | None = None, **keywords: Any) -> CompileSettings:
    """`CompileSettings` from options (a plain mapping) and keywords (which win when they are not None).

    Raises `UnknownNameError` for an unknown option or pass and `InvalidInputError` for a value of the wrong kind.
    """
    if options is not None and not isinstance(options, Mapping):
        raise InvalidInputError(f"options of type {type(options).__name__}", expected="a dict such as {'mode': 'max'}")
    given = dict(options or {})
    for name in given:
        if name not in OPTION_NAMES:
            raise UnknownNameError("option", str(name), OPTION_NAMES)
    given.update({k: v for k, v in keywords.items() if v is not None})
    env = environment_settings()
    base = CompileSettings(strict=env.strict, dump_dir=env.dump, disable=env.disable)
    values: dict[str, Any] = {name: _READ[name](name, value) if name in _READ else value
                              for name, value in given.items()}
    values["disable"] = base.disable | values.get("disable", frozenset())
    settings = replace(base, **values)
    _check_names(settings)
    return settings


def _check_names(settings: CompileSettings) -> None:
    for spec in settings.passes or ():
        if isinstance(spec, str):
            check_name(spec)
    for entry in settings.disable:
        name = entry.partition(":")[0]
        _check_known(name, settings)
    for name in settings.extra:
        _check_known(name, settings)


def _check_known(name: str, settings: CompileSettings) -> None:
    """Raise `UnknownNameError` unless `name` is registered or that of a pass object given for this compilation."""
    if not any(not isinstance(p, str) and p.name == name for p in settings.passes or ()):
        check_name(name)


def _read_passes(name: str, value: Any) -> tuple[PassSpec, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        value = (value,)
    return tuple(_read_pass(item) for item in value)


def _read_pass(item: Any) -> PassSpec:
    if isinstance(item, str):
        return item
    if not isinstance(item, Pass):
        raise InvalidInputError(f"{item!r} in passes",
                                expected="a pass name or a Pass object (name, lossless, level, find)")
    _hashable("passes", item)
    if item.level not in ("module", "graph"):
        raise InvalidInputError(f"pass {item.name!r} at level {item.level!r}", expected="level 'module' or 'graph'")
    return item


def _hashable(name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise InvalidInputError(f"{name}: {value!r} is not hashable", expected="a hashable value",
                                do="Declare the pass as a frozen dataclass, with tuples for lists.") from None


def _read_names(name: str, value: Any) -> frozenset[str]:
    items = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(item, str) for item in items):
        raise InvalidInputError(f"{name}={value!r}", expected="pass names as strings")
    return frozenset(items)


def _read_target(name: str, value: Any) -> str | None:
    if value is not None and value not in TARGETS:
        raise UnknownNameError(name, str(value), TARGETS)
    return None if value is None else str(value)


def _read_mode(name: str, value: Any) -> str:
    if value not in MODES:
        raise UnknownNameError("mode", str(value), MODES)
    return str(value)


def _read_seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise InvalidInputError(f"{name}={value!r}", expected="a positive number of seconds")
    return float(value)


def _read_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name}={value!r}", expected="True or False")
    return value


def _read_path(name: str, value: Any) -> Path | None:
    if value is not None and not isinstance(value, (str, Path)):
        raise InvalidInputError(f"{name}={value!r}", expected="a directory")
    return None if value is None else Path(value).expanduser().absolute()


def _read_extra(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"{name}={value!r}", expected="a dict from pass name to that pass's options")
    return dict(value)


_READ = {
    "passes": _read_passes, "disable": _read_names, "mode": _read_mode, "time_limit_s": _read_seconds,
    "strict": _read_flag, "dynamic": _read_flag, "check": _read_flag, "measure": _read_flag, "dump_dir": _read_path,
    "extra": _read_extra, "target": _read_target,
}
