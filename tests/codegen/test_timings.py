"""Timings of methods pass addresses to C++: what is behind them must not depend on the user's defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from meshwright.codegen import (
    program_cpp_attention,
    program_cpp_conv_methods,
    program_cpp_conv_sizes,
    program_cpp_packing,
    timings,
)
from meshwright.codegen.affine import ONE, ZERO
from meshwright.codegen.program_cpp_attention import MeasuredAttention
from meshwright.codegen.program_cpp_conv import PackedConv
from meshwright.codegen.program_cpp_gemm import Product, Weight
from meshwright.codegen.program_cpp_run import host_library
from meshwright.codegen.templates.cpu_gemm import FP32, LIBRARY
from meshwright.codegen.timings import Timings
from meshwright.runtime.program import Conv, TensorSpec

CONV = PackedConv((0, 1), Conv(TensorSpec("y", "float32", (1, 1, 1, 1), (1, 1, 1, 1)), "x", "w", "b", (1, 1), (1, 1),
                               (1, 1), 1, ONE, ZERO), ())


class Made(TorchFunctionMode):
    """Tensors that torch functions gave."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.tensors += [found] if isinstance(found, torch.Tensor) and not found.is_mkldnn else []
        return found


@pytest.fixture
def strange_defaults() -> Iterator[None]:
    """bf16 takes half the room of what the templates write, and a meta tensor has no address."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def test_only_what_belongs_to_an_expanded_weight_is_evicted(monkeypatch: pytest.MonkeyPatch):
    """Evicting an address that is not mapped ends the process."""
    weight = torch.ones(32).expand(16, 32)
    evicted: list[tuple[int, int]] = []
    library = host_library()
    monkeypatch.setattr(library, "mw_evict", lambda address, size: evicted.append((address, size)))
    given = Product(8, 16, 32, True, True, Weight(0, 0, 16, 32, 0, 1))
    program_cpp_packing.measure(library, given, weight, (8, 16, 32), 1, (LIBRARY,))
    assert set(evicted) == {(weight.data_ptr(), 32 * 4)}


def _product() -> None:
    weight = torch.ones(16, 32, dtype=torch.float32, device="cpu")
    for given in (Product(8, 16, 32, True, True, Weight(0, 0, 16, 32, 32, 1)), Product(8, 16, 32, True, True, None)):
        methods = (LIBRARY, FP32) if given.weight else (LIBRARY,)
        program_cpp_packing.measure(host_library(), given, weight, (8, 16, 32), 1, methods)


def _attention() -> None:
    program_cpp_attention.measure(host_library(), MeasuredAttention(1, 2, 2, 20, 20, 16, False, "full"), 1)


def _convolution() -> None:
    weight, bias = (torch.ones(shape, **program_cpp_packing.HOST_FLOATS) for shape in ((16, 32, 3, 3), (16,)))
    folded, shift = CONV.folded(weight, bias)
    program_cpp_conv_methods.measure(host_library(), CONV, folded, shift, (1, 32, 6, 6), 1)


def _layout() -> None:
    program_cpp_conv_sizes._layout((16, 32, 3, 3), (1, 32, 6, 6), (1, 1), (1, 1), (1, 1), 1)


@pytest.mark.parametrize("timed", [_product, _attention, _convolution, _layout])
def test_the_users_defaults_do_not_count(timed: Callable[[], None], strange_defaults: None):
    if timed is _convolution and not host_library().mw_split_ready():
        pytest.skip("this machine has no AMX tiles")
    with Made() as made:
        timed()
    assert made.tensors and {t.device.type for t in made.tensors} == {"cpu"}
    assert {t.dtype for t in made.tensors} <= {torch.float32, torch.float64, torch.uint8}


def test_times_that_were_given_come_before_those_on_disk(monkeypatch: pytest.MonkeyPatch):
    disk: dict[str, Any] = {}
    monkeypatch.setattr(timings.cache, "get_json", disk.get)
    monkeypatch.setattr(timings.cache, "put_json", disk.__setitem__)
    first = Timings()
    taken = first.seconds("product", "text", "8 8 8", ("own", "library"), lambda: {"own": 1.0, "library": 2.0})
    assert taken == {"own": 1.0, "library": 2.0} and list(disk.values()) == [taken]
    other = {key: {"own": 5.0, "library": 3.0} for key in first.used}
    second = Timings(other)
    assert second.seconds("product", "text", "8 8 8", ("own", "library"), pytest.fail)["own"] == 5.0
    assert Timings().seconds("product", "text", "8 8 8", ("own",), pytest.fail)["own"] == 1.0


@pytest.mark.parametrize("damaged", [None, 3, {"own": "fast"}, {"own": float("nan")}, {"own": -1.0}, {"library": 1.0}])
def test_a_damaged_entry_is_measured_anew(damaged: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timings.cache, "get_json", lambda key: damaged)
    monkeypatch.setattr(timings.cache, "put_json", lambda key, value: None)
    found = Timings().seconds("product", "text", "8", ("own", "library"), lambda: {"own": 1.0, "library": 2.0})
    assert found["library"] == 2.0
