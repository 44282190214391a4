"""The contract between a pass and the pipeline.

A pass finds places (`Candidate`) and says what should stand there instead; it never edits the graph. The pipeline
(`compiler/pipeline.py`) checks each replacement against the original, times it where it can, splices it in, reports.
A pass that looks at a place and declines says so with `Refused`, so that "why did it not fire?" has an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Union, runtime_checkable

from torch import fx, nn

Level = Literal["module", "graph", "aten"]


@dataclass(frozen=True)
class Predicted:
    """What the cost model expects, in seconds and bytes, before and after the rewrite of one region."""

    before_s: float
    after_s: float
    before_bytes: int = 0
    after_bytes: int = 0

    @property
    def gain_s(self) -> float:
        return self.before_s - self.after_s


@dataclass(frozen=True)
class Candidate:
    """A region and its replacement.

    At level `module` the region is the qualified name of a submodule and the replacement an `nn.Module`. At levels
    `graph` and `aten` the region is a set of FX nodes, closed under "between", with `inputs` (nodes read from outside,
    in order) and `outputs` (nodes used outside, in order); the replacement is a callable from the inputs' values to a
    tuple of the outputs' values. `key` is equal for structurally equal regions: they are checked and timed once.
    """

    region: tuple[fx.Node, ...] | str
    replacement: Callable[..., Any] | nn.Module
    predicted: Predicted
    inputs: tuple[fx.Node, ...] = ()
    outputs: tuple[fx.Node, ...] = ()
    key: str = ""
    description: str = ""


@dataclass(frozen=True)
class Refused:
    """A place the pass looked at and left alone. `node` is an FX node or a module name."""

    reason: str
    node: fx.Node | str | None = None


Finding = Union[Candidate, Refused]


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the graph: the device, whether gradients are wanted, the chosen options, and the
    nodes of modules from which the user keeps it away (candidates there are refused, whatever the pass makes of them).
    """

    device: str = "cpu"
    training: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    left_out: frozenset[fx.Node] = frozenset()


@runtime_checkable
class Pass(Protocol):
    """A rewrite. Implement it as a frozen dataclass whose fields are its options (they become CLI options).

    `level` says which graph it reads: `module` (the nn.Module tree, before tracing), `graph` (Dynamo's torch-level FX
    graph; gradients flow through the replacement) or `aten` (one forward or backward graph after autograd).
    `lossless` promises equality within rounding; a lossy pass runs only when the user names it or gives a budget.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    level: ClassVar[Level]

    def find(self, target: fx.GraphModule | nn.Module, context: PassContext) -> Sequence[Finding]:
        """Candidates and refusals in `target`, which must not be changed."""
        ...
