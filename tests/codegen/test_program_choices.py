"""Which rewrites a CUDA program uses: the choice on planted times, and the whole path on a stand-in for the device."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from meshwright.codegen import program_choices
from meshwright.codegen.program_choices import (
    LIBRARY,
    STACKED,
    ChosenProgram,
    Decision,
    Measured,
    Options,
    choose,
    difference,
)
from meshwright.codegen.program_graphs import load_program_cuda
from meshwright.codegen.program_rewrites import Refusal, Rewrite
from meshwright.codegen.timings import Timings
from meshwright.runtime import packing
from meshwright.runtime.program import Program

from ..runtime.test_cuda_graphs import RecordedGraphs
from .test_program_rewrites import expected, swiglu, values


# -- the choice alone -------------------------------------------------------------------------------
def rewrite(key: str, *replaced: int) -> Rewrite:
    return Rewrite(f"what {key}", key, replaced, replaced[-1], (), ())


def planted(library: float, **others: float) -> Measured:
    return Measured({LIBRARY: library, **others})


def names(chosen: Sequence[tuple[Rewrite, str]]) -> list[tuple[str, str]]:
    return [(r.key, method) for r, method in chosen]


def test_the_fastest_method_wins_and_both_times_are_told() -> None:
    chosen, decisions = choose([rewrite("a", 1, 2)], {"a": planted(10.0, small=8.0, large=7.0)})
    assert names(chosen) == [("a", "large")]
    assert decisions == [Decision("what a", 1, "large", 10.0, 7.0)]


@pytest.mark.parametrize("best", [9.9, 10.0, 12.0])
def test_the_library_stays_where_nothing_is_clearly_faster(best: float) -> None:
    chosen, decisions = choose([rewrite("a", 1)], {"a": planted(10.0, small=best)})
    assert chosen == []
    assert decisions == [Decision("what a", 1, LIBRARY, 10.0, best, "the library is as fast")]


def test_nothing_measured_means_the_library() -> None:
    chosen, decisions = choose([rewrite("a", 1)], {"a": Measured({}, "no way")})
    assert chosen == [] and decisions == [Decision("what a", 1, LIBRARY, None, None, "no way")]


@pytest.mark.parametrize(("stack_s", "winner"), [(12.0, "stack"), (17.0, "epilogue")])
def test_of_two_that_replace_one_step_the_larger_saving_wins(stack_s: float, winner: str) -> None:
    rewrites = [rewrite("epilogue", 2, 5), rewrite("stack", 1, 2)]
    times = {"epilogue": planted(10.0, small=5.0), "stack": planted(20.0, stacked=stack_s)}
    chosen, decisions = choose(rewrites, times)
    assert [r.key for r, _ in chosen] == [winner]
    (loser,) = [d for d in decisions if d.reason]
    assert loser.method == LIBRARY and "saves more" in loser.reason and loser.best_s is not None


def test_equal_work_is_counted_once() -> None:
    rewrites = [rewrite("a", 1), rewrite("a", 3), rewrite("a", 5), rewrite("b", 5)]
    chosen, decisions = choose(rewrites, {"a": planted(10.0, small=8.0), "b": planted(10.0, small=2.0)})
    assert sorted(r.at for r, _ in chosen) == [1, 3, 5] and len(chosen) == 3
    assert [(d.what, d.count) for d in decisions] == [("what a", 2), ("what b", 1)]


# -- the whole path ---------------------------------------------------------------------------------
class PlantedClock:
    """A device whose times are given: runs, in the order library, then the rest, take `times` seconds."""

    def __init__(self, epilogue: Sequence[float], stack: Sequence[float]) -> None:
        self.epilogue, self.stack = epilogue, stack
        self.asked = 0
        self.is_ready, self.memory = True, 1 << 30

    def identity(self, device: torch.device) -> tuple[str, ...]:
        return ("a stand-in",)

    def ready(self, device: torch.device) -> bool:
        return self.is_ready

    def free_bytes(self, device: torch.device) -> int:
        return self.memory

    def seconds(self, runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
        self.asked += 1
        results = [run() for run in runs]
        times = self.stack if len(results[0]) == 2 else self.epilogue  # the stack makes two results
        return [times[min(i, len(times) - 1)] for i in range(len(runs))]


class Told:
    """What a program said when it had decided."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.refused: list[Refusal] = []
        self.sources: list[str] = []

    def __call__(self, decisions: Sequence[Decision], refused: Sequence[Refusal], source: str) -> None:
        self.decisions += decisions
        self.refused += refused
        self.sources.append(source)


