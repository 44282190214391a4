"""From a program to a callable: rewrite, print, compile, load, and cross from Python once per call."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Union

import torch

from ..runtime import torch_compat
from ..runtime.errors import IndexOutOfRangeError
from ..runtime.locks import ForkSafeLock
from ..runtime.program import Call, Program, SymbolInput
from ..runtime.toolchain import compile_shared, open_library
from .cpp import CompiledCppKernel
from .program_attention import lower_attention
from .program_conv import fuse_convolutions
from .program_cpp import Printer, entry_name
from .program_cpp_attention import AttentionChoices, MeasuredAttention
from .program_cpp_conv import PackedConv, can_convolve
from .program_cpp_conv_methods import ConvMethods
from .program_cpp_conv_sizes import ConvSizes
from .program_cpp_gemm import Product
from .program_cpp_packing import BehindProduct, ProductMethods
from .program_cpp_python import PythonOperators
from .program_epilogue import fuse_epilogues
from .program_gemm import lower_products, share_inputs
from .templates import host_runtime
from .timings import Seconds, Timings

Value = Union[torch.Tensor, int, None]

# Products may contract a*b+c; kernels keep torch's two roundings (see runtime/toolchain.py).
RUNTIME_FLAGS = ("-ffp-contract=fast", "-fwrapv", "-fno-strict-aliasing")
PROGRAM_FLAGS = ("-fwrapv", "-fno-strict-aliasing")


@lru_cache(maxsize=1)
def start_host_library() -> None:
    """Begin to compile the host runtime in the background: it is the same for every program and takes the longest.
    Where that fails, `host_library` will say so."""
    threading.Thread(target=_compile_host, name="meshwright-host").start()


def _compile_host() -> None:
    with contextlib.suppress(Exception):
        compile_shared(host_runtime.SOURCE, extra_flags=RUNTIME_FLAGS, libtorch=True)


class HostLibrary(ctypes.PyDLL):
    """The host runtime. Packing takes long, and lets other Python threads run; everything else holds Python's lock."""

    mw_pack_b: Any


@lru_cache(maxsize=1)
def host_library() -> HostLibrary:
    """The host runtime, compiled on this machine's first use and loaded where programs find its symbols."""
    path = compile_shared(host_runtime.SOURCE, extra_flags=RUNTIME_FLAGS, libtorch=True)
    library = open_library(path, HostLibrary, ctypes.RTLD_GLOBAL)
    library.mw_call.restype = ctypes.py_object
    library.mw_call.argtypes = [ctypes.py_object, *[ctypes.c_void_p] * 6, ctypes.c_int, ctypes.c_int]
    address, size, method = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
    library.mw_packed_bytes.restype = ctypes.c_int64
    library.mw_packed_bytes.argtypes = [method, size, size]
    library.mw_evict.argtypes, library.mw_evict.restype = [address, size], None
    library.mw_pack_b = open_library(path, ctypes.CDLL).mw_pack_b
    library.mw_pack_b.argtypes = [method, address, *[size] * 4, address, ctypes.c_int]
    library.mw_conv.argtypes = [ctypes.c_int, *[address] * 6]
    library.mw_gemm.restype = None
    library.mw_gemm.argtypes = [ctypes.c_int, *[size] * 4, address, *[size] * 3, address, *[size] * 3, address, size,
                                size, address, size, size, address]
    library.mw_gemm_then.argtypes = [ctypes.c_int, size, size, address, size, size, address, address]
    library.mw_launch.restype = None
    library.mw_launch.argtypes = [address, ctypes.c_int, size, size, address, address]
    library.mw_attention.restype = None
    library.mw_attention.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 8, ctypes.c_double, ctypes.c_int]
    library.mw_arena_release.restype = ctypes.c_int64
    return library


def release_arenas() -> int:
    """Free the working memory that programs keep between calls; the bytes freed."""
    return int(host_library().mw_arena_release())


