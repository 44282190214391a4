"""Saving and loading: bit-equal without the model's class; damaged, foreign and malicious files are refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import meshwright as mw
from meshwright.codegen import program_cpp_packing
from meshwright.compiler import artifact_load
from meshwright.runtime.artifact_files import read_artifact


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.out = nn.Linear(16, 32, bias=False)
        self.out.weight = self.words.weight  # tied

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> dict[str, object]:
        x = self.norm(torch.nn.functional.gelu(self.words(ids)))
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return {"logits": self.out(x) * scale, "states": (x, ids), "layers": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[str, object]]:
    torch.manual_seed(0)
    model = Encoder().eval()
    example = {"ids": torch.randint(0, 32, (3, 7)), "mask": torch.ones(3, 7)}
    fast = mw.compile(model, example)
    folder = tmp_path_factory.mktemp("artifact") / "model"
    fast.save(folder)
    with torch.no_grad():
        return folder, example, fast(**example)


def test_loading_is_bit_equal_and_keeps_the_structure(saved) -> None:
    folder, example, expected = saved
    loaded = mw.load(folder)
    got = loaded(example["ids"], mask=example["mask"])
    assert list(got) == ["logits", "states", "layers"]
    assert torch.equal(got["logits"], expected["logits"])
    assert torch.equal(got["states"][0], expected["states"][0])
    assert got["states"][1] is example["ids"] and got["layers"] == 1


def test_a_loaded_model_takes_the_methods_it_was_saved_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times come with it: an empty cache, where a busy machine may prefer another method, changes no bit."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128)).eval(), torch.randn(64, 256)
    fast = mw.compile(model, (x,))
    fast.save(tmp_path / "model")
    with torch.no_grad():
        expected = fast(x)
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(program_cpp_packing, "measure", pytest.fail)
    assert torch.equal(mw.load(tmp_path / "model")(x), expected)


def test_a_new_process_needs_no_class(saved, tmp_path: Path) -> None:
    folder, example, expected = saved
    torch.save((example, expected["logits"]), tmp_path / "io.pt")
    code = ("import sys, torch, meshwright as mw\n"
            "example, logits = torch.load(sys.argv[2])\n"
            "torch.set_num_threads(int(sys.argv[3]))\n"
            "assert torch.equal(mw.load(sys.argv[1])(**example)['logits'], logits)\n"
            "assert not any('test_artifact' in m for m in sys.modules)\n")
    run = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "io.pt"),
                          str(torch.get_num_threads())], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


def test_another_instruction_set_opens_with_a_warning(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds kernel IR: kernels are printed for the instruction set that is here."""
    folder, example, expected = saved
    monkeypatch.setenv("MESHWRIGHT_ISA", "scalar")
    with pytest.warns(mw.MeshwrightWarning, match="kernels are now printed for scalar"):
        loaded = mw.load(folder)
    torch.testing.assert_close(loaded(**example)["logits"], expected["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("saved_on", "here", "opens"), [
    ("x86_64", "x86_64", True), ("AMD64", "x86_64", True), ("x86_64", "AMD64", True), ("arm64", "aarch64", True),
    ("aarch64", "x86_64", False), ("x86_64", "arm64", False), ("riscv64", "x86_64", False),
])
def test_the_same_architecture_opens_under_any_of_its_names(saved, monkeypatch: pytest.MonkeyPatch, saved_on: str,
                                                            here: str, opens: bool) -> None:
    manifest = read_artifact(saved[0])[0].model_copy(update={"machine": saved_on})
    monkeypatch.setattr(artifact_load.platform, "machine", lambda: here)
    if opens:
        artifact_load._check_machine(manifest.model_copy(update={"isa": artifact_load.current_isa().name}))
    else:
        with pytest.raises(mw.MeshwrightError, match=f"saved for {saved_on}, this machine is {here}"):
            artifact_load._check_machine(manifest)


def test_open_sizes_may_differ_and_fixed_ones_may_not(saved) -> None:
    folder, _, _ = saved
    loaded = mw.load(folder)
    ids = torch.randint(0, 32, (5, 9))
    assert loaded(ids, torch.ones(5, 9))["logits"].shape == (5, 9, 32)
    with pytest.raises(mw.MeshwrightError, match="shape"):
        loaded(ids, torch.ones(5, 8))
    with pytest.raises(mw.MeshwrightError, match="int64"):
        loaded(ids.float(), torch.ones(5, 9))
    with pytest.raises(mw.MeshwrightError, match=r"expected \(ids, mask\)"):
        loaded(ids)
    with pytest.raises(mw.MeshwrightError, match="scale"):
        loaded(ids, torch.ones(5, 9), scale=2.0)


def test_weights_are_stored_once_and_sources_are_there_to_read(saved) -> None:
    folder, _, _ = saved
    manifest = json.loads((folder / "program.json").read_text())
    assert len(manifest["weights"]) == 3  # the tied one, and the norm's two
    assert sorted(p.name for p in folder.iterdir()) == ["graph.json", "kernels", "program.json", "sources",
                                                        "weights.safetensors"]
    assert any((folder / "sources").iterdir())
    assert all(p.read_text().startswith("kernel ") for p in (folder / "kernels").iterdir())