@pytest.fixture(autouse=True)
def no_memory_of_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test plants its own."""
    monkeypatch.setattr("meshwright.runtime.cache.get_json", lambda key: None)
    monkeypatch.setattr("meshwright.runtime.cache.put_json", lambda key, value: None)
    yield
    packing.clear()


LIBRARY_WINS, OTHER_WINS = (1.0, 2.0), (2.0, 1.0)


def loaded(program: Program, clock: PlantedClock, **options: Any) -> tuple[Any, Told, RecordedGraphs]:
    told, graphs = Told(), RecordedGraphs()
    call = load_program_cuda(program, None, graphs, Options(clock, settled=told, **options))
    assert isinstance(call, ChosenProgram)
    return call, told, graphs


@pytest.mark.parametrize(("epilogue", "stack", "used"), [
    (LIBRARY_WINS, LIBRARY_WINS, []), (OTHER_WINS, LIBRARY_WINS, ["gemm_swiglu"]),
    (LIBRARY_WINS, OTHER_WINS, ["baddbmm"]), ((5.0, 1.0), OTHER_WINS, ["gemm_swiglu"]),
    (OTHER_WINS, (5.0, 1.0), ["baddbmm"]),
])
def test_the_program_is_written_with_what_is_faster(epilogue: tuple[float, ...], stack: tuple[float, ...],
                                                    used: list[str]) -> None:
    call, told, graphs = loaded(swiglu(), PlantedClock(epilogue, stack))
    given = values()
    for _ in range(3):
        torch.testing.assert_close(call(given)[0], expected(*given))
    assert (graphs.captures, graphs.replays) == (1, 2)
    (source,) = told.sources
    assert [n for n in ("gemm_swiglu", "baddbmm") if n in source] == used
    assert {d.what.split(" → ")[1]: (d.method != LIBRARY) for d in told.decisions} == {
        "swiglu": "gemm_swiglu" in used, "baddbmm": "baddbmm" in used}
    assert all(d.library_s is not None and d.best_s is not None for d in told.decisions)
    assert ("def swiglu(" in source) == ("gemm_swiglu" not in used)  # what is not launched is not printed


def test_times_are_taken_once_per_power_of_two_and_kept() -> None:
    clock = PlantedClock(OTHER_WINS, LIBRARY_WINS)
    timings = Timings()
    call, _, _ = loaded(swiglu(), clock, timings=timings)
    for rows in (4, 5, 7, 6, 4):
        torch.testing.assert_close(call(values(rows))[0], expected(*values(rows)))
    assert clock.asked == 2
    call(values(9))
    assert clock.asked == 4 and len(timings.used) == 4
    again = PlantedClock(LIBRARY_WINS, LIBRARY_WINS)  # a saved model brings the times it was chosen by
    call, told, _ = loaded(swiglu(), again, timings=Timings(timings.used))
    call(values(4))
    assert again.asked == 0 and [d.method for d in told.decisions] == ["32x64x16", LIBRARY]


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("ask", [
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
])
def test_tf32_is_used_where_torch_may_use_it(ask: Callable[[], None], precision: None) -> None:
    call, told, _ = loaded(swiglu(), PlantedClock(OTHER_WINS, LIBRARY_WINS))
    call(values())
    ask()
    call(values())
    exact, tf32 = told.sources
    assert "tile_dot_exact" in exact and "tile_dot_tf32" in tf32 and "exact" not in tf32


def test_without_a_way_to_measure_the_library_stays() -> None:
    clock = PlantedClock(OTHER_WINS, OTHER_WINS)
    call, told, _ = loaded(swiglu(), clock, wanted=lambda: False)
    torch.testing.assert_close(call(values())[0], expected(*values()))
    assert clock.asked == 0 and {(d.method, d.reason) for d in told.decisions} == {(LIBRARY, "nothing may be measured")}


def test_a_call_inside_a_foreign_capture_decides_nothing() -> None:
    clock = PlantedClock(OTHER_WINS, OTHER_WINS)
    clock.is_ready = False
    call, told, _ = loaded(swiglu(), clock)
    torch.testing.assert_close(call(values())[0], expected(*values()))
    assert clock.asked == 0 and not told.decisions
    clock.is_ready = True
    call(values())
    assert clock.asked == 2 and told.decisions


def test_a_template_that_fails_or_lies_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers raise on devices they do not know; and a wrong tile must lose however fast it is."""
    real = program_choices.gemm_kernel

    def broken(gemm: Any, tile: Any) -> Callable[..., None]:
        def call(buffers: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
            if tile.rows == 32:
                raise RuntimeError("no such instruction\nand a long story")
            real(gemm, tile)(buffers, sizes)
            buffers[-1].mul_(1.5)

        return call

    monkeypatch.setattr(program_choices, "gemm_kernel", broken)
    call, told, _ = loaded(swiglu(), PlantedClock(OTHER_WINS, LIBRARY_WINS))
    torch.testing.assert_close(call(values(100))[0], expected(*values(100)))
    (found,) = [d for d in told.decisions if "swiglu" in d.what]
    assert found.method == LIBRARY and found.best_s is None
    assert "64x64x16: differs from the library" in found.reason
    assert "32x64x16: RuntimeError: no such instruction" in found.reason and "story" not in found.reason


def test_a_clock_that_fails_leaves_the_library() -> None:
    class Broken(PlantedClock):
        def seconds(self, runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
            raise torch.cuda.OutOfMemoryError("too little for the flush")

    call, told, _ = loaded(swiglu(), Broken((), ()))
    torch.testing.assert_close(call(values())[0], expected(*values()))
    assert all(d.method == LIBRARY and "too little" in d.reason for d in told.decisions)


def test_sizes_without_end_do_not_make_programs_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_choices, "MAX_VARIANTS", 1)
    call, told, _ = loaded(swiglu(), PlantedClock(OTHER_WINS, LIBRARY_WINS))
    for rows in (4, 8):
        torch.testing.assert_close(call(values(rows))[0], expected(*values(rows)))
    full = "the program has 1 sets of choices already"
    assert [d.reason for d in told.decisions] == ["", "the library is as fast", full, full]


# -- stacked weights --------------------------------------------------------------------------------
def stacked() -> tuple[Any, Told, RecordedGraphs]:
    return loaded(swiglu(), PlantedClock(LIBRARY_WINS, OTHER_WINS))


def test_an_edited_weight_is_stacked_anew_under_a_graph() -> None:
    call, _, _ = stacked()
    given = values()
    for step in range(6):
        torch.testing.assert_close(call(given)[0], expected(*given))
        if step in (2, 4):
            with torch.no_grad():
                given[1 if step == 2 else 4].add_(1.0)


def test_a_replaced_weight_and_a_copy_of_the_model_have_their_own() -> None:
    call, _, _ = stacked()
    given, other = values(), [v + 1 for v in values()]
    for _ in range(3):
        torch.testing.assert_close(call(given)[0], expected(*given))
        torch.testing.assert_close(call(other)[0], expected(*other))


def test_copies_die_with_their_weights() -> None:
    call, _, _ = stacked()
    given = values()
    call(given)
    copy = weakref.ref(packing.packed([given[1], given[2]], _variant(call, given), lambda *_: None))
    assert copy() is not None
    packing.clear()
    call([v.clone() for v in given])
    assert copy() is None


def _variant(call: Any, inputs: Sequence[torch.Tensor]) -> Any:
    return call.settle(inputs)._packed.wanted[0][1]


def test_weights_without_a_version_are_multiplied_one_by_one() -> None:
    call, _, _ = stacked()
    with torch.inference_mode():
        given = [v.clone() for v in values()]
        for _ in range(3):
            torch.testing.assert_close(call(given)[0], expected(*given))


def test_stacked_weights_must_fit_beside_the_model() -> None:
    clock = PlantedClock(LIBRARY_WINS, OTHER_WINS)
    clock.memory = 4 * 300  # the copies take 384 bytes, a quarter of the memory is 300
    call, told, _ = loaded(swiglu(), clock)
    torch.testing.assert_close(call(values())[0], expected(*values()))
    (found,) = [d for d in told.decisions if "baddbmm" in d.what]
    assert found.method == LIBRARY and "memory" in found.reason


def test_a_copy_that_finds_no_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    call, _, _ = stacked()
    given, asked = values(), []
    call.settle(given)

    def full(*_: Any) -> None:
        asked.append(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packing, "packed", full)
    for _ in range(3):
        torch.testing.assert_close(call(given)[0], expected(*given))
    assert len(asked) == 1


def test_a_stack_is_named_by_its_method() -> None:
    call, told, _ = stacked()
    call(values())
    assert STACKED in {d.method for d in told.decisions}


def test_a_training_program_may_have_epilogues_and_no_graph() -> None:
    call, told, graphs = loaded(dataclasses.replace(swiglu(), inference=False), PlantedClock(OTHER_WINS, OTHER_WINS))
    for _ in range(3):
        torch.testing.assert_close(call(values())[0], expected(*values()))
    assert graphs.captures == 0 and [d.what for d in told.decisions] == ["addmm → swiglu"]


# -- the comparison ---------------------------------------------------------------------------------
@pytest.mark.parametrize(("change", "found"), [
    (lambda x: x, ""), (lambda x: x * (1 + 2e-4), ""), (lambda x: x * 1.01, "differs"),
    (lambda x: torch.where(x == x[0, 0], float("nan"), x), "not finite"),
])
def test_results_are_compared_loosely(change: Callable[[torch.Tensor], torch.Tensor], found: str) -> None:
    x = torch.arange(1.0, 21.0).reshape(4, 5)
    got = difference([change(x)], [x])
    assert (found in got) if found else got == ""


def test_other_types_are_compared_by_value() -> None:
    x = torch.arange(100)
    assert difference([x], [x]) == ""
    assert difference([torch.where(x < 20, -1, x)], [x]) == "20% of the values differ from the library's"
