"""From an ATen graph and its fused groups to a `Program`: order the steps, write sizes as text, plan releases."""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..codegen.expr import Expr
from ..codegen.group import Group
from ..codegen.lowering import CannotLower, kind_of, size_expr
from ..codegen.program_memory import size_text
from ..runtime.program import (
    Alloc,
    Call,
    Json,
    Launch,
    Program,
    Release,
    Step,
    Symbol,
    SymbolInput,
    TensorSpec,
    View,
    defines,
    reads,
)
from ..runtime.torch_compat import argument, device_of, is_operator


class NotAProgram(Exception):
    """The graph holds something a `Program` can't say; the message names it."""


Item = Group | fx.Node
aten = torch.ops.aten
IN_PLACE = {aten.index_put.default: "aten.index_put_.default", aten.scatter_add.default: "aten.scatter_add_.default",
            aten.index_add.default: "aten.index_add_.default", aten.scatter.src: "aten.scatter_.src",
            aten.scatter.value: "aten.scatter_.value"}


def program_text(size: Any) -> str | int:
    """A size as `Program` writes it: an int, or an expression in text."""
    return size_text(size if isinstance(size, Expr) else size_expr(size))


def tensor_spec(name: str, value: torch.Tensor, *, static: bool = False, source: str | None = None) -> TensorSpec:
    """Shape, strides, dtype and device of a (fake) tensor."""
    if value.layout != torch.strided or type(value) not in (torch.Tensor, torch.nn.Parameter) and not _is_fake(value):
        raise NotAProgram(f"{name} is a {type(value).__name__} of layout {value.layout}")
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(program_text(s) for s in value.shape),
                      tuple(program_text(s) for s in value.stride()), str(device_of(value)), static, source)


def _is_fake(value: torch.Tensor) -> bool:
    return type(value).__name__ == "FakeTensor"