def test_saving_again_replaces_and_refuses_other_directories(saved, tmp_path: Path) -> None:
    fast = mw.compile(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    fast.save(tmp_path / "a")
    fast.save(tmp_path / "a")
    assert mw.load(tmp_path / "a")(torch.ones(2, 4)).shape == (2, 4)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("precious")
    with pytest.raises(mw.MeshwrightError, match="exists and is no artifact"):
        fast.save(tmp_path / "b")
    assert (tmp_path / "b" / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_disk_that_fills_up_while_saving_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact that was there before stays whole, and nothing is left beside it."""
    fast, x = mw.compile(nn.Linear(4, 4).eval(), torch.randn(2, 4)), torch.ones(2, 4)
    fast.save(tmp_path / "a")
    for error in (SafetensorError("I/O error: No space left"), OSError(errno.ENOSPC, "No space left on device")):
        def full(*args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("safetensors.torch.save_file", full)
        for target in ("a", "b"):
            with pytest.raises(mw.MeshwrightError, match=f"could not write .*/{target}: .*No space.*Choose a writable"):
                fast.save(tmp_path / target)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    torch.testing.assert_close(mw.load(tmp_path / "a")(x), fast(x))


def test_a_place_that_can_not_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    fast = mw.compile(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file" / "model", tmp_path / ("long" * 100), Path("/sys/kernel/model")):
        with pytest.raises(mw.MeshwrightError, match="could not write .*Choose a writable directory"):
            fast.save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_graph_breaks_refuse_to_save_with_a_sentence(tmp_path: Path) -> None:
    class Breaking(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            print(end="")
            return x * 2

    fast = mw.compile(Breaking(4, 4).eval(), torch.randn(2, 4))
    with pytest.raises(mw.MeshwrightError, match=r"graph breaks between them: .*test_artifact\.py:\d+"):
        fast.save(tmp_path / "x")
    with pytest.raises(mw.MeshwrightError, match="without example_inputs"):
        mw.compile(nn.Linear(4, 4)).save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def edit(name: str, change: Callable[[dict], None], *, fix: bool = True) -> Callable[[Path], None]:
    """An edit of a JSON file that also repairs the checksum, so that only the change itself can be noticed."""

    def apply(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))
        if fix and name != "program.json":
            repair(folder, name)

    return apply


def repair(folder: Path, name: str) -> None:
    from hashlib import sha256

    manifest = json.loads((folder / "program.json").read_text())
    manifest["checksums"][name] = sha256((folder / name).read_bytes()).hexdigest()
    (folder / "program.json").write_text(json.dumps(manifest))


def kernel_text(old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = sorted((folder / "kernels").iterdir())[0]
        path.write_text(path.read_text().replace(old, new))
        repair(folder, f"kernels/{path.name}")

    return apply


def truncate(folder: Path) -> None:
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(data[:-7])


def first_call(program: dict) -> dict:
    return next(s for s in program["steps"] if s["kind"] == "call")


def nest(program: dict) -> None:
    deep: list = []
    for _ in range(100):
        deep = [deep]
    first_call(program)["args"] = [deep]


@pytest.mark.parametrize(("spoil", "message"), [
    (truncate, "weights.safetensors is damaged"),
    (edit("graph.json", lambda d: d.update(name="other"), fix=False), "graph.json is damaged"),
    (edit("program.json", lambda d: d.update(format=99)), "format version 99; expected version 1"),
    (edit("program.json", lambda d: d.update(machine="riscv64")), "saved for riscv64"),
    (edit("program.json", lambda d: d.update(device="cuda")), "saved for CUDA"),
    (edit("program.json", lambda d: d.update(extra=1)), "malformed at extra"),
    (edit("program.json", lambda d: d["checksums"].update({"../../etc/passwd": "0"})), "missing or not its own"),
    (edit("program.json", lambda d: d["inputs"][0].update(index=99, kind="input")), "input 99 does not exist"),
    (edit("graph.json", lambda d: first_call(d).update(op="aten.from_file.default")), "not allowed"),
    (edit("graph.json", lambda d: first_call(d).update(op="os.system.default")), "not allowed"),
    (edit("graph.json", lambda d: first_call(d).update(op="aten.no_such_thing.default")), "has no operator"),
    (edit("graph.json", lambda d: d["inputs"][0].update(name="x; system(\"true\")")), "is no identifier|before it is"),
    (edit("graph.json", lambda d: d["inputs"][0].update(shape=["__import__('os')"])), "not an integer|disagree"),
    (edit("graph.json", nest), "nested too deep"),
    (edit("graph.json", lambda d: d.update(evil=1)), "fields of another version"),
    (kernel_text("axes p0", "axes p0; evil()"), "kernel fused|is no identifier"),
    (kernel_text("store ", "launch "), "kernel "),
])
def test_a_spoiled_artifact_is_refused(saved, tmp_path: Path, spoil, message: str) -> None:
    import shutil

    folder = tmp_path / "spoiled"
    shutil.copytree(saved[0], folder)
    spoil(folder)
    with pytest.raises(mw.MeshwrightError, match=message):
        mw.load(folder)


def test_nothing_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(mw.MeshwrightError, match="holds no saved model"):
        mw.load(tmp_path)
    assert os.listdir(tmp_path) == []
