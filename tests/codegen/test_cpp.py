"""The C++ printer: every case against torch, in one and in two threads; goldens; in-place; vectorisation."""

from __future__ import annotations

import pytest
import torch

from meshwright.codegen.cpp import CompiledCppKernel, compile_kernels

from .cases import Case, all_cases, check

CASES = {c.name: c for c in all_cases()}


@pytest.fixture(scope="module")
def compiled() -> dict[str, CompiledCppKernel]:
    """All cases in a few translation units: minutes would go by one compiler run per case."""
    kernels = compile_kernels([c.kernel.renamed(f"case_{i}") for i, c in enumerate(CASES.values())])
    return {name: kernels[f"case_{i}"] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_case_agrees_with_torch(name: str, compiled: dict[str, CompiledCppKernel]) -> None:
    def run(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        compiled[case.name]([*inputs, *outputs], case.sizes)

    check(CASES[name], run)
