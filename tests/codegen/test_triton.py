"""The Triton printer: the shared cases in the interpreter, golden texts, and ahead-of-time compilation."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch

from meshwright.codegen.aot import TARGETS, compile_ahead
from meshwright.codegen.ir import IRError, Kernel
from meshwright.codegen.ir_text import parse_kernel
from meshwright.codegen.triton import index_bound, print_kernel_triton, print_module
from meshwright.codegen.triton_axes import merge_axes
from meshwright.codegen.triton_build import configure, triton_kernel
from meshwright.codegen.triton_config import launch_config
from meshwright.codegen.triton_ops import HELPERS
from meshwright.codegen.triton_schedule import form_of
from meshwright.runtime.errors import CompileFailure, InvalidInputError, UnknownNameError
from meshwright.runtime.triton_launch import Launch, TritonKernel

from .cases import Case, all_cases, check

CASES = {c.name: c for c in all_cases()}
GOLDENS = ("softmax", "rms_norm", "layer_norm", "gelu", "argmax", "embedding")


def run(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    triton_kernel(case.kernel)([*inputs, *outputs], case.sizes)


def small_blocks(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    """With the block sizes of a GPU launch (few elements per program), so that every mask matters."""
    from_table = configure(case.kernel)

    def at(sizes: tuple[int, ...], interpret: bool) -> Launch:
        return from_table(sizes, False)

    TritonKernel(case.kernel.name, print_module([case.kernel]), at)([*inputs, *outputs], case.sizes)


def wide_indices(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    from_table = configure(case.kernel)

    def at(sizes: tuple[int, ...], interpret: bool) -> Launch:
        return dataclasses.replace(from_table(sizes, interpret), wide_index=True)

    TritonKernel(case.kernel.name, print_module([case.kernel]), at)([*inputs, *outputs], case.sizes)


def tolerance(name: str) -> int:
    """In f64 the truth is eager itself, and a product in another order differs by more than 4 ulp."""
    return 16 if name.startswith("prod_f64") else 4


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_agrees_with_torch(name: str) -> None:
    check(CASES[name], run, tolerance(name))


@pytest.mark.parametrize("name", list(CASES)[::7])
def test_launch_block_sizes_agree_with_torch(name: str) -> None:
    case = CASES[name]
    if launch_config(case.kernel, case.sizes).grid > 64:
        case = None
    if case is not None:
        check(case, small_blocks, tolerance(name))


@pytest.mark.parametrize("name", list(CASES)[3::7])
def test_wide_indices_agree_with_torch(name: str) -> None:
    check(CASES[name], wide_indices, tolerance(name))
