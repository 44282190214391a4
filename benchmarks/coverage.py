"""Which share of the architectures' ATen calls the code generator takes: `python benchmarks/coverage.py`.

Every model of tests/architectures is traced through Dynamo and AOTAutograd, forward and backward, and grouped;
nothing is compiled. Counted are calls that compute something (views cost nothing and are left out) and that are no
GEMM, convolution or attention. A call counts as taken when it stands in a kernel, not when its operator merely has a
lowering.
"""

from __future__ import annotations

import argparse
import operator
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import torch  # noqa: E402
from torch import fx, nn  # noqa: E402

from benchmarks._harness import goal_line, print_table, write_result  # noqa: E402

GOAL = 0.95


@dataclass
class Calls:
    """Counts of one model: calls in kernels, calls left to ATen by operator, library calls."""

    taken: int = 0
    left: Counter[str] = field(default_factory=Counter)
    library: int = 0

    @property
    def share(self) -> float:
        total = self.taken + sum(self.left.values())
        return self.taken / total if total else 1.0


def count(gm: fx.GraphModule, calls: Calls) -> None:
    """Add the calls of one ATen graph."""
    from meshwright.codegen.group import group
    from meshwright.codegen.lowering import kind_of
    from meshwright.compiler.graph_bytes import LIBRARY

    taken = {n for g in group(gm.graph)[0] for n in g.nodes}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.users and not node.target._schema.is_mutable:
            continue
        kind = kind_of(node)
        multiple = any(u.target is operator.getitem and u in taken for u in node.users)
        if node in taken or multiple:
            calls.taken += 1
        elif (
            kind in ("view", "generator")
            or all(kind_of(u) == "view" for u in node.users if u.target is operator.getitem)
            and any(u.target is operator.getitem and kind_of(u) == "view" for u in node.users)
        ):
            continue
        elif node.target.overloadpacket in LIBRARY:
            calls.library += 1
        else:
            calls.left[str(node.target)] += 1


def counting_backend(calls: Calls) -> Any:
    """A Dynamo backend that counts the graphs AOTAutograd makes and runs them in ATen."""
    from meshwright.codegen.lowering import decompositions
    from meshwright.runtime import torch_compat

    def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        count(gm, calls)
        return torch_compat.mark_boxed(lambda args: gm.forward(*args))

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return torch_compat.aot_autograd(
            gm, inputs, forward=compiler, backward=compiler, inference=compiler, decompositions=decompositions()
        )

    return backend


def measure(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Calls:
    """Count the calls of one forward and backward pass."""
    from tests.architectures.compare import run

    calls = Calls()
    torch.compiler.reset()
    run(torch.compile(model, backend=counting_backend(calls)), model, inputs)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="only this architecture (repeatable)")
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args()
    from tests.architectures.zoo import ARCHITECTURES

    wanted = [a for a in ARCHITECTURES if not given.model or a.name in given.model]
    found = {}
    for architecture in wanted:
        found[architecture.name] = measure(architecture.build(), architecture.inputs())
        print(f"  {architecture.name}: {found[architecture.name].share:.1%}", flush=True)
    left: Counter[str] = sum((c.left for c in found.values()), Counter())
    taken = sum(c.taken for c in found.values())
    share = taken / (taken + sum(left.values()))
    print_table(
        "ATen calls outside GEMM, convolution and attention, forward and backward",
        ["architecture", "in kernels", "left to ATen", "share"],
        [[n, c.taken, sum(c.left.values()), c.share] for n, c in found.items()],
    )
    print_table(
        "Left to ATen",
        ["operator", "calls", "architectures"],
        [[op, n, sum(op in c.left for c in found.values())] for op, n in left.most_common()],
    )
    print(goal_line("share of calls in kernels", share, GOAL))
    if not given.no_write:
        print(
            "written to",
            write_result(
                "coverage",
                {
                    "goal": GOAL,
                    "share": share,
                    "left_to_aten": dict(left.most_common()),
                    "architectures": {
                        n: {"in_kernels": c.taken, "left": dict(c.left), "library": c.library} for n, c in found.items()
                    },
                },
            ),
        )


if __name__ == "__main__":
    main()
