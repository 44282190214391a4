"""The arena plan: tensors alive together never share bytes, dead ones do, and nothing that escapes is placed."""

from __future__ import annotations

import random

import pytest

from meshwright.codegen.program_memory import ALIGN, last_uses, nbytes, plan_arena, roots
from meshwright.runtime.program import Alloc, Launch, Program, TensorSpec, View


def spec(name: str, *shape: int | str) -> TensorSpec:
    strides: list[int | str] = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, f"{strides[0]}*{n}" if isinstance(n, str) or isinstance(strides[0], str) else strides[0] * n)
    return TensorSpec(name, "float32", shape, tuple(strides))


def random_program(seed: int, symbolic: bool) -> Program:
    pick = random.Random(seed)
    steps: list[Alloc | Launch | View] = []
    names = ["x"]
    for k in range(30):
        first: int | str = pick.choice([1, 7, 64])
        shape = (f"{first}*s0" if symbolic and pick.random() < 0.7 else first, 16)
        steps.append(Alloc(spec(f"t{k}", *shape)))
        steps.append(Launch("kernel", (pick.choice(names[-4:]),), (f"t{k}",)))
        names.append(f"t{k}")
        if pick.random() < 0.3:
            steps.append(View(spec(f"v{k}", 1, 4), f"t{k}"))
            names.append(f"v{k}")
    return Program("random", (spec("x", 4, 4),), (), tuple(steps), (names[-1],))


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_tensors_alive_together_do_not_overlap(seed: int, symbolic: bool):
    program = random_program(seed, symbolic)
    arena, last = plan_arena(program), last_uses(program, roots(program))
    born = {s.spec.name: i for i, s in enumerate(program.steps) if isinstance(s, Alloc)}
    for s0 in (0, 1, 5, 100):
        sizes = {s.spec.name: nbytes(s.spec).evaluate({"s0": s0}) for s in program.steps if isinstance(s, Alloc)}
        place = {n: e.evaluate({"s0": s0}) for n, e in arena.offsets.items()}
        total = arena.total.evaluate({"s0": s0})
        for a in place:
            assert place[a] % ALIGN == 0 and place[a] + sizes[a] <= total
            for b in place:
                if a < b and born[a] <= last[b] and born[b] <= last[a]:
                    assert place[a] + sizes[a] <= place[b] or place[b] + sizes[b] <= place[a], (a, b)


def test_memory_is_reused_and_outputs_stay_out():
    steps = []
    for k in range(6):
        steps += [Alloc(spec(f"t{k}", 64, 64)), Launch("kernel", (f"t{k - 1}" if k else "x",), (f"t{k}",))]
    program = Program("chain", (spec("x", 64, 64),), (), tuple(steps), ("t5",))
    arena = plan_arena(program)
    assert "t5" not in arena.offsets and len(arena.offsets) == 5
    assert arena.total.value == 2 * 64 * 64 * 4


def test_an_output_that_views_an_allocation_keeps_it_out_of_the_arena():
    program = Program("view", (), (), (Alloc(spec("t", 8, 8)), View(spec("v", 2, 8), "t")), ("v",))
    assert plan_arena(program).offsets == {}
