"""The instruction set is chosen from what the CPU says, and spelled out for the compiler."""

from __future__ import annotations

import pytest

from meshwright.runtime.errors import InvalidInputError
from meshwright.runtime.isa import choose_isa, cpu_features, current_isa

AVX2 = frozenset({"sse2", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "popcnt", "movbe"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}


@pytest.mark.parametrize(("wanted", "machine", "features", "name", "lanes"), [
    ("native", "x86_64", AVX512, "avx512", 16),
    ("native", "x86_64", AVX2, "avx2", 8),
    ("native", "x86_64", AVX512 - {"avx512vl"}, "avx2", 8),
    ("native", "x86_64", AVX2 - {"fma"}, "scalar", 2),
    ("native", "x86_64", frozenset(), "scalar", 2),
    ("avx2", "x86_64", AVX512, "avx2", 8),
    ("scalar", "amd64", AVX512, "scalar", 2),
    ("native", "aarch64", frozenset({"asimd"}), "neon", 4),
    ("native", "arm64", frozenset(), "neon", 4),
    ("native", "riscv64", frozenset(), "scalar", 2),
])
def test_choice(wanted: str, machine: str, features: frozenset[str], name: str, lanes: int) -> None:
    isa = choose_isa(wanted, machine, features)
    assert (isa.name, isa.lanes(4)) == (name, lanes)
    assert all(flag.startswith("-m") and "native" not in flag for flag in isa.flags)


@pytest.mark.parametrize(("wanted", "machine", "features"), [
    ("avx512", "x86_64", AVX2), ("neon", "x86_64", AVX512), ("avx2", "aarch64", frozenset()),
])
def test_what_the_machine_lacks_is_refused(wanted: str, machine: str, features: frozenset[str]) -> None:
    with pytest.raises(InvalidInputError, match=f"MESHWRIGHT_ISA='{wanted}'.*scalar"):
        choose_isa(wanted, machine, features)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_ISA", "scalar")
    assert current_isa().name == "scalar"
    monkeypatch.delenv("MESHWRIGHT_ISA")
    assert (current_isa().name == "avx512") == cpu_features().issuperset(AVX512 - {"sse2", "avx"})
