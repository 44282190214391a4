"""Hugging Face `generate()` with dynamic and static key/value caches produces eager's tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import meshwright as mw

from ..architectures.zoo import BY_NAME, VOCABULARY, tokens

pytest.importorskip("transformers")


def decoder(name: str) -> nn.Module:
    model = BY_NAME[name].build().eval()
    model.config.use_cache = True
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def generate(model: nn.Module, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**tokens(), max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dynamic_cache(name: str) -> None:
    model = decoder(name)
    wanted = generate(model)
    compiled = mw.compile(model)
    assert isinstance(compiled, type(model))
    assert torch.equal(generate(compiled), wanted)
    assert torch.equal(generate(compiled), wanted)


def test_static_cache() -> None:
    model = decoder("llama")
    wanted = generate(model)
    compiled = mw.compile(model)
    assert torch.equal(generate(compiled, cache_implementation="static", disable_compile=True), wanted)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prompts_of_other_lengths(cache: str) -> None:
    """No fall-back; with the dynamic cache no second compilation either."""
    model = decoder("llama")
    compiled = mw.compile(model)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    graphs = []
    for length in (5, 9):
        prompt = torch.randint(1, VOCABULARY, (2, length))
        assert torch.equal(compiled.generate(prompt, **options), model.generate(prompt, **options))
        graphs.append(len(compiled.report.graphs))
    assert not compiled.report.fall_backs and graphs[0] > 0
    assert cache == "static" or graphs[0] == graphs[1]


def test_compiled_forward_under_generate() -> None:
    """The way transformers' own documentation compiles a model for generation."""
    model = decoder("llama")
    wanted = generate(model)
    model.forward = torch.compile(model.forward, backend="meshwright")
    assert torch.equal(generate(model), wanted)
