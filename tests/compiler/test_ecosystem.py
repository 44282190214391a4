"""What people put around and inside a compiled model: generate(), PEFT, DDP, FSDP2."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import meshwright as mw

pytestmark = pytest.mark.usefixtures("eager_engine")
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).eval()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str) -> None:
    model = llama()
    fast = mw.compile(model)
    ids = torch.randint(1, 64, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(ids, **options)
    assert torch.equal(fast.generate(ids, **options), expected)
    assert not fast.report.fall_backs
    compiled = len(fast.report.graphs)
    other = torch.randint(1, 64, (2, 9))
    assert torch.equal(fast.generate(other, **options), model.generate(other, **options))
    if cache == "dynamic":
        assert len(fast.report.graphs) == compiled


def test_gpt2_with_labels_trains() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(0, 64, (2, 8))
    fast = mw.compile(model, {"input_ids": ids, "labels": ids})
    expected = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    out = fast(input_ids=ids, labels=ids)
    assert type(out).__name__ == "CausalLMOutputWithCrossAttentions"
    torch.testing.assert_close(torch.autograd.grad(out.loss, list(model.parameters())), expected)


def test_lora_adapters_train_and_the_base_does_not() -> None:
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), lora).train()
    ids = torch.randint(1, 64, (2, 8))
    fast = mw.compile(model, {"input_ids": ids, "labels": ids})
    trainable = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trainable)
    fast(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(tuple(p.grad for p in trainable), expected)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_compiled_model_inside_an_adapter() -> None:
    ids = torch.randint(1, 64, (2, 8))
    base = llama()
    fast = peft.get_peft_model(mw.compile(base), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_data_parallel_wrappers(wrapper: str) -> None:
    """Two processes; gradients equal one process's on the whole batch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", __file__, wrapper]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                         timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("gradients agree") == 2


def _worker(wrapper: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    _compare_gradients(wrapper)
    gc.collect()  # a wrapper that outlives its process group can wait for its peer for ever
    dist.barrier()
    dist.destroy_process_group()


def _compare_gradients(wrapper: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    from meshwright.compiler import backend

    backend._engine = lambda: _plain_engine
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    batch = torch.randn(4, 8)
    expected = torch.autograd.grad(model(batch).square().mean(), list(model.parameters()))
    fast = mw.compile(model)
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(fast)
    else:
        wrapped = fully_shard(fast, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    wrapped(batch[rank * 2: rank * 2 + 2]).square().mean().backward()
    for p, e in zip(wrapped.parameters(), expected, strict=True):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(grad, e)
    assert fast.report.graphs, "nothing was compiled"
    print("gradients agree", flush=True)


def _plain_engine(gm, example_inputs, *, kind, settings, report):
    report.add_graph("plain", kind, len(gm.graph.nodes))

    def run(args):
        taken = list(args)
        args.clear()
        return gm.forward(*taken)

    return run


if __name__ == "__main__":
    _worker(sys.argv[1])
