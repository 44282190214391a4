"""The C++ printer of programs: one readable translation unit per graph, called once per graph call.

    static void gelu_0(...)                         // kernels, printed by codegen/cpp.py
    extern "C" int NAME(Frame* frame) {             // symbols, inputs, steps in order, outputs; 2: an index was bad
      const Arena arena(1572864);
      ...
    }

Kernels and products work on addresses; operators get handles (program_cpp_tensors.py). A step that has no C++ form
raises `Unsupported`, and the caller runs the program from Python instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.cache import key_of
from ..runtime.program import (
    Alloc,
    Attention,
    Call,
    Conv,
    Epilogue,
    Gemm,
    Gemms,
    Json,
    Launch,
    Program,
    Release,
    Step,
    SymbolInput,
    TensorSpec,
    View,
)
from .cpp import prelude, print_kernel_cpp, print_rows, rows_name, work_items, work_per_item
from .expr import Expr
from .ir import Kernel, expects
from .ir_text import parse_kernel
from .program_cpp_attention import MeasuredAttention, print_attention, print_choices
from .program_cpp_calls import print_call
from .program_cpp_conv import PackedConv, print_conv
from .program_cpp_epilogue import print_blocks, print_epilogue
from .program_cpp_gemm import Product, print_gemm, print_gemms
from .program_cpp_tensors import Tensors, c_expr, c_name, ints
from .program_memory import plan_arena, size_expr
from .schema import Unsupported
from .templates.host_runtime import DECLARATIONS


def print_program_cpp(program: Program) -> str:
    """The program as one C++17 translation unit. Raises `Unsupported(reason, step)`."""
    return Printer(program).text()


class Printer:
    """Prints one program; `products` then lists what its products are, in the order of `frame->products`."""

    def __init__(self, program: Program, linked: Sequence[str] = ()) -> None:
        if program.device != "cpu":
            raise Unsupported(f"a program for {program.device}")
        self.program = program
        self.linked = linked
        self.kernels: dict[str, Kernel] = {name: parse_kernel(text) for name, text in program.kernels.items()}
        self.work: dict[str, tuple[Expr, Expr]] = {}  # of a kernel: its items, and the operations of all of them
        self.arena = plan_arena(program)
        self.lines: list[str] = []
        self.tensors = Tensors(program, self.arena, self.lines)
        self.products: list[Product] = []
        self.blocks: dict[str, Kernel] = {}  # kernels that may work on the blocks of a product
        self.packed_convs: list[PackedConv] = []  # two inputs each, behind the program's own
        self.attentions: list[MeasuredAttention] = []  # in the order of the rows of `attention_choice`
        self.from_python: list[Call] = []  # operators that run in Python, in the order of their numbers

    def text(self) -> str:
        body = self._body()
        kernels = {name: k.renamed(name) for name, k in self.kernels.items()}
        printed = [print_kernel_cpp(k) + print_rows(k) for name, k in kernels.items() if name not in self.linked]
        if self.linked:
            printed.append(print_linked([kernels[name] for name in self.linked]))
        printed.append(print_blocks(self.blocks.values()))
        head = f"// {self.program.name}: printed by Meshwright from its program; steps stand in program order.\n"
        return "\n".join([head, prelude(), DECLARATIONS, print_choices(self.attentions), *printed, body])

    def _body(self) -> str:
        put = self.lines.append
        self._inputs()
        self._symbols()
        if self.arena.offsets:
            put(f"const Arena arena({c_expr(self.arena.total)});")
        failing = any(map(expects, self.kernels.values()))
        if failing:
            put("int bad_index = 0;  // set by kernels that gather")
        for step in self.program.steps:
            self._step(step)
        if failing:
            put("if (bad_index) return 2;")
        self._outputs()
        indented = "\n".join("    " + line for line in self.lines)
        name = entry_name(self.program)
        return (f'extern "C" __attribute__((visibility("default"))) MW_COLD int {name}(Frame* frame) {{\n'
                "  void** const in = frame->inputs;\n"
                "  const int threads = frame->threads;\n"
                "  const NoGrad no_grad;\n"
                f"  try {{\n{indented}\n    return 0;\n"
                "  } catch (const std::exception& error) {\n"
                '    std::snprintf(frame->error, sizeof frame->error, "%s", error.what());\n'
                "    return 1;\n  }\n}\n")

    # -- entry and exit -----------------------------------------------------------------------------
    def _inputs(self) -> None:
        position = 0
        for item in self.program.inputs:
            if isinstance(item, TensorSpec):
                self.tensors.add_input(item, position)
                position += 1

    def _symbols(self) -> None:
        integers = [i for i, item in enumerate(self.program.inputs) if isinstance(item, SymbolInput)]
        for symbol in self.program.symbols:
            if symbol.argument is not None:
                source = f"frame->integers[{integers.index(symbol.argument)}]"
            else:
                source = f"size_of(h_{self.tensors.name(str(symbol.tensor))}, {symbol.dim})"
            self.lines.append(f"const int64_t s_{c_name(symbol.name)} = {source};")

    def _outputs(self) -> None:
        tensors = [o for o in self.program.outputs if _tensor_name(o)]
        integers = [o for o in self.program.outputs if isinstance(o, dict) and "size" in o]
        taken = [self.tensors.take(str(_tensor_name(o))) for o in tensors]
        self.lines += [f"frame->outputs[{k}] = {text};" for k, text in enumerate(taken)]
        self.lines += [f"frame->output_integers[{k}] = {c_expr(o['size'])};" for k, o in enumerate(integers)]

    # -- steps --------------------------------------------------------------------------------------
    def _step(self, step: Step) -> None:
        match step:
            case Alloc(spec=spec):
                self.tensors.add_alloc(spec)
            case View(spec=spec, base=base, offset=offset):
                self.tensors.add_view(spec, base, offset)
            case Launch():
                self.lines.append(self._launch(step))
            case Call():
                print_call(step, self.tensors, self.from_python)
            case Gemm():
                print_gemm(step, self.tensors, self.program, self.products)
            case Gemms():
                print_gemms(step, self.tensors, self.program, self.products)
            case Epilogue(launch=launch):
                print_epilogue(step, self.tensors, self.program, self.products, self.blocks,
                               self.kernels[launch.kernel], self._launch(launch))
            case Attention():
                print_attention(step, self.tensors, self.attentions)
            case Conv():
                print_conv(step, self.tensors, self.program, self.packed_convs)
            case Release(names=names):
                for name in names:
                    self.tensors.release(name)
            case _:
                raise Unsupported("a kind of step without a C++ form", step)

    def _launch(self, step: Launch) -> str:
        kernel = self.kernels[step.kernel]
        values: dict[str, Expr | int] = dict(zip(kernel.sizes, map(size_expr, step.sizes), strict=True))
        if step.kernel not in self.work:
            self.work[step.kernel] = work_items(kernel), work_items(kernel) * work_per_item(kernel)
        rows, work = (amount.subs(values) for amount in self.work[step.kernel])
        found = [self.tensors.address(n) for n in (*step.inputs, *step.outputs)]
        addresses = ", ".join([*found, "{&bad_index}"] if expects(kernel) else found)
        return (f"launch({rows_name(step.kernel)}, threads, {c_expr(rows)}, {c_expr(work)}, {{{addresses}}}, "
                f"{ints(step.sizes)});")


def print_linked(kernels: Sequence[Kernel]) -> str:
    """Kernels that are compiled elsewhere: the functions `mw_bind` is given, in order.

    Libraries are shared by their text, so the digest keeps programs apart that launch other kernels of the same names.
    """
    names = [rows_name(k.name) for k in kernels]
    bound = "\n".join(f"  if (!{name}) {name} = (Rows)rows[{i}];" for i, name in enumerate(names))
    return (f"// kernels compiled on their own, digest {key_of(*map(str, kernels))}\n"
            f"static Rows {', '.join(names)};\n"
            f'extern "C" __attribute__((visibility("default"))) void mw_bind(void* const* rows) {{\n{bound}\n}}\n')


def entry_name(program: Program) -> str:
    """The `extern "C"` name of a program's function."""
    return "mw_program_" + c_name(program.name)


def _tensor_name(output: Json) -> str | None:
    if isinstance(output, dict):
        return output.get("tensor")
    return output if isinstance(output, str) else None
