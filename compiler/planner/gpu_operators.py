"""The operators that torch would choose on a GPU, for tensors that are on none.

`scaled_dot_product_attention` on a CPU or without data is taken apart, and the graph would save S × S scores. Flash
attention saves q, k, v, its output and one logsumexp per row; so does the memory-efficient kernel, which takes over
where flash attention is not available: with a mask, with unequal head sizes, in fp32. Dropout saves a mask of one byte
per element, and RMS norm one number per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
FLASH_HEAD_SIZE = 256  # the largest that torch's flash kernel takes


class GpuOperators(TorchFunctionMode):
    """Within it, calls of `torch.nn.functional` that a GPU has one kernel for give that kernel's operator."""

    def __torch_function__(self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        return _CHOSEN.get(function, function)(*args, **(kwargs or {}))


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> torch.Tensor:
    if query.dim() != 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                              enable_gqa=enable_gqa)
    if query.size(1) % max(1, key.size(1)) or key.size(1) not in (value.size(1), query.size(1)):
        heads = [t.size(1) for t in (query, key, value)]
        raise ValueError("attention of {} query heads over {} key and {} value heads".format(*heads))
    sizes = {t.size(-1) for t in (query, key, value)}
    narrow = query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and narrow and len(sizes) == 1 and max(sizes) <= FLASH_HEAD_SIZE:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        return out[0]  # type: ignore[no-any-return]
    groups = query.size(1) // key.size(1)
    if enable_gqa and groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = None if attn_mask is None else _additive(attn_mask, query).expand(
        query.size(0), query.size(1), query.size(2), key.size(2))
    out = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal, scale=scale)
    return out[0]  # type: ignore[no-any-return]


def _additive(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask of booleans as torch hands it to the kernel: 0 where a key may be seen, else -inf."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -torch.inf)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return aten.native_dropout(input, p, True)[0] if training and p > 0 else input  # type: ignore[no-any-return]


def _rms_norm(input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None,
              eps: float | None = None) -> torch.Tensor:
    return aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]  # type: ignore[no-any-return]


_CHOSEN: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention, F.dropout: _dropout, F.rms_norm: _rms_norm}
