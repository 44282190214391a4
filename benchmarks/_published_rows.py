"""Published training runs as inputs of the cost model, one adapter per table.

A `Run` holds what a planner would know, and nothing else: a model's configuration, the cluster, the layout, the
properties of the training stack. Fields that were not published are None: the planner picks them. `Row` puts the
measurement and the labels beside it; no label reaches a prediction.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks._published_recipes import recomputed, with_recipe
from meshwright.cost_model.model import RecomputeMode
from meshwright.cost_model.strategy import Training

DATA = Path(__file__).parent / "data" / "published_runs"
GIB = 2**30


@dataclass(frozen=True)
class Run:
    """What is known before a run. `model`: a transformers configuration as JSON. `v`, `micro_batch`, `recompute`: None
    where not published. `imbalance`: rows of the busiest GPU's experts over the mean."""

    model: str
    seq: int
    gpu: str
    nodes: int
    gpus_per_node: int
    global_batch: int
    training: Training
    micro_batch: int | None = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    v: int | None = 1
    zero: int = 0
    recompute: RecomputeMode | None = "none"

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)


@dataclass(frozen=True)
class Row:
    """A run with what was measured. `table`, `family`, `precision`, `tags` are for reports and splits only."""

    run: Run
    table: str
    source: str
    family: str
    precision: str
    moe: bool
    step_s: float | None = None
    static_bytes: float | None = None
    peak_bytes: float | None = None
    generation: str = ""

    @property
    def complete(self) -> bool:
        """Whether every field that decides the time was published."""
        return None not in (self.run.micro_batch, self.run.v, self.run.recompute)


@dataclass(frozen=True)
class Excluded:
    """A row that is not predicted, and the rule that says so."""

    table: str
    rule: str


def all_rows() -> tuple[list[Row], list[Excluded]]:
    """Every row of every table: as a run, or excluded by a rule."""
    rows: list[Row] = []
    excluded: list[Excluded] = []
    for adapt in (_megatron_2021, _llmfoundry, _torchtitan, _simumax, _bridge):
        for made in adapt():
            (rows if isinstance(made, Row) else excluded).append(made)  # type: ignore[arg-type]
    return rows, excluded


def _read(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _json(**config: Any) -> str:
    return json.dumps(config, sort_keys=True)


# -- models from their public dimensions ----------------------------------------------------------
def llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int = 8, vocabulary: int = 128256) -> str:
    return _json(model_type="llama", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn,
                 num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
                 max_position_embeddings=1 << 18, rms_norm_eps=1e-5)


def gpt(layers: int, hidden: int, heads: int, seq: int, vocabulary: int, dropout: float, tied: bool = True) -> str:
    return _json(model_type="gpt2", n_layer=layers, n_embd=hidden, n_head=heads, n_positions=seq, vocab_size=vocabulary,
                 activation_function="gelu", attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout,
                 tie_word_embeddings=tied)


LLAMA3 = {"8b": llama(32, 4096, 14336, 32), "70b": llama(80, 8192, 28672, 64)}
MPT = {  # llm-foundry's scripts/train/yamls/pretrain: layers, width, heads
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "760m": (24, 1536, 12), "1b": (24, 2048, 16), "3b": (32, 2560, 20),
    "7b": (32, 4096, 32), "13b": (40, 5120, 40), "30b": (48, 7168, 56), "70b": (80, 8192, 64)}
QWEN3_30B = _json(
    model_type="qwen3_moe", num_hidden_layers=48, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], vocab_size=151936, max_position_embeddings=40960)
QWEN3_235B = _json(
    model_type="qwen3_moe", num_hidden_layers=94, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
    num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], vocab_size=151936, max_position_embeddings=40960)
GPT_OSS_120B = _json(  # in turn layers that see 128 tokens and all; with fused attention
    every_other_window=128, model_type="qwen3_moe", num_hidden_layers=36, hidden_size=2880, intermediate_size=2880,
    moe_intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_experts=128,
    num_experts_per_tok=4, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], vocab_size=201088,
    max_position_embeddings=131072)
DEEPSEEK_V3 = _json(
    model_type="deepseek_v3", num_hidden_layers=61, hidden_size=7168, intermediate_size=18432,
    moe_intermediate_size=2048, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1,
    num_experts_per_tok=8, n_group=8, topk_group=4, first_k_dense_replace=3, vocab_size=129280,
    max_position_embeddings=163840)


# -- stacks ---------------------------------------------------------------------------------------
# What a framework's documentation says about its own defaults, as inputs.
MEGATRON_2021 = Training(fusion="kernels", flash_attention=False, overlap_gradients=False, prefetch_parameters=False,
                         gradient_bytes=4, reduce_bytes=4, sequence_parallel=False)
