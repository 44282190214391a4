"""`meshwright.load(directory)`: verify, print the kernels anew, compile, run. The model's class is not needed."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.artifact_files import Leaf, Manifest, read_artifact
from ..runtime.errors import ArtifactError, InvalidInputError, MeshwrightWarning
from ..runtime.isa import current_isa
from ..runtime.program import Program
from ..runtime.structure import flatten, same_structure, unflatten
from .artifact_verify import verify_program


def load_artifact(directory: str | Path) -> nn.Module:
    """The saved model as a module for inference. Raises `ArtifactError`, see `meshwright.load`."""
    manifest, program, weights = read_artifact(Path(directory))
    _check_machine(manifest)
    verify_program(program)
    _check_manifest(manifest, program, weights)
    return LoadedModel(manifest, program, weights)


def _check_machine(manifest: Manifest) -> None:
    """Refuse another architecture, or a missing GPU: the ATen calls of the program were chosen for it. Kernels are IR,
    so another instruction set of one architecture only gets a warning."""
    here = platform.machine().lower()
    if _architecture(manifest.machine) != _architecture(here) and manifest.device == "cpu":
        raise ArtifactError(f"the model was saved for {manifest.machine}, this machine is {here}",
                            do="Compile and save it on a machine of this architecture.")
    if manifest.device == "cuda" and not torch.cuda.is_available():
        raise ArtifactError("the model was saved for CUDA, which this machine lacks",
                            do="Compile and save it for the CPU.")
    if manifest.device == "cpu" and manifest.isa != current_isa().name:
        warnings.warn(MeshwrightWarning(
            f"the model was saved on {manifest.isa}, kernels are now printed for {current_isa().name}: results may "
            "differ in the last bits"), stacklevel=4)


def _architecture(machine: str) -> str:
    """One name for what systems call differently."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())


def _check_manifest(manifest: Manifest, program: Program, weights: dict[str, torch.Tensor]) -> None:
    if len(manifest.inputs) != len(program.inputs):
        raise ArtifactError(f"{len(manifest.inputs)} sources for {len(program.inputs)} program inputs")
    for source in (*manifest.inputs, *manifest.outputs):
        if source.kind == "weight" and source.name not in weights:
            raise ArtifactError(f"weight {source.name!r} is missing")
        limit = {"input": len(manifest.leaves), "size": len(manifest.leaves), "output": len(program.outputs)}
        if source.index < 0 or source.index >= limit.get(source.kind, 1):
            raise ArtifactError(f"{source.kind} {source.index} does not exist")


def build_runner(program: Program, timings: Mapping[str, Mapping[str, float]] | None = None) -> Any:
    """Print and compile a program and its kernels; a callable from the list of inputs to the list of outputs.
    `timings`: what decided between methods where it was saved."""
    from ..codegen.ir_text import parse_kernel
    from .build_program import build_kernels, build_program

    kernels = [parse_kernel(text) for text in program.kernels.values()]
    return build_program(program, lambda: build_kernels(program.device, kernels), timings, own_unit=True).run


class LoadedModel(nn.Module):
    """A saved model: takes the arguments its example had, in any sizes that were left open, and gives its outputs.

    It is for inference: gradients do not flow through it. Weights are buffers, under their names with `.` as `__`.
    """

    def __init__(self, manifest: Manifest, program: Program, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.manifest, self.program = manifest, program
        for name, value in weights.items():
            self.register_buffer(name, value.cuda() if program.device == "cuda" else value)
        self._run = build_runner(program, manifest.timings)

    @property
    def kernels(self) -> dict[str, str]:
        """Kernel IR by kernel name."""
        return self.program.kernels

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = self._leaves(args, kwargs)
        inputs = [self._value(s, leaves, None) for s in self.manifest.inputs]
        with torch.no_grad():
            outputs = list(self._run(inputs))
        values = [self._value(s, leaves, outputs) for s in self.manifest.outputs]
        return unflatten(values, self.manifest.output_structure)

    def _leaves(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        names = self.manifest.parameters
        if len(args) > len(names):
            raise InvalidInputError(f"{len(args)} positional arguments", expected=f"at most {len(names)}")
        given = dict(zip(names, args, strict=False))
        twice = given.keys() & kwargs.keys()
        given |= kwargs
        extra = [k for k, v in given.items() if k not in self.manifest.arguments and v is not None]
        missing = [k for k in self.manifest.arguments if k not in given]
        if twice or extra or missing:
            wanted = ", ".join(self.manifest.arguments)
            raise InvalidInputError(f"arguments ({', '.join(given)})",
                                    expected=f"({wanted}), as in the example the model was saved with")
        leaves, structure = flatten({k: given[k] for k in self.manifest.arguments})
        if not same_structure(structure, self.manifest.argument_structure):
            raise InvalidInputError("arguments nested differently from the example the model was saved with")
        sizes: dict[str, int] = {}
        for i, (leaf, known) in enumerate(zip(leaves, self.manifest.leaves, strict=True)):
            self._check_leaf(i, leaf, known, sizes)
        return leaves

    def _check_leaf(self, i: int, leaf: Any, wanted: Leaf, sizes: dict[str, int]) -> None:
        if not wanted.tensor:
            if type(leaf) is not type(wanted.value) or leaf != wanted.value:
                raise InvalidInputError(f"argument leaf {i} is {leaf!r}", expected=f"{wanted.value!r}, as when saved")
            return
        if not isinstance(leaf, torch.Tensor) or str(leaf.dtype) != f"torch.{wanted.dtype}":
            got = leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise InvalidInputError(f"argument leaf {i} is {got}", expected=f"a tensor of {wanted.dtype}")
        if leaf.device.type != self.manifest.device or leaf.dim() != len(wanted.shape):
            raise InvalidInputError(f"argument leaf {i} has shape {tuple(leaf.shape)} on {leaf.device}",
                                    expected=f"shape {wanted.shape} on {self.manifest.device}")
        for n, size in zip(leaf.shape, wanted.shape, strict=True):
            self._check_size(i, leaf, int(n), size, sizes, wanted)

    def _check_size(self, i: int, leaf: torch.Tensor, n: int, size: int | str, sizes: dict[str, int],
                    wanted: Leaf) -> None:
        if isinstance(size, str):
            low, high = self.manifest.ranges.get(size, [n, n])
            fits = sizes.setdefault(size, n) == n and low <= n <= high
            limits = f", {size} from {low} to {high}"
        else:
            fits, limits = n == size, ""
        if not fits:
            raise InvalidInputError(f"argument leaf {i} has shape {tuple(leaf.shape)}",
                                    expected=f"shape ({', '.join(map(str, wanted.shape))}){limits}",
                                    do="Save the model with an example of these sizes, or give sizes that fit.")

    def _value(self, source: Any, leaves: Sequence[Any], outputs: Sequence[Any] | None) -> Any:
        match source.kind:
            case "input":
                return leaves[source.index]
            case "weight":
                return getattr(self, source.name)
            case "size":
                return int(leaves[source.index].shape[source.dim])
            case "output" if outputs is not None:
                return outputs[source.index]
        return source.value
