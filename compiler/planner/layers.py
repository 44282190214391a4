"""Which modules of a model are its layers, and what each gets when the model runs.

One run without data records every call of a module that stands in a `ModuleList`, `Sequential` or `ModuleDict`. The
layers are the outermost containers whose members are called in a chain, each on what the one before it made, and of
which at least two are equal. Names play no part. Equal calls run once: later ones get outputs of the same kind.

Two modules are equal when their class, configuration object, plain attributes, parameter and buffer shapes, ties and
hooks are, their sub-modules included. An attribute that counts the members of a container (0, 1, 2, …) is ignored, so
code that reads its own number in `forward` is not seen: `--verify-folding` captures every layer and compares.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...cost_model.model import BoundaryRole
from ...runtime import torch_compat
from ...runtime.errors import InvalidInputError, UnsupportedError
from .gpu_operators import GpuOperators
from .meta_model import MetaModel
from .state import State, exchanged

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
INTERNAL = frozenset(vars(nn.Module()))  # what every module has


@dataclass
class Call:
    """One call of a layer: the module, its arguments and its result, which are fake tensors in containers."""

    container: str
    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors among the arguments, each once, in order."""
        return unique_tensors((self.args, self.kwargs))


def named_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among the arguments of a call, each once, in order, by keyword or position: `mask`, `rotary.0`."""
    named: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in [*((str(i), a) for i, a in enumerate(args)), *kwargs.items()]:
        found = unique_tensors(value)
        for i, tensor in enumerate(found):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                named[name if len(found) == 1 else f"{name}.{i}"] = tensor
    return named


def unique_tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested containers, each once, in order."""
    leaves = [v for v in torch_compat.tree_leaves(tree) if isinstance(v, torch.Tensor)]
    return list({id(v): v for v in leaves}.values())


def roles(calls: Sequence[Call]) -> list[list[BoundaryRole]]:
    """For each call, what each of its inputs is to the chain of layers."""
    uses = Counter(id(t) for c in calls for t in c.inputs)

    def role(tensor: torch.Tensor, first: bool) -> BoundaryRole:
        if first and uses[id(tensor)] == 1:
            return "chain"
        if not tensor.requires_grad:
            return "constant"
        return "chain" if uses[id(tensor)] == 1 else "carried"

    found: list[list[BoundaryRole]] = []
    for call in calls:
        floating = [t for t in call.inputs if t.is_floating_point()]
        found.append([role(t, bool(floating) and t is floating[0]) for t in call.inputs])
    return found


