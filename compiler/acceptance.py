"""Acceptance of fused regions: compare each with what it replaces, and time both, on real data.

It happens inside the first real call of a graph. The ATen graph runs once, node by node, in eager; that run's
outputs are the call's result, so nothing is computed twice and mutations and random numbers happen exactly once.
While it runs, every region with a new structure is checked on the values that flow through it:

* lossless means error against float64 ≤ 2 × eager's own error + 4 ulp of the output's scale, element for element in the
  worst case, on the recorded inputs and on adversarial ones (zeros, large and tiny magnitudes, mixed signs);
* kernel and eager region are timed in turn; a kernel that is clearly slower is dropped.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..codegen.expr import Expr
from ..codegen.group import Group
from ..codegen.ir import Kernel
from ..codegen.lowering.shapes import shape_of

log = logging.getLogger(__name__)

KernelFunction = Callable[[Sequence[torch.Tensor], Sequence[int]], None]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SLOWER_FACTOR = 1.15  # timings below this ratio are noise
SLOWER_SECONDS = 20e-6  # a difference smaller than a few dispatches can't be told from noise either
# Small and huge apart: errors are measured against the output's scale, and exp(50) would hide all others.
ADVERSARIAL = ((0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1e-6, -1e-30, 3.0, -0.1), (50.0, -50.0, 3e3, 0.0, -700.0, 11.0, 1e-20))
MAX_TURNS = 8
MAX_TIMING_S = 0.2
MAX_REFERENCE_BYTES = 1 << 30  # the float64 copy of a region's tensors may take this much


@dataclass
class Verdict:
    """What acceptance found for one kernel structure. Times in seconds per call, None where not taken."""

    ok: bool
    reason: str = ""
    eager_s: float | None = None
    kernel_s: float | None = None


class Region:
    """A group as a function: run its ATen nodes in eager, in the graph's dtypes or in float64."""

    def __init__(self, group: Group) -> None:
        self.group = group
        inside = {*group.nodes, *group.views}
        wanted: dict[fx.Node, None] = {}
        order: list[fx.Node] = []
        bases = set(group.built.inputs)
        self._collect(group.built.outputs, inside, bases, wanted, order)
        self.nodes = order

    def _collect(self, outputs: Sequence[fx.Node], inside: set[fx.Node], bases: set[fx.Node],
                 wanted: dict[fx.Node, None], order: list[fx.Node]) -> None:
        """Every node between the kernel's inputs and outputs, views outside the group included."""
        stack = [(n, False) for n in reversed(outputs)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in wanted and node not in bases or node in inside and node not in wanted:
                wanted.setdefault(node)
                stack.append((node, True))
                stack += [(a, False) for a in reversed(node.all_input_nodes)]

    def run(self, env: Mapping[fx.Node, Any], *, double: bool = False) -> list[torch.Tensor]:
        """Outputs from the values of the kernel's inputs (and of sizes) in `env`. `double`: all floats in float64."""
        values = dict(env)
        if double:
            values = {n: _double(v) for n, v in values.items()}

        def value(n: fx.Node) -> Any:
            return values[n]
        for node in self.nodes:
            if node in values:
                continue
            args = fx.map_arg(node.args, value)
            kwargs = dict(fx.map_arg(node.kwargs, value))
            if double:
                args = tuple(torch.float64 if a in FLOATS else a for a in args) if any(
                    isinstance(a, torch.dtype) for a in args) else args
                kwargs = {k: torch.float64 if isinstance(v, torch.dtype) and v in FLOATS else v
                          for k, v in kwargs.items()}
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [values[o] for o in self.group.built.outputs]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.dtype in FLOATS else value


def empty_outputs(outputs: Sequence[fx.Node], size: Callable[[Expr], int], device: torch.device) -> list[torch.Tensor]:
    """Uninitialised outputs of the shapes and strides the graph was traced with; `size` evaluates an expression."""
    out = []
    for node in outputs:
        shape = shape_of(node.meta["val"])
        out.append(torch.empty_strided([size(s) for s in shape.sizes], [size(s) for s in shape.strides],
                                       dtype=node.meta["val"].dtype, device=device))
    return out


class Acceptance:
    """Judges regions while the graph runs. `symbols` are the values of the graph's symbolic sizes in this call."""

    def __init__(self, kernels: Mapping[str, KernelFunction], names: Mapping[str, str], symbols: Mapping[str, int], *,
                 check: bool = True, measure: bool = True, deadline: float | None = None) -> None:
        self.kernels, self.names, self.symbols = kernels, names, symbols
        self.check, self.measure, self.deadline = check, measure, deadline
        self.verdicts: dict[str, Verdict] = {}
        self.check_s = 0.0
        self.measure_s = 0.0

    def judge(self, group: Group, env: Mapping[fx.Node, Any], eager: Sequence[torch.Tensor]) -> Verdict:
        """The verdict for this group's structure, given the values of its inputs and eager's outputs."""
        key = group.built.key
        if key in self.verdicts:
            return self.verdicts[key]
        if self.deadline is not None and time.monotonic() > self.deadline:
            verdict = Verdict(True, "not checked: time limit reached")
        else:
            verdict = self._judge(group, env, eager)
        self.verdicts[key] = verdict
        return verdict

    def _judge(self, group: Group, env: Mapping[fx.Node, Any], eager: Sequence[torch.Tensor]) -> Verdict:
        region = Region(group)
        kernel = self.kernels[self.names[group.built.key]]
        start = time.perf_counter()
        inputs = [env[n] for n in group.built.inputs]
        wanted = set(group.built.inputs)
        known = {n: v for n, v in env.items()  # tuples hold tensors: kept, they would hide the changed inputs
                 if n in wanted or n.op != "call_function" or not isinstance(v, (torch.Tensor, tuple, list))}
        try:
            if self.check:
                reason = self._compare(group, region, kernel, known, inputs, eager)
                reason = reason or self._adversarial(group, region, kernel, known)
                if reason:
                    return Verdict(False, reason)
        finally:
            self.check_s += time.perf_counter() - start
        return self._time(group, region, kernel, known, inputs, eager) if self.measure else Verdict(True)

    def _call(self, group: Group, kernel: KernelFunction, inputs: Sequence[torch.Tensor],
              like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = self._outputs(group, like)
        for o in outputs:
            _poison(o)
        kernel([*inputs, *outputs], self.sizes(group))
        return outputs

    def _outputs(self, group: Group, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return empty_outputs(group.built.outputs, lambda e: e.evaluate(self.symbols), like[0].device)

    def sizes(self, group: Group) -> list[int]:
        return [e.evaluate(self.symbols) for e in group.built.sizes]

    def _compare(self, group: Group, region: Region, kernel: KernelFunction, known: Mapping[fx.Node, Any],
                 inputs: Sequence[torch.Tensor], eager: Sequence[torch.Tensor]) -> str:
        """Empty when the kernel's outputs pass, else what differs."""
        ours = self._call(group, kernel, inputs, eager)
        exact: list[Any] = [None] * len(ours)
        for k, (node, mine, theirs) in enumerate(zip(group.built.outputs, ours, eager, strict=True)):
            if _close_enough(mine, theirs):
                continue
            if exact[k] is None and sum(t.numel() * 8 for t in (*inputs, *eager)) <= MAX_REFERENCE_BYTES:
                exact = region.run(known, double=True)
            reason = difference(mine, theirs, exact[k])
            if reason and exact[k] is not None:
                reason = difference(mine, theirs, exact[k], self._conditioning(region, known, exact)[k])
            if reason:
                return f"{node.name}: {reason}"
        return ""

    @staticmethod
    def _conditioning(region: Region, known: Mapping[fx.Node, Any], exact: Sequence[torch.Tensor]) -> list[float]:
        """Eager's error when its inputs move by one unit in the last place.

        Where a result is the small difference of large numbers, one fp32 run may be right by luck; inputs are
        themselves rounded, so an error as large as the rounding of the inputs causes is nobody's fault.
        """
        worst = [0.0] * len(exact)
        for salt in range(2):
            moved = {n: jitter(v, salt + k) for k, (n, v) in enumerate(known.items())}
            for i, (out, ref) in enumerate(zip(region.run(moved), exact, strict=True)):
                if out.dtype in FLOATS:
                    gap = (out.double() - ref).abs()
                    worst[i] = max(worst[i], float(gap[torch.isfinite(gap)].max()) if gap.numel() else 0.0)
        return worst

    def _adversarial(self, group: Group, region: Region, kernel: KernelFunction, known: Mapping[fx.Node, Any]) -> str:
        """The same comparison on zeros, huge, tiny and mixed values in place of the recorded floats."""
        if sum(v.numel() for v in known.values() if isinstance(v, torch.Tensor)) > 1 << 20:
            return ""  # checked on the recorded values; a second full pass over big tensors costs seconds
        for menu in ADVERSARIAL:
            changed = {n: _provoke(v, menu, k) for k, (n, v) in enumerate(known.items())}
            try:
                eager = region.run(changed)
            except Exception as error:
                log.debug("adversarial inputs are no valid inputs here: %s", error)
                continue
            reason = self._compare(group, region, kernel, changed, [changed[n] for n in group.built.inputs], eager)
            if reason:
                return f"on adversarial inputs, {reason}"
        return ""

    def _time(self, group: Group, region: Region, kernel: KernelFunction, known: Mapping[fx.Node, Any],
              inputs: Sequence[torch.Tensor], eager: Sequence[torch.Tensor]) -> Verdict:
        start = time.perf_counter()
        outputs = self._outputs(group, eager)
        buffers, sizes = [*inputs, *outputs], self.sizes(group)
        theirs, mine = [], []
        for turn in range(MAX_TURNS):
            theirs.append(_seconds(lambda: region.run(known)))
            mine.append(_seconds(lambda: kernel(buffers, sizes)))
            # the best time of each is what the code can do; the rest is the machine. Stop early once ours has won.
            if turn and (min(mine) < min(theirs) or time.perf_counter() - start > MAX_TIMING_S):
                break
        verdict = Verdict(True, "", min(theirs), min(mine))
        assert verdict.kernel_s is not None and verdict.eager_s is not None
        if verdict.kernel_s > verdict.eager_s * SLOWER_FACTOR and verdict.kernel_s - verdict.eager_s > SLOWER_SECONDS:
            verdict.ok = False
            verdict.reason = f"slower: {verdict.kernel_s * 1e6:.0f} µs against {verdict.eager_s * 1e6:.0f} µs in eager"
        self.measure_s += time.perf_counter() - start
        return verdict


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _poison(t: torch.Tensor) -> None:
    """Make an element that was not written visible."""
    if t.dtype in FLOATS:
        t.fill_(float("nan"))
    elif t.dtype != torch.bool:
        t.fill_(77)


def _close_enough(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """True when the outputs agree to 4 ulp of the output's scale, so that no float64 run is needed."""
    if mine.dtype not in FLOATS:
        return torch.equal(mine, theirs)
    if mine.numel() == 0:
        return True
    scale = float(theirs.abs().max())
    gap = float((mine - theirs).abs_().max())
    return gap <= 4 * torch.finfo(mine.dtype).eps * scale < float("inf")  # NaN and infinity fail every comparison


def jitter(value: Any, salt: int) -> Any:
    """A float tensor with every element moved by -1, 0 or +1 unit in the last place; other things unchanged."""
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS:
        return value
    steps = ((torch.arange(value.numel(), device=value.device) * 31 + salt * 17) % 3 - 1).reshape(value.shape)
    return value + (value.abs() * torch.finfo(value.dtype).eps * steps).to(value.dtype)


def difference(mine: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor | None, moved: float = 0.0) -> str:
    """Empty when `mine` is as good as `theirs` (the lossless rule of this module), else a sentence. `moved` is eager's
    error under a one-ulp change of its inputs, where known."""
    if mine.dtype not in FLOATS:
        wrong = mine != theirs
        if exact is not None:
            wrong &= mine.to(exact.dtype) != exact
        count = int(wrong.sum())
        return f"{count} of {mine.numel()} values differ" if count else ""
    reference = (theirs if exact is None else exact).double()
    own, other = mine.double(), theirs.double()
    usable = torch.isfinite(reference) & torch.isfinite(other)
    odd = torch.isfinite(own) != torch.isfinite(other)
    odd |= torch.isnan(own) != torch.isnan(other)
    # where float64 stays finite and eager overflowed (or the reverse) rounding decides; only a NaN of ours is wrong
    # there
    lost = odd & usable
    if bool(lost.any()):
        return f"{int(lost.sum())} values are not finite where eager's are"
    scale = float(reference[usable].abs().max()) if bool(usable.any()) else 0.0
    mine_off = float((own - reference)[usable].abs().max()) if bool(usable.any()) else 0.0
    eager_off = float((other - reference)[usable].abs().max()) if bool(usable.any()) else 0.0
    allowed = 2 * max(eager_off, moved) + 4 * torch.finfo(mine.dtype).eps * scale
    if mine_off > allowed:
        return (f"error {mine_off:.3g} against float64, allowed {allowed:.3g} "
                f"(eager's own {eager_off:.3g}, scale {scale:.3g})")
    return ""


def _provoke(value: Any, menu: Sequence[float], salt: int) -> Any:
    """A tensor of the same shape and strides (the kernel knows no others) with values from `menu`; other things
    unchanged."""
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS or value.numel() == 0:
        return value
    values = torch.tensor(menu, dtype=torch.float64)
    changed = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    once = changed[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]  # expanded dims
    picks = (torch.arange(once.numel()) * 7919 + salt * 31) % len(menu)
    once.copy_(values[picks].reshape(once.shape))
    return changed


def kernel_names(groups: Sequence[Group]) -> dict[str, str]:
    """A readable unique name for every kernel structure: its last few operators."""
    names: dict[str, str] = {}
    taken: dict[str, int] = {}
    for g in groups:
        if g.built.key in names:
            continue
        base = _describe(g)
        taken[base] = taken.get(base, -1) + 1
        names[g.built.key] = f"{base}_{taken[base]}"
    return names


_BORING = {"mul", "add", "sub", "div", "clone", "view", "_to_copy", "where", "getitem", "sum"}


def _describe(g: Group) -> str:
    words: list[str] = []
    for n in g.nodes:
        parent = n.args[0] if n.args else None
        target = parent.target if n.target is operator.getitem and isinstance(parent, fx.Node) else n.target
        word = str(target).split(".")[1]
        if not words or words[-1] != word:
            words.append(word.strip("_"))
    telling = [w for w in words if w not in _BORING] or words
    return "fused_" + "_".join(dict.fromkeys(telling[-3:]))


def plain_kernel(group: Group, name: str) -> Kernel:
    return group.built.kernel.renamed(name)
