"""Whole graphs through `torch.compile`: the compiled call (the second one) against eager."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.codegen import program_cpp_run
from meshwright.compiler import acceptance, aten, backend
from meshwright.compiler.backend import recent_reports
from meshwright.runtime import toolchain


def second_call(function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """What the compiled graph gives: the first call is the eager run that accepts its kernels."""
    compiled = torch.compile(function, backend="meshwright", fullgraph=True)
    compiled(*inputs)
    return compiled(*inputs)


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_STRICT", "1")
    torch._dynamo.reset()


def scatter_from_itself(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    y = x + 1
    return y.scatter_add(0, places, y)


def put_from_itself(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    y = x + 1
    return y.index_put((places,), y, accumulate=True)


@pytest.mark.parametrize("function", [scatter_from_itself, put_from_itself])
def test_a_scatter_of_a_tensor_into_itself_copies_it(function: Callable[..., torch.Tensor]) -> None:
    x, places = torch.randn(8), torch.tensor([3, 1, 1, 7, 0, 2, 2, 5])
    torch.testing.assert_close(second_call(function, x, places), function(x, places))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_process_can_compile() -> None:
    """The threads that compile stay behind in the parent."""
    x = torch.randn(8)
    second_call(lambda x: x.exp() + 1, x)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        right = torch.allclose(second_call(lambda x: (x.sin() + 3).exp(), x), (x.sin() + 3).exp())
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("finished", ["nothing", "kernels"])
def test_a_child_finishes_what_its_parent_was_compiling(monkeypatch: pytest.MonkeyPatch, finished: str) -> None:
    may_compile, waiting = threading.Event(), threading.Event()
    submit, in_time, waits = aten.submit, aten.in_time, []
    late = {"nothing": ("_compile_kernels", "_make_runner"), "kernels": ("_make_runner",)}[finished]

    def submit_late(step: Callable[..., Any], *args: Any) -> Any:
        return submit(lambda: (step.__name__ not in late or may_compile.wait(60)) and step(*args))

    def signal_wait(future: Any, deadline: float | None) -> bool:
        waits.append(future)
        if len(waits) == (1 if finished == "nothing" else 2):  # first for the kernels, then for the program
            waiting.set()
        return in_time(future, deadline)

    monkeypatch.setattr(aten, "submit", submit_late)
    monkeypatch.setattr(aten, "in_time", signal_wait)
    model, x = Stack(), torch.randn(4, 8)
    fast = mw.compile(model)
    started = threading.Thread(target=lambda: fast(x))
    started.start()  # the first call waits for the compiler, and holds the graph's lock
    assert waiting.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        may_compile.set()
        right = all(torch.allclose(fast(x), model(x), atol=1e-5) for _ in range(2)) and bool(fast.report.kernels)
        os._exit(0 if right else 1)
    may_compile.set()
    started.join()
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def sizes_from_data() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def test_kernels_over_sizes_known_only_inside_the_graph(sizes_from_data: None) -> None:
    def positive(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = x[x > 0]
        return kept * 2, (kept + 1).softmax(0), torch.cat([kept, kept]) * 3
    x = torch.randn(16)
    torch.testing.assert_close(second_call(positive, x), positive(x))


def test_a_spliced_graph_draws_its_random_numbers_in_order(sizes_from_data: None) -> None:
    def noisy(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, first, second = x.sin(), torch.rand_like(x), torch.rand_like(x)
        return a, first, x.cos() * second, x.nonzero() * 2
    compiled = torch.compile(noisy, backend="meshwright", fullgraph=True)
    x = torch.randn(16)
    for _ in range(2):
        torch.manual_seed(0)
        found = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, noisy(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("pattern", ["fuse:first", "fuse:fir*", "fuse:first.1"])
@pytest.mark.parametrize("entry", ["compile", "backend"])
def test_fusion_keeps_away_from_modules_that_match_a_pattern(pattern: str, entry: str) -> None:
    model, x = Stack(), torch.randn(4, 8)
    if entry == "compile":
        fast = mw.compile(model, x, disable=pattern)
        report = fast.report
    else:
        fast = torch.compile(model, backend="meshwright", options={"disable": pattern})
        fast(x)
        report = recent_reports()[-1]
    torch.testing.assert_close(fast(x), model(x))
    fast(x).sum().backward()  # the backward of a module is the module's too
    assert any("sigmoid" in k.name for k in report.kernels)
    assert not any("gelu" in k.name or "erf" in k.name for k in report.kernels), [k.name for k in report.kernels]
    assert "disabled for this module" in {n.reason for n in report.passes["fuse"].refused}


def test_the_time_limit_counts_all_graphs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    may_compile, submit, futures = threading.Event(), aten.submit, []

    def late(step: Callable[..., Any], *args: Any) -> Any:
        futures.append(submit(lambda: may_compile.wait(60) and step(*args)))
        return futures[-1]

    monkeypatch.setattr(aten, "submit", late)
    model, x = Stack(), torch.randn(4, 8)
    fast = mw.compile(model, x, time_limit_s=1e-6)
    for call in range(4):  # eagerly until the kernels are there, then unchecked
        torch.testing.assert_close(fast(x), model(x))
        fast(x).sum().backward()
        assert len(fast.report.kernels) == 0 or call > 1
        if call == 1:
            may_compile.set()
            wait(futures, 60)
    waited = {n.reason.partition(" runs eagerly until")[0] for n in fast.report.notes if "until" in n.reason}
    unchecked = {n.reason.partition(" was compared")[0] for n in fast.report.notes if "as a whole" in n.reason}
    assert waited == unchecked == {"forward 0", "backward 1"}
    assert fast.report.kernels
    assert fast.report.phases["check"] == fast.report.phases["measure"] == 0
    rows = fast.report.passes["fuse"].candidates
    assert all(c.reason == "not checked: time limit reached" for c in rows)
    assert not fast.report.fall_backs


def test_the_time_limit_bounds_the_wait_for_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Stack().eval(), torch.randn(4, 8)
    with torch.no_grad():
        mw.compile(model, x)  # the kernels are in the cache: what is late below is the program
        may_compile, compile_now = threading.Event(), program_cpp_run.compile_program
        monkeypatch.setattr(program_cpp_run, "compile_program",
                            lambda *args: may_compile.wait(60) and compile_now(*args))
        started = time.monotonic()
        fast = mw.compile(model, x, time_limit_s=2)
        assert time.monotonic() - started < 50
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))
        [graph] = fast.report.graphs
        assert graph.state == "pending" and fast.report.kernels
        assert {n.reason for n in fast.report.notes} == {
            "inference 0 runs eagerly until its program is compiled: time limit reached"}
        may_compile.set()
        while graph.state == "pending" and time.monotonic() - started < 100:
            torch.testing.assert_close(fast(x), model(x))
        assert graph.state == "ready" and graph.source
        torch.testing.assert_close(fast(x), model(x))
    assert not fast.report.fall_backs


def test_dump_holds_graph_kernels_and_program(tmp_path: Path) -> None:
    mw.compile(Stack().eval(), torch.randn(4, 8), options={"dump_dir": str(tmp_path)})
    texts = {p.stem.partition("-Stack-")[2]: p.read_text() for p in tmp_path.iterdir()}
    assert "torch.ops.aten" in texts["inference_0-aten"]
    assert texts["inference_0-kernels"].startswith("kernel ")
    assert any("mw_program" in text for name, text in texts.items() if "program" in name)


def test_a_pass_knows_its_own_seconds() -> None:
    report = mw.compile(Stack().eval(), torch.randn(4, 8)).report
    entry = report.passes["fuse"]
    assert 0 < entry.seconds <= sum(report.phases[p] for p in ("lowering", "check", "measure")) + 1e-9


class Lookup(nn.Module):
    """Every operator that gathers; the index tensors come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6)

    def forward(self, ids: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.words(ids) * 2
        return x.softmax(-1), x.gather(1, columns) + 1, x[:, columns[0]].exp(), x.index_select(1, columns[0]) * 3


@pytest.mark.parametrize(("ids", "columns"), [([3, 10], [0, 5]), ([3, -1], [0, 5]), ([3, 1], [0, 6])])
@pytest.mark.parametrize("strict", [True, False])
def test_an_index_out_of_range_raises_as_in_eager(ids: list[int], columns: list[int], strict: bool) -> None:
    model, good = Lookup(), (torch.tensor([1, 2]), torch.tensor([[4, 0], [2, 2]]))
    fast = mw.compile(model, good, strict=strict)
    bad = (torch.tensor(ids), torch.tensor([columns, columns]))
    with torch.no_grad():
        torch.testing.assert_close(fast(*good), model(*good))
        with pytest.raises((IndexError, RuntimeError)):
            model(*bad)
        with pytest.raises((IndexError, RuntimeError), match="out of (range|bounds)"):
            fast(*bad)
        torch.testing.assert_close(fast(*good), model(*good))
    assert not fast.report.fall_backs, "a mistake in the call is no failure of ours"
    assert fast.report.graphs[0].state == "ready"


def test_an_index_behind_a_guard_is_no_mistake() -> None:
    """Where padding hides the place, eager reads nothing either."""
    def shifted(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x[places] * 2, (3, 0)).cumsum(0) + 1
    x, places = torch.randn(4), torch.tensor([0, 3, 1])
    torch.testing.assert_close(second_call(shifted, x, places), shifted(x, places))


def test_a_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its acceptance and for the program alike, also when a region is dropped and the program printed anew."""
    texts: list[str] = []
    real = toolchain.compile_shared

    def spy(source: str, **options: Any) -> Any:
        texts.append(source)
        return real(source, **options)

    for module in (toolchain, program_cpp_run):
        monkeypatch.setattr(module, "compile_shared", spy)

    def regions(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ((x * 3).tanh() @ w).softmax(-1).cumsum(-1) @ w.exp().sin()

    inputs = torch.randn(8, 8), torch.randn(8, 8)
    judged = acceptance.Acceptance.judge

    def one_dropped(self: Any, *args: Any) -> Any:
        verdict = judged(self, *args)
        verdict.ok = len(self.verdicts) != 1  # the first
        return verdict

    for judge in (judged, one_dropped):
        monkeypatch.setattr(acceptance.Acceptance, "judge", judge)
        torch._dynamo.reset()
        texts.clear()
        torch.testing.assert_close(second_call(regions, *inputs), regions(*inputs), rtol=1e-4, atol=1e-5)
        bodies = Counter(re.findall(r"^MW_KERNEL void (\w+)", "\n".join(texts), re.MULTILINE))
        assert len(bodies) >= 2 and set(bodies.values()) == {1}
    assert sum("int mw_program_" in text for text in texts) == 2


def test_the_host_runtime_is_compiled_while_the_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(program_cpp_run, "start_host_library", lambda: order.append("host"))
    monkeypatch.setattr(backend, "compile_with_aot", lambda gm, *_: order.append("traced") or gm.forward)
    torch.compile(lambda x: x + 1, backend="meshwright")(torch.ones(3))
    assert order == ["host", "traced"]