class CompiledProgram:
    """A program as one C++ function: `p(inputs) -> outputs`, in the program's order. Threads may call it at once."""

    def __init__(self, program: Program, source: str, products: Sequence[Product], convs: Sequence[PackedConv],
                 from_python: Sequence[Call], attentions: Sequence[MeasuredAttention], library: ctypes.CDLL,
                 timings: Timings) -> None:
        self.program = program
        self.source = source
        self._entry = ctypes.cast(getattr(library, entry_name(program)), ctypes.c_void_p)
        self._library = library
        self._call = host_library().mw_call
        self._integers = [i for i, item in enumerate(program.inputs) if isinstance(item, SymbolInput)]
        self.timings = timings
        host = host_library()
        self._products = ProductMethods(products, host, timings, library) if products else None
        self._attentions = AttentionChoices(attentions, library, host, timings) if attentions else None
        self._conv_methods = ConvMethods(convs, host, timings) if convs else None
        self._conv_sizes = ConvSizes(program, convs) if convs else None
        self._outputs = [_kind(o) for o in program.outputs]
        self._python = PythonOperators(from_python)
        self._n_tensors = self._outputs.count("tensor")
        self._only_tensors = self._n_tensors == len(self._outputs)

    def __call__(self, inputs: Sequence[Value]) -> list[Value]:
        """Raises `IndexOutOfRangeError` when a gather met an index outside of its dimension, `RuntimeError` with the
        operator's own message when a step fails."""
        tensors, integers = self._split(inputs)
        numbers = (ctypes.c_int64 * max(1, len(self._outputs)))()
        threads = torch.get_num_threads()
        if self._attentions is not None:
            self._attentions.settle(threads)
        methods = self._products.addresses(tensors, threads) if self._products is not None else None
        convolutions, given = None, tensors
        if self._conv_sizes is not None and self._conv_methods is not None:
            chosen = self._conv_sizes.settle(tensors, integers, threads)
            convolutions = self._conv_methods.addresses(tensors, threads, chosen)
            given = [*tensors, *chosen.inputs(tensors)]
        handles = torch_compat.handles_of(given)
        try:
            found = self._call(handles, self._entry, integers, numbers, methods, convolutions,
                               self._python.entry, self._n_tensors, threads)
        except IndexError:
            raise IndexOutOfRangeError(f"the graph {self.program.name!r}") from None
        except RuntimeError as error:
            raise self._python.error() or error from None
        results = torch_compat.tensors_of(found)
        return results if self._only_tensors else self._merge(results, numbers)

    def prepare(self, inputs: Sequence[Any], threads: int) -> None:
        """Pack now, on this thread alone, the weights that a call with `threads` threads would pack for its products.
        Does nothing where that call has to measure first."""
        if self._products is not None:
            skip = set(self._integers)  # they may be symbols still, whose values nobody should ask for
            self._products.prepare([x for i, x in enumerate(inputs) if i not in skip], threads)

    @property
    def behind_products(self) -> list[BehindProduct]:
        """How products with an element-wise kernel behind them are done, for the numbers of threads met so far."""
        return self._products.behind if self._products is not None else []

    def _split(self, inputs: Sequence[Value]) -> tuple[list[Any], Any]:
        if not self._integers:
            return inputs if isinstance(inputs, list) else list(inputs), None
        numbers = [int(inputs[i] or 0) for i in self._integers]  # None: an unused input
        skip = set(self._integers)
        return [x for i, x in enumerate(inputs) if i not in skip], (ctypes.c_int64 * len(numbers))(*numbers)

    def _merge(self, tensors: list[Any], numbers: Any) -> list[Value]:
        rest, integers = iter(tensors), iter(numbers)
        pick: dict[str, Callable[[], Value]] = {
            "tensor": lambda: next(rest), "int": lambda: int(next(integers)), "none": lambda: None,
        }
        return [pick[kind]() for kind in self._outputs]


def compile_program(program: Program, kernels: Callable[[], Mapping[str, CompiledCppKernel]] | None = None,
                    timings: Mapping[str, Seconds] | None = None) -> CompiledProgram:
    """Print, compile, load. Raises `Unsupported` (run it in Python), `ToolchainError`, `CompileFailure`.

    `kernels` gives the program's kernels, which are compiled on their own, perhaps at the same time: it is asked last.
    By default they are part of the program's translation unit. `timings`: what decided between methods where the
    program was saved.
    """
    lowered = lower_products(fuse_convolutions(program) if can_convolve() else program)
    lowered = lower_attention(fuse_epilogues(share_inputs(lowered)))
    linked = [n for n, t in lowered.kernels.items() if t == program.kernels.get(n)] if kernels is not None else []
    printer = Printer(lowered, linked)
    source = printer.text()
    start_host_library()
    path = compile_shared(source, extra_flags=PROGRAM_FLAGS, libtorch=True)
    with _compile_guard:
        host_library()  # before the program, which looks for its symbols
    library = open_library(path, ctypes.CDLL)
    if kernels is not None and linked:
        compiled = kernels()
        library.mw_bind((ctypes.c_void_p * len(linked))(*[compiled[n].rows for n in linked]))
    return CompiledProgram(lowered, source, printer.products, printer.packed_convs, printer.from_python,
                           printer.attentions, library, Timings(timings))


_compile_guard = ForkSafeLock()


def _kind(output: Any) -> str:
    if output is None:
        return "none"
    return "int" if isinstance(output, dict) and "size" in output else "tensor"
