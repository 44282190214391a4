"""Model descriptions: JSON there and back, what is refused, other micro-batches."""

from __future__ import annotations

import dataclasses
import json

import pytest

from meshwright.cost_model.model import (
    Boundary,
    LayerKind,
    ModelDescription,
    ParameterGroup,
    Saved,
    interpolated,
    model_from_json,
)
from meshwright.cost_model.records import ElementOps, OpRecord


def layer(n: int) -> LayerKind:
    product = OpRecord("mm", "gemm", "bfloat16", flops=100 * n, bytes_read=7 + 5 * n, element_ops=ElementOps(simple=n))
    return LayerKind("layer", (product, product), (product,), (ParameterGroup("bfloat16", True, 30, 60),),
                     (ParameterGroup("float32", False, 2, 8),), {"none": Saved(10 * n), "full": Saved(3 * n, (0, 1))},
                     (Boundary("x", "chain", "bfloat16", (n, 4, 8), 64 * n),), heads=4)


def model(n: int = 2, **changes) -> ModelDescription:
    fields = {"name": "model", "seq": 4, "micro_batch": n, "imbalance": 1.0, "kinds": (layer(n),), "order": (0, 0, 0),
              "modules": ("a", "b", "c"), "notes": ("a note",)}
    return ModelDescription(**{**fields, **changes})


def test_totals() -> None:
    m = model()
    assert (m.parameter_count, m.count(0), m.tokens) == (90, 3, 8)
    kind = m.kinds[0]
    assert (kind.flops_forward, kind.flops_backward, kind.parameter_bytes) == (400, 200, 60)
    assert (kind.recomputed_flops("none"), kind.recomputed_flops("full")) == (0, 400)


def test_json_there_and_back() -> None:
    assert model_from_json(json.dumps(model().as_dict())) == model()


@pytest.mark.parametrize(("old", "new", "message"), [
    ('"count": 30', '"count": -30', r"layer\.parameters\[0\]\.count is negative"),
    ('"flops": 200', '"flops": -1', r"layer\.forward\[0\]\.flops is negative"),
    ('"bytes": 60', '"bytes": NaN', "parameters.0.bytes: Input should be a finite number"),
    ('"capture_s": 0.0', '"capture_s": NaN', "capture_s is negative or not a number"),
    ('"version": 1', '"version": 2', "of version 2; this release reads version 1"),
    ('"kind": "gemm"', '"kind": "magic"', "kinds.0.forward.0.kind: Input should be"),
    ('"order": [0, 0, 0]', '"order": [0, 1, 0]', "names kinds or modules that are not there"),
    ('"order": [0, 0, 0]', '"order": [0, 0]', "names kinds or modules that are not there"),
    ('"recomputed": [0, 1]', '"recomputed": [0, 2]', "full recomputes an operator that is not among"),
    ('"seq": 4', '"seq": 0', "seq 0, micro-batch 2, imbalance 1.0: expected 1 or more"),
    ('"imbalance": 1.0', '"imbalance": 0.5', "imbalance 0.5"),
])
def test_damaged_descriptions(old: str, new: str, message: str) -> None:
    text = json.dumps(model().as_dict())
    assert old in text
    with pytest.raises(ValueError, match=message):
        model_from_json(text.replace(old, new))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', "[" * 10_000 + "]" * 10_000,
                                  '{"name":' * 10_000 + "1" + "}" * 10_000])
def test_what_is_no_description(text: str) -> None:
    with pytest.raises(ValueError, match="not a model description"):
        model_from_json(text)


def test_numbers_of_other_micro_batches_lie_on_a_line() -> None:
    assert interpolated(model(2), model(3), 7) == model(7)
    assert interpolated(model(5), model(3), 2) == model(2)


@pytest.mark.parametrize(("sizes", "message"), [((2, 2, 4), "two different ones"), ((1, 2, 4), "all above 1"),
                                                ((2, 3, 1), "all above 1")])
def test_points_that_give_no_line(sizes: tuple[int, int, int], message: str) -> None:
    one, two, wanted = sizes
    with pytest.raises(ValueError, match=message):
        interpolated(model(one), model(two), wanted)


def test_descriptions_of_different_models_give_no_line() -> None:
    with pytest.raises(ValueError, match=r"model\.order"):
        interpolated(model(2), model(3, order=(0, 0), modules=("a", "b")), 4)
    other = dataclasses.replace(layer(4), heads=None)
    with pytest.raises(ValueError, match=r"model\.kinds\[0\]\.heads is 4 in one capture and None in the other"):
        interpolated(model(2), model(4, kinds=(other,)), 6)
    odd = dataclasses.replace(layer(4), heads=5)
    with pytest.raises(ValueError, match="does not grow by a whole number"):
        interpolated(model(2), model(4, kinds=(odd,)), 5)
