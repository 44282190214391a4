"""Layouts that others trained with fit, and what holds them is in the right category."""

from __future__ import annotations

import pytest

from meshwright.compiler.plan_price import fixed
from meshwright.compiler.planner.foreign import Layout
from meshwright.compiler.planner.plan_model import Planner
from meshwright.runtime.plan import Plan

from .planning import planner

CLUSTER = "2048x8 h100-sxm"


def priced(one: Planner, layout: Layout) -> Plan:
    plan, searched = fixed(one, layout)
    return one.writer(searched).write(plan, one.ask(), one.batch, certified=False)


@pytest.fixture(scope="module")
def llama() -> Planner:
    return planner("llama3-405b", CLUSTER, 8192, 2048)


def test_llama3_405b_as_meta_trained_it_fits(llama: Planner) -> None:
    """Table 4 and section 3.3.2 of "The Llama 3 Herd of Models" (arXiv:2407.21783): 16,384 H100 of 80 GB, tp 8, cp 1,
    pp 16, dp 128, 8,192 tokens, 16 sequences per replica; no recomputation; FSDP shards optimizer states and gradients
    and keeps the weights; gradients are summed in fp32; the first and the last stage hold a layer less."""
    layout = Layout(source="", tp=8, pp=16, dp=128, zero=2, micro_batches=16, first_blocks=7, last_blocks=7,
                    global_batch=2048, seq=8192)
    found = priced(llama, layout).predicted
    assert found.fits
    stage = found.stages[1]  # eight layers, fifteen micro-batches in flight
    gib = {name: n / 2**30 for name, n in stage.memory_bytes.items()}
    assert gib["weights"] == pytest.approx(8 * 3.2e9 * 2 / 8 / 2**30, rel=0.02)
    assert gib["gradients"] < 0.2 and gib["optimizer"] < 0.4  # cut by 128
    tokens, hidden, ffn, kv = 8192, 16384, 53248, 1024
    kept = 2 * tokens / 8 * (5 * hidden + hidden + 2 * kv + 3 * ffn)  # bf16: inputs of products, queries, keys, values
    assert gib["activations"] == pytest.approx(8 * 15 * kept / 2**30, rel=0.02)
    assert gib["allocator"] == pytest.approx(0.12 * (gib["activations"] + gib["working-set"] + gib["communication"]),
                                             rel=1e-3)
    assert sum(gib.values()) == pytest.approx(stage.peak_bytes / 2**30)
