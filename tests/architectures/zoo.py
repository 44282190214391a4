"""Hugging Face architectures as tiny random models: one table of (class, configuration, inputs).

Sizes are the smallest that keep every mechanism alive: two layers, grouped heads, relative positions, experts, a
window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["encoder", "decoder", "encoder-decoder", "moe", "vision", "audio", "multimodal"]
Inputs = dict[str, torch.Tensor]
BATCH, LENGTH, VOCABULARY = 2, 12, 99


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens() -> Inputs:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=_draw(0)), "attention_mask": mask}


def two_sided() -> Inputs:
    return {**tokens(), "decoder_input_ids": torch.randint(3, VOCABULARY, (BATCH, 7), generator=_draw(1))}


def image(size: int = 32) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size, generator=_draw(2))}


def image_and_text() -> Inputs:
    return {**tokens(), **image(30)()}


def waveform() -> Inputs:
    return {"input_values": torch.randn(BATCH, 800, generator=_draw(3))}


def spectrogram() -> Inputs:
    return {
        "input_features": torch.randn(BATCH, 16, 40, generator=_draw(4)),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (BATCH, 5), generator=_draw(5)),
    }


def patches() -> Inputs:
    return {"input_values": torch.randn(BATCH, 40, 16, generator=_draw(6))}


BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 32,
    "patch_size": 8,
}
WAVE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": VOCABULARY,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}
NO_DROPOUT = (
    "dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "activation_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "hidden_dropout",
    "dropout_rate",
    "drop_path_rate",
    "feat_proj_dropout",
    "final_dropout",
    "layerdrop",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "classifier_dropout",
    "qa_dropout",
    "seq_classif_dropout",
    "embedding_dropout",
    "attn_dropout",
    "ffn_dropout",
    "residual_dropout",
)


@dataclass(frozen=True)
class Architecture:
    """`model` is a class of transformers; its configuration class is the model's own."""

    name: str
    kind: Kind
    model: str
    config: Mapping[str, Any]
    inputs: Callable[[], Inputs]

    def __str__(self) -> str:
        return self.name

    def build(self, *, dropout: bool = False) -> nn.Module:
        """The model in train mode with seeded weights, without dropout unless asked."""
        import transformers

        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        values = dict(self.config)
        if not dropout:
            known = vars(model_class.config_class())
            values.update({n: 0.0 for n in NO_DROPOUT if n in known and n not in values})
        config = model_class.config_class(**values)
        return model_class(config).train()


def _a(name: str, kind: Kind, model: str, config: Mapping[str, Any], inputs: Callable[[], Inputs]) -> Architecture:
    return Architecture(name, kind, model, config, inputs)


