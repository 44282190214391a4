"""What Megatron-Bridge's own recipes say about its published runs: inputs that its table of results leaves out.

Source: NVIDIA-NeMo/Megatron-Bridge, *workload_base_configs.py and *_llm_pretrain.py in scripts/performance/configs, at
the tag of each release: v0.2.0 (25.11), v0.3.0 (26.02), v0.3.1 (26.02.01), v0.4.0 (26.04), v0.5.0 (26.06 and later).

    gradients       accumulated and reduced in bf16 everywhere (`grad_reduce_in_fp32 = False`)
    parameters      gathered in fp8 where products are in fp8 (`fp8_param_gather`)
    recomputation   none of Llama-3-70B (with Megatron-FSDP activations of some layers go to the host's memory instead,
                    which is not priced), Llama-3-8B on Blackwell and Qwen3; of GPT-OSS norms and activations, which
                    fused kernels don't keep here either. Others: left to the planner
    CUDA graphs     of a whole step: Llama-3-8B on Blackwell; GPT-OSS in MXFP8 from 26.06 on. Of the router and what
                    prepares its rows (`moe_router`, `moe_preprocess`): DeepSeek-V3 on GB200, and on B200 with ep 32
    dispatch        all-to-all unless the recipe names DeepEP or HybridEP
    overlap         of rows' travel to experts with another micro-batch (`moe_a2a_overlap`)
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost_model.model import RecomputeMode
from meshwright.cost_model.strategy import CudaGraphs, Training


def with_recipe(training: Training, family: str, size: str, gpu: str, container: str, ep: int) -> Training:
    """`training` with what the recipe of a release adds. `size`: "8b", "30b" and so on, as the model's name has it."""
    release = float(container[:5])
    patched = container[5:8] == ".01"
    fp8 = bool(training.fp8_recipe)
    made = replace(training, gradient_bytes=2, reduce_bytes=2, gather_bytes=1 if fp8 else 2)
    if family == "llama3":
        return replace(made, cuda_graphs="step" if size == "8b" and gpu != "h100-sxm" else "none")
    since_26_02_01 = release > 26.02 or (release == 26.02 and patched)
    near, overlapped = False, False
    graphs: CudaGraphs = "none"
    if family == "gpt-oss":
        near = release >= 26.04
        overlapped = near and gpu == "gb200"
        graphs = "step" if fp8 and release >= 26.06 else "none"
    elif family == "qwen3" and size == "30b":
        near, overlapped = release >= 26.02, not since_26_02_01
    elif family == "qwen3":
        near, overlapped = release == 26.02 and patched, True
    elif family == "deepseek":
        near = gpu == "gb200" or release >= 26.02
        overlapped = gpu == "b200" and ep > 8
        graphs = "router" if gpu == "gb200" or overlapped else "none"
    return replace(made, dispatch="once per node" if near else "all-to-all", overlap_experts=overlapped,
                   cuda_graphs=graphs)


def recomputed(family: str, size: str, gpu: str) -> RecomputeMode | None:
    """The recipe's recomputation, None where only the planner can say."""
    if family == "llama3":
        return None if size == "8b" and gpu == "h100-sxm" else "none"
    return None if family == "deepseek" else "none"
