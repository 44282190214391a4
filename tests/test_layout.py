"""Sizes of files and functions, and that packaging and documentation name everything there is."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.runtime.settings import VARIABLES, environment_table, setting_fields

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
ROOMS = ("compiler", "passes", "codegen", "runtime", "cost_model")
OTHERS = ("tests", "benchmarks", "examples")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 800, 80
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python_files(*folders: str) -> list[Path]:
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))


def long_functions(source: str) -> list[tuple[str, int]]:
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = [(n.name, (n.end_lineno or n.lineno) - n.lineno + 1) for n in nodes]
    return [(name, size) for name, size in sizes if size > MAX_FUNCTION_LINES]


def test_no_file_is_too_long() -> None:
    sizes = {f.relative_to(ROOT): len(f.read_text().splitlines()) for f in python_files(*ROOMS, *OTHERS)}
    assert not {f: n for f, n in sizes.items() if n > MAX_FILE_LINES}


def test_no_function_is_too_long() -> None:
    found = {f.relative_to(ROOT): long_functions(f.read_text()) for f in python_files(*ROOMS, *OTHERS)}
    assert not {f: names for f, names in found.items() if names}


def test_long_functions_are_seen() -> None:
    assert long_functions("def f():\n" + "    pass\n" * 80) == [("f", 81)]
    assert not long_functions("def f():\n" + "    pass\n" * 79)


def test_every_package_is_listed() -> None:
    folders = {"meshwright"}
    for file in python_files(*ROOMS):
        folders.add(".".join(("meshwright", *file.relative_to(ROOT).parts[:-1])))
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_every_package_has_an_init() -> None:
    folders = {f.parent for f in python_files(*ROOMS)}
    assert not [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()]


def test_data_files_are_packaged() -> None:
    """Whatever is no Python file in a room is listed as package data."""
    globs = PYPROJECT["tool"]["setuptools"]["package-data"]
    missing = []
    for file in (f for room in ROOMS for f in (ROOT / room).rglob("*") if f.is_file()):
        package = ".".join(("meshwright", *file.relative_to(ROOT).parts[:-1]))
        if file.suffix in (".py", ".pyc") or file.name.startswith("."):
            continue
        if not any(fnmatch.fnmatch(file.name, pattern) for pattern in globs.get(package, [])):
            missing.append(str(file.relative_to(ROOT)))
    assert not missing


def test_no_stray_module_at_the_root() -> None:
    """It would be installed into the package."""
    assert {f.name for f in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_every_third_party_import_is_declared() -> None:
    project = PYPROJECT["project"]
    lines = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    declared = {re.split(r"[<>=;\[ ]", line)[0].lower().replace("-", "_") for line in lines}
    declared |= {"functorch"}  # part of torch
    declared = {"yaml" if name == "pyyaml" else name for name in declared}  # the one that is imported by another name
    used = set()
    for file in python_files(*ROOMS):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add((node.module or "").split(".")[0])
    undeclared = used - declared - set(sys.stdlib_module_names)
    assert not undeclared


def test_environment_variables_are_documented() -> None:
    assert environment_table() in (ROOT / "docs" / "environment.md").read_text()
    assert sorted(v.field for v in VARIABLES) == sorted(setting_fields())


def test_environment_is_read_in_one_place() -> None:
    # handing all of it to a child process, or setting a default for another library, is no reading
    reads = re.compile(r"(?<!\*\*)os\.environ(?!\.setdefault)|getenv")
    files = [f for f in python_files(*ROOMS) if reads.search(f.read_text())]
    assert [f.relative_to(ROOT).as_posix() for f in files] == ["runtime/settings.py"]


def test_no_variable_is_mentioned_without_a_row() -> None:
    known = {name for v in VARIABLES for name in v.names}
    texts = python_files(*ROOMS) + sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md"]
    mentioned = {name for f in texts for name in re.findall(r"\bMESHWRIGHT_[A-Z_]*[A-Z]\b", f.read_text())}
    assert mentioned <= known


@pytest.mark.parametrize("target", ["demo", "test", "lint", "sweep", "compat", "bench"])
def test_makefile_has_target(target: str) -> None:
    run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
