"""Seeded programs of 10–60 nodes: element-wise chains in mixed dtypes, views, reductions, gathers, mutation, gradients.

The generator runs every statement as it writes it, so dtypes are torch's own and a statement torch rejects is not kept.
Discontinuous operations (comparisons, argmax, rounding to bf16) are applied to *exact* values only, inputs and
integers, because a last-bit difference elsewhere would rightly flip them. Magnitudes are kept near 1.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from .program import DTYPES, Input, Line, Program, namespace

FLOAT_UNARY = (
    "torch.tanh({0})",
    "torch.sigmoid({0})",
    "F.gelu({0})",
    "F.gelu({0}, approximate='tanh')",
    "F.silu({0})",
    "F.relu({0})",
    "-{0}",
    "{0}.abs()",
    "torch.sqrt({0}.abs() + 0.5)",
    "torch.rsqrt({0}.abs() + 0.5)",
    "torch.erf({0})",
    "torch.sin({0})",
    "torch.log1p({0}.abs())",
    "torch.exp(torch.tanh({0}))",
    "{0} * 0.5 + 1.25",
    "F.leaky_relu({0}, 0.1)",
    "1.5 - {0}",
    "{0}.clamp(-1.0, 2.0)",
    "F.softplus({0})",
    "torch.tanh({0}).square()",
    "torch.cos({0})",
    "{0}.clone()",
    "{0} / 3.0",
    "torch.expm1(torch.tanh({0}))",
    "torch.reciprocal({0}.abs() + 1.0)",
    "torch.tanh({0}) ** 3",
    "{0}.contiguous()",
)
FLOAT_BINARY = (
    "{0} + {1}",
    "{0} - {1}",
    "{0} * torch.tanh({1})",
    "{0} / ({1}.abs() + 0.5)",
    "torch.maximum({0}, {1})",
    "torch.minimum({0}, {1})",
    "torch.atan2({0}, {1}.abs() + 1.0)",
    "torch.sub({0}, {1}, alpha=2)",
    "(torch.sigmoid({0}) + 0.5) ** torch.tanh({1})",
)
INT_UNARY = (
    "-{0}",
    "{0}.abs()",
    "{0}.sign()",
    "~{0}",
    "{0}.clamp(-3, 7)",
    "{0} // 3",
    "{0} % 5",
    "torch.fmod({0}, 4)",
    "{0} * 3 + 1",
    "torch.div({0}, 4, rounding_mode='trunc')",
    "{0}.to(torch.int8).to(torch.int64)",
    "{0}.to(torch.int32)",
    "7 - {0}",
    "{0}.to(torch.uint8)",
    "{0}.to(torch.int64)",
    "{0}.clone()",
    "{0} ** 2",
    "({0} > 0).to(torch.int64).argmax(-1, keepdim=True) + {0}",
)
INT_BINARY = (
    "{0} + {1}",
    "{0} - {1}",
    "{0} * {1}",
    "{0} & {1}",
    "{0} | {1}",
    "{0} ^ {1}",
    "torch.maximum({0}, {1})",
    "torch.minimum({0}, {1})",
)
BOOL_BINARY = ("{0} & {1}", "{0} | {1}", "{0} ^ {1}", "torch.logical_and({0}, ~{1})")
COMPARE = ("{0} > {1}", "{0} <= {1}", "{0} == {1}", "{0} != {1}", "{0} < {1}", "{0} >= {1}")
CASTS = {
    "float": ("f32({0})", "bf16({0})", "f64({0})", "f32({0})"),
    "int": ("f32({0})", "{0} > 0", "{0} != 0"),
    "bool": ("f32({0})", "{0}.to(torch.int64)", "~{0}", "{0}.to(torch.uint8)"),
}
ROUNDING = (
    "({0} - {0}.to(torch.bfloat16).to({0}.dtype)) * 256.0",
    "({0} - {0}.to(torch.float16).to({0}.dtype)) * 1024.0",
    "({0} * 4.0).to(torch.int64)",
    "torch.floor({0})",
    "torch.round({0} * 2.0)",
)
# Whatever the operand, also 0, 1 and True, some results wrap around; the values stay small.
OVERFLOWS = (
    "({0} * 77 + 200).to(torch.int8).to(torch.int64)",
    "({0} * 77 - 1).to(torch.uint8).to(torch.int32)",
    "({0} * 9999 + 40000).to(torch.int16).to(torch.int64) % 97",
    "({0}.to(torch.int32) * 1500000000 + 1500000000) % 7",
)
MUTATIONS = (
    "{0}.add_({1})",
    "{0}.mul_(0.5)",
    "{0}.clamp_(-1, 1)",
    "{0}.select(0, 0).zero_()",
    "{0}[..., 1:].add_(1)",
    "{0}.transpose(0, -1).add_({1}.transpose(0, -1))",
    "{0}.copy_({1})",
    "{0}.flip(0)[:1].mul_(2)",
    "{0}[..., 0].copy_({1}[..., -1])",
    "{0}.masked_fill_({0} > 100, 3)",
)
SIZES = (
    ({"A": 12, "B": 7, "C": 5}, {"A": 6, "B": 9, "C": 3}),
    ({"A": 3, "B": 5, "C": 37}, {"A": 4, "B": 2, "C": 70}),
    ({"A": 6, "B": 19, "C": 16}, {"A": 13, "B": 3, "C": 33}),
)


@dataclass
class Value:
    """A name in the program: its symbolic shape, the tensor it held when generated, and whether it is exact."""

    name: str
    shape: tuple[str, ...]
    tensor: torch.Tensor
    exact: bool
    writable: bool = True  # no two elements share memory

    @property
    def kind(self) -> str:
        dtype = self.tensor.dtype
        return "bool" if dtype is torch.bool else "float" if dtype.is_floating_point else "int"


class Generator:
    """One program from one seed."""

    def __init__(self, seed: int, nodes: tuple[int, int] = (10, 60)) -> None:
        self.seed, self.random = seed, random.Random(seed)
        self.grad = self.random.random() < 0.35
        self.count = self.random.randint(*nodes)
        self.sizes, self.other = SIZES[self.random.randrange(len(SIZES))]
        self.space = namespace(False)
        self.space.update(self.sizes)
        self.inputs: list[Input] = []
        self.lines: list[Line] = []
        self.values: list[Value] = []
        self.tried = self.refused = 0

    # -- the whole program ----------------------------------------------------------------------
    def program(self) -> Program:
        self._make_inputs()
        steps = (
            self._unary,
            self._binary,
            self._binary,
            self._view,
            self._view,
            self._reduce,
            self._cast,
            self._where,
            self._compare,
            self._gather,
            self._join,
            self._round,
            self._overflow,
            self._library,
            self._mutate,
        )
        weights = (20, 12, 12, 10, 10, 12, 7, 6, 5, 5, 5, 4, 4, 4, 6)
        while len(self.lines) < self.count and self.tried < 40 * self.count:
            self.random.choices(steps, weights)[0]()
        made = Program(
            self.seed, tuple(self.inputs), tuple(self.lines), self._outputs(), dict(self.sizes), dict(self.other)
        )
        if self.grad and not runs(made, made.sizes):  # autograd refuses some mutations
            made = replace(made, lines=tuple(line for line in made.lines if line.target is not None), _cache={})
        return replace(made, zero=tuple(n for n in ("B",) if runs(made, {**made.other_sizes, n: 0})), _cache={})

    def _make_inputs(self) -> None:
        self._input("x0", "f32", ("A", "B", "C"))
        for k in range(1, self.random.randint(3, 6)):
            dtype = self.random.choice(("f32", "f32", "f32", "bf16", "i64", "b1", "f64", "i32"))
            full = ("A", "B", "C")
            shape = self.random.choice((full, full, full[1:], full[2:], ("A", "1", "C"), ("B", "A"), ("1", "C"), ()))
            self._input(f"x{k}", dtype, shape)
        self._input("index", "i64", ("4",), high=2)
        if self.grad:  # leaves are not mutated, copies of them are
            for i in [i for i in self.inputs if i.grad]:
                self._add("{0} * 1.0", [self._named(i.name)], i.shape, exact=True)

    def _input(self, name: str, dtype: str, shape: tuple[str, ...], high: int = 9) -> None:
        layouts = ["contiguous", "contiguous"]
        if len(shape) > 1 and name != "x0":
            layouts += ["transposed", "sliced", "expanded"]
        grad = self.grad and dtype in ("f32", "f64", "bf16") and (name == "x0" or self.random.random() < 0.6)
        made = Input(name, dtype, shape, self.random.choice(layouts), high, grad)
        self.inputs.append(made)
        tensor = made.make(self.sizes, self.seed)
        self.space[name] = tensor
        self.values.append(Value(name, shape, tensor, True, made.layout != "expanded" and not self.grad))

    def _named(self, name: str) -> Value:
        return next(v for v in self.values if v.name == name)

    def _outputs(self) -> tuple[str, ...]:
        used = {n for line in self.lines for n in line.uses}
        sinks = [v.name for v in self.values if v.name not in used and v.name.startswith("v")]
        self.random.shuffle(sinks)
        chosen = sinks[:5] or [self.values[-1].name]
        if self.random.random() < 0.3:
            chosen.append(self.random.choice([v for v in self.values if v.name.startswith("v")]).name)
        return tuple(chosen)

    # -- adding a statement ---------------------------------------------------------------------
    def _add(
        self, template: str, values: list[Value], shape: tuple[str, ...], exact: bool = False, writable: bool = True
    ) -> None:
        """Keep `template` as a new value of `shape` when torch runs it and its values are tame."""
        self.tried += 1
        text = template.format(*(v.name for v in values))
        try:
            made = eval(text, self.space)
        except (RuntimeError, IndexError, TypeError, ValueError):
            self.refused += 1
            return
        if not isinstance(made, torch.Tensor) or made.dim() != len(shape) or made.numel() > 20000:
            return
        if made.is_floating_point() and not bool((made.abs() < 1e4).all()) or made.dtype not in DTYPES.values():
            return
        name = f"v{len(self.lines)}"
        self.space[name] = made
        self.lines.append(Line(name, text, tuple(dict.fromkeys(v.name for v in values))))
        self.values.append(Value(name, shape, made, exact or not made.is_floating_point(), writable))

    def _pick(self, *kinds: str, rank: int = 0, exact: bool = False) -> Value | None:
        found = [
            v
            for v in self.values
            if (not kinds or v.kind in kinds) and len(v.shape) >= rank and v.name != "index" and (v.exact or not exact)
        ]
        recent = found[-8:]
        return self.random.choice(recent if self.random.random() < 0.6 else found) if found else None

    def _partner(
        self, value: Value, exact: bool = False, same_kind: bool = False
    ) -> tuple[Value, tuple[str, ...]] | None:
        """A value that broadcasts with `value`, and the shape of the two together."""
        order = [v for v in self.values if v.name != "index" and (v.exact or not exact)]
        self.random.shuffle(order)
        for other in order:
            joint = broadcast(value.shape, other.shape)
            if joint is not None and (
                other.kind == value.kind or not same_kind and "bool" not in (other.kind, value.kind)
            ):
                return other, joint
        return None

    # -- kinds of statements --------------------------------------------------------------------
    def _unary(self) -> None:
        value = self._pick("float", "float", "int")
        if value is not None:
            template = self.random.choice(FLOAT_UNARY if value.kind == "float" else INT_UNARY)
            self._add(
                template,
                [value],
                value.shape,
                exact=value.exact and template in ("{0}.clone()", "-{0}"),
                writable=value.writable or template != "{0}.contiguous()",
            )

    def _binary(self) -> None:
        value = self._pick()
        found = value and self._partner(value)
        if value is None or not found:
            return
        other, shape = found
        both = {value.kind, other.kind}
        table = FLOAT_BINARY if "float" in both else INT_BINARY if "int" in both else BOOL_BINARY
        self._add(self.random.choice(table), self.random.sample([value, other], 2), shape)

    def _cast(self) -> None:
        value = self._pick()
        if value is not None:
            self._add(self.random.choice(CASTS[value.kind]), [value], value.shape, exact=value.kind != "float")

    def _compare(self) -> None:
        value = self._pick("float", "int", exact=True)
        found = value and self._partner(value, exact=True)
        if value is not None and found:
            self._add(self.random.choice(COMPARE), [value, found[0]], found[1])

    def _round(self) -> None:
        value = self._pick("float", exact=True)
        if value is not None and value.tensor.dtype is torch.float32:
            self._add(self.random.choice(ROUNDING), [value], value.shape)

    def _overflow(self) -> None:
        value = self._pick("int", "bool")
        if value is not None:
            self._add(self.random.choice(OVERFLOWS), [value], value.shape)

    def _where(self) -> None:
        mask, value = self._pick("bool"), self._pick("float", "float", "int")
        found = value and self._partner(value, same_kind=True)
        if mask is None or value is None or not found:
            return
        shape = broadcast(found[1], mask.shape)
        if shape is not None and self.random.random() < 0.7:
            self._add("torch.where({0}, {1}, {2})", [mask, value, found[0]], shape)
        elif broadcast(value.shape, mask.shape) == value.shape:
            self._add("{1}.masked_fill({0}, -2)", [mask, value], value.shape)

    def _reduce(self) -> None:
        value = self._pick("float", "float", "int", "bool", rank=1)
        if value is None:
            return
        d, keep = self.random.randrange(len(value.shape)), self.random.random() < 0.5
        shape = (*value.shape[:d], "1", *value.shape[d + 1 :]) if keep else (*value.shape[:d], *value.shape[d + 1 :])
        options = f"dim={d}, keepdim={keep}"
        if value.kind == "float":
            self._reduce_float(value, d, shape, options)
        elif value.kind == "int":
            self._add(
                f"{{0}}.{self.random.choice(('sum', 'amax', 'amin', 'argmax', 'argmin'))}({options})", [value], shape
            )
        else:
            self._add(f"{{0}}.{self.random.choice(('any', 'all', 'sum'))}({options})", [value], shape)

    def _reduce_float(self, value: Value, d: int, shape: tuple[str, ...], options: str) -> None:
        whole = (
            f"torch.softmax({{0}}, {d})",
            f"torch.log_softmax({{0}}, {d})",
            "F.layer_norm({0}, {0}.shape[-1:])",
            "F.rms_norm({0}, {0}.shape[-1:])",
        )
        names = ["sum", "mean", "mean", "amax", "amin", "var"] + (["argmax", "argmin"] if value.exact else [])
        choice = self.random.random()
        if choice < 0.35:
            self._add(self.random.choice(whole), [value], value.shape)
        elif choice < 0.42 and len(value.shape) > 1:
            self._add("{0}.mean(dim=(0, -1))", [value], value.shape[1:-1])
        elif choice < 0.5:
            self._add(f"torch.logsumexp({{0}}, {options})", [value], shape)
        elif choice < 0.6:  # rows of one sign: a wrong starting value of max or min shows
            sided = self.random.choice(("(-{0}.abs() - 0.5).amax", "({0}.abs() + 0.5).amin"))
            self._add(f"{sided}({options})", [value], shape)
        elif choice < 0.65:
            self._add(f"torch.max({{0}}, {options}).values", [value], shape, exact=value.exact)
        else:
            self._add(f"{{0}}.{self.random.choice(names)}({options})", [value], shape)

    def _view(self) -> None:
        value = self._pick(rank=1)
        if value is None:
            return
        template, shape, writable = self.random.choice(views(value.shape, self.random))
        self._add(template, [value], shape, exact=value.exact, writable=value.writable and writable)

    def _gather(self) -> None:
        value = self._pick(rank=1)
        if value is None:
            return
        d = self.random.randrange(len(value.shape))
        index = self._named("index")
        shape = (*value.shape[:d], "4", *value.shape[d + 1 :])
        if value.shape[d] in ("A", "B", "C"):
            if len(value.shape) == 2 and d == 0 and self.random.random() < 0.5:
                self._add("F.embedding({1}, {0})", [value, index], shape, exact=value.exact)
            elif self.random.random() < 0.5 or len(value.shape) != 1:
                self._add(f"{{0}}.index_select({d}, {{1}})", [value, index], shape, exact=value.exact)
            else:
                self._add("torch.gather({0}, 0, {1})", [value, index], shape, exact=value.exact)

    def _join(self) -> None:
        value = self._pick(rank=1)
        others = value and [v for v in self.values if v.shape == value.shape and v.kind == value.kind]
        if value is None or not others:
            return
        other = self.random.choice(others)
        d = self.random.randrange(len(value.shape))
        exact = value.exact and other.exact
        if self.random.random() < 0.4:
            self._add(
                f"torch.stack([{{0}}, {{1}}], {d})", [value, other], (*value.shape[:d], "2", *value.shape[d:]), exact
            )
        else:
            joined = f"({value.shape[d]}+{other.shape[d]})"
            self._add(
                f"torch.cat([{{0}}, {{1}}], {d})",
                [value, other],
                (*value.shape[:d], joined, *value.shape[d + 1 :]),
                exact,
            )

    def _library(self) -> None:
        """Operators that stay ATen calls, so that kernels meet tensors they did not make."""
        value = self._pick("float", rank=1)
        if value is None:
            return
        if len(value.shape) >= 2 and value.tensor.dtype is torch.float32 and self.random.random() < 0.5:
            self._add(
                "torch.matmul(torch.tanh({0}), torch.tanh({0}).transpose(-1, -2)) * 0.1",
                [value],
                (*value.shape[:-1], value.shape[-2]),
            )
        else:
            self._add(f"torch.cumsum({{0}}, {self.random.randrange(len(value.shape))}) * 0.1", [value], value.shape)

    def _mutate(self) -> None:
        value = self._pick("float", "int", rank=1)
        if value is None or not value.writable or (self.grad and value.name.startswith("x")):
            return
        same = [
            v
            for v in self.values
            if broadcast(value.shape, v.shape) == value.shape
            and len(v.shape) == len(value.shape)
            and v.kind == value.kind
            and v.tensor.dtype == value.tensor.dtype
        ]
        other = self.random.choice(same or [value])
        text = self.random.choice(MUTATIONS).format(value.name, other.name)
        self.tried += 1
        try:
            exec(text, self.space)
        except (RuntimeError, IndexError, TypeError, ValueError):
            self.refused += 1
            return
        self.lines.append(Line(None, text, (value.name, other.name)))
        memory = value.tensor.untyped_storage()._cdata
        for v in self.values:
            if v.kind == "float" and v.tensor.untyped_storage()._cdata == memory:
                v.exact = False


def runs(program: Program, sizes: dict[str, int]) -> bool:
    """True when eager accepts the program at these sizes."""
    try:
        program.function()(*program.make_inputs(sizes))
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


def broadcast(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...] | None:
    """The joint symbolic shape, or None."""
    rank = max(len(a), len(b))
    a, b = ("1",) * (rank - len(a)) + a, ("1",) * (rank - len(b)) + b
    if any(x != y and "1" not in (x, y) for x, y in zip(a, b, strict=True)):
        return None
    return tuple(y if x == "1" else x for x, y in zip(a, b, strict=True))


def views(shape: tuple[str, ...], draw: random.Random) -> list[tuple[str, tuple[str, ...], bool]]:
    """(template, shape, still writable) of views and copies that rearrange a value of `shape`."""
    rank = len(shape)
    d, e = draw.randrange(rank), draw.randrange(rank)
    order = draw.sample(range(rank), rank)
    swapped = list(shape)
    swapped[d], swapped[e] = swapped[e], swapped[d]

    def at(size: str) -> tuple[str, ...]:
        return (*shape[:d], size, *shape[d + 1 :])

    out: list[tuple[str, tuple[str, ...], bool]] = [
        (f"{{0}}.transpose({d}, {e})", tuple(swapped), True),
        (f"{{0}}.permute({order})", tuple(shape[i] for i in order), True),
        (f"{{0}}.unsqueeze({d})", (*shape[:d], "1", *shape[d:]), True),
        (f"{{0}}.flip({d})", shape, True),
        (f"torch.roll({{0}}, 1, {d})", shape, True),
        ("F.pad({0}, (1, 2))", (*shape[:-1], f"{shape[-1]}+3"), True),
    ]
    if shape[d] != "1":
        out += [
            (f"{{0}}.narrow({d}, 1, {{0}}.size({d}) - 1)", at(f"{shape[d]}[1:]"), True),
            (f"{{0}}.select({d}, -1)", (*shape[:d], *shape[d + 1 :]), True),
            (f"{{0}}.select({d}, 1)", (*shape[:d], *shape[d + 1 :]), True),
            (f"{{0}}[{':, ' * d}::2]", at(f"{shape[d]}[::2]"), True),
            (f"{{0}}[{':, ' * d}:-1]", at(f"{shape[d]}[:-1]"), True),
            (f"{{0}}.chunk(2, {d})[0]", at(f"{shape[d]}/2"), True),
        ]
    if rank >= 2 and d + 1 < rank:
        joined = f"{shape[d]}*{shape[d + 1]}"
        out.append((f"{{0}}.flatten({d}, {d + 1})", (*shape[:d], joined, *shape[d + 2 :]), False))
        out.append(
            (
                f"{{0}}.reshape({{0}}.size({d}) * {{0}}.size({d + 1}), -1)"
                if rank == 2
                else f"{{0}}.flatten({d}, {d + 1})",
                (joined, "1") if rank == 2 else (*shape[:d], joined, *shape[d + 2 :]),
                False,
            )
        )
    if rank >= 2:
        out.append(("torch.tril({0})", shape, True))
    parts = shape[d].split("*")
    if len(parts) == 2 and all(p in ("A", "B", "C") for p in parts):
        out += [(f"{{0}}.unflatten({d}, ({parts[0]}, {parts[1]}))", (*shape[:d], *parts, *shape[d + 1 :]), True)] * 3
    if shape[d] == "1":
        out += [
            (f"{{0}}.squeeze({d})", (*shape[:d], *shape[d + 1 :]), True),
            (f"{{0}}.expand({', '.join('A' if i == d else '-1' for i in range(rank))})", at("A"), False),
        ]
    if rank < 3:
        out.append((f"{{0}}.expand(B, {', '.join(['-1'] * rank)})", ("B", *shape), False))
    return [o for o in out if len(o[1]) <= 4]


def generate(seed: int, **options: Any) -> Program:
    """The program of `seed`."""
    return Generator(seed, **options).program()
