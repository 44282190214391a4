"""A fuzzed program: inputs with symbolic shapes and Python statements over them; runs in eager, in float64, and traced.

Sizes are the names A, B and C, bound at the top of the function to the shape of `x0`, so one text serves every
assignment of numbers. In the *wide* run (the truth) inputs are float64 and the helpers `f32`, `bf16`, … keep them
that way; statements that round on purpose say `.to(torch.bfloat16)` themselves and are applied to exact values only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

Sizes = Mapping[str, int]
DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "b1": torch.bool,
}


@dataclass(frozen=True)
class Input:
    """`shape` holds size names or numbers; `layout`: "contiguous", "transposed", "sliced" or "expanded"; `high` bounds
    integers (index inputs stay below 2, valid at every size of at least 2)."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    layout: str = "contiguous"
    high: int = 9
    grad: bool = False

    def make(self, sizes: Sizes, seed: int) -> torch.Tensor:
        shape = [sizes[s] if s in sizes else int(s) for s in self.shape]
        made = self._values([shape[0], *shape[:0:-1]] if self.layout == "transposed" else shape, seed)
        if self.layout == "transposed":
            return made.permute(0, *range(len(shape) - 1, 0, -1))
        if self.layout == "sliced":
            return self._values([*shape[:-1], 2 * shape[-1] + 1], seed)[..., 1::2]
        if self.layout == "expanded":
            return made[:1].expand(shape) if shape[0] else made
        return made

    def _values(self, shape: list[int], seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed * 101 + sum(map(ord, self.name)))
        if self.dtype == "b1":
            return torch.rand(shape, generator=g) < 0.5
        if self.dtype in ("i64", "i32", "u8"):
            low = 0 if self.dtype == "u8" or self.high == 2 else -self.high
            return torch.randint(low, self.high, shape, generator=g).to(DTYPES[self.dtype])
        return torch.randn(shape, generator=g).to(DTYPES[self.dtype])


@dataclass(frozen=True)
class Line:
    """`target = text`, or the statement `text` when there is no target (a mutation). `uses` are the names in it."""

    target: str | None
    text: str
    uses: tuple[str, ...]

    def __str__(self) -> str:
        return self.text if self.target is None else f"{self.target} = {self.text}"


@dataclass(frozen=True)
class Program:
    """`seed` draws the input values; `zero` names sizes that may be 0."""

    seed: int
    inputs: tuple[Input, ...]
    lines: tuple[Line, ...]
    outputs: tuple[str, ...]
    sizes: dict[str, int]
    other_sizes: dict[str, int]
    zero: tuple[str, ...] = ()
    _cache: dict[bool, Callable[..., Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def has_grad(self) -> bool:
        return any(i.grad for i in self.inputs)

    @property
    def mutates(self) -> bool:
        return any(line.target is None for line in self.lines)

    def source(self) -> str:
        """The function as Python text."""
        head = [f"def f({', '.join(i.name for i in self.inputs)}):", "    A, B, C = x0.shape"]
        return "\n".join([*head, *(f"    {line}" for line in self.lines), f"    return ({', '.join(self.outputs)},)"])

    def function(self, wide: bool = False) -> Callable[..., Any]:
        """Outputs, and with gradients also those of the inputs that want one."""
        if wide not in self._cache:
            space: dict[str, Any] = namespace(wide)
            exec(self.source(), space)
            self._cache[wide] = _with_gradients(space["f"], self.inputs, space["f32"]) if self.has_grad else space["f"]
        return self._cache[wide]

    def make_inputs(self, sizes: Sizes) -> list[torch.Tensor]:
        return [i.make(sizes, self.seed) for i in self.inputs]

    def reproducer(self, reason: str) -> str:
        """What a failing test prints."""
        rows = [
            f"#   {i.name}: {i.dtype}[{', '.join(i.shape)}] {i.layout}{' requires grad' if i.grad else ''}"
            for i in self.inputs
        ]
        return "\n".join(
            [
                f"# seed {self.seed}: {reason}",
                f"# sizes {self.sizes}, other {self.other_sizes}, inputs:",
                *rows,
                self.source(),
            ]
        )


def namespace(wide: bool) -> dict[str, Any]:
    """What a program's text may name. Casts always copy: a mutation reaches the same tensors in the wide run, where
    every cast is one to the same dtype."""

    def keep(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x.to(torch.float64 if wide else dtype, copy=True)

    return {
        "torch": torch,
        "F": F,
        "f32": keep(torch.float32),
        "bf16": keep(torch.bfloat16),
        "f64": keep(torch.float64),
        "__builtins__": {},
    }


def _with_gradients(f: Callable[..., Any], inputs: tuple[Input, ...], f32: Callable[..., Any]) -> Callable[..., Any]:
    wanted = tuple(k for k, i in enumerate(inputs) if i.grad)

    def loss(*tensors: torch.Tensor) -> tuple[torch.Tensor, Any]:
        outputs = f(*tensors)
        floating = [o for o in outputs if o.is_floating_point()]
        total = sum(((f32(o) * (k + 0.5)).sum() for k, o in enumerate(floating)), f32(tensors[0]).sum() * 0.25)
        return total, outputs

    def run(*tensors: torch.Tensor) -> Any:
        gradients, outputs = torch.func.grad(loss, argnums=wanted, has_aux=True)(*tensors)
        return (*outputs, *gradients)

    return run