ARCHITECTURES: tuple[Architecture, ...] = (
    # encoders
    _a("bert", "encoder", "BertModel", BERT, tokens),
    _a("roberta", "encoder", "RobertaModel", {**BERT, "pad_token_id": 0}, tokens),
    _a(
        "distilbert",
        "encoder",
        "DistilBertModel",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 37,
            "max_position_embeddings": 64,
        },
        tokens,
    ),
    _a("albert", "encoder", "AlbertModel", {**BERT, "embedding_size": 16}, tokens),
    _a("electra", "encoder", "ElectraModel", {**BERT, "embedding_size": 16}, tokens),
    _a(
        "deberta-v2",
        "encoder",
        "DebertaV2Model",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        tokens,
    ),
    _a("mpnet", "encoder", "MPNetModel", {**BERT, "pad_token_id": 0}, tokens),
    _a(
        "modernbert",
        "encoder",
        "ModernBertModel",
        {
            **BERT,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        tokens,
    ),
    _a(
        "funnel",
        "encoder",
        "FunnelModel",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 37,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
        tokens,
    ),
    _a("squeezebert", "encoder", "SqueezeBertModel", {**BERT, "embedding_size": 32, "intermediate_size": 64}, tokens),
    _a("xlm-roberta", "encoder", "XLMRobertaModel", {**BERT, "pad_token_id": 0}, tokens),
    # decoders
    _a("gpt2", "decoder", "GPT2LMHeadModel", GPT, tokens),
    _a(
        "gpt-neo",
        "decoder",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 4,
            "use_cache": False,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        tokens,
    ),
    _a("gptj", "decoder", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, tokens),
    _a(
        "gpt-neox",
        "decoder",
        "GPTNeoXForCausalLM",
        {**BERT, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2},
        tokens,
    ),
    _a(
        "opt",
        "decoder",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 37,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "use_cache": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        tokens,
    ),
    _a("llama", "decoder", "LlamaForCausalLM", LLAMA, tokens),
    _a("mistral", "decoder", "MistralForCausalLM", {**LLAMA, "sliding_window": 6}, tokens),
    _a("qwen2", "decoder", "Qwen2ForCausalLM", LLAMA, tokens),
    _a("qwen3", "decoder", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}, tokens),
    _a("gemma", "decoder", "GemmaForCausalLM", {**LLAMA, "head_dim": 8}, tokens),
    _a("gemma2", "decoder", "Gemma2ForCausalLM", {**LLAMA, "head_dim": 8, "sliding_window": 6}, tokens),
    _a("phi", "decoder", "PhiForCausalLM", LLAMA, tokens),
    _a(
        "falcon",
        "decoder",
        "FalconForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        tokens,
    ),
    _a(
        "bloom",
        "decoder",
        "BloomForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "use_cache": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        tokens,
    ),
    _a(
        "mpt",
        "decoder",
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "use_cache": False},
        tokens,
    ),
    _a("olmo", "decoder", "OlmoForCausalLM", LLAMA, tokens),
    _a("cohere", "decoder", "CohereForCausalLM", LLAMA, tokens),
    _a("stablelm", "decoder", "StableLmForCausalLM", LLAMA, tokens),
    # mixtures of experts
    _a(
        "mixtral",
        "moe",
        "MixtralForCausalLM",
        {**LLAMA, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
        tokens,
    ),
    _a(
        "qwen2-moe",
        "moe",
        "Qwen2MoeForCausalLM",
        {
            **LLAMA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
        tokens,
    ),
    _a(
        "olmoe",
        "moe",
        "OlmoeForCausalLM",
        {**LLAMA, "intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2},
        tokens,
    ),
    # encoder–decoders
    _a(
        "t5",
        "encoder-decoder",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
            "relative_attention_num_buckets": 8,
            "decoder_start_token_id": 0,
        },
        two_sided,
    ),
    _a("bart", "encoder-decoder", "BartModel", BART, two_sided),
    _a("mbart", "encoder-decoder", "MBartModel", BART, two_sided),
    _a("pegasus", "encoder-decoder", "PegasusModel", BART, two_sided),
    _a("marian", "encoder-decoder", "MarianModel", {**BART, "decoder_vocab_size": VOCABULARY}, two_sided),
    # vision
    _a("vit", "vision", "ViTModel", VIT, image()),
    _a("deit", "vision", "DeiTModel", VIT, image()),
    _a("beit", "vision", "BeitModel", {**VIT, "vocab_size": VOCABULARY, "use_relative_position_bias": True}, image()),
    _a(
        "swin",
        "vision",
        "SwinModel",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
        image(),
    ),
    _a("convnext", "vision", "ConvNextModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, image()),
    _a(
        "resnet",
        "vision",
        "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "bottleneck"},
        image(),
    ),
    _a("mobilenet-v2", "vision", "MobileNetV2Model", {"depth_multiplier": 0.25, "output_stride": 32}, image()),
    _a("dinov2", "vision", "Dinov2Model", VIT, image()),
    _a(
        "segformer",
        "vision",
        "SegformerModel",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        image(),
    ),
    # several modalities
    _a(
        "clip",
        "multimodal",
        "CLIPModel",
        {
            "text_config": {**BERT, "projection_dim": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
            "vision_config": {**VIT, "image_size": 30, "patch_size": 15, "projection_dim": 16},
            "projection_dim": 16,
        },
        image_and_text,
    ),
    # audio
    _a("wav2vec2", "audio", "Wav2Vec2Model", WAVE, waveform),
    _a("hubert", "audio", "HubertModel", WAVE, waveform),
    _a("wavlm", "audio", "WavLMModel", WAVE, waveform),
    _a(
        "whisper",
        "audio",
        "WhisperModel",
        {**BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 16},
        spectrogram,
    ),
    _a(
        "audio-spectrogram",
        "audio",
        "ASTModel",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "patch_size": 4,
            "max_length": 40,
            "num_mel_bins": 16,
            "frequency_stride": 4,
            "time_stride": 4,
        },
        patches,
    ),
)
BY_NAME = {a.name: a for a in ARCHITECTURES}
