"""Published models by name: the numbers of their configuration, where these are published, and the published total of
parameters. The modelling code is that of transformers; what it does differently is in `note`.

Sources
  [Llama3]   "The Llama 3 Herd of Models", arXiv:2407.21783, Table 3 (layers, widths, heads, vocabulary, RoPE base) and
             the model cards (8.03B, 70.6B, 405B parameters; 8192 tokens in pre-training).
  [GPT3]     Brown et al., "Language Models are Few-Shot Learners", arXiv:2005.14165, Table 2.1; vocabulary of GPT-2.
  [Mixtral]  Jiang et al., "Mixtral of Experts", arXiv:2401.04088, Table 1; 46.7B: mistral.ai/news/mixtral-of-experts.
  [8x22B]    mistral.ai/news/mixtral-8x22b (141B parameters, 39B active) and config.json of Mixtral-8x22B-v0.1.
  [Qwen3]    "Qwen3 Technical Report", arXiv:2505.09388, Table 2, and config.json of Qwen3-235B-A22B (22B active).
  [DSv3]     "DeepSeek-V3 Technical Report", arXiv:2412.19437, §4.2 (671B, 37B active), and its config.json.
  [BERT]     Devlin et al., arXiv:1810.04805, §3: L=24, H=1024, A=16, "340M".
  [T5]       Raffel et al., arXiv:1910.10683, §3.7, "11B", and config.json of t5-11b.
  [ViT22B]   Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", arXiv:2302.05442, Table 1.
  [Switch]   Fedus et al., "Switch Transformers", arXiv:2101.03961, Table 9 (Switch-C, 1571B).

"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelPreset:
    """`model_type`: transformers' name of the architecture; `changes`: what differs from its default configuration;
    `parameters`: the published total, in 10^9."""

    model_type: str
    changes: dict[str, Any]
    parameters: float
    source: str
    note: str = ""


def _llama3(layers: int, hidden: int, ffn: int, heads: int, parameters: float) -> ModelPreset:
    return ModelPreset("llama", {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, parameters, "Llama3")


def _mixtral(layers: int, hidden: int, ffn: int, heads: int, tokens: int, parameters: float,
             source: str) -> ModelPreset:
    return ModelPreset("mixtral", {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": tokens, "num_local_experts": 8,
        "num_experts_per_tok": 2}, parameters, source)


MODEL_PRESETS: dict[str, ModelPreset] = {
    "llama3-8b": _llama3(32, 4096, 14336, 32, 8.03),
    "llama3-70b": _llama3(80, 8192, 28672, 64, 70.6),
    "llama3-405b": _llama3(126, 16384, 53248, 128, 405.0),
    "gpt3-175b": ModelPreset("gpt2", {
        "n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "vocab_size": 50257}, 175.0, "GPT3",
        "GPT-2's dense attention in every layer; the paper alternates dense and locally banded sparse attention"),
    "mixtral-8x7b": _mixtral(32, 4096, 14336, 32, 32768, 46.7, "Mixtral"),
    "mixtral-8x22b": _mixtral(56, 6144, 16384, 48, 65536, 141.0, "8x22B"),
    "qwen3-235b-a22b": ModelPreset("qwen3_moe", {
        "num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "vocab_size": 151936, "max_position_embeddings": 40960}, 235.0, "Qwen3"),
    "deepseek-v3": ModelPreset("deepseek_v3", {
        "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
        "vocab_size": 129280, "max_position_embeddings": 163840}, 671.0, "DSv3",
        "without the multi-token prediction module, which the 671B do not count either"),
    "bert-large": ModelPreset("bert", {
        "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}, 0.34,
        "BERT"),
    "t5-11b": ModelPreset("t5", {
        "num_layers": 24, "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_heads": 128, "vocab_size": 32128}, 11.0,
        "T5", "encoder and decoder both see `seq` tokens"),
    "vit-22b": ModelPreset("vit", {
        "num_hidden_layers": 48, "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48,
        "image_size": 224, "patch_size": 14}, 21.743, "ViT22B",
        "transformers' ViT: attention and MLP one after the other and no norm of queries and keys, where the paper's "
        "blocks are parallel and normalise them"),
    "switch-c": ModelPreset("switch_transformers", {
        "num_layers": 15, "num_decoder_layers": 15, "num_sparse_encoder_layers": 15, "num_sparse_decoder_layers": 15,
        "d_model": 2080, "d_kv": 64, "d_ff": 6144, "num_heads": 32, "num_experts": 2048, "vocab_size": 32128}, 1571.0,
        "Switch", "no token is dropped, where the paper's experts have a capacity; encoder and decoder both see `seq` "
        "tokens"),
}
