"""CUDA graph capture and replay, on a stand-in for the device: replaying runs the recorded call on recorded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from meshwright.runtime.cuda_graphs import IDLE_CALLS, MAX_GRAPHS, GraphedProgram


class RecordedGraphs:
    """Like a device: capturing computes nothing that counts, replaying writes the outputs' memory in place."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.waits: list[Any] = []

    def capture(self, call: Callable[[], list[Any]], device: torch.device) -> tuple[list[Any], Callable[[], None]]:
        self.captures += 1
        outputs = call()
        for out in outputs:
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                out.detach().fill_(float("nan")) if not isinstance(out, torch.nn.Parameter) else None

        def replay() -> None:
            self.replays += 1
            for old, new in zip(outputs, call(), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)

        return outputs, replay

    def order(self, device: torch.device, last: Any) -> None:
        self.waits.append(last)

    def mark(self, device: torch.device) -> Any:
        return self.replays


def affine(inputs: Any) -> list[Any]:
    x, w = inputs
    return [x * w + 1, 7]


def test_first_call_runs_directly_then_one_graph_serves_all() -> None:
    api = RecordedGraphs()
    program = GraphedProgram(affine, [False, True], api)
    w = torch.full((4,), 3.0)
    for k in range(5):
        x = torch.full((4,), float(k))
        out, number = program([x, w])
        assert torch.equal(out, x * 3 + 1) and number == 7
    assert (api.captures, api.replays) == (1, 4)
    assert api.waits == [None, 1, 2, 3]


def test_results_are_the_callers_own() -> None:
    program = GraphedProgram(affine, [False, True], RecordedGraphs())
    w = torch.ones(3)
    results = [program([torch.full((3,), float(k)), w])[0] for k in range(4)]
    assert [r[0].item() for r in results] == [1.0, 2.0, 3.0, 4.0]


def test_changed_parameter_in_place_is_seen_and_a_replaced_one_is_captured_anew() -> None:
    api = RecordedGraphs()
    program = GraphedProgram(affine, [False, True], api)
    x, w = torch.ones(2), torch.full((2,), 2.0)
    for _ in range(2):
        program([x, w])
    w.fill_(5.0)
    assert program([x, w])[0].tolist() == [6.0, 6.0] and api.captures == 1
    other = torch.full((2,), 9.0)
    for _ in range(3):  # two copies of a model may share one program: neither evicts the other's graph
        assert program([x, other])[0].tolist() == [10.0, 10.0]
        assert program([x, w])[0].tolist() == [6.0, 6.0]
    assert api.captures == program.captured == 2


def test_an_idle_graph_makes_way() -> None:
    program = GraphedProgram(affine, [False, True], RecordedGraphs())
    weights = [torch.ones(n) for n in range(1, MAX_GRAPHS + 1)]
    for w in (*weights, *weights):
        program([torch.ones(w.numel()), w])
    assert program.captured == MAX_GRAPHS
    w = torch.ones(99)
    for _ in range(IDLE_CALLS + 2 * MAX_GRAPHS):
        assert torch.equal(program([torch.ones(99), w])[0], torch.full((99,), 2.0))
    assert program.captured == MAX_GRAPHS and any(key[0][0] == (99,) for key in program._graphs)


def test_each_shape_has_its_graph_up_to_a_limit() -> None:
    api = RecordedGraphs()
    program = GraphedProgram(affine, [False, True], api)
    for n in range(1, MAX_GRAPHS + 4):
        w = torch.ones(n)
        for _ in range(3):
            x = torch.arange(float(n))
            assert torch.equal(program([x, w])[0], x + 1)
    assert program.captured == MAX_GRAPHS


@pytest.mark.parametrize("layout", ["transposed", "with gaps"])
def test_strided_inputs_keep_their_strides(layout: str) -> None:
    seen: list[tuple[int, ...]] = []

    def call(inputs: Any) -> list[Any]:
        seen.append(inputs[0].stride())
        return [(inputs[0] * 2).contiguous()]

    program = GraphedProgram(call, [False], RecordedGraphs())
    x = torch.arange(12.0).reshape(3, 4).t() if layout == "transposed" else torch.arange(24.0).reshape(4, 6)[:, :3]
    for _ in range(3):
        assert torch.equal(program([x])[0], x * 2)
    assert set(seen) == {x.stride()}


def test_result_that_is_a_view_of_an_input_is_refused() -> None:
    program = GraphedProgram(lambda inputs: [inputs[0].view(4)], [False], RecordedGraphs())
    x = torch.ones(2, 2)
    for _ in range(3):
        (out,) = program([x])
        assert out.data_ptr() == x.data_ptr()
    assert program.captured == 0 and "view of an input" in (program.refused or "")


def test_expanded_inputs_run_directly() -> None:
    program = GraphedProgram(lambda inputs: [inputs[0] + 1], [False], RecordedGraphs())
    for _ in range(3):
        assert torch.equal(program([torch.ones(1).expand(4)])[0], torch.full((4,), 2.0))
    assert "expanded" in (program.refused or "")


def test_failing_capture_falls_back_for_good() -> None:
    class Broken(RecordedGraphs):
        def capture(self, call: Callable[[], list[Any]], device: torch.device) -> tuple[list[Any], Callable[[], None]]:
            self.captures += 1
            raise RuntimeError("operation not permitted when stream is capturing")

    api = Broken()
    program = GraphedProgram(affine, [False, True], api)
    w = torch.ones(1)
    for _ in range(4):
        assert program([torch.ones(1), w])[0].item() == 2.0
    assert api.captures == 1 and "not permitted" in (program.refused or "")
