"""Graphs kept on disk: a second compilation starts from the program, gives the same bits, trusts nothing it reads."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.compiler import kept_graph
from meshwright.compiler.backend import recent_reports
from meshwright.compiler.graph_key import Unkept, graph_key
from meshwright.compiler.settings import resolve
from meshwright.compiler.whole_check import WrongResult
from meshwright.runtime import cache, packing
from meshwright.runtime.errors import MeshwrightWarning


@pytest.fixture(autouse=True)
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MESHWRIGHT_GRAPH_CACHE", "1")
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path))
    yield tmp_path


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return y if shift is None else y + shift


def run(model: nn.Module, *inputs: Any, **options: Any) -> tuple[Any, Any]:
    """Compile anew, as a new process would, and run once; the output and the graph's report."""
    torch.compiler.reset()
    with torch.no_grad():
        out = torch.compile(model, backend="meshwright", options=options or None)(*inputs)
    return out, recent_reports()[-1]


def from_disk(report: Any) -> bool:
    return any("was compiled before" in n.reason for n in report.notes)


def documents(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*.json") if "program" in f.read_text()[:20_000] and "guards" in f.read_text()]


def test_the_second_compilation_traces_nothing_and_gives_the_same_bits() -> None:
    model, x = Block(), torch.randn(4, 7, 32)
    compiled = torch.compile(model, backend="meshwright")
    with torch.no_grad():
        compiled(x)
        first = compiled(x)
    cold = recent_reports()[-1]
    eager, warm = run(model, x)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="meshwright")(x), first)
        assert torch.equal(eager, model(x))  # the first call returns eager's result
    assert not from_disk(cold)
    assert from_disk(warm)
    assert warm.phases["aot"] == warm.phases["lowering"] == 0
    assert [k.source for k in warm.kernels] == [k.source for k in cold.kernels]
    assert warm.passes["fuse"].candidates == cold.passes["fuse"].candidates
    assert warm.graphs[0].behind_products  # a GELU behind a product
    fields = ("kernels", "kernel_bytes", "aten_bytes", "library_bytes", "nodes", "program", "state", "behind_products")
    assert [getattr(warm.graphs[0], f) for f in fields] == [getattr(cold.graphs[0], f) for f in fields]


def test_other_weights_are_used_and_later_changes_seen() -> None:
    x = torch.randn(4, 7, 32)
    run(Block(), x)
    other = Block()
    torch.compiler.reset()
    compiled = torch.compile(other, backend="meshwright")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), other(x), rtol=1e-5, atol=1e-5)
        other.up.weight.mul_(2.0)
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-5, atol=1e-5)
    assert from_disk(recent_reports()[-1])


def test_symbolic_sizes_keep_the_conditions_that_tracing_made() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, -1).softmax(-1) if x.shape[0] % 2 == 0 else x[None].softmax(-1)

    class Sum(nn.Module):  # an addition whose broadcast tracing has to decide
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + y) * 2

    for model, sets in ((Halves(), [(6,), (10,), (5,), (9,)]), (Sum(), [(6, 6), (9, 9)])):
        for attempt in range(2):
            torch.compiler.reset()
            fast = mw.compile(model)
            with torch.no_grad():
                for sizes in sets:
                    inputs = [torch.randn(n) for n in sizes]
                    torch.testing.assert_close(fast(*inputs), model(*inputs))
            assert from_disk(fast.report) == bool(attempt)
        if isinstance(model, Sum):
            assert len(fast.report.graphs) == 1  # the relation was kept as one: no second compile for equal sizes
            with torch.no_grad(), pytest.raises(RuntimeError):
                fast(torch.randn(6), torch.randn(9))


@pytest.mark.parametrize("change", ["grad", "dtype", "shape", "options", "autocast", "code"])
def test_what_changes_the_program_changes_the_key(change: str) -> None:
    def key(model: nn.Module, x: torch.Tensor, **options: Any) -> str:
        found: list[str] = []

        def backend(gm: Any, inputs: Any) -> Callable[..., Any]:
            found.append(graph_key(gm, inputs, resolve(options)))
            return gm.forward

        torch.compiler.reset()
        torch.compile(model, backend=backend)(x)
        return found[0]

    class Other(Block):
        def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x) * 1.0000001

    x = torch.randn(4, 7, 32)
    with torch.no_grad():
        same = key(Block(), x)
        assert key(Block(), torch.randn(4, 7, 32)) == same
        match change:
            case "grad":
                with torch.enable_grad():
                    assert key(Block(), x) != same
            case "dtype":
                assert key(Block().double(), x.double()) != same
            case "shape":
                assert key(Block(), torch.randn(4, 8, 32)) != same
            case "options":
                assert key(Block(), x, disable=["fuse"]) != same
            case "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    assert key(Block(), x) != same
            case "code":
                assert key(Other(), x) != same


