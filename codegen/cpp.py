"""The C++ printer of the kernel IR: one plain function per kernel, compiled many to a translation unit.

    static void gelu(const float* x, float* y, int64_t s0, int64_t begin, int64_t end)   // work items [begin, end)
    extern "C" int gelu_run(void** buffers, const int64_t* sizes)          // splits over threads; 1: an index was bad

What a work item is, `work_items` and `work_per_item` say (see cpp_plan.py); loops, statements and accumulators are
in cpp_loops.py and cpp_reduce.py, element functions in cpp_math.h. Outputs may share memory with an input that is
loaded only with the output's own index map. A reduction without parallel axes is one item; a long one is cut into
chunks inside the function (cpp_split.py). Its order of additions, and so its bits, never depend on the number of
threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import IndexOutOfRangeError
from ..runtime.toolchain import Source, compile_jobs, compile_many, load_shared
from .cpp_expr import MEMORY_TYPE, c_index, c_name
from .cpp_loops import Body
from .cpp_plan import LoopPlan, plan_loops
from .expr import Expr
from .ir import Kernel, expects, verify

if TYPE_CHECKING:
    import torch

PRINTER_VERSION = 1
# Integers wrap around as in torch; an output may reuse the memory of an input of another type.
COMPILE_FLAGS = ("-fwrapv", "-fno-strict-aliasing")
KERNELS_PER_UNIT = 64


def work_items(kernel: Kernel) -> Expr:
    """Number of independent work items of the printed function."""
    return plan_loops(kernel).items


def work_per_item(kernel: Kernel) -> Expr:
    """Roughly the element operations one work item runs, for grain decisions."""
    return plan_loops(kernel).work_per_item


def print_kernel_cpp(kernel: Kernel) -> str:
    """The C++ function of one kernel: `static void NAME(inputs, outputs, sizes, begin, end)`.

    Raises `IRError` when `kernel` breaks a rule of the IR.
    """
    verify(kernel)
    return _print_function(kernel, plan_loops(kernel))


def print_translation_unit(kernels: Iterable[Kernel], *, entries: bool = True) -> str:
    """Prelude, functions and (with `entries`) one `extern "C" NAME_run` per kernel, in order."""
    parts = [prelude()]
    for kernel in kernels:
        parts.append(print_kernel_cpp(kernel))
        if entries:
            parts += [print_entry(kernel), print_rows(kernel, 'extern "C" __attribute__((visibility("default")))')]
    return "\n".join(parts)


@lru_cache(maxsize=1)
def prelude() -> str:
    """What every translation unit starts with."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text() for name in ("cpp_math.h", "cpp_runtime.h"))


def print_entry(kernel: Kernel) -> str:
    """`NAME_run(buffers, sizes)`: unpack the arguments and split the items over torch's OpenMP threads."""
    plan = plan_loops(kernel)
    buffers = [*kernel.inputs, *kernel.outputs]
    name = c_name(kernel.name)
    lines = ['extern "C" __attribute__((visibility("default")))',
             f"int {name}_run(void** buffers, const int64_t* sizes) {{", "  int bad_index = 0;"]
    lines += [f"  {'const ' if i < len(kernel.inputs) else ''}{MEMORY_TYPE[b.dtype]}* {c_name(b.name)} = "
              f"static_cast<{MEMORY_TYPE[b.dtype]}*>(buffers[{i}]);" for i, b in enumerate(buffers)]
    lines += [f"  const int64_t {c_name(s)} = sizes[{i}];" for i, s in enumerate(kernel.sizes)]
    failure = ["&bad_index"] if expects(kernel) else []
    arguments = ", ".join([*(c_name(b.name) for b in buffers), *map(c_name, kernel.sizes), *failure])
    return "\n".join([*lines, *_split(plan, name, arguments), "  return bad_index;", "}", ""])


def rows_name(kernel: str) -> str:
    """What `print_rows` calls its function for the kernel of this name."""
    return c_name(kernel) + "_rows"


def print_rows(kernel: Kernel, linkage: str = "static") -> str:
    """`NAME_rows(tensors, sizes, begin, end)`: the kernel behind one signature, so that programs launch all alike."""
    buffers = [*kernel.inputs, *kernel.outputs]
    arguments = [f"({MEMORY_TYPE[b.dtype]}*)tensors[{i}]" for i, b in enumerate(buffers)]
    arguments += [f"sizes[{i}]" for i in range(len(kernel.sizes))]
    arguments += [f"(int*)tensors[{len(buffers)}]"] if expects(kernel) else []
    parameters = "void* const* tensors, const int64_t* sizes, int64_t begin, int64_t end"
    return (f"{linkage} void {rows_name(kernel.name)}({parameters}) {{\n"
            f"  {c_name(kernel.name)}({', '.join([*arguments, 'begin', 'end'])});\n}}\n")