MEGATRON_CORE = Training(fusion="kernels", gradient_bytes=4, reduce_bytes=4, attention_kernel="cudnn")
FSDP1 = Training(parameter_bytes=4, gradient_bytes=4, master_bytes=0, reduce_bytes=4, fusion="none", fused_loss=True,
                 attention_kernel="triton")  # fused: `loss_fn` of llm-foundry's ComposerMPTCausalLM, by default
TORCHTITAN = Training(parameter_bytes=4, gradient_bytes=4, master_bytes=0, reduce_bytes=4, fusion="compiled",
                      attention_kernel="flash-2", selective_every=2)  # its policy: "except every second mm"


def _megatron_2021() -> Iterator[Row | Excluded]:
    """Published: TFLOP/s with 96·B·s·l·h²·(1 + s/6h + V/16lh) FLOPs a step (Narayanan et al., SC 2021, equation 3)."""
    for name in ("megatron_a100_2021.csv", "megatron_a100_jan2021.csv"):
        for r in _read(name):
            layers, hidden, heads = int(r["layers"]), int(r["hidden"]), int(r["heads"])
            gpus, batch, mp = int(r["gpus"]), int(r["global_batch"]), int(r["model_parallel"])
            seq, vocabulary = int(r.get("seq") or 2048), int(r.get("vocab") or 51200)
            tp = min(8, mp)
            flops = 96 * batch * seq * layers * hidden**2 * (
                1 + seq / (6 * hidden) + vocabulary / (16 * layers * hidden))
            training = replace(MEGATRON_2021, software=f"megatron-2021-{'01' if 'jan' in name else '04'}",
                               software_year=2021.0 if "jan" in name else 2021.3)
            yield Row(Run(gpt(layers, hidden, heads, seq, vocabulary, 0.1), seq, "a100-80", gpus // 8, 8, batch,
                          training, None, tp, mp // tp, v=None if mp > tp else 1, recompute="full"),
                      name, "megatron-2021", "gpt", "bf16", False,
                      flops / (float(r["achieved_tflops_per_gpu"]) * 1e12 * gpus), generation=name)


def _llmfoundry() -> Iterator[Row | Excluded]:
    """Per-GPU token rates are published to four digits, steps and samples to fewer."""
    name = "llmfoundry_mpt.csv"
    for r in _read(name):
        layers, hidden, heads = MPT[r["Model"]]
        seq, gpus = int(r["SeqLen (T)"]), int(r["# GPUs"])
        gpu = {"h100_80gb": "h100-sxm", "a100_80gb": "a100-80", "a100_40gb": "a100-40"}[r["GPU"]]
        pure, fp8 = r["MP Mode"] == "PURE", r["Precision"] == "amp_fp8"
        training = replace(FSDP1, software="composer-2023", software_year=2023.5, reduce_bytes=2 if pure else 4,
                           fp8_recipe="delayed" if fp8 else "")
        batch, micro_batch = int(r["GlobalBatchSize"]), int(r["MicroBatchSize"])
        if batch != gpus * micro_batch * int(r["GradAccum"]):
            yield Excluded(name, "batch is not GPUs · micro-batch · accumulation")
            continue
        yield Row(Run(gpt(layers, hidden, heads, seq, 50368, 0.0), seq, gpu, gpus // 8, 8, batch, training, micro_batch,
                      zero=3 if r["Sharding Strategy"] == "FULL_SHARD" else 2,
                      recompute="full" if r["Activation Checkpointing"] == "True" else "none"),
                  name, "llm-foundry", "mpt", "fp8" if fp8 else "bf16", False,
                  batch * seq / (float(r["Throughput (T/s/GPU)"]) * gpus), generation="2023")


def _torchtitan() -> Iterator[Row | Excluded]:
    name = "torchtitan.csv"
    recipes = {"bf16": "", "float8": "tensorwise", "float8_tensorwise": "tensorwise", "float8_rowwise": "rowwise"}
    for r in _read(name):
        gpus, seq, tp = int(r["gpus"]), int(r["seq"]), int(r["tp"])
        gpu = "h200" if r["gpu"] == "H200" else "h100-96-hbm2e"
        training = replace(TORCHTITAN, software="torchtitan", fp8_recipe=recipes[r["precision"]],
                           software_year=2024.9 if "202412" in r["source"] else 2025.4,
                           async_tp=r["extra"].lower() == "asynctp",
                           gather_bytes=1 if gpu == "h200" else 2)  # its page: enable_fsdp_float8_all_gather
        size = "8b" if r["model"].endswith("8B") else "70b"
        yield Row(Run(LLAMA3[size], seq, gpu, gpus // 8, 8, int(r["global_batch"]), training, int(r["local_batch"]), tp,
                      int(r["pp"]), int(r["cp"]), zero=3,
                      recompute="full" if r["activation_ckpt"] == "full" else "selective"),
                  name, "torchtitan", "llama3", "fp8" if training.fp8_recipe else "bf16", False,
                  int(r["global_batch"]) * seq / (float(r["tps_per_gpu"]) * gpus),
                  peak_bytes=float(r["memory_GiB"]) * GIB if r["memory_GiB"] else None, generation=r["source"][-60:])


def _simumax() -> Iterator[Row | Excluded]:
    name = "simumax_b200.csv"
    for r in _read(name):
        model = llama(int(r["layers"]), int(r["hidden"]), int(r["ffn"]), int(r["heads"]), int(r["kv_heads"]),
                      int(r["vocab"]))
        dp, m, b = int(r["dp"]), int(r["num_microbatches"]), int(r["microbatch"])
        seq = int(r["seq"].split()[0])
        # run_pretrain_llama3.sh of SimuMax passes neither --overlap-grad-reduce nor --overlap-param-gather
        training = replace(MEGATRON_CORE, software="megatron-core", software_year=2025.7, overlap_gradients=False,
                           prefetch_parameters=False)
        yield Row(Run(model, seq, "b200", 1, 8, dp * m * b, training, b, int(r["tp"]), int(r["pp"]), int(r["cp"]),
                      zero=1),
                  name, "simumax", r["model"], "bf16", False, float(r["real_step_ms"]) / 1e3,
                  peak_bytes=float(r["real_alloc_GiB"]) * GIB, generation="v1.2")


BRIDGE_MODELS = {"LLAMA3_8B": ("llama3", LLAMA3["8b"]), "LLAMA3_70B": ("llama3", LLAMA3["70b"]),
                 "Qwen3_30B_a3B": ("qwen3", QWEN3_30B), "Qwen3_235B_a22B": ("qwen3", QWEN3_235B),
                 "GPT OSS 120B": ("gpt-oss", GPT_OSS_120B), "DeepSeekV3": ("deepseek", DEEPSEEK_V3),
                 "DeepSeekV3 (w/o MTP)": ("deepseek", DEEPSEEK_V3),
                 "DeepSeekV3 (dropless)": ("deepseek", DEEPSEEK_V3)}
BRIDGE_GPUS = {"DGX-H100": ("h100-sxm", 8), "DGX-B200": ("b200", 8), "DGX-GB200": ("gb200", 4)}
BRIDGE_RECIPES = {"BF16": "", "FP8": "tensorwise", "FP8-CS": "tensorwise", "FP8-CS (FP8-MX)": "tensorwise",
                  "MXFP8": "mxfp8", "FP8-MX": "mxfp8"}


def _bridge() -> Iterator[Row | Excluded]:
    name = "megatron_bridge.csv"
    for r in _read(name):
        if r["section"] != "Pre-Training Performance":
            yield Excluded(name, "fine-tuning")
        elif r["model"] not in BRIDGE_MODELS:
            yield Excluded(name, "a model without public dimensions here, with token dropping or a second loss")
        elif r["system"] not in BRIDGE_GPUS:
            yield Excluded(name, f"no preset of the device ({r['system']})")
        elif r["precision"] not in BRIDGE_RECIPES:
            yield Excluded(name, "NVFP4" if r["precision"] else "precision not stated")
        else:
            yield _bridge_row(r)


def _bridge_row(r: dict[str, str]) -> Row:
    family, model = BRIDGE_MODELS[r["model"]]
    gpu, per_node = BRIDGE_GPUS[r["system"]]
    number = {k: int(r[k].split()[0]) if r[k] not in ("", "n/a") else 1 for k in ("tp", "pp", "cp", "vp", "ep", "fsdp")}
    gpus, moe = int(r["gpus"]), family not in ("llama3",)
    recipe = BRIDGE_RECIPES[r["precision"]]
    training = replace(MEGATRON_CORE, fp8_recipe=recipe, software=f"nemo-{r['container'][:2]}",
                       software_year=2025.8 if r["container"].startswith("25") else 2026.3,
                       async_tp=number["tp"] > 1 and not moe)
    size = next((word.lower() for word in r["model"].replace(" ", "_").split("_") if word[:1].isdigit()), "")
    run = Run(model, int(r["seq"]), gpu, gpus // per_node, per_node, int(r["gbs"]),
              with_recipe(training, family, size, gpu, r["container"], number["ep"]), int(r["mbs"]),
              number["tp"], number["pp"], number["cp"], number["ep"] if moe else 1, 1, number["vp"],
              3 if r["fsdp"] not in ("", "0") else 1, recomputed(family, size, gpu))
    return Row(run, "megatron_bridge.csv", "megatron-bridge", family, "fp8" if recipe else "bf16", moe,
               run.global_batch * run.seq / (float(r["tokens_s_gpu"].split()[0]) * gpus), generation=r["container"])