class Aliased(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(x) + 1, x[0]


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return torch.relu(x) + self.seen


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + torch.rand_like(x)


@pytest.mark.parametrize("model", [Aliased(), Written(), Random()], ids=lambda m: type(m).__name__)
def test_what_torch_does_around_a_graph_is_not_kept(model: nn.Module) -> None:
    x = torch.randn(4, 8)
    for _ in range(2):
        torch.manual_seed(3)
        got, report = run(model, x)
        assert not from_disk(report)
    if isinstance(model, Written):
        assert model.seen == 2
    if isinstance(model, Aliased):
        assert got[1].data_ptr() == x.data_ptr()


def test_unknown_code_is_not_kept() -> None:
    @torch.library.custom_op("kept_graph_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(twice(x))

    x = torch.randn(8)
    for _ in range(2):
        got, report = run(Custom(), x)
        assert torch.equal(got, torch.relu(2 * x))
        assert not from_disk(report)


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit every kept graph, with the right digest: what a bug of ours or a stranger could have written."""
    for file in documents(folder):
        document = json.loads(file.read_text())
        edit(document)
        cache.default_cache().put_json(file.stem, document)


def test_a_wrong_program_is_refused_and_forgotten(kept_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(), torch.randn(4, 7, 32)
    run(model, x)

    def edit(document: dict[str, Any]) -> None:
        document["kernels"] = [k.replace("0.7071067811865476", "0.9") for k in document["kernels"]]
        program = document["program"].replace("0.7071067811865476", "0.9")
        assert program != document["program"]
        document["program"] = program

    change(kept_in, edit)
    with pytest.raises(WrongResult):
        run(model, x)
    assert not documents(kept_in)
    _, report = run(model, x)  # compiled again, and kept again
    assert not from_disk(report)
    change(kept_in, edit)
    monkeypatch.setenv("MESHWRIGHT_STRICT", "0")
    with pytest.warns(MeshwrightWarning, match="eager"):
        got, _ = run(model, x)
    with torch.no_grad():
        assert torch.equal(got, model(x))


@pytest.mark.parametrize("damage", ["no object", "operator", "field", "constant", "kernels", "guard"])
def test_a_damaged_document_is_compiled_again(kept_in: Path, damage: str) -> None:
    model, x = Block(), torch.randn(4, 7, 32)
    expected, _ = run(model, x)

    def edit(document: dict[str, Any]) -> None:
        match damage:
            case "no object":
                document.clear()
            case "operator":
                program = json.loads(document["program"])
                program["steps"].insert(0, {"op": "aten.from_file.default", "args": ["/etc/passwd"], "kwargs": {},
                                            "outputs": ["t"], "specs": [None], "kind": "call"})
                document["program"] = json.dumps(program)
            case "field":
                document["counts"] = {"state": 1}
            case "constant":
                document["constants"] = [{"dtype": "nn", "shape": [1], "values": [1]}]
            case "kernels":
                document["kernels"] = []
            case "guard":
                document["guards"] = [{"relation": "Equality", "left": "s0", "right": "__import__"}]

    assert documents(kept_in)
    change(kept_in, edit)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeshwrightWarning)
        got, report = run(model, x)
    assert not from_disk(report)
    assert torch.equal(got, expected)


def test_the_time_limit_bounds_the_wait_for_a_started_program(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(), torch.randn(4, 7, 32)
    run(model, x)
    may_compile, compile_now = threading.Event(), kept_graph.build_program
    monkeypatch.setattr(kept_graph, "build_program", lambda *a, **k: may_compile.wait(60) and compile_now(*a, **k))
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="meshwright", options={"time_limit_s": 0.5})
        torch.testing.assert_close(compiled(x), model(x))
        report = recent_reports()[-1]
        [graph] = report.graphs
        assert from_disk(report) and graph.state == "pending"
        assert any("eagerly until its program is compiled: time limit" in n.reason for n in report.notes)
        may_compile.set()
        started = time.monotonic()
        while graph.state == "pending" and time.monotonic() - started < 100:
            torch.testing.assert_close(compiled(x), model(x))
        assert graph.state == "ready"
        torch.testing.assert_close(compiled(x), model(x))


def test_a_started_model_can_be_saved(tmp_path: Path) -> None:
    model, x = Block().eval(), torch.randn(4, 7, 32)
    mw.compile(model, (x,))
    torch.compiler.reset()
    fast = mw.compile(model, (x,))
    assert from_disk(fast.report)
    with torch.no_grad():
        fast.save(tmp_path / "saved")
        loaded = mw.load(tmp_path / "saved")
        for rows in (4, 9):
            y = torch.randn(rows, 7, 32)
            assert torch.equal(loaded(y), fast(y))


def test_autocast_around_a_started_graph_casts_once() -> None:
    model, x = Block(), torch.randn(4, 7, 32)
    outs = []
    for _ in range(2):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="meshwright")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            compiled(x)
            outs.append(compiled(x))
    assert from_disk(recent_reports()[-1])
    assert torch.equal(*outs)


def test_a_guard_that_does_not_hold_starts_nothing() -> None:
    guard = kept_graph.Guard("Equality", "mod(s0, 4)", "floordiv(s0, 8)")
    assert kept_graph.holds(guard, {"s0": 18})
    assert not kept_graph.holds(guard, {"s0": 19})


def test_a_module_call_is_no_graph_we_know() -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(Unkept):
        graph_key(gm, [torch.randn(2, 2)], resolve())


def test_weights_are_packed_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(32, 64), torch.randn(4, 32)  # so small that the packed form needs no timing
    run(model, x)
    packing.clear()
    prepared, held = threading.Event(), []
    prepare, first_call = kept_graph.StartedGraph._prepare, kept_graph.StartedGraph._first_call

    def tell(self: kept_graph.StartedGraph, *args: Any) -> None:
        prepare(self, *args)
        prepared.set()

    def look(self: kept_graph.StartedGraph, args: list[Any]) -> list[Any]:
        assert prepared.wait(60)
        held.append(packing.clear())
        return first_call(self, args)

    monkeypatch.setattr(kept_graph.StartedGraph, "_prepare", tell)
    monkeypatch.setattr(kept_graph.StartedGraph, "_first_call", look)
    got, _ = run(model, x)
    torch.testing.assert_close(got, model(x))
    assert held[0] >= 4 * 32 * 64
