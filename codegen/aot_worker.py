"""A process that compiles Triton kernels: `python -m meshwright.codegen.aot_worker JOBS.json RESULTS.json`.

Each job (see `aot.make_job`) is answered by registers, shared memory, spills, assembly text and binary, or by an error.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..runtime.triton_launch import load_module, require_triton


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one job; what Triton raises becomes the answer `{"error": message}`."""
    try:
        return _compile(job)
    except Exception as error:  # a compiler may raise anything; the caller names the kernel
        return {"error": f"{type(error).__name__}: {error}"}


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    triton = require_triton()
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load_module(job["source"]), job["function"])
    names = list(function.arg_names)
    constants = {**job["constants"], "INDEX": tl.int64 if job["wide_index"] else tl.int32}
    signature = {n: job["pointers"].get(n, "constexpr" if n in constants else "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in job["pointers"]}
    source = ASTSource(function, signature, constants, aligned)
    target = job["target"]
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"], "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget(target["backend"], target["arch"], target["warp_size"]),
                           options=options)
    return _nvidia(built) if target["backend"] == "cuda" else _amd(built)


def _nvidia(built: Any) -> dict[str, Any]:
    usage = ptxas_usage(built.asm["ptx"])
    return {"registers": usage["registers"], "spills": usage["spills"], "shared_bytes": int(built.metadata.shared),
            "assembly": built.asm["ptx"], "binary": base64.b64encode(built.asm["cubin"]).decode()}


def _amd(built: Any) -> dict[str, Any]:
    text = built.asm["amdgcn"]
    spilled = 4 * _field(text, "vgpr_spill_count")  # scalar registers spill into lanes of vector registers, not memory
    return {"registers": _field(text, "vgpr_count"), "spills": spilled, "shared_bytes": int(built.metadata.shared),
            "assembly": text, "binary": base64.b64encode(built.asm["hsaco"]).decode()}


def _field(text: str, name: str) -> int:
    """A number from the metadata at the end of AMD assembly (`.vgpr_count: 16`)."""
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    if found is None:
        raise ValueError(f"the assembly has no .{name}")
    return int(found[1])


def ptxas_usage(ptx: str) -> dict[str, int]:
    """Registers per thread and bytes spilled, as `ptxas -v` says for this PTX."""
    said = _assemble(ptx)
    registers = re.search(r"Used (\d+) registers", said)
    if registers is None:
        raise ValueError(f"ptxas said nothing about registers: {said[-1000:]}")
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    return {"registers": int(registers[1]), "spills": sum(spills)}


def _assemble(ptx: str) -> str:
    """What `ptxas -v` prints. Triton brings two assemblers; each knows PTX up to its own version."""
    arch = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)
    if arch is None:
        raise ValueError("the PTX names no target")
    errors = ""
    with tempfile.TemporaryDirectory(prefix="meshwright-ptx-") as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        for assembler in find_assemblers():
            command = [str(assembler), "-v", f"--gpu-name={arch[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stderr + done.stdout
            errors += done.stderr[-1000:]
    raise ValueError(f"ptxas failed: {errors}")


def find_assemblers() -> list[Path]:
    """The assemblers inside Triton's package. Raises `FileNotFoundError` where there is none."""
    folder = Path(require_triton().__file__ or "").parent / "backends" / "nvidia" / "bin"
    found = [folder / name for name in ("ptxas", "ptxas-blackwell") if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(f"no ptxas in {folder}")
    return found


def main(arguments: list[str]) -> int:
    asked, answered = arguments
    jobs = json.loads(Path(asked).read_text())
    Path(answered).write_text(json.dumps([compile_job(job) for job in jobs]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
