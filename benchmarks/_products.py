"""Every product with an epilogue that the GEMM template could take over in a model: compiled ahead of time with all of
its tiles, and interpreted against the library's product and the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from benchmarks._collect import Collector, Judge
from meshwright.codegen.aot import compile_gemms_ahead
from meshwright.codegen.group import Group
from meshwright.codegen.ir_text import parse_kernel
from meshwright.codegen.program_choices import Bench, Options
from meshwright.codegen.program_rewrites import Refusal, Rewrite, find_rewrites
from meshwright.codegen.templates.triton_gemm import tiles_for
from meshwright.codegen.triton_build import triton_kernels
from meshwright.compiler.acceptance import kernel_names
from meshwright.compiler.graph_cleanup import clean_up
from meshwright.compiler.program_builder import ProgramBuilder
from meshwright.runtime import torch_compat
from meshwright.runtime.program import Program


@dataclass
class FoundProduct:
    """A candidate of one of the model's programs, how often it stands there and in which kinds of graph; what the
    interpreter said of it ("" where it did not run, "agrees", or the difference)."""

    rewrite: Rewrite
    program: Program
    count: int = 0
    graphs: set[str] = field(default_factory=set)
    interpreted: str = ""


class _NoClock:
    """Comparing takes no times."""

    def identity(self, device: torch.device) -> tuple[str, ...]:
        return ()

    def ready(self, device: torch.device) -> bool:
        return True

    def free_bytes(self, device: torch.device) -> int:
        return 0

    def seconds(self, runs: Sequence[Any], device: torch.device) -> list[float]:
        raise AssertionError("nothing is timed here")


class ProductCollector(Collector):
    """Collects the candidates of whatever is compiled with its `backend`, by what they do; nothing else is done."""

    def __init__(self, judge: Judge | None = None) -> None:
        super().__init__(judge)
        self.products: dict[str, FoundProduct] = {}
        self.stacks: list[str] = []
        self.refused: list[Refusal] = []

    def _groups(self, gm: fx.GraphModule, kind: str) -> list[Group]:
        groups = super()._groups(gm, kind)
        static = {name: name for name in torch_compat.static_inputs(gm)}
        program = ProgramBuilder(gm, groups, kernel_names(groups), "graph", kind == "inference", static).build()
        rewrites, refused = find_rewrites(program)
        self.refused += refused
        for r in rewrites:
            if r.gemm is None:
                self.stacks.append(r.what)
                continue
            found = self.products.setdefault(r.key, FoundProduct(r, program))
            found.count += 1
            found.graphs.add(kind)
        return groups

    def _compiler(self, kind: str) -> Any:
        compile_one = super()._compiler(kind)
        return lambda gm, fake_inputs: compile_one(clean_up(gm), fake_inputs)  # as in a compilation


def interpret(found: FoundProduct) -> str:
    """The interpreted template against the library's product and the interpreted kernel, on random values."""
    kernels = dict(triton_kernels({n: parse_kernel(t) for n, t in found.program.kernels.items()}))
    bench = Bench(found.program, kernels, {}, torch.device("cpu"), Options(_NoClock()))
    failures: list[str] = []
    bench.runs(found.rewrite, bench.methods(found.rewrite)[:1], failures)  # interpreted, all tiles are the same
    return "; ".join(failures) or "agrees"


def product_rows(model: str, dtype: str, products: Sequence[FoundProduct],
                 targets: Sequence[str]) -> list[dict[str, Any]]:
    """One row per product and tile, with its costs on every target."""
    cases = []
    for found in products:
        gemm = found.rewrite.gemm
        assert gemm is not None
        cases += [(found, gemm, tile) for tile in tiles_for(gemm, {})]
    compiled = {t: compile_gemms_ahead([(gemm, tile) for _, gemm, tile in cases], t) for t in targets}
    rows = []
    for i, (found, gemm, tile) in enumerate(cases):
        costs: Mapping[str, Any] = {
            t: {"registers": r[i].registers, "shared_bytes": r[i].shared_bytes, "spills": r[i].spills,
                "fits": r[i].fits, "num_warps": r[i].num_warps} for t, r in compiled.items()}
        rows.append({"model": model, "dtype": dtype, "kernel": gemm.name, "sizes": f"{gemm.M} x {gemm.N} x {gemm.K}",
                     "tile": str(tile), "graphs": sorted(found.graphs), "launches": found.count,
                     "interpreted": found.interpreted, "targets": costs})
    return rows
