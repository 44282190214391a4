"""Imports go one way, lazy ones included; private torch names live in one module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("compiler", "passes", "codegen", "runtime", "cost_model")
MAY_IMPORT = {  # besides itself
    "compiler": {"passes", "codegen", "runtime", "cost_model"},
    "passes": {"codegen", "runtime", "cost_model"},
    "codegen": {"runtime", "cost_model"},
    "runtime": set(),
    "cost_model": set(),
}
COMPATIBILITY = "runtime/torch_compat.py"
# torch.ops.aten._softmax is an operator's name, not a private one of torch
PRIVATE_TORCH = re.compile(r"torch(?!\.ops\.)(\.\w+)*\._[A-Za-z]\w*(\.\w+)*")


def room_files() -> list[Path]:
    return sorted(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))


def imported_modules(tree: ast.AST, module: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in `tree`; relative ones resolved against the package path `module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ("meshwright", *module)[: len(module) + 1 - (node.level - 1)] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def direction_faults(source: str, path: Path) -> list[str]:
    """What breaks the direction in `source`, which stands at `path` relative to the root."""
    room = path.parts[0]
    faults = []
    for line, name in imported_modules(ast.parse(source), path.parts[:-1]):
        parts = name.split(".")
        if parts[0] == "meshwright" and len(parts) > 1 and parts[1] in ROOMS and parts[1] != room:
            if parts[1] not in MAY_IMPORT[room]:
                faults.append(f"{path}:{line}: {room} imports {parts[1]}")
    return faults


def absolute_faults(source: str, path: Path) -> list[str]:
    """Imports of this package by its own name; inside it they are relative."""
    found = [(n.lineno, a.name) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names]
    found += [(n.lineno, n.module or "") for n in ast.walk(ast.parse(source))
              if isinstance(n, ast.ImportFrom) and n.level == 0]
    return [f"{path}:{line}: import {name}" for line, name in found if name.split(".")[0] == "meshwright"]


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def private_torch_faults(source: str, path: Path) -> list[str]:
    """Private torch modules and names: imported, reached through attributes, or named to `import_module`."""
    tree = ast.parse(source)
    names = list(imported_modules(tree, path.parts[:-1]))
    names += [(n.lineno, _dotted(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    names += [(n.lineno, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return sorted({f"{path}:{line}: {name}" for line, name in names
                   if PRIVATE_TORCH.fullmatch(name) and not name.rpartition(".")[2].startswith("__")})


@pytest.mark.parametrize("check", [direction_faults, absolute_faults, private_torch_faults])
def test_no_faults(check) -> None:
    faults = [fault for file in room_files() if check is not private_torch_faults
              or file.relative_to(ROOT).as_posix() != COMPATIBILITY
              for fault in check(file.read_text(), file.relative_to(ROOT))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(("path", "source"), [
    ("runtime/x.py", "from ..codegen.ir import Kernel"),
    ("runtime/x.py", "def f():\n    from ..codegen import ir"),
    ("runtime/ops/x.py", "from ...passes import base"),
    ("codegen/x.py", "from ..compiler.api import compile"),
    ("cost_model/x.py", "from .. import runtime"),
    ("passes/x.py", "import meshwright.compiler.api"),
    ("passes/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..compiler import api"),
])
def test_direction_check_fires(path: str, source: str) -> None:
    assert direction_faults(source, Path(path))


@pytest.mark.parametrize(("path", "source"), [
    ("compiler/x.py", "from ..passes import base\nfrom ..runtime.cache import key_of"),
    ("codegen/templates/x.py", "from ...runtime import cache\nfrom ..ir import Kernel"),
    ("runtime/x.py", "from . import cache\nimport compiler_gym\nfrom torch import compiler"),
])
def test_direction_check_stays_quiet(path: str, source: str) -> None:
    assert not direction_faults(source, Path(path))


@pytest.mark.parametrize("source", [
    "import torch._dynamo", "from torch._dynamo import x", "from torch import _C", "from torch.fx._x import y",
    "import torch\ntorch._C.f()", "import torch\ntorch.utils._pytree.tree_map(f, x)",
    "importlib.import_module('torch._inductor')", "def f():\n    from torch.utils import _pytree",
])
def test_private_torch_check_fires(source: str) -> None:
    assert private_torch_faults(source, Path("passes/x.py"))


@pytest.mark.parametrize("source", [
    "import torch\ntorch.__version__", "import torch.fx", "x.meta['_name']", "import torch\ntorch.ops.aten._softmax",
])
def test_private_torch_check_stays_quiet(source: str) -> None:
    assert not private_torch_faults(source, Path("passes/x.py"))
