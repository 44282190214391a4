"""Recognise models that are quantized already: our checks and kernels know nothing of packed integer weights."""

from __future__ import annotations

import torch
from torch import nn

from ..runtime.errors import UnsupportedError

_MODULES = {"torch.ao.nn.quantized": "torch.ao", "torch.ao.nn.intrinsic.quantized": "torch.ao",
            "torch.nn.quantized": "torch.ao", "bitsandbytes": "bitsandbytes", "torchao": "torchao",
            "gptqmodel": "GPTQ", "auto_gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "optimum.quanto": "quanto",
            "compressed_tensors": "compressed-tensors"}


def refuse_quantized(model: nn.Module) -> None:
    """Raise `UnsupportedError` when a module or a parameter of `model` is quantized."""
    for name, module in model.named_modules():
        if module.__dict__.get("is_quantized") is True:
            config = getattr(module, "config", None)
            method = getattr(getattr(config, "quantization_config", None), "quant_method", "a quantized checkpoint")
            _refuse(f"transformers loaded it with {method}")
        if (tool := _tool(type(module).__module__)) is not None:
            _refuse(f"module {name or type(model).__name__!r} is a {tool} {type(module).__name__}")
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and ((tool := _tool(type(value).__module__)) is not None or _is_quantized(value)):
                path = f"{name}.{key}" if name else key
                _refuse(f"{path!r} is a {f'{tool} ' if tool else ''}quantized {type(value).__name__}")


def _is_quantized(value: torch.Tensor) -> bool:
    return bool(value.is_quantized)


def _tool(module: str) -> str | None:
    return next((t for prefix, t in _MODULES.items() if module == prefix or module.startswith(prefix + ".")), None)


def _refuse(what: str) -> None:
    raise UnsupportedError(f"the model is already quantized: {what}", expected="floating-point weights",
                           do="Compile the model before it is quantized.")