@dataclass
class ProgramBuilder:
    """One use: `ProgramBuilder(gm, groups, ...).build()`. `names` maps kernel keys to kernel names."""

    gm: fx.GraphModule
    groups: Sequence[Group]
    names: Mapping[str, str]
    name: str = "graph"
    inference: bool = True
    static: Mapping[str, str] = field(default_factory=dict)  # placeholder name -> source name of a Parameter or buffer

    def __post_init__(self) -> None:
        self.group_of = {n: g for g in self.groups for n in g.nodes}
        self.order = {n: i for i, n in enumerate(self.gm.graph.nodes)}
        self.steps: list[Step] = []
        self.made: set[str] = set()
        self.constants: list[TensorSpec] = []
        self.alias: dict[fx.Node, str] = {}  # results written in place -> the tensor they were written into

    def build(self) -> Program:
        """Raises `NotAProgram` or `CannotLower` when the graph can't be written as a program."""
        inputs, symbols = self._inputs()
        for item in self._schedule():
            if isinstance(item, Group):
                self._launch(item)
            else:
                self._call(item)
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        results = tuple(self._result(o) for o in output.args[0])
        self._check_symbols(symbols)
        steps = with_releases(_mark_escapes(self.steps, results), results)
        kernels = {self.names[g.built.key]: str(g.built.kernel.renamed(self.names[g.built.key])) for g in self.groups}
        return Program(self.name, (*inputs, *self.constants), tuple(symbols), tuple(steps), results, kernels,
                       self.inference)

    # -- inputs -------------------------------------------------------------------------------
    def _inputs(self) -> tuple[list[TensorSpec | SymbolInput], list[Symbol]]:
        inputs: list[TensorSpec | SymbolInput] = []
        symbols: dict[str, Symbol] = {}
        for k, node in enumerate(n for n in self.gm.graph.nodes if n.op == "placeholder"):
            value = node.meta["val"]
            if isinstance(value, torch.Tensor):
                spec = tensor_spec(node.name, value, static=node.name in self.static, source=self.static.get(node.name))
                inputs.append(spec)
                self.made.add(node.name)
            elif isinstance(value, (int, torch.SymInt)):
                inputs.append(SymbolInput(node.name))
                e = size_expr(value)
                if not e.is_const and e.variables() == e.symbols() and str(e) in e.symbols():
                    symbols.setdefault(str(e), Symbol(str(e), argument=k))
            elif value is None:
                inputs.append(SymbolInput(node.name))
            else:
                raise NotAProgram(f"input {node.name} is a {type(value).__name__}")
        for item in inputs:
            for d, size in enumerate(item.shape if isinstance(item, TensorSpec) else ()):
                if isinstance(size, str) and size.isidentifier():
                    symbols.setdefault(size, Symbol(size, tensor=item.name, dim=d))
        return inputs, list(symbols.values())

    def _check_symbols(self, symbols: Sequence[Symbol]) -> None:
        from ..codegen.expr import parse_expr

        known = {s.name for s in symbols}
        for step in self.steps:
            for size in _sizes_of(step):
                missing = parse_expr(str(size)).symbols() - known
                if missing:
                    raise NotAProgram(f"size {size} depends on {sorted(missing)}, known only inside the graph")

    # -- order --------------------------------------------------------------------------------
    def _needed(self) -> list[Item]:
        """Groups and outside nodes that outputs or side effects depend on."""
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        todo: list[fx.Node] = list(output.all_input_nodes)
        todo += [n for n in self.gm.graph.nodes if n.op == "call_function" and is_effect(n)]
        seen: set[fx.Node] = set()
        items: dict[int, Item] = {}
        while todo:
            n = todo.pop()
            if n in seen:
                continue
            seen.add(n)
            g = self.group_of.get(n)
            if g is not None:
                items[id(g)] = g
                todo += g.built.inputs
            elif n.op != "placeholder":
                if n.op not in ("call_function", "get_attr", "output"):
                    raise NotAProgram(f"{n.op} node {n.name}")
                items[id(n)] = n
                if isinstance(n.meta.get("val"), torch.Tensor) or not _is_size(n):
                    todo += _reads(n)
        return list(items.values())

    def _schedule(self) -> list[Item]:
        """Items in dependency order, closest to the graph's own order; effects keep their order."""
        items = self._needed()
        owner: dict[fx.Node, int] = {}
        place: list[int] = []
        for k, item in enumerate(items):
            nodes = item.nodes if isinstance(item, Group) else (item,)
            for n in nodes:
                owner[n] = k
            place.append(max(self.order[n] for n in nodes))
        waits: list[set[int]] = [set() for _ in items]
        feeds: list[set[int]] = [set() for _ in items]
        last_effect = None
        for k in sorted(range(len(items)), key=place.__getitem__):
            item = items[k]
            sources = item.built.inputs if isinstance(item, Group) else _reads(item)
            before = {owner[s] for s in sources if s in owner}
            if not isinstance(item, Group) and is_effect(item):
                before |= {last_effect} if last_effect is not None else set()
                last_effect = k
            before.discard(k)
            waits[k] = before
            for b in before:
                feeds[b].add(k)
        ready = [(place[k], k) for k in range(len(items)) if not waits[k]]
        heapq.heapify(ready)
        out: list[Item] = []
        while ready:
            _, k = heapq.heappop(ready)
            out.append(items[k])
            for f in feeds[k]:
                waits[f].discard(k)
                if not waits[f]:
                    heapq.heappush(ready, (place[f], f))
        if len(out) != len(items):
            raise NotAProgram("the fused groups form a cycle")
        return out

    # -- steps --------------------------------------------------------------------------------
    def _launch(self, g: Group) -> None:
        for node in g.built.outputs:
            self.steps.append(Alloc(tensor_spec(node.name, node.meta["val"])))
            self.made.add(node.name)
        inputs = tuple(self._name(n) for n in g.built.inputs)
        self.steps.append(Launch(self.names[g.built.key], inputs, tuple(n.name for n in g.built.outputs),
                                 tuple(program_text(e) for e in g.built.sizes)))

    def _call(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._constant(node)
        elif node.op == "output" or _is_size(node) or self._is_result(node):
            return
        elif not self._view(node):
            self._operator(node)

    def _constant(self, node: fx.Node) -> None:
        value = node.meta.get("val", getattr(self.gm, str(node.target), None))
        if not isinstance(value, torch.Tensor):
            raise NotAProgram(f"attribute {node.target} is no tensor")
        self.constants.append(tensor_spec(node.name, value, static=True, source=f"constant:{node.target}"))
        self.made.add(node.name)

    def _is_result(self, node: fx.Node) -> bool:
        """`getitem(call, k)`: already a result of the call."""
        return node.target is operator.getitem and node.name in self.made

    def _view(self, node: fx.Node) -> bool:
        """Emit a strided view when `node` shares memory with what it reads."""
        if kind_of(node) != "view" and node.target not in (torch.ops.aten.as_strided.default,):
            return False
        base = node.args[0]
        while isinstance(base, fx.Node) and base.op == "call_function" and base.name not in self.made \
                and base not in self.alias and isinstance(base.args[0], fx.Node):
            base = base.args[0]
        if not isinstance(base, fx.Node):
            return False
        value, under = node.meta["val"], base.meta["val"]
        if not isinstance(under, torch.Tensor) or _storage(value) != _storage(under):
            return False
        offset = size_expr(value.storage_offset()) - size_expr(under.storage_offset())
        self.steps.append(View(tensor_spec(node.name, value), self._name(base), program_text(offset)))
        self.made.add(node.name)
        return True

    def _operator(self, node: fx.Node) -> None:
        target = node.target
        if not is_operator(target):
            raise NotAProgram(f"{target} is no ATen operator")
        if self._in_place(node):
            return
        value = node.meta.get("val")
        results = list(value) if isinstance(value, (list, tuple)) else [value]
        outs: list[str | None] = [None] * len(results)
        if isinstance(value, (list, tuple)):
            for user in node.users:
                if user.target is operator.getitem:
                    outs[int(user.args[1])] = user.name  # type: ignore[arg-type]
        else:
            outs[0] = node.name
        specs = tuple(tensor_spec(o, v) if o is not None and isinstance(v, torch.Tensor) else None
                      for o, v in zip(outs, results, strict=True))
        if any(v is not None and not isinstance(v, torch.Tensor) for v in results):
            raise NotAProgram(f"{target} returns {[type(v).__name__ for v in results]}")
        args = tuple(self._argument(a) for a in node.args)
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items()}
        self.steps.append(Call(str(target), args, kwargs, tuple(outs), specs))
        self.made.update(o for o in outs if o is not None)

    def _in_place(self, node: fx.Node) -> bool:
        """Scatter into a fresh tensor that nothing else reads: write into it instead of copying it first."""
        into = node.args[0] if node.args else None
        if node.target not in IN_PLACE or not isinstance(into, fx.Node) or len(into.users) > 1:
            return False
        others: list[fx.Node] = []
        fx.map_arg((node.args[1:], node.kwargs), others.append)
        if into in others:  # ATen refuses to write into what it reads
            return False
        if into not in self.group_of or tensor_spec("", into.meta["val"]) != tensor_spec("", node.meta["val"]):
            return False
        args = tuple(self._argument(a) for a in node.args)
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items()}
        self.steps.append(Call(IN_PLACE[node.target], args, kwargs, (None,), (None,)))
        self.alias[node] = self._name(into)
        return True

    # -- arguments ----------------------------------------------------------------------------
    def _name(self, node: fx.Node) -> str:
        if node in self.alias:
            return self.alias[node]
        if node.name not in self.made:
            raise NotAProgram(f"{node.name} ({node.target}) is used before it exists")
        return node.name

    def _result(self, value: Any) -> Json:
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
            return self._name(value)
        if value is None:
            return None
        return self._argument(value) if not isinstance(value, int) else {"size": value}

    def _argument(self, value: Any) -> Json:
        """An operator's argument as JSON (see `Call`)."""
        if isinstance(value, fx.Node):
            held = value.meta.get("val")
            if isinstance(held, torch.Tensor):
                return {"tensor": self._name(value)}
            if isinstance(held, (int, torch.SymInt)) and not isinstance(held, bool):
                return {"size": program_text(held)}
            raise NotAProgram(f"argument {value.name} is a {type(held).__name__}")
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        kinds: dict[type, str] = {torch.dtype: "dtype", torch.device: "device", torch.layout: "layout",
                                  torch.memory_format: "memory_format"}
        for kind, key in kinds.items():
            if isinstance(value, kind):
                return {key: str(value).removeprefix("torch.")}
        raise NotAProgram(f"argument of type {type(value).__name__}")