class Recorder:
    """Runs a model once without data and finds its layers. `run_all`: equal calls too."""

    def __init__(self, built: MetaModel, state: State, *, run_all: bool = False) -> None:
        self.built, self.state, self.run_all = built, state, run_all
        self.prints: dict[str, Any] = {}
        self._known: dict[Any, tuple[Any, Any]] = {}
        self._calls: list[Call] = []

    def layer_calls(self) -> list[Call]:
        """Calls of the layers, in order. Raises `UnsupportedError` with the name of the module that needs data."""
        members = {}
        for path, container in self.built.model.named_modules():
            if isinstance(container, CONTAINERS):
                children = dict(container.named_children())
                counting = _counting_attributes(list(children.values()))
                for name, child in children.items():
                    inner = f"{path}.{name}" if path else name
                    self.prints[inner] = fingerprint(child, counting)
                    members[inner] = (path, child)
        wrappers = {inner: self._recording(path, inner, child) for inner, (path, child) in members.items()}
        with replaced_forwards({members[i][1]: w for i, w in wrappers.items()}):
            run_without_data(self.built, self.state)
        chosen = self._layer_containers()
        return [c for c in self._calls if c.container in chosen]

    def _recording(self, container: str, path: str, module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = Call(container, path, module, args, kwargs)
            self._calls.append(call)
            key = (self.prints[path], signature((args, kwargs)))
            if key in self._known and not self.run_all:
                call.output = again(*self._known[key], (args, kwargs))
            else:
                call.output = original(*args, **kwargs)
                self._known[key] = (call.output, (args, kwargs))
            return call.output

        return forward

    def _layer_containers(self) -> set[str]:
        chains = {}
        for container in dict.fromkeys(c.container for c in self._calls):
            calls = [c for c in self._calls if c.container == container]
            if all(_linked(a, b) for a, b in zip(calls, calls[1:], strict=False)):
                chains[container] = max(Counter(self.prints[c.path] for c in calls).values())
        repeating = [c for c, most in chains.items() if most > 1]
        return _outermost(repeating) or _outermost(chains)


def _outermost(paths: Any) -> set[str]:
    return {p for p in paths if not any(o != p and (not o or p.startswith(f"{o}.")) for o in paths)}


def _linked(first: Call, second: Call) -> bool:
    """Whether the second call works on what the first made; `forward` may have changed it on the way. Branches that get
    the same input side by side are no chain."""
    made, got, given = unique_tensors(first.output), second.inputs, first.inputs
    if not made or not got:
        return False
    alike = made[0].shape == got[0].shape and made[0].dtype == got[0].dtype
    return any(m is g for m in made for g in got) or (alike and not (given and got[0] is given[0]))


def run_without_data(built: MetaModel, state: State) -> Any:
    """The model's output on fake tensors. Raises `UnsupportedError` or `InvalidInputError` with the module's name."""
    names = {id(m): n for n, m in built.model.named_modules()}
    stack: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            stack.append(module)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in names:
            stack.pop()

    hooks = [nn.modules.module.register_module_forward_pre_hook(enter),
             nn.modules.module.register_module_forward_hook(leave)]
    try:
        with state.mode, GpuOperators(), exchanged(built.model, state.weights()):
            return built.model(*state.args, **state.kwargs)
    except torch_compat.data_dependent_exceptions() as error:
        where = f"{names[id(stack[-1])] or 'forward'} ({type(stack[-1]).__name__})" if stack else "forward"
        raise UnsupportedError(f"{built.name}: {where} decides by the values of tensors, and there are none ({error})",
                               expected="a forward that runs on the meta device") from None
    except UnsupportedError:
        raise
    except Exception as error:
        where = f"{names[id(stack[-1])] or 'forward'} ({type(stack[-1]).__name__})" if stack else "forward"
        lines = str(error).strip().splitlines() or [""]
        raise InvalidInputError(f"{built.name} fails in {where} without data ({type(error).__name__}: {lines[0]})",
                                expected="a forward that runs on the meta device") from error
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it, each module runs the given function in place of its `forward`; hooks stay."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, old in before.items():
            if old is None:
                del module.forward
            else:
                module.forward = old  # type: ignore[method-assign]


def signature(tree: Any) -> Any:
    """What two calls must share to be equal: containers, shapes, dtypes, gradients, plain values."""
    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (tuple(value.shape), value.stride(), value.dtype, value.requires_grad)
        return value if isinstance(value, (int, float, str, bool, type(None))) else type(value)

    return repr(torch_compat.tree_map(leaf, tree))


def again(output: Any, inputs: Any, new_inputs: Any, *, gradients: bool = True) -> Any:
    """A result like `output` for other inputs: what was an input is the new input, the rest is fresh."""
    passed = {id(a): b for a, b in zip(unique_tensors(inputs), unique_tensors(new_inputs), strict=False)}

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in passed:
            return passed[id(value)]
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return made.requires_grad_().clone() if gradients and value.requires_grad else made

    return torch_compat.tree_map(fresh, output)


# -- equality of modules --------------------------------------------------------------------------
def fingerprint(module: nn.Module, ignored: frozenset[tuple[str, str]] = frozenset()) -> Any:
    """What two modules must share to be equal, as one hashable value. `ignored`: (sub-module, attribute)."""
    seen: dict[int, int] = {}

    def tensor(value: torch.Tensor | None) -> Any:
        if value is None:
            return None
        return (tuple(value.shape), value.dtype, value.requires_grad, seen.setdefault(id(value), len(seen)))

    parts = []
    for name, sub in module.named_modules(remove_duplicate=False):
        own = [(n, tensor(p)) for kind in (sub._parameters, sub._buffers) for n, p in kind.items()]
        plain = [(k, _plain(v)) for k, v in sorted(vars(sub).items())
                 if k not in INTERNAL and k != "forward" and (name, k) not in ignored]
        hooks = [id(h) for table in (sub._forward_pre_hooks, sub._forward_hooks, sub._backward_hooks)
                 for h in table.values()]
        parts.append((name, type(sub), sub.training, tuple(own), tuple(plain), tuple(hooks)))
    return tuple(parts)


def _plain(value: Any, depth: int = 4) -> Any:
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.Size)):
        return (type(value), value)
    if isinstance(value, (list, tuple)) and depth:
        return (type(value), tuple(_plain(v, depth - 1) for v in value))
    if isinstance(value, Mapping) and depth:
        return tuple((str(k), _plain(v, depth - 1)) for k, v in value.items())
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, functools.partial):
        return (id(value.func), _plain(value.args, depth), _plain(value.keywords, depth))
    value = getattr(value, "__func__", value)  # a bound method is a new object for every instance
    return id(value) if callable(value) or hasattr(value, "to_dict") else type(value)


def _counting_attributes(children: Sequence[nn.Module]) -> frozenset[tuple[str, str]]:
    """Attributes that number the members of a container one by one, from whatever the first has."""
    if len(children) < 2:
        return frozenset()
    numbers: list[dict[tuple[str, str], int]] = [
        {(name, k): v for name, sub in child.named_modules() for k, v in vars(sub).items()
         if isinstance(v, int) and not isinstance(v, bool)} for child in children]
    names = {n for found in numbers for n in found}

    def counts(name: tuple[str, str]) -> bool:
        have = [(i, found[name]) for i, found in enumerate(numbers) if name in found]
        return len(have) > 1 and len({value - i for i, value in have}) == 1

    return frozenset(n for n in names if counts(n))
