"""The compiled module: a shallow copy of a model, of a generated subclass of its class, with another `forward`.

The copy has dictionaries of its own but shares every Parameter, buffer and submodule with the original, so
`isinstance`, `generate`, hooks, optimizers made before, `state_dict` keys and gradients on the original Parameters
need no special care. `copy.deepcopy` gives an independent compiled module; pickling is refused with a sentence.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedError

STATE = "_meshwright"


@dataclass
class CompiledState:
    """What a compiled module carries. `make(plain model)` compiles again (for deepcopy); `example` is what `save` runs.

    `call(module, *args, **kwargs)` runs the compiled forward.
    """

    original_class: type[nn.Module]
    call: Callable[..., Any]
    report: Any
    save: Callable[[nn.Module, Any], None]
    make: Callable[[nn.Module], nn.Module]


def shallow(model: nn.Module, cls: type[nn.Module] | None = None) -> nn.Module:
    """A copy of `model` (of class `cls`) with dictionaries of its own and the same Parameters, buffers and children."""
    kind = cls or type(model)
    out = kind.__new__(kind)
    state = {k: copy.copy(v) if type(v) in _COPIED else v for k, v in model.__dict__.items()}
    out.__dict__.update(state)
    return out


_COPIED = (dict, list, set, type(nn.Module()._forward_hooks), type(nn.Module()._parameters))


def shallow_tree(model: nn.Module) -> nn.Module:
    """Like `shallow` for every module of the tree: submodules may be replaced without touching the original."""
    copies: dict[int, nn.Module] = {}

    def of(module: nn.Module) -> nn.Module:
        if id(module) not in copies:
            copies[id(module)] = new = shallow(module)
            new._modules = {k: None if m is None else of(m) for k, m in module._modules.items()}
        return copies[id(module)]

    return of(model)


def compiled_module(model: nn.Module, state: CompiledState) -> nn.Module:
    """The compiled twin of `model`, running `state.call`."""
    out = shallow(model, _subclass(type(model)))
    out.__dict__.pop("forward", None)  # an instance-level forward is what `state.call` runs
    out.__dict__[STATE] = state
    return out


def state_of(module: nn.Module) -> CompiledState | None:
    """The compiled state of a module made by `compiled_module`, else None."""
    found = module.__dict__.get(STATE)
    return found if isinstance(found, CompiledState) else None


def plain(module: nn.Module) -> nn.Module:
    """The module without its compiled forward: same class as the original, sharing everything."""
    state = state_of(module)
    if state is None:
        return module
    out = shallow(module, state.original_class)
    del out.__dict__[STATE]
    return out


_subclasses: weakref.WeakKeyDictionary[type, type[nn.Module]] = weakref.WeakKeyDictionary()


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of `cls`, under the same name (libraries look at class names)."""
    if cls not in _subclasses:
        names: dict[str, Any] = {
            "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
            "forward": _forward_of(cls), "__deepcopy__": _deepcopy, "__copy__": _copy,
            "__reduce_ex__": _refuse_pickle, "meshwright": property(state_of),
        }
        # a model that has its own `save` or `report` keeps it: ours are then at `.meshwright`
        names.update({k: v for k, v in _PUBLIC.items() if not hasattr(cls, k)})
        metaclass: Any = type(cls)
        _subclasses[cls] = metaclass(cls.__name__, (cls,), names)
    return _subclasses[cls]


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # inside someone else's trace: let it see the model itself
            return cls.forward(self, *args, **kwargs)
        return self.__dict__[STATE].call(self, *args, **kwargs)

    return forward


def _report(self: nn.Module) -> Any:
    """What the compilation did: `print(model.report)`, `.as_dict()`, `.to_html()`."""
    return self.__dict__[STATE].report


def _kernels(self: nn.Module) -> Any:
    """The emitted kernels, as `KernelReport`s with their source text."""
    return self.__dict__[STATE].report.kernels


def _save(self: nn.Module, directory: Any) -> None:
    """Write the compiled inference program, its kernels and weights to `directory`; read with `meshwright.load`."""
    self.__dict__[STATE].save(self, directory)


_PUBLIC = {"report": property(_report), "kernels": property(_kernels), "save": _save}


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    state = self.__dict__[STATE]
    out = state.make(copy.deepcopy(plain(self), memo))
    memo[id(self)] = out
    return out  # type: ignore[no-any-return]


def _copy(self: nn.Module) -> nn.Module:
    return compiled_module(plain(self), self.__dict__[STATE])


def _refuse_pickle(self: nn.Module, protocol: Any) -> Any:
    raise UnsupportedError(
        f"pickling a compiled {type(self).__name__}", expected="a model that was not compiled, or an artifact",
        do="Use compiled.save(directory) and meshwright.load(directory), or pickle compiled.state_dict().")
