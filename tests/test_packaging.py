"""What gets installed: a wheel with nothing but `meshwright/`, and programs that start in every usual way.

The wheel is built once from the files git knows, and unpacked into a folder of its own: the *regular* install. The
environment that runs the tests has the *editable* one (made by `make test`), so every start is tried with both.
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROBE = """
import multiprocessing, sys
import meshwright

def where(_):
    from meshwright.runtime.cache import key_of
    return key_of("x")[:4], meshwright.__file__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(where, [0]) == [where(0)]
    print("file", meshwright.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    made = tmp_path_factory.mktemp("wheel")
    run = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", made,
                          source], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return next(made.glob("*.whl"))


@pytest.fixture(scope="module")
def regular(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what `pip install` of the wheel would put into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(params=["regular", "editable"])
def environment(request: pytest.FixtureRequest) -> tuple[dict[str, str], Path]:
    """(environment variables, folder that meshwright must come from)."""
    if request.param == "regular":
        folder = request.getfixturevalue("regular")
        return {**os.environ, "PYTHONPATH": str(folder)}, folder / "meshwright"
    return dict(os.environ), ROOT


def start(arguments: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run


def test_wheel_holds_only_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {re.sub(r"-.*\.dist-info$", ".dist-info", top) for top in tops} == {"meshwright", "meshwright.dist-info"}
    rooms = {name.split("/")[1] for name in names if name.startswith("meshwright/")}
    assert rooms == {"__init__.py", "__main__.py", "py.typed", "codegen", "compiler", "cost_model", "passes", "runtime"}


def test_wheel_holds_every_file_of_the_rooms(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    rooms = ("codegen", "compiler", "cost_model", "passes", "runtime")
    files = [f.relative_to(ROOT).as_posix() for room in rooms for f in (ROOT / room).rglob("*")
             if f.is_file() and f.suffix != ".pyc"]
    assert not [f for f in files if f"meshwright/{f}" not in names]


def test_wheel_states_license_and_entry_points(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    read = {name.split("/", 1)[1]: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "License-Expression: Apache-2.0" in read["METADATA"] and "Apache License" in read["licenses/LICENSE"]
    assert "[torch_dynamo_backends]" in read["entry_points.txt"] and "[console_scripts]" in read["entry_points.txt"]


def test_every_required_package_is_imported(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = next(archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    required = set(re.findall(r"^Requires-Dist: ([\w.-]+)(?![^\n]*extra ==)", metadata, re.MULTILINE))
    required = {"yaml" if name == "pyyaml" else name for name in required}  # the one that is imported by another name
    sources = "\n".join(archive.read(n).decode() for n in archive.namelist() if n.endswith(".py"))
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", sources, re.MULTILINE))
    assert required and required <= imported


def test_module_and_spawned_processes(environment: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    env, home = environment
    (tmp_path / "probe.py").write_text(PROBE)
    run = start(["-m", "probe"], env, tmp_path)
    assert Path(run.stdout.split()[-1]).resolve() == home / "__init__.py"


def test_torchrun(environment: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    env, home = environment
    (tmp_path / "probe.py").write_text(PROBE)
    run = start(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "probe"], env, tmp_path)
    assert Path(run.stdout.split()[-1]).resolve() == home / "__init__.py"


def test_backend_is_found_by_name(environment: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    code = "import torch; print('meshwright' in torch.compiler.list_backends())"
    assert start(["-c", code], environment[0], tmp_path).stdout.strip() == "True"


def test_command_line(environment: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    env, _ = environment
    assert "doctor" in start(["-m", "meshwright", "--help"], env, tmp_path).stdout


def test_help_is_fast_and_loads_no_torch(tmp_path: Path) -> None:
    """The least CPU time of three starts; wall time would measure what else the machine does."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = start(["-X", "importtime", "-m", "meshwright", "--help"], dict(os.environ), tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "triton", "sympy", "networkx", "transformers"}
    assert min(seconds) < 0.4


def test_import_is_light(environment: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    code = "import sys, meshwright; print('torch' in sys.modules, [m for m in sys.modules if 'meshwright.' in m])"
    assert start(["-c", code], environment[0], tmp_path).stdout.strip() == "False []"


def test_public_names_exist() -> None:
    import meshwright

    assert set(meshwright.__all__) <= set(dir(meshwright))
    for name in meshwright.__all__:
        assert getattr(meshwright, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        meshwright.nonsense  # noqa: B018


def test_type_checkers_see_the_public_names() -> None:
    """The lazy table and the block for type checkers hold the same names from the same modules."""
    import meshwright

    text = (ROOT / "__init__.py").read_text()
    typed = {name: module for module, name in re.findall(r"^    from (\.\S*) import (\w+) as \2$", text, re.MULTILINE)}
    assert typed == {**meshwright._HOME, "passes": "."}
    assert {*typed, "__version__"} == set(meshwright.__all__)


def test_every_room_imports(regular: Path, tmp_path: Path) -> None:
    """Every module of the regular install, so that a file left out of it is seen."""
    files = sorted((regular / "meshwright").rglob("*.py"))
    left_out = {"__main__"} if importlib.util.find_spec("triton") else {"__main__", "doctor_kernel"}
    names = [".".join(f.relative_to(regular).with_suffix("").parts) for f in files if f.stem not in left_out]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    start(["-c", code], {**os.environ, "PYTHONPATH": str(regular)}, tmp_path)
