"""The legs of cpu_models: eager, Inductor, Inductor with freezing, ONNX Runtime, and our two entries.

Every builder gives a `Leg`, or raises; the caller reports why a leg is missing and goes on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._harness import Leg
from benchmarks._isolation import inductor_blocked
from benchmarks._models import Inputs

BACKEND = "meshwright"
OURS = ("torch.compile", "mw.compile", "mw max")  # the default legs first, mode="max" apart
PEERS = ("eager", "inductor", "freezing", "onnxruntime")
PROBES = ("fp32 product", "bf16 product")  # not compared: how steady the vector units and the AMX tiles are


def output_of(result: Any, name: str) -> torch.Tensor:
    return result[name] if not isinstance(result, torch.Tensor) else result


def _leg(name: str, function: Callable[..., Any], inputs: Inputs) -> Leg:
    """A leg that was called once already: compiled before anything is timed."""

    def call() -> Any:
        with torch.inference_mode():
            return function(**inputs)

    call()
    call()
    return Leg(name, call)


def probes() -> list[Leg]:
    """The same product of 512 x 512 matrices again and again, by the library, in fp32 and in bf16.

    Where other tenants share the cores they take up to half of the units that these use, for seconds at a time and not
    of both alike; then ratios between programs that lean on different units move. Median over fastest tells.
    """
    legs = []
    for name, dtype in zip(PROBES, (torch.float32, torch.bfloat16), strict=True):
        a = torch.ones(512, 512, dtype=dtype)
        legs.append(Leg(name, partial(torch.mm, a, a)))
    return legs


def eager(model: nn.Module, inputs: Inputs) -> Leg:
    return _leg("eager", model, inputs)


def inductor(model: nn.Module, inputs: Inputs) -> Leg:
    return _leg("inductor", torch.compile(model, backend="inductor"), inputs)


def freezing(model: nn.Module, inputs: Inputs) -> Leg:
    """Inductor with its weights folded and packed (`torch._inductor.config.freezing`)."""
    import torch._inductor.config as config

    with config.patch(freezing=True):
        return _leg(
            "freezing", torch.compile(copy.deepcopy(model), backend="inductor", options={"freezing": True}), inputs
        )


def onnxruntime(model: nn.Module, inputs: Inputs, folder: Path, output: str) -> Leg:
    """ONNX Runtime fp32 through the dynamo exporter: a session per thread count, workers that do not spin after a
    run."""
    import onnxruntime as ort

    path = folder / "model.onnx"
    with torch.no_grad():
        program = torch.onnx.export(model, (), kwargs=dict(inputs), dynamo=True, verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export gave nothing")
    program.save(str(path))
    feeds = {k: v.numpy() for k, v in inputs.items()}
    state: dict[str, Any] = {}

    def prepare(threads: int) -> None:
        state.clear()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        state["session"] = session
        state["feeds"] = {i.name: feeds[i.name] for i in session.get_inputs()}

    def call() -> Any:
        found = state["session"].run(None, state["feeds"])
        return {output: torch.from_numpy(found[0])}

    prepare(torch.get_num_threads())
    call()
    return Leg("onnxruntime", call, prepare)


def ours_backend(model: nn.Module, inputs: Inputs) -> Leg:
    """`torch.compile(backend="meshwright")` with Inductor's compiler out of reach."""
    with inductor_blocked():
        return _leg(OURS[0], torch.compile(model, backend=BACKEND), inputs)


def ours_compile(model: nn.Module, inputs: Inputs) -> Leg:
    """`mw.compile` with Inductor's compiler out of reach."""
    import meshwright as mw

    with inductor_blocked(), torch.inference_mode():
        return _leg(OURS[1], mw.compile(model, dict(inputs)), inputs)


def ours_max(model: nn.Module, inputs: Inputs) -> Leg:
    """mode="max": Inductor is one of the candidates, by design."""
    return _leg(OURS[2], torch.compile(model, backend=BACKEND, options={"mode": "max"}), inputs)


def build(name: str, model: nn.Module, inputs: Inputs, folder: Path, output: str) -> Leg:
    """The leg `name`, compiled. Dynamo's caches are per leg: every leg wraps its own shallow copy of the model."""
    started = time.perf_counter()
    own = copy.copy(model)
    makers = {
        "eager": eager,
        "inductor": inductor,
        "freezing": freezing,
        OURS[0]: ours_backend,
        OURS[1]: ours_compile,
        OURS[2]: ours_max,
    }
    leg = onnxruntime(own, inputs, folder, output) if name == "onnxruntime" else makers[name](own, inputs)
    print(f"    {name}: ready after {time.perf_counter() - started:.1f} s", flush=True)
    return leg
