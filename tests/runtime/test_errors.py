"""Messages say what was given, what was expected and what to do."""

from __future__ import annotations

import copy

from meshwright.runtime.errors import InvalidInputError, MeshwrightError, UnknownNameError, nearest_name


def test_three_parts() -> None:
    error = MeshwrightError("an int", expected="an nn.Module", do="Pass the model itself.")
    assert str(error) == "an int; expected an nn.Module. Pass the model itself."
    assert str(MeshwrightError("One sentence.")) == "One sentence."


def test_unknown_name_says_the_nearest() -> None:
    error = UnknownNameError("pass", "fues", ["fuse", "moe", "quantize"])
    assert error.nearest == "fuse" and "did you mean 'fuse'?" in str(error) and "fuse, moe, quantize" in str(error)
    assert isinstance(error, InvalidInputError) and isinstance(error, ValueError)


def test_nothing_near() -> None:
    assert nearest_name("zzz", ["fuse"]) is None
    assert "did you mean" not in str(UnknownNameError("pass", "zzz", ["fuse"]))


def test_unknown_name_survives_copying() -> None:
    error = UnknownNameError("C++ target", "sm_8", ["sm_80"])
    assert str(copy.copy(error)) == str(error)


def test_of_many_names_the_three_nearest_are_said() -> None:
    known = [f"model-{i}" for i in range(600)]
    text = str(UnknownNameError("model type", "modle-42", known))
    assert text.count("model-") == 4 and "one of 600 names" in text and text.endswith("did you mean 'model-42'?")
    assert "of which none is close" in str(UnknownNameError("model type", "zzz", known))