def is_effect(node: fx.Node) -> bool:
    """Operators whose order and execution matter: mutation and random numbers."""
    target = node.target
    if not is_operator(target):
        return False
    return target._schema.is_mutable or (torch.Tag.nondeterministic_seeded in target.tags and not _drops_nothing(node))


def _drops_nothing(node: fx.Node) -> bool:
    """Attention is tagged as random for its dropout: with a probability of 0 it draws nothing."""
    given = argument(node, "dropout_p")
    return isinstance(given, float) and given == 0.0


def _reads(node: fx.Node) -> Sequence[fx.Node]:
    """Input nodes of a node; a chunk of a split reads what is split."""
    parent = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(parent, fx.Node) and kind_of(node) == "view":
        return parent.all_input_nodes
    return node.all_input_nodes


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _sizes_of(step: Step) -> Iterable[str | int]:
    match step:
        case Alloc(spec=spec):
            return (*spec.shape, *spec.strides)
        case View(spec=spec, offset=offset):
            return (*spec.shape, *spec.strides, offset)
        case Launch(sizes=sizes):
            return sizes
        case Call(args=args, kwargs=kwargs):
            return _tree_sizes([*args, *kwargs.values()])
    return ()


def _tree_sizes(tree: Json) -> list[str | int]:
    if isinstance(tree, dict):
        return [tree["size"]] if "size" in tree else []
    if isinstance(tree, (list, tuple)):
        return [s for item in tree for s in _tree_sizes(item)]
    return []


