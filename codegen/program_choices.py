"""Which of a CUDA program's rewrites are used: those that measure faster on the device of the call.

The first call on a device times every candidate against the steps it stands for, on random values, and compares the
results loosely: that finds a miscompiled template, not rounding. Then the program is written with the winners alone, so
its text shows what runs. Symbolic sizes are rounded down to a power of two for that, and measured again when one leaves
its own. Where nothing can be measured, the program runs as it is.

Stacked weights are inputs of the rewritten program, looked up at call time (`runtime.packing`): a CUDA graph around it
reads them at their address, and an edited weight means another copy.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..runtime.device_clock import CudaClock, DeviceClock
from ..runtime.packing import PackedWeights
from ..runtime.program import Launch, Program, Symbol, TensorSpec, reads
from ..runtime.torch_compat import tf32_allowed
from .program_facts import ProgramFacts, alone, rewritten
from .program_memory import ITEMSIZE, size_expr, writes
from .program_python import KernelCall, load_program_python, print_program_python
from .program_rewrites import Refusal, Rewrite, find_rewrites
from .templates.triton_gemm import GemmKernel, Precision, gemm_kernel, print_gemm, tile_named, tiles_for
from .timings import Timings
from .triton import PRINTER_VERSION

log = logging.getLogger(__name__)

Runner = Callable[[Sequence[Any]], list[Any]]
LIBRARY, STACKED = "library", "stacked"
MARGIN = 0.97  # of the library's time: a smaller gain may be noise, and the library needs no compiler
MAX_VARIANTS = 8  # sets of choices per program; further sizes use the library
MEMORY_SHARE = 4  # stacked weights may take one part in so many of the memory that is free
LOOSE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the output's scale; tf32 as fp16
SPREAD = 0.25  # standard deviation of measured values: products of 4096 terms then have one of 4


@dataclass(frozen=True)
class Decision:
    """What was found for candidates that do the same work. `method` is "library" or what replaces it; seconds are None
    where nothing was measured. `count`: how many of them the program uses."""

    what: str
    count: int
    method: str
    library_s: float | None = None
    best_s: float | None = None
    reason: str = ""


@dataclass
class Measured:
    """Seconds by method, and why some methods have none."""

    seconds: dict[str, float]
    failed: str = ""

    @property
    def best(self) -> str:
        return min(self.seconds, key=lambda m: self.seconds[m])


Choice = tuple[Rewrite, str]  # and its method


def choose(rewrites: Sequence[Rewrite], measured: Mapping[str, Measured]) -> tuple[list[Choice], list[Decision]]:
    """The rewrites to use, no two of which replace the same step, and what to report. `measured`: by key."""
    def saved(r: Rewrite) -> float:
        found = measured[r.key]
        return found.seconds.get(LIBRARY, 0.0) - found.seconds.get(found.best, 0.0) if found.seconds else 0.0

    taken: set[int] = set()
    chosen: list[Choice] = []
    reasons: dict[str, str] = {}
    for r in sorted(rewrites, key=saved, reverse=True):
        found = measured[r.key]
        if not _faster(found):
            reasons[r.key] = found.failed or "the library is as fast"
        elif taken & set(r.replaced):
            reasons.setdefault(r.key, "another rewrite of the same product saves more")
        else:
            taken |= set(r.replaced)
            chosen.append((r, found.best))
    return chosen, _decisions(rewrites, measured, chosen, reasons)


def _faster(found: Measured) -> bool:
    return bool(found.seconds) and found.seconds[found.best] < MARGIN * found.seconds[LIBRARY]


def _decisions(rewrites: Sequence[Rewrite], measured: Mapping[str, Measured], chosen: Sequence[Choice],
               reasons: Mapping[str, str]) -> list[Decision]:
    out = []
    for key in dict.fromkeys(r.key for r in rewrites):
        found, mine = measured[key], [r for r in rewrites if r.key == key]
        used = sum(r.key == key for r, _ in chosen)
        others = {m: s for m, s in found.seconds.items() if m != LIBRARY}
        out.append(Decision(mine[0].what, used or len(mine), found.best if used else LIBRARY,
                            found.seconds.get(LIBRARY), min(others.values(), default=None),
                            "" if used else reasons[key]))
    return out


@dataclass
class Options:
    """How `ChosenProgram` measures. `wanted`: asked before anything is measured. `settled`: told what was decided, what
    was refused, and the program's text."""

    clock: DeviceClock = field(default_factory=CudaClock)
    timings: Timings = field(default_factory=Timings)
    wanted: Callable[[], bool] = lambda: True
    settled: Callable[[Sequence[Decision], Sequence[Refusal], str], None] = lambda *found: None


