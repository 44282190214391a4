"""Every private `torch._…` name Meshwright depends on, in one place.

The rule: no other module imports a private torch module, at the top or lazily (tests/test_imports.py holds this).
A function here is small, says which private name it wraps and why nothing public will do, and works on every
supported torch release (the oldest and the newest are tested). Imports of private modules stand inside the
functions, so that a name which moves breaks its one caller and not `import meshwright`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch._ops import OpOverload


def core_aten_decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's table of decompositions to core ATen."""
    from torch._decomp import core_aten_decompositions as table

    return dict(table())


def get_decompositions(ops: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """PyTorch's own decompositions of `ops` (packets or overloads)."""
    from torch._decomp import get_decompositions as lookup

    return dict(lookup(ops))


def is_operator(target: object) -> TypeGuard[OpOverload]:
    """True for one overload of an operator (`aten.add.Tensor`): its class has no public name."""
    from torch._ops import OpOverload

    return isinstance(target, OpOverload)


GraphCompiler = Callable[..., Callable[..., Any]]  # (aten gm, fake inputs) -> boxed callable


def aot_autograd(gm: Any, example_inputs: Sequence[Any], *, forward: GraphCompiler, backward: GraphCompiler,
                 inference: GraphCompiler, decompositions: Mapping[Any, Any]) -> Callable[..., Any]:
    """Run AOTAutograd on a Dynamo graph; each compiler turns an ATen graph with fake inputs into a boxed callable.

    Wraps `torch._functorch.aot_autograd.aot_module_simplified`: the public `functorch.compile.aot_module` takes no
    Dynamo graph, and `torch._dynamo.backends.common.aot_autograd` imports Inductor's scheduler. Like it, this keeps
    Dynamo away from the compiled code, which autograd may call while something else is being traced.
    """
    import torch
    from functorch.compile import min_cut_rematerialization_partition
    from torch._functorch.aot_autograd import aot_module_simplified

    def untraced_backward(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return torch.compiler.disable(torch.compiler.disable(backward)(*args, **kwargs))  # type: ignore[no-any-return]

    compiled = aot_module_simplified(
        gm, list(example_inputs), fw_compiler=forward, bw_compiler=untraced_backward, inference_compiler=inference,
        decompositions=dict(decompositions), partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True)
    return torch.compiler.disable(compiled)  # type: ignore[no-any-return]


def outside_of_autograd(boxed: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    """`boxed` called as AOTAutograd calls an inference graph: without gradients, without autocast (the traced graph
    holds its casts), and where Dynamo does not look. Wraps `torch._C._is_any_autocast_enabled`, `_DisableAutocast`."""
    import torch

    any_autocast, no_autocast = torch._C._is_any_autocast_enabled, torch._C._DisableAutocast

    def run(*args: Any) -> Any:
        with torch.no_grad():
            if not any_autocast():
                return boxed(list(args))
            with no_autocast():
                return boxed(list(args))

    return torch.compiler.disable(run)  # type: ignore[no-any-return]


def mark_boxed(call: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Say that `call` takes one list of arguments and may empty it. Wraps the attribute AOTAutograd looks for."""
    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def device_of(value: Any) -> Any:
    """A tensor's device, also of a fake one that another thread's trace is working with: while a fake kernel runs,
    every tensor of its mode says "meta". Wraps `FakeTensor.fake_device`."""
    from torch._subclasses.fake_tensor import FakeTensor

    return value.fake_device if isinstance(value, FakeTensor) else value.device


def is_fake(value: object) -> bool:
    """True for a tensor without data (fake or on the meta device). Wraps `torch._subclasses.FakeTensor`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor) or (isinstance(value, torch.Tensor) and value.is_meta)


@dataclass(frozen=True)
class BreakReason:
    """Why Dynamo ended a graph, and the user's line it points at."""

    reason: str
    file: str
    line: int


def break_reason(gm: Any) -> BreakReason | None:
    """Why Dynamo ended the graph `gm`, or None when it ended because the function did.

    Wraps `GraphModule.compile_subgraph_reason`, which Dynamo sets and documents nowhere.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    return _break_reason(reason)


def _break_reason(reason: Any) -> BreakReason:
    frames = [f for f in reason.user_stack if "torch/nn/modules/module.py" not in f.filename]
    last = frames[-1] if frames else None
    text = next((ln.strip() for ln in str(reason.reason).splitlines() if ln.strip()), "unknown reason")
    return BreakReason(text, last.filename if last else "", int(last.lineno or 0) if last else 0)


def break_reasons_so_far() -> int:
    """How many graph breaks Dynamo has recorded so far. Wraps `torch._dynamo.output_graph.graph_break_reasons`."""
    from torch._dynamo import output_graph

    return len(output_graph.graph_break_reasons)


def break_reasons_since(start: int) -> list[BreakReason]:
    """The graph breaks recorded after `break_reasons_so_far()` returned `start`."""
    from torch._dynamo import output_graph

    return [_break_reason(r) for r in output_graph.graph_break_reasons[start:]]


def backend_failure(error: BaseException) -> BaseException:
    """The exception a backend raised, out of Dynamo's wrapper. Wraps `torch._dynamo.exc.BackendCompilerFailed`."""
    from torch._dynamo.exc import BackendCompilerFailed

    return error.inner_exception if isinstance(error, BackendCompilerFailed) else error


def dynamo_exceptions() -> tuple[type[BaseException], ...]:
    """What Dynamo raises when it, or a backend under it, fails. Wraps `torch._dynamo.exc.TorchDynamoException`."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def control_flow_exceptions() -> tuple[type[BaseException], ...]:
    """Exceptions Dynamo and AOTAutograd use to restart an analysis: a backend must let them pass."""
    from torch._dynamo import exc

    names = ("TensorifyScalarRestartAnalysis", "RestartAnalysis", "SkipFrame")
    return tuple(getattr(exc, n) for n in names if hasattr(exc, n))


def compile_started_ns() -> int | None:
    """When Dynamo began the compilation this thread is in (`time.time_ns()`), None outside of one.

    Wraps `torch._dynamo.utils.get_metrics_context`, the only place where the start is kept.
    """
    from torch._dynamo.utils import get_metrics_context

    context = get_metrics_context()
    start = getattr(context, "_start_time_ns", 0)
    return int(start) if start and getattr(context, "_level", 0) else None


_specializing = threading.local()


@contextlib.contextmanager
def specializing_floats() -> Iterator[None]:
    """Within the body, compilations on this thread treat Python floats of the model (dropout rates, epsilons) as
    constants. With `dynamic=True` Dynamo first makes them symbols, finds in AOTAutograd that they are none, and traces
    everything again.

    Wraps `torch._dynamo.config.specialize_float`, set in compile callbacks: setting it around every call would cost
    more than a small model takes.
    """
    from torch._dynamo.callback import callback_handler

    if _start_specializing not in callback_handler.start_callbacks:  # torch.compiler.reset() forgets them
        callback_handler.register_start_callback(_start_specializing)
        callback_handler.register_end_callback(_end_specializing)
    before = getattr(_specializing, "wanted", False)
    _specializing.wanted = True
    try:
        yield
    finally:
        _specializing.wanted = before


def _start_specializing(_: Any) -> None:
    if getattr(_specializing, "wanted", False):
        from torch._dynamo import config

        _specializing.saved = config.specialize_float
        config.specialize_float = True


def _end_specializing(_: Any) -> None:
    if hasattr(_specializing, "saved"):
        from torch._dynamo import config

        config.specialize_float = _specializing.saved
        del _specializing.saved


def is_tracing() -> bool:
    """True while Dynamo traces the calling function (public, but torch may not be imported yet)."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_dynamo_compiling())


def handles_of(tensors: Any) -> list[Any]:
    """New owning handles (capsules) of `tensors` for the C++ program, which consumes them. Wraps `torch._C._aoti`."""
    import torch

    return torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)


def tensors_of(handles: Any) -> list[Any]:
    """The tensors behind owning handles; the handles are consumed. Wraps `torch._C._aoti`."""
    import torch

    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` on every leaf of nested containers. Wraps `torch.utils._pytree`, which has no public name."""
    from torch.utils import _pytree

    return _pytree.tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of nested containers, in order. Wraps `torch.utils._pytree`."""
    from torch.utils import _pytree

    return list(_pytree.tree_leaves(tree))


def tf32_allowed() -> bool:
    """Whether fp32 products on CUDA may be computed in tf32. The older getters raise once the newer were used."""
    import torch

    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def static_inputs(gm: Any) -> set[str]:
    """Placeholders of an ATen graph that are Parameters or buffers of the model (their address is stable).

    Call it while AOTAutograd compiles `gm`. Wraps the input descriptors in `node.meta["desc"]` and
    `TracingContext.fw_metadata.static_input_indices`; the empty set when torch says nothing.
    """
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    indices = set(getattr(getattr(context, "fw_metadata", None), "static_input_indices", None) or ())
    found = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" and input_index(node) in indices:
            found.add(node.name)
    return found


def is_static_input(value: Any) -> bool:
    """True for a Parameter, and for a buffer that Dynamo found in a module (it marks those)."""
    import torch

    return isinstance(value, torch.nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None


def tracing_state() -> list[str]:
    """What tracing depends on besides the graph, as text: versions and the switches of torch that are on now."""
    import torch
    from torch import backends

    kinds = ("cpu", "cuda")
    cuda, mkldnn = backends.cuda, backends.mkldnn
    return [
        f"torch {torch.__version__} {torch.version.git_version} python {sys.version_info[:2]}",
        f"grad {torch.is_grad_enabled()} inference {torch.is_inference_mode_enabled()}",
        f"autocast {[(torch.is_autocast_enabled(k), str(torch.get_autocast_dtype(k))) for k in kinds]}",
        f"dtype {torch.get_default_dtype()} device {torch.get_default_device()}",
        f"deterministic {torch.are_deterministic_algorithms_enabled()}",
        f"precision {torch.get_float32_matmul_precision()} mkldnn {mkldnn.enabled} {mkldnn.is_available()}",
        f"attention {cuda.flash_sdp_enabled()} {cuda.mem_efficient_sdp_enabled()} {cuda.math_sdp_enabled()} "
        f"{cuda.cudnn_sdp_enabled()} cudnn {backends.cudnn.enabled} {backends.cudnn.allow_tf32}",
    ]


def is_plain_inference(gm: Any) -> bool:
    """Whether an inference graph's arguments and results are the Dynamo graph's own, one by one: nothing written into
    inputs, no result that shares memory with an input or has to be wrapped, no random state or token passed along.

    Call it while AOTAutograd compiles `gm`. Wraps `TracingContext.fw_metadata`, where torch says nothing: False.
    """
    from torch._functorch._aot_autograd.schemas import OutputType
    from torch._guards import TracingContext

    meta = getattr(TracingContext.try_get(), "fw_metadata", None)
    if meta is None:
        return False
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    results = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    own = (OutputType.non_alias, OutputType.unsafe_view_alias)
    aliased = any(o.output_type not in own for o in meta.output_info)
    written = any(i.mutates_data or i.mutates_metadata for i in meta.input_info)
    passed_along = meta.tokens or meta.num_intermediate_bases or meta.num_graphsafe_rng_states
    one_by_one = len(inputs) == len(meta.input_info) and len(results) == len(meta.output_info)
    return one_by_one and not (aliased or written or passed_along)


def symbol_range(size: Any) -> str:
    """The values a symbolic size may take, as Dynamo knows them now. Wraps its `ShapeEnv`."""
    return str(size.node.shape_env.var_to_range.get(size.node.expr))


def guard_count(sizes: Sequence[Any]) -> int:
    """How many guards on symbolic sizes there are so far. Wraps the `ShapeEnv` that `sizes` share."""
    return len(sizes[0].node.shape_env.guards) if sizes else 0


def guards_since(sizes: Sequence[Any], start: int) -> list[tuple[str, Any, Any]] | None:
    """The guards made after `guard_count` gave `start`, as (relation, left, right): sympy's name of the relation, sides
    as sympy expressions. None when one is of another form, or is put off until a size is known."""
    if not sizes:
        return []
    environment = sizes[0].node.shape_env
    found = [g.expr for g in environment.guards[start:]]
    if environment.deferred_runtime_asserts or not all(getattr(g, "is_Relational", False) for g in found):
        return None
    return [(type(g).__name__, g.lhs, g.rhs) for g in found]


def tree_rebuilder(tree: Any) -> Callable[[list[Any]], Any]:
    """A function that puts a list of leaves into the containers of `tree`. Wraps `torch.utils._pytree`."""
    from torch.utils import _pytree

    spec = _pytree.tree_structure(tree)
    return lambda leaves: _pytree.tree_unflatten(leaves, spec)


def compile_with_inductor(gm: Any, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor's version of a Dynamo graph. Wraps `torch._inductor.compile_fx`: within a backend there is no public way
    to hand a Dynamo graph with symbolic sizes to another backend."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, list(example_inputs))
    return compiled  # type: ignore[no-any-return]


def handle_address(tensor: Any) -> int:
    """The address of a new owning handle of `tensor`. Wraps `torch._C._aoti`; the capsule is only its carrier."""
    import ctypes

    import torch

    capsule = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor])[0]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(pointer(capsule, None))


def borrowed_tensors(addresses: Sequence[int]) -> list[Any]:
    """Tensors behind handles that stay their owner's. Wraps the C shim's `new_tensor_handle` and `torch._C._aoti`."""
    import ctypes

    import torch

    shim = ctypes.CDLL(None if hasattr(ctypes.CDLL(None), "aoti_torch_new_tensor_handle") else _libtorch_cpu())
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsules = []
    for address in addresses:
        copy = ctypes.c_void_p()
        if shim.aoti_torch_new_tensor_handle(ctypes.c_void_p(address), ctypes.byref(copy)):
            raise RuntimeError("a tensor handle could not be copied")
        capsules.append(make(copy, None, None))
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)


def _libtorch_cpu() -> str:
    """Path of the library that holds the C shim (already loaded)."""
    import glob
    import os

    import torch

    return glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.*"))[0]


def fake_mode() -> Any:
    """A context in which tensors have sizes and no data. Wraps `torch._subclasses.FakeTensorMode`: meta tensors alone
    are not enough, libraries ask whether a tensor is fake before they look at its values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def data_dependent_exceptions() -> tuple[type[BaseException], ...]:
    """What fake tensors raise where a program asks for their values. Wraps `torch._subclasses.fake_tensor`."""
    from torch._subclasses import fake_tensor

    names = ("DataDependentOutputException", "DynamicOutputShapeException", "UnsupportedFakeTensorException")
    return tuple(getattr(fake_tensor, n) for n in names if hasattr(fake_tensor, n))


def is_view(op: Any) -> bool:
    """True when an operator's results share memory with an argument. Wraps the schema of an `OpOverload`."""
    schema = getattr(op, "_schema", None)
    returns = schema.returns if schema is not None else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Traced(BaseException):
    """Ends AOTAutograd once the joint graph is there; no `except Exception` on the way may swallow it."""


def joint_graph(function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Any, int]:
    """AOTAutograd's joint graph of `function(*inputs)` and the number of its forward outputs, not compiled.

    Placeholders are the inputs (`primals`) and the gradients of the outputs (`tangents`); outputs are the function's
    and the inputs' gradients. Where nothing needs a gradient it is the forward graph alone. Through the public
    `functorch.compile.aot_function`: its partitioner is the one place that sees the joint graph.
    """
    from functorch.compile import aot_function

    found: list[tuple[Any, int]] = []

    def keep(joint: Any, _: Any, *, num_fwd_outputs: int, **__: Any) -> Any:
        found.append((joint, num_fwd_outputs))
        raise _Traced

    def inference(graph: Any, _: Any) -> Any:
        found.append((graph, len(next(n for n in graph.graph.nodes if n.op == "output").args[0])))
        raise _Traced

    with contextlib.suppress(_Traced):
        aot_function(function, fw_compiler=inference, partition_fn=keep)(*inputs)
    return found[0]


def input_index(placeholder: Any) -> int | None:
    """Which input of the traced function a placeholder of `joint_graph` is; None for a gradient of an output.

    Wraps AOTAutograd's descriptors in `node.meta["desc"]`: placeholders may be dropped or reordered.
    """
    index = getattr(placeholder.meta.get("desc"), "idx", None)
    return index if isinstance(index, int) else None


def argument(node: Any, name: str) -> Any:
    """What an ATen node passes for the operator's parameter `name`, its default included; None where there is no such
    parameter. Wraps the schema of an `OpOverload`."""
    for position, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            default = parameter.default_value if parameter.has_default_value() else None
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    return None


def is_traced(value: object) -> bool:
    """True for fake tensors and for what AOTAutograd wraps them in. Wraps `torch._subclasses.FunctionalTensor`."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(value, (FakeTensor, FunctionalTensor))
