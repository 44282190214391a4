"""How a layout from another trainer trains (formats, optimizer, fusion, attention) as the cost model's `Training`.

    training, not_priced = training_of(layout)

Bytes per parameter follow the trainer's own memory layout: torchtitan computes with casts of the sharded parameters
(kept in `training.dtype`); Megatron-LM and DeepSpeed keep parameters in the dtype of products and a float32 copy in the
optimizer. What the cost model knows no price of is priced as the nearest thing it knows, and named.
"""

from __future__ import annotations

from dataclasses import replace

from ...cost_model.strategy import OPTIMIZER_STATE_BYTES, Training
from .foreign import Layout

OPTIMIZERS = {"adam": "adamw", "fusedadam": "adamw", "adamw8bit": "adamw-8bit", "adam8bit": "adamw-8bit"}
COMPUTE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MEASURED_FP8 = ("delayed", "mxfp8", "rowwise", "tensorwise")


def training_of(layout: Layout) -> tuple[Training, tuple[str, ...]]:
    """The training of a layout, and what of it has no price of its own, in words."""
    notes = list(layout.ignored)
    optimizer = _optimizer(layout, notes)
    training = _formats(layout, optimizer, notes)
    if layout.tp > 1 and not layout.sequence_parallel:
        notes.append("activations that tensor parallelism repeats without sequence parallelism (memory as if it was "
                     "on, time as it is)")
    if layout.cp > 1 and layout.cp_kind == "all-gather":
        notes.append("context parallelism by all-gather (priced as a ring)")
    made = replace(training, fusion=layout.fusion or "none", flash_attention=layout.flash_attention,
                   async_tp=layout.async_tp, sequence_parallel=layout.sequence_parallel or layout.tp == 1,
                   overlap_gradients=layout.overlap_gradients, prefetch_parameters=layout.overlap_parameters)
    return made, tuple(notes)


def _optimizer(layout: Layout, notes: list[str]) -> str:
    name = layout.optimizer or "adamw"
    name = OPTIMIZERS.get(name, name)
    if layout.source == "megatron" and name == "sgd":
        name = "sgd-momentum"  # its --sgd-momentum is 0.9 unless said otherwise
    if name not in OPTIMIZER_STATE_BYTES:
        notes.append(f"the optimizer {name[:40]} (priced as adamw)")
        return "adamw"
    return name


def _formats(layout: Layout, optimizer: str, notes: list[str]) -> Training:
    recipe = layout.recipe
    if recipe is None:
        notes.append("a dtype of products other than bfloat16 and float32 (priced as bfloat16)")
        recipe = "bf16"
    fp8 = recipe.removeprefix("fp8-") if recipe not in COMPUTE else ""
    if fp8 and fp8 not in MEASURED_FP8:
        notes.append(f"what is special to {'' if 'fp' in fp8 else 'fp8 '}{fp8[:40]} (priced at a default efficiency)")
    compute = COMPUTE.get(recipe, "bfloat16")
    if compute == "float32":
        notes.append("activations in float32 (priced at 2 bytes an element)")
    wide = 4 if compute == "float32" else 2
    gradient = {"float32": 4, None: wide}.get(layout.gradient_dtype, 2)
    parameter, master, reduce = wide, 4 if wide == 2 else 0, gradient
    if layout.source == "torchtitan":  # gradients are reduced in float32 whatever the parameters are
        parameter, master, reduce = gradient, 0, 4
        if gradient == 2 and optimizer == "adamw":
            optimizer = "adamw-bf16"
    return Training(optimizer=optimizer, parameter_bytes=parameter, gradient_bytes=gradient,  # type: ignore[arg-type]
                    master_bytes=master, reduce_bytes=reduce, gather_bytes=wide, compute=compute, fp8_recipe=fp8)
