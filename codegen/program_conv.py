"""A rewrite of inference programs: convolutions with packed weights, channels last, batch norm and ReLU folded in.

`convolution (→ per-channel affine kernel) (+ residual) (+ ReLU)` becomes one `Conv` step of oneDNN. Legal because the
folded weights are the same products, rounded once more; weights and statistics must be static, and are looked up at
call time.
Between convolutions tensors stay channels last; a kernel or an output gets the layout it was planned with by a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..runtime.program import Alloc, Call, Conv, Launch, Program, Release, Step, TensorSpec, reads
from .affine import ONE, ZERO, Affine, channel_extents, match_affine, nonempty, renamed, tensors_of
from .expr import Expr, const, product
from .ir import Kernel
from .ir_text import parse_kernel
from .program_cpp_tensors import output_names
from .program_facts import ProgramFacts
from .program_memory import size_expr, size_text, with_releases
from .schema import bind

_POOLS = ("aten.max_pool2d_with_indices.default", "aten.avg_pool2d.default")


def fuse_convolutions(program: Program) -> Program:
    """`program` with its float32 convolutions of static weights as `Conv` steps."""
    if not program.inference or program.device != "cpu":
        return program
    convs = {s.outs[0]: s for s in program.steps if isinstance(s, Call) and _takes(s, program)}
    if not convs:
        return program
    return _Rewriter(program, {str(k): v for k, v in convs.items()}).run()


def _takes(call: Call, program: Program) -> bool:
    if call.op != "aten.convolution.default" or not call.specs or call.specs[0] is None:
        return False
    values = [v for _, v in bind(call)]
    static = {i.name for i in program.inputs if isinstance(i, TensorSpec) and i.static and i.dtype == "float32"}
    spec = call.specs[0]
    return (len(spec.shape) == 4 and isinstance(spec.shape[1], int) and spec.dtype == "float32"
            and _all_integers(call) and values[1]["tensor"] in static
            and (values[2] is None or values[2]["tensor"] in static) and values[6] is False
            and _strides(spec) in (_contiguous(spec), _channels_last(spec)))


def _is_pool(call: Call) -> bool:
    """A pooling whose result alone is used, in a layout that a copy can give back."""
    spec = call.specs[0] if call.specs else None
    return (call.op in _POOLS and spec is not None and len(spec.shape) == 4 and not any(call.outs[1:])
            and _strides(spec) in (_contiguous(spec), _channels_last(spec)))


def _all_integers(call: Call) -> bool:
    """False where a stride, padding, dilation or number of groups depends on sizes."""
    values = [v for _, v in bind(call)]
    return all(isinstance(n, int) for v in values[3:6] for n in v) and isinstance(values[8], int)


def _strides(spec: TensorSpec) -> tuple[Expr, ...]:
    return tuple(nonempty(size_expr(s)) for s in spec.strides)


def _contiguous(spec: TensorSpec) -> tuple[Expr, ...]:
    _, c, h, w = map(size_expr, spec.shape)
    return c * h * w, h * w, w, const(1)


def _channels_last(spec: TensorSpec) -> tuple[Expr, ...]:
    _, c, h, w = map(size_expr, spec.shape)
    return c * h * w, const(1), w * c, c


def _as_channels_last(spec: TensorSpec) -> TensorSpec:
    return replace(spec, name=f"{spec.name}__last", strides=tuple(map(size_text, _channels_last(spec))))


@dataclass(frozen=True)
class _Fold:
    """What is folded into one convolution: its factor, the shift, and (for the last of a sum) residual and ReLU."""

    scale: tuple[object, ...] = ONE
    shift: tuple[object, ...] = ZERO
    other: str | None = None
    relu: bool = False


class _Rewriter:
    def __init__(self, program: Program, convs: dict[str, Call]) -> None:
        self.program, self.convs = program, convs
        self.kernels = {name: match_affine(parse_kernel(text)) for name, text in program.kernels.items()}
        self.static = {i.name for i in program.inputs if isinstance(i, TensorSpec) and i.static}
        self.known = ProgramFacts(program).specs
        self.uses = Counter(n for s in program.steps for n in reads(s)) + Counter(output_names(program))
        self.folds: dict[str, _Fold] = {}
        self.result: dict[str, str] = {}  # convolution -> the kernel output it now computes
        self.plain: set[str] = set()  # tensors that also exist in their planned layout
        self.last: dict[str, str] = {}  # tensor -> its channels-last form
        self.specs: dict[str, TensorSpec] = {}
        self.steps: list[Step] = []

    def run(self) -> Program:
        dropped = {id(s) for s in self.program.steps if isinstance(s, Launch) and self._fold(s)}
        absorbed = set(self.result.values())
        self.agnostic = Counter(n for s in self.program.steps if self._is_agnostic(s) for n in reads(s))
        for step in self.program.steps:
            match step:
                case Alloc(spec=spec) if spec.name in absorbed:
                    self.specs[spec.name] = spec
                case Launch() if id(step) in dropped:
                    self._emit_folded(step)
                case Call(outs=(name, *_)) if name in self.convs:
                    if name not in self.folds:
                        self._emit(str(name), str(name), self.convs[str(name)].specs[0], _Fold())
                case Call() if _is_pool(step) and step.args[0]["tensor"] in self.last:
                    self._pool(step)
                case Release():
                    pass  # convolutions move behind the kernels they absorb: planned anew below
                case _:
                    self.steps.append(step)
        return with_releases(replace(self.program, steps=tuple(self.steps)))

    # -- what folds ---------------------------------------------------------------------------------
    def _fold(self, step: Launch) -> bool:
        """Decide the folds of one kernel. True when its convolutions compute all of it."""
        form = self.kernels[step.kernel]
        if form is None:
            return False
        kernel = parse_kernel(self.program.kernels[step.kernel])
        names = dict(zip((b.name for b in kernel.inputs), step.inputs, strict=True))
        terms = {names[b]: renamed(f, names) for b, f in form.terms.items()}
        shift = renamed(form.shift, names)
        own = [n for n in terms if n in self.convs and self.uses[n] == 1 and n not in self.folds]
        rest = [n for n in terms if n not in own]
        needed = {n for f in (*[terms[n] for n in own], shift) for n in tensors_of(f)}
        if not own or len(terms) > 2 or not needed <= self.static or any(terms[n] != ONE for n in rest):
            return False
        if len(set(names.values())) != len(names) or not self._same_layout(own[0], terms, step, kernel, form):
            return False
        for name in own[1:]:
            self.folds[name] = _Fold(scale=terms[name])
        other = own[1] if len(own) == 2 else rest[0] if rest else None
        self.folds[own[0]] = _Fold(terms[own[0]], shift, other, form.relu)
        self.result[own[0]] = step.outputs[0]
        return True

    def _same_layout(self, first: str, terms: Mapping[str, object], step: Launch, kernel: Kernel, form: Affine) -> bool:
        """All summands have the convolution's shape and are contiguous in the planned layout: the kernel walked them as
        one, channel by channel where that matters."""
        spec = self.convs[first].specs[0]
        if spec is None or _strides(spec) != _contiguous(spec):
            return False
        sizes = dict(zip(kernel.sizes, map(size_expr, step.sizes), strict=True))
        _, channels, *positions = map(size_expr, spec.shape)
        walked = tuple(e.subs(sizes) for e in channel_extents(kernel)) if form.per_channel else None
        return walked in (None, (channels, product(positions))) and all(
            (other := self.known.get(n)) is not None and other.shape == spec.shape and _strides(other) == _strides(spec)
            for n in (*terms, *step.outputs))

    def _is_agnostic(self, step: Step) -> bool:
        """Steps that take a tensor in any layout: convolutions, poolings, and kernels folded away."""
        if isinstance(step, Call):
            return _is_pool(step) or (bool(step.outs) and step.outs[0] in self.convs)
        return isinstance(step, Launch) and any(step.outputs[0] == out for out in self.result.values())

    # -- steps --------------------------------------------------------------------------------------
    def _emit_folded(self, step: Launch) -> None:
        final = next(c for c, out in self.result.items() if out == step.outputs[0])
        spec = self.specs[step.outputs[0]]
        fold = self.folds[final]
        if fold.other in self.convs and fold.other in self.folds and fold.other not in self.result:
            self._emit(str(fold.other), str(fold.other), self.convs[fold.other].specs[0], self.folds[fold.other])
        self._emit(final, step.outputs[0], spec, fold)

    def _emit(self, conv: str, name: str, spec: TensorSpec | None, fold: _Fold) -> None:
        assert spec is not None
        _, *rest = bind(self.convs[conv])
        values = [v for _, v in bind(self.convs[conv])]
        made = _as_channels_last(spec)
        sources = tuple(dict.fromkeys((*tensors_of(fold.scale), *tensors_of(fold.shift))))
        self.steps.append(Conv(
            made, self.last.get(values[0]["tensor"], values[0]["tensor"]), values[1]["tensor"],
            values[2]["tensor"] if values[2] else None, tuple(values[3]), tuple(values[4]), tuple(values[5]), values[8],
            fold.scale, fold.shift, sources, self.last.get(fold.other, fold.other) if fold.other else None, fold.relu))
        self._publish(name, spec, made)

    def _pool(self, call: Call) -> None:
        """A pooling of a channels-last tensor gives channels last."""
        spec = call.specs[0]
        assert spec is not None
        made = _as_channels_last(spec)
        args = ({"tensor": self.last[call.args[0]["tensor"]]}, *call.args[1:])
        outs = (made.name, *call.outs[1:])
        self.steps.append(replace(call, args=args, outs=outs, specs=(made, *call.specs[1:])))
        self._publish(str(call.outs[0]), spec, made)

    def _publish(self, name: str, spec: TensorSpec, made: TensorSpec) -> None:
        """Readers that need the planned layout get a copy of their own."""
        self.last[name] = made.name
        if self.uses[name] > self.agnostic[name] or _strides(spec) == _strides(made):
            self.steps.append(Call("aten.clone.default", ({"tensor": made.name},),
                                   {"memory_format": {"memory_format": "contiguous_format"}
                                    if _strides(spec) == _contiguous(spec) else {"memory_format": "channels_last"}},
                                   (spec.name,), (spec,)))


__all__ = ["Affine", "fuse_convolutions"]