def _split(plan: LoopPlan, name: str, arguments: str) -> list[str]:
    step = "63) / 64 * 64" if plan.flat else "0)"  # whole cache lines per thread where an item is one element
    share = f"(items / team + (items % team != 0) + {step}"
    return [
        f"  const int64_t items = {c_index(plan.items)};",
        f"  const int threads = mw_threads(items, items * int64_t({c_index(plan.work_per_item)}));",
        f"  if (threads <= 1) {{ {name}({arguments}, 0, items); return bad_index; }}",
        "  #pragma omp parallel num_threads(threads)",
        "  {",
        "    const int64_t team = mw_team(), share = " + share + ";",
        "    const int64_t begin = mw_min(items, mw_thread() * share);",
        f"    {name}({arguments}, begin, mw_min(items, begin + share));",
        "  }",
    ]


def _print_function(kernel: Kernel, plan: LoopPlan) -> str:
    inputs = [f"const {MEMORY_TYPE[b.dtype]}* {c_name(b.name)}" for b in kernel.inputs]
    outputs = [f"{MEMORY_TYPE[b.dtype]}* {c_name(b.name)}" for b in kernel.outputs]
    sizes = [f"int64_t {c_name(s)}" for s in kernel.sizes]
    failure = ["int* bad_index"] if expects(kernel) else []
    parameters = ", ".join([*inputs, *outputs, *sizes, *failure, "int64_t begin", "int64_t end"])
    return "\n".join([f"MW_KERNEL void {c_name(kernel.name)}({parameters}) {{", *Body(plan).emit(), "}", ""])


@dataclass(frozen=True)
class CompiledCppKernel:
    """A kernel ready to run: `k(buffers, sizes)` with contiguous CPU tensors, inputs first, in the kernel's order.

    `rows` is the address of its `NAME_rows`, for programs to launch.
    """

    name: str
    entry: Callable[[Any, Any], int]
    rows: int
    buffers: int
    sizes: int

    def __call__(self, buffers: Sequence[torch.Tensor], sizes: Sequence[int] = ()) -> None:
        """Raises `IndexOutOfRangeError` when a gather met an index outside of its dimension (every other element is
        written), `ValueError` when the number of buffers or sizes is not the kernel's."""
        if len(buffers) != self.buffers or len(sizes) != self.sizes:
            raise ValueError(f"{self.name}: expected {self.buffers} buffers and {self.sizes} sizes, "
                             f"got {len(buffers)} and {len(sizes)}")
        if any(b.device.type != "cpu" for b in buffers):  # its address would be 0
            raise ValueError(f"{self.name}: expected buffers on the CPU, got one on "
                             f"{next(b.device for b in buffers if b.device.type != 'cpu')}")
        if self.entry((ctypes.c_void_p * self.buffers)(*[b.data_ptr() for b in buffers]),
                      (ctypes.c_int64 * self.sizes)(*sizes)):
            raise IndexOutOfRangeError(self.name)


def compile_kernels(kernels: Iterable[Kernel]) -> dict[str, CompiledCppKernel]:
    """Compile kernels of distinct names, through the cache, several compilers at once; by name.

    Raises `ToolchainError` without a compiler, `CompileFailure` when it rejects the code, `IRError` for bad IR.
    """
    todo = list(kernels)
    out: dict[str, CompiledCppKernel] = {}
    units = _units(todo)
    paths = compile_many([Source(print_translation_unit(u), extra_flags=COMPILE_FLAGS) for u in units])
    for unit, path in zip(units, paths, strict=True):
        library = load_shared(path)
        for kernel in unit:
            entry = getattr(library, c_name(kernel.name) + "_run")
            entry.restype = ctypes.c_int
            rows = ctypes.cast(getattr(library, rows_name(kernel.name)), ctypes.c_void_p).value
            buffers = len(kernel.inputs) + len(kernel.outputs)
            out[kernel.name] = CompiledCppKernel(kernel.name, entry, rows or 0, buffers, len(kernel.sizes))
    return out


def _units(kernels: list[Kernel]) -> list[list[Kernel]]:
    """Split into translation units: enough to keep every compiler process busy, none above `KERNELS_PER_UNIT`."""
    if not kernels:
        return []
    jobs = min(compile_jobs(), max(1, len(kernels) // 4))
    count = max(jobs, -(-len(kernels) // KERNELS_PER_UNIT))
    return [kernels[i::count] for i in range(count)]
