"""Number formats by name, and which of them a device can multiply.

    training_from("adamw", "mxfp8")      as the cost model's `Training`
    refuse_precision(training, device)   before anything is planned with products that the device does not have
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, get_args

from ...cost_model.device import Device
from ...cost_model.op_price import FP8, NARROW
from ...cost_model.strategy import OPTIMIZER_STATE_BYTES, CudaGraphs, Dispatch, Fusion, Training
from ...runtime.errors import InvalidInputError, UnknownNameError

PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "bf16": {}, "fp16": {"compute": "float16"},
    "fp32": {"compute": "float32", "parameter_bytes": 4, "master_bytes": 0, "gather_bytes": 4},
    **{f"fp8-{recipe}": {"fp8_recipe": recipe} for recipe in ("tensorwise", "rowwise", "blockwise", "delayed")},
    "mxfp8": {"fp8_recipe": "mxfp8"}, "nvfp4": {"fp8_recipe": "nvfp4"}}
"""fp8 recipes are torchao's and Transformer Engine's; activations between products stay in 16 bits."""
COMPUTE = ("bfloat16", "float16", "float32")


def training_from(optimizer: str = "adamw", precision: str = "bf16", words: Iterable[str] = ()) -> Training:
    """A training by the names of its optimizer and precision, changed by words such as `gradient_bytes=2`. Raises
    `UnknownNameError` and `InvalidInputError`."""
    if optimizer not in OPTIMIZER_STATE_BYTES:
        raise UnknownNameError("optimizer", optimizer, OPTIMIZER_STATE_BYTES)
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    training = Training(optimizer=optimizer, **PRECISIONS[precision])  # type: ignore[arg-type]
    for word in words:
        training = training_with(training, word)
    return training


def training_with(training: Training, word: str) -> Training:
    """With one `field=value` as `Request.words` writes it. Raises `InvalidInputError`."""
    name, _, value = word.partition("=")
    usual = vars(Training()).get(name)
    try:
        if isinstance(usual, bool):
            made: Any = {"True": True, "False": False}[value]
        elif isinstance(usual, str):
            made = value
        else:
            number = float(value)
            made = int(number) if isinstance(usual, int) and number.is_integer() else number
        known = {"fusion": get_args(Fusion), "dispatch": get_args(Dispatch), "compute": COMPUTE,
                 "cuda_graphs": get_args(CudaGraphs)}.get(name)
        if usual is None or (known and made not in known) or (name == "software_year" and not 2000 <= made <= 2100):
            raise ValueError
        return replace(training, **{name: made})
    except (ValueError, KeyError):
        raise InvalidInputError(f"training {word[:60]!r}", expected="field=value, such as gradient_bytes=2 or "
                                "flash_attention=False") from None


def refuse_precision(training: Training, device: Device) -> None:
    """Raises `InvalidInputError` for products in fewer bits than the device multiplies."""
    if not training.fp8_recipe:
        return
    if NARROW.get(training.fp8_recipe, FP8) not in device.peak_flops_per_s:
        has = [name for name, recipe in (("fp8", ""), ("nvfp4", "nvfp4"))
               if NARROW.get(recipe, FP8) in device.peak_flops_per_s]
        raise InvalidInputError(f"{training.fp8_recipe} products on {device.name}, which has none",
                                expected=f"16 bits{''.join(f', {name}' for name in has)}")