def _roots(steps: Sequence[Step]) -> dict[str, str]:
    """View name -> the tensor whose memory it shows."""
    root: dict[str, str] = {}
    for s in steps:
        if isinstance(s, View):
            root[s.spec.name] = root.get(s.base, s.base)
    return root


def _mark_escapes(steps: Sequence[Step], results: Sequence[Json]) -> list[Step]:
    root = _roots(steps)
    leaving = {root.get(r, r) for r in results if isinstance(r, str)}
    return [Alloc(s.spec, True) if isinstance(s, Alloc) and s.spec.name in leaving else s for s in steps]


def with_releases(steps: Sequence[Step], results: Sequence[Json]) -> list[Step]:
    """Insert a `Release` after the last use of every tensor made here (a view's use counts as its base's)."""
    root = _roots(steps)
    kept = {x for r in results if isinstance(r, str) for x in (r, root.get(r, r))}
    last: dict[str, int] = {}
    born: set[str] = set()
    for i, s in enumerate(steps):
        names = [*reads(s), *defines(s), *(s.outputs if isinstance(s, Launch) else ())]
        born.update(defines(s))
        for n in names:
            last[n] = i
            last[root.get(n, n)] = i
    ending: dict[int, list[str]] = {}
    for n, i in last.items():
        if n in born and n not in kept:
            ending.setdefault(i, []).append(n)
    out: list[Step] = []
    for i, s in enumerate(steps):
        out.append(s)
        if i in ending:
            out.append(Release(tuple(ending[i])))
    return out


__all__ = ["CannotLower", "NotAProgram", "ProgramBuilder", "is_effect", "tensor_spec", "with_releases"]