class ChosenProgram:
    """`call(inputs) -> outputs`: the program with the rewrites that pay. `load` makes a runner of a program and its
    kernels (through CUDA graphs, or not). Threads may call it at once."""

    def __init__(self, program: Program, kernels: Mapping[str, KernelCall], options: Options,
                 load: Callable[[Program, Mapping[str, KernelCall]], Runner]) -> None:
        self.program, self.kernels, self.options, self._load = program, kernels, options, load
        self._plain = load(program, kernels)
        self._variants: dict[tuple[Any, ...], Variant] = {}
        self._runners: dict[frozenset[tuple[int, str, str]], Variant] = {}  # by the steps replaced, and how
        self._guard = threading.Lock()
        facts = ProgramFacts(program)
        found = find_rewrites(program)[0]
        self._sized_by = set[str]().union(*(symbols_of(facts, r) for r in found))
        self._in_fp32 = not torch.version.hip and any(r.gemm is not None and r.gemm.dtype == "f32" for r in found)
        self._position = {item.name: i for i, item in enumerate(program.inputs)}
        self._first = next(i for i, item in enumerate(program.inputs)
                           if isinstance(item, TensorSpec) and item.device.split(":")[0] == program.device)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        variant = self.settle(inputs)
        return variant(inputs) if variant is not None else self._plain(inputs)

    def settle(self, inputs: Sequence[Any]) -> Variant | None:
        """What runs for these inputs, measured now if it was not; None while nothing can be."""
        key = self._key(inputs)
        found = self._variants.get(key)
        return found if found is not None else self._settle(key, inputs)

    def _key(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What the times depend on: the device, how fp32 may be computed, the power of two of every size."""
        sizes = [self._value(s, inputs).bit_length() for s in self.program.symbols if s.name in self._sized_by]
        return (inputs[self._first].device, self._in_fp32 and tf32_allowed(), *sizes)

    def _value(self, symbol: Symbol, inputs: Sequence[Any]) -> int:
        if symbol.argument is not None:
            return int(inputs[symbol.argument])
        return int(inputs[self._position[str(symbol.tensor)]].shape[symbol.dim])

    def _settle(self, key: tuple[Any, ...], inputs: Sequence[Any]) -> Variant | None:
        device = inputs[self._first].device
        with self._guard:  # two at once would spoil each other's timings
            if key in self._variants:
                return self._variants[key]
            if not self.options.clock.ready(device):
                return None
            symbols = {s.name: 1 << max(self._value(s, inputs).bit_length() - 1, 0) for s in self.program.symbols}
            variant = self._choose(device, symbols, "tf32" if key[1] else "exact")
            self._variants[key] = variant
            return variant

    def _choose(self, device: torch.device, symbols: Mapping[str, int], precision: Precision) -> Variant:
        rewrites, refused = find_rewrites(self.program, precision)
        why = "" if self.options.wanted() else "nothing may be measured"
        if len(self._runners) >= MAX_VARIANTS:
            why = f"the program has {MAX_VARIANTS} sets of choices already"
        bench = Bench(self.program, self.kernels, symbols, device, self.options)
        counts = Counter(r.key for r in rewrites)
        first = {r.key: r for r in reversed(rewrites)}
        measured = {key: Measured({}, why) if why else bench.measure(first[key], counts[key]) for key in counts}
        chosen, decisions = choose(rewrites, measured)
        variant = self._variant(chosen)
        self.options.settled(decisions, refused if not self._variants else [], variant.source)
        return variant

    def _variant(self, chosen: Sequence[Choice]) -> Variant:
        key = frozenset((r.at, r.key, method) for r, method in chosen)
        if key not in self._runners:
            self._runners[key] = Variant(self.program, chosen, self.kernels, self._plain, self._load)
        return self._runners[key]


class Variant:
    """One set of choices, ready to call. Where a stacked copy can't be kept, the call goes to `plain`."""

    def __init__(self, program: Program, chosen: Sequence[Choice], kernels: Mapping[str, KernelCall], plain: Runner,
                 load: Callable[[Program, Mapping[str, KernelCall]], Runner]) -> None:
        stacks = [s for r, _ in chosen for s in r.stacks]
        written = rewritten(program, {i for r, _ in chosen for i in r.replaced}, {r.at: r.steps for r, _ in chosen},
                            [s.spec for s in stacks])
        gemms = {r.gemm.name: (r.gemm, method) for r, method in chosen if r.gemm is not None}
        templates = {name: _template(gemm, method) for name, (gemm, method) in gemms.items()}
        self._plain = plain
        self._no_room = False
        self._run = load(written, {**kernels, **templates}) if chosen else plain
        self._packed = PackedWeights([(s.sources, s.variant, s.pack) for s in stacks]) if stacks else None
        self.source = print_program_python(written, templates=[print_gemm(g) for g, _ in gemms.values()])

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        if self._packed is None:
            return self._run(inputs)
        copies = self._copies(self._packed, inputs)
        if any(c is None for c in copies):
            return self._plain(inputs)
        return self._run([*inputs, *copies])

    def _copies(self, packed: PackedWeights, inputs: Sequence[Any]) -> list[Any]:
        try:
            return [None] if self._no_room else packed.lookup(inputs).copies
        except torch.cuda.OutOfMemoryError:  # somebody else took what was free when the choice was made
            log.warning("no memory for stacked weights: products run one by one")
            self._no_room = True
            return [None]


def _template(gemm: GemmKernel, method: str) -> KernelCall:
    return gemm_kernel(gemm, tile_named(gemm, method))


# -- measuring --------------------------------------------------------------------------------------
class Bench:
    """Measures rewrites of one program at sizes `symbols` on one device."""

    def __init__(self, program: Program, kernels: Mapping[str, KernelCall], symbols: Mapping[str, int],
                 device: torch.device, options: Options) -> None:
        self.facts, self.kernels, self.symbols = ProgramFacts(program), kernels, symbols
        self.device, self.options = device, options
        self._left = options.clock.free_bytes(device) // MEMORY_SHARE

    def measure(self, rewrite: Rewrite, count: int) -> Measured:
        """Seconds of every method of a rewrite that is used `count` times; none where that failed."""
        needed = count * sum(_bytes(s.spec) for s in rewrite.stacks)
        if needed > self._left:
            return Measured({}, f"stacked weights would take {needed >> 20} MiB of memory")
        self._left -= needed
        methods = self.methods(rewrite)
        failures: list[str] = []
        where = (*self.options.clock.identity(self.device), PRINTER_VERSION)
        sizes = {name: self.symbols[name] for name in sorted(symbols_of(self.facts, rewrite))}
        try:
            found = self.options.timings.seconds("cuda rewrite", rewrite.key, str(sizes), (LIBRARY,),
                                                 lambda: self._take(rewrite, methods, failures), where)
        except Exception as error:  # Triton and CUDA raise what they like; the library is there
            log.debug("%s was not measured", rewrite.what, exc_info=True)
            return Measured({}, f"not measured: {_first_line(error)}")
        return Measured({m: found[m] for m in (LIBRARY, *methods) if m in found}, "; ".join(failures))

    def methods(self, rewrite: Rewrite) -> list[str]:
        """What there is beside the library: stacked weights, or the template's tiles."""
        if rewrite.gemm is None:
            return [STACKED]
        return [str(t) for t in tiles_for(rewrite.gemm, self._gemm_sizes(rewrite))]

    def _gemm_sizes(self, rewrite: Rewrite) -> dict[str, int]:
        assert rewrite.gemm is not None and isinstance(rewrite.steps[0], Launch)
        return {s: size_expr(e).evaluate(self.symbols)
                for s, e in zip(rewrite.gemm.sizes, rewrite.steps[0].sizes, strict=True)}

    def _take(self, rewrite: Rewrite, methods: Sequence[str], failures: list[str]) -> dict[str, float]:
        with torch.no_grad():
            runs = self.runs(rewrite, methods, failures)
            times = self.options.clock.seconds(list(runs.values()), self.device)
        return dict(zip(runs, times, strict=True))

    def runs(self, rewrite: Rewrite, methods: Sequence[str], failures: list[str]) -> dict[str, Callable[[], Any]]:
        """The library's way and those methods that agree with it, ready to call; the others go to `failures`."""
        steps = [self.facts.program.steps[i] for i in sorted(rewrite.replaced)]
        before = alone(self.facts, steps, rewrite.results)
        after = alone(self.facts, rewrite.steps, rewrite.results, [s.spec for s in rewrite.stacks])
        tensors = self._tensors(before, rewrite)
        runs: dict[str, Callable[[], Any]] = {LIBRARY: self._run(before, self.kernels, tensors)}
        expected = runs[LIBRARY]()
        for method in methods:
            own = {rewrite.gemm.name: _template(rewrite.gemm, method)} if rewrite.gemm is not None else {}
            run = self._run(after, {**self.kernels, **own}, tensors)
            try:
                reason = difference(run(), expected)
            except Exception as error:  # this tile is not for this device
                log.debug("%s as %s failed", rewrite.what, method, exc_info=True)
                reason = _first_line(error)
            if reason:
                failures.append(f"{method}: {reason}")
            else:
                runs[method] = run
        return runs

    def _run(self, program: Program, kernels: Mapping[str, KernelCall],
             tensors: Mapping[str, torch.Tensor]) -> Callable[[], list[Any]]:
        call = load_program_python(program, kernels)
        values = [s.name for s in program.symbols]
        inputs = [*(tensors[i.name] for i in program.inputs if isinstance(i, TensorSpec)),
                  *(self.symbols[name] for name in values)]
        return lambda: call(inputs)

    def _tensors(self, before: Program, rewrite: Rewrite) -> dict[str, torch.Tensor]:
        """Memory for what the steps read, and the stacked copies of it."""
        generator = torch.Generator(self.device).manual_seed(0)
        made = {i.name: self._tensor(i, generator) for i in before.inputs if isinstance(i, TensorSpec)}
        names = [i.name for i in self.facts.program.inputs]
        for stack in rewrite.stacks:
            made[stack.spec.name] = stack.pack(*(made[names[k]] for k in stack.sources))
        return made

    def _tensor(self, spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
        """Random floats; zeros of other types, which are valid indices."""
        shape, strides = ([size_expr(n).evaluate(self.symbols) for n in ns] for ns in (spec.shape, spec.strides))
        span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if 0 not in shape else 0
        memory = torch.zeros(span, dtype=getattr(torch, spec.dtype), device=self.device)
        if memory.is_floating_point():
            memory.normal_(0.0, SPREAD, generator=generator)
        return memory.as_strided(shape, strides)


def difference(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> str:
    """Empty when results agree as two roundings of the same do, else a sentence."""
    for own, other in zip(mine, theirs, strict=True):
        finite = torch.isfinite(own) & torch.isfinite(other)
        if own.numel() and not own.is_floating_point():
            agree = float((own == other).float().mean())  # a comparison may tip where the product is rounded
            if agree < 1 - LOOSE[torch.bfloat16]:
                return f"{1 - agree:.0%} of the values differ from the library's"
        elif not torch.equal(torch.isfinite(own), torch.isfinite(other)):
            return "not finite where the library is, or the other way round"
        elif bool(finite.any()):
            gap, scale = (float(t[finite].abs().max()) for t in (own.double() - other.double(), other.double()))
            if gap > LOOSE[own.dtype] * scale:
                return f"differs from the library by {gap:.3g}, at a scale of {scale:.3g}"
    return ""


def symbols_of(facts: ProgramFacts, rewrite: Rewrite) -> set[str]:
    """The program's symbols that the work of a rewrite depends on."""
    steps = [facts.program.steps[i] for i in rewrite.replaced]
    specs = [facts.specs[n] for step in steps for n in (*reads(step), *writes(step))]
    sizes = [*(n for spec in specs for n in (*spec.shape, *spec.strides)),
             *(n for step in steps if isinstance(step, Launch) for n in step.sizes)]
    return {name for size in sizes for name in size_expr(size).symbols()}


def _bytes(spec: TensorSpec) -> int:
    return math.prod(int(n) for n in spec.shape) * ITEMSIZE[spec.dtype]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
