"""Published models by name: the numbers of their configuration, where these are published, and the published total of
parameters. The modelling code is that of transformers; what it does differently is in `note`. What `changes` does not
name is transformers' default; tests hold the defaults that cost something to the same sources.

Sources, with what was read there (papers in text copies of them; "hub": config.json on the Hugging Face hub)
  [Llama3]   "The Llama 3 Herd of Models", arXiv:2407.21783, Table 3: layers, widths, heads, 8 KV heads, RoPE base.
             pytorch/torchtitan, torchtitan/models/llama3/__init__.py: the same, and 128256 rows of vocabulary (Table 3
             rounds to 128,000). meta-llama/llama-models, models/llama3/args.py: epsilon 1e-5; models/llama3/
             MODEL_CARD.md: 8192 tokens in pre-training. Totals: safetensors metadata of Llama-3.1 on the hub, as
             others quote it. (The first 405B files there held every KV head twice: 16 heads, 410B.)
  [GPT3]     Brown et al., "Language Models are Few-Shot Learners", arXiv:2005.14165, Table 2.1 and n_ctx = 2048,
             d_ff = 4 d_model; it prints "175.0B", these sizes make 174.6B (so does Table 2 of Narayanan et al., SC21).
             NVIDIA/Megatron-LM, examples/gpt3/train_gpt3_175b_distributed.sh: the same sizes. Vocabulary of GPT-2.
  [Mixtral]  Jiang et al., "Mixtral of Experts", arXiv:2401.04088, Table 1; mistral.ai/news/mixtral-of-experts: 46.7B,
             12.9B per token; AI-Hypercomputer/maxtext, src/maxtext/configs/models/mixtral-8x7b.yml: all but positions.
  [8x22B]    mistral.ai/news/mixtral-8x22b: "39B active parameters out of 141B", 64K tokens; mistral-community/
             Mixtral-8x22B-v0.1 on the hub: all sizes. Later releases (v0.3, Instruct) have 32768 rows of vocabulary,
             says mistralai/mistral-inference, README.md.
  [Qwen3]    "Qwen3 Technical Report", arXiv:2505.09388: Table 2 (layers, heads, experts) and §3.2, RoPE base 1,000,000;
             235B and 22B active. NVIDIA-NeMo/Megatron-Bridge, tests/unit_tests/models/qwen/test_qwen3_moe_bridge.py, a
             copy of the hub's configuration: widths, vocabulary, 40960 positions. torchtitan, torchtitan/models/qwen3/
             __init__.py: the same but for RoPE base 5,000,000 (that of the 2507 releases).
  [DSv3]     "DeepSeek-V3 Technical Report", arXiv:2412.19437, §4.2: layers, widths of model and experts, heads, ranks,
             three dense layers, 8 of 256 + 1 experts, 671B and 37B active. deepseek-ai/DeepSeek-V3, inference/configs/
             config_671B.json: all of these, dense width, groups, vocabulary; README_WEIGHTS.md: 671B and 36.7B without
             the 11.5B of the multi-token prediction module. 163840 positions: maxtext, src/maxtext/configs/models/
             deepseek3-671b.yml. YaRN is left out: pre-training at 4096 tokens had none; it changes angles, not work.
  [BERT]     Devlin et al., arXiv:1810.04805, §3: L=24, H=1024, A=16, MLP of 4 H, "340M"; google-research/bert,
             README.md: the same, modeling.py: 512 positions, dropout 0.1; google-bert/bert-large-uncased on the hub:
             all sizes and the vocabulary of 30522.
  [T5]       Raffel et al., arXiv:1910.10683, §3.7: d_ff 65,536, 128 heads, "11B". google-research/
             text-to-text-transfer-transformer, t5/models/gin/models/bi_v1_11B.gin: all sizes. Vocabulary: google/
             t5-11b-ssm-nqo on the hub, and dropout 0.1; released_checkpoints.md says that only T5 1.1 went without.
  [ViT22B]   Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", arXiv:2302.05442: width, depth,
             MLP, heads and 21743M read in Table 1 of the InternVL paper, arXiv:2312.14238 (the 21743M are exactly the
             matrices of the 48 blocks); no biases on queries, keys and values: Google's post on the paper, 31 March
             2023. Assumptions: images of 224 pixels, patches of 14 and a head for two classes (not read anywhere).
  [Switch]   Fedus et al., "Switch Transformers", arXiv:2101.03961, Table 9: 1571B, widths, 15 layers, 2048 experts in
             every layer. google/flaxformer, flaxformer/t5x/configs/moe/models/switch_c.gin, which google-research/t5x,
             docs/models.md, names for the paper's converted weights: 15 + 15 layers, 30 heads (the table prints 32; the
             hub has 30 too, but 12 decoder layers, of which 15 are sparse), ReLU; no dropout (moe.gin).

Assumption, no document found: dropout of 0.1 in gpt3-175b, GPT-2's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelPreset:
    """`model_type`: transformers' name of the architecture; `changes`: what differs from its default configuration;
    `parameters`: the published total, in 10^9; `active`: what of it one token uses, 0 where none is published."""

    model_type: str
    changes: dict[str, Any]
    parameters: float
    source: str
    note: str = ""
    active: float = 0.0


def _llama3(layers: int, hidden: int, ffn: int, heads: int, parameters: float) -> ModelPreset:
    return ModelPreset("llama", {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, parameters, "Llama3")


def _mixtral(layers: int, hidden: int, ffn: int, heads: int, tokens: int, parameters: float, active: float,
             source: str) -> ModelPreset:
    return ModelPreset("mixtral", {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": tokens, "num_local_experts": 8,
        "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, parameters, source,
        active=active)


MODEL_PRESETS: dict[str, ModelPreset] = {
    "llama3-8b": _llama3(32, 4096, 14336, 32, 8.030261248),
    "llama3-70b": _llama3(80, 8192, 28672, 64, 70.553706496),
    "llama3-405b": _llama3(126, 16384, 53248, 128, 405.8533888),
    "gpt3-175b": ModelPreset("gpt2", {
        "n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "vocab_size": 50257}, 175.0, "GPT3",
        "GPT-2's dense attention in every layer; the paper alternates dense and locally banded sparse attention"),
    "mixtral-8x7b": _mixtral(32, 4096, 14336, 32, 32768, 46.7, 12.9, "Mixtral"),
    "mixtral-8x22b": _mixtral(56, 6144, 16384, 48, 65536, 141.0, 39.0, "8x22B"),
    "qwen3-235b-a22b": ModelPreset("qwen3_moe", {
        "num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 235.0, "Qwen3", active=22.0),
    "deepseek-v3": ModelPreset("deepseek_v3", {
        "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
        "vocab_size": 129280, "max_position_embeddings": 163840}, 671.0, "DSv3",
        "without the multi-token prediction module, which the 671B do not count either", active=37.0),
    "bert-large": ModelPreset("bert", {
        "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}, 0.34,
        "BERT"),
    "t5-11b": ModelPreset("t5", {
        "num_layers": 24, "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_heads": 128, "vocab_size": 32128}, 11.0,
        "T5", "encoder and decoder both see `seq` tokens"),
    "vit-22b": ModelPreset("vit", {
        "num_hidden_layers": 48, "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48,
        "image_size": 224, "patch_size": 14, "qkv_bias": False}, 21.743, "ViT22B",
        "transformers' ViT: attention and MLP one after the other, biases in norms and no norm of queries and keys, "
        "where the paper's blocks are parallel, without these biases, and normalise queries and keys"),
    "switch-c": ModelPreset("switch_transformers", {
        "num_layers": 15, "num_decoder_layers": 15, "num_sparse_encoder_layers": 15, "num_sparse_decoder_layers": 15,
        "d_model": 2080, "d_kv": 64, "d_ff": 6144, "num_heads": 30, "num_experts": 2048, "vocab_size": 32128,
        "dropout_rate": 0.0}, 1571.0, "Switch",
        "30 heads, as in the released weights (the paper prints 32); the output head is tied to the embedding, where "
        "the released model has one of its own; no token is dropped, where the paper's experts have a capacity; "
        "encoder and decoder both see `seq` tokens"),
}
