"""Which ATen operators are taken apart before code generation.

PyTorch's core-ATen table, plus normalisations, losses and activations' backward formulas that our kernels fuse,
minus what is better left whole (library kernels, ATen's random numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ...runtime.torch_compat import core_aten_decompositions, get_decompositions

aten = torch.ops.aten

EXTRA = (
    aten._softmax, aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data, aten._safe_softmax,
    aten.native_layer_norm, aten.native_layer_norm_backward, aten.native_group_norm, aten.native_group_norm_backward,
    aten.native_batch_norm, aten.native_batch_norm_backward, aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional, aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update, aten._batch_norm_with_update_functional, aten._batch_norm_no_update,
    aten.batch_norm_backward, aten.nll_loss_forward, aten.nll_loss_backward, aten.nll_loss2d_forward,
    aten.nll_loss2d_backward, aten.gelu_backward, aten.silu, aten.silu_backward, aten.sigmoid_backward,
    aten.tanh_backward, aten.threshold_backward, aten.hardtanh_backward, aten.leaky_relu_backward, aten.elu_backward,
    aten.hardswish, aten.hardswish_backward, aten.hardsigmoid, aten.hardsigmoid_backward, aten.softplus,
    aten.softplus_backward, aten.log_sigmoid_forward, aten.log_sigmoid_backward, aten.mish, aten.mish_backward,
    aten.celu, aten.selu, aten.glu, aten.glu_backward, aten.mse_loss, aten.mse_loss_backward, aten.l1_loss,
    aten.smooth_l1_loss, aten.smooth_l1_loss_backward, aten.huber_loss, aten.huber_loss_backward,
    aten.binary_cross_entropy, aten.binary_cross_entropy_backward, aten.binary_cross_entropy_with_logits, aten.std,
    aten.std_mean, aten.logsumexp, aten.masked_fill, aten.addcmul, aten.addcdiv, aten.lerp, aten.stack, aten.tril,
    aten.triu, aten.select_backward, aten.slice_backward, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.zero,
    aten.fill, aten.masked_scatter, aten.logit, aten.logit_backward, aten.xlogy, aten.frac, aten.deg2rad, aten.rad2deg,
    aten.nan_to_num, aten.heaviside, aten.isneginf, aten.isposinf, aten.square, aten.relu6, aten.rms_norm,
    aten._fused_rms_norm, aten._fused_rms_norm_backward, aten.linalg_vector_norm, aten.norm, aten.roll, aten.rot90,
    aten.new_empty, aten.empty_like, aten.index_add, aten.index_copy, aten.unfold_copy,
)
KEEP = (
    aten._scaled_dot_product_flash_attention_for_cpu.default, aten.var_mean.correction, aten.var.correction,
    aten.native_dropout.default, aten.index_add.default, aten.index_copy.default, aten.empty_like.default,
    aten.new_empty.default, aten.masked_scatter.default, aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.default, aten.upsample_bilinear2d.vec, aten.upsample_nearest2d.vec,
    aten.upsample_bicubic2d.default, aten.upsample_bicubic2d.vec, aten.split.Tensor, aten.split_with_sizes.default,
    aten.bernoulli.default, aten.bernoulli.p, aten.rand_like.default, aten.randn_like.default,
    aten.nll_loss2d_backward.default, aten.max_pool2d_with_indices_backward.default, aten.grid_sampler_2d.default,
)


@lru_cache(maxsize=1)
def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table handed to AOTAutograd."""
    table = dict(core_aten_decompositions())
    table.update(get_decompositions(list(EXTRA)))
    for op in KEEP:
        table.pop(op, None)
    return table
