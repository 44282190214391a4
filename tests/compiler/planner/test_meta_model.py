"""Models are built without data; those that can't be are refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meshwright.compiler.planner.capture_model import capture_model
from meshwright.compiler.planner.meta_model import build
from meshwright.runtime.errors import InvalidInputError, MeshwrightError, UnknownNameError

pytest.importorskip("transformers")

@pytest.mark.parametrize(("name", "kinds", "layers"), [("deepseek-v3", 4, 63), ("llama3-405b", 3, 128)])
def test_large_models_take_seconds_and_no_memory(name: str, kinds: int, layers: int) -> None:
    code = ("import json, resource\n"
            "from meshwright.compiler.planner.capture_model import capture_model\n"
            f"model = capture_model({name!r}, seq=4096)\n"
            "used = resource.getrusage(resource.RUSAGE_SELF)\n"
            "print(json.dumps([len(model.kinds), len(model.order), used.ru_maxrss, used.ru_utime + used.ru_stime]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=True)
    found_kinds, found_layers, peak_kib, processor_s = json.loads(done.stdout)
    assert (found_kinds, found_layers) == (kinds, layers)
    assert peak_kib < 2 * 2**20
    assert processor_s < 60  # imports included; processor time: wall time depends on what else runs


def test_encoder_decoder() -> None:
    model = capture({"model_type": "t5", "num_layers": 3, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4,
                     "vocab_size": 100})
    names = [model.kinds[k].name for k in model.order]
    assert names == ["embedding", "T5Block 1", "T5Block 2", "T5Block 2", "between",
                     "T5Block 3", "T5Block 4", "T5Block 4", "head"]
    assert [b.role for b in model.kinds[2].inputs] == ["chain", "carried"]  # the position bias of the first layer
    assert [b.role for b in model.kinds[5].inputs][:3] == ["chain", "carried", "carried"]  # and the encoder's output


def test_local_and_global_attention_are_two_kinds() -> None:
    model = capture({"model_type": "gemma3_text", "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100,
                     "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2})
    first, second, third, fourth = model.order[1:5]
    assert first == third != second == fourth
    assert model.kinds[second].causal_flops_forward > 0 == model.kinds[first].causal_flops_forward


def capture(data: dict[str, object]):
    from meshwright.compiler.planner.capture_model import describe
    from meshwright.compiler.planner.meta_model import _config, _from_config

    return describe(_from_config("model", _config(data, "model"), 16, 2, torch.bfloat16), seq=16, micro_batch=2)


# -- inputs ---------------------------------------------------------------------------------------
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}


def test_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for spec in (tmp_path, tmp_path / "config.json"):
        model = capture_model(str(spec), seq=16)
        assert model.name == tmp_path.name and model.count(1) == 2
    (tmp_path / "mine.json").write_text(json.dumps(CONFIG))
    assert capture_model(str(tmp_path / "mine.json"), seq=16).name == "mine"
    assert capture_model(str(tmp_path), seq=16, dtype="float32").kinds[1].parameters[0].dtype == "float32"


def test_code_that_a_configuration_names_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    build(str(tmp_path), seq=16, micro_batch=1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("[" * 10_000 + "]" * 10_000, "nested too deeply|no JSON that can be read|names no model_type"),
    ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deeply|no JSON that can be read|names no model_type"),
    ("{", "is no JSON that can be read"),
    ("[]", "names no model_type"),
    ('{"model_type": "lama"}', "unknown model_type of transformers 'lama'.*did you mean 'llama'"),
    (json.dumps({**CONFIG, "hidden_size": -32}), "hidden_size is -32; expected a positive size"),
    (json.dumps({**CONFIG, "num_hidden_layers": -1}), "num_hidden_layers is -1"),
    (json.dumps({**CONFIG, "vocab_size": float("-inf")}), "vocab_size is -inf"),
    (json.dumps({**CONFIG, "hidden_size": 10**30}), "can't build this configuration|accepts"),
    (json.dumps({**CONFIG, "hidden_size": "wide"}), "is no configuration that transformers accepts|can't build"),
    (json.dumps({**CONFIG, "num_key_value_heads": 3}), "attention of 4 query heads over 3 key and 3 value heads"),
    (json.dumps({**CONFIG, "num_attention_heads": 0}), "can't build|fails|accepts"),
])
def test_bad_configurations(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MeshwrightError, match=message):
        capture_model(str(tmp_path), seq=16)


def test_a_missing_file_and_an_unknown_name() -> None:
    with pytest.raises(InvalidInputError, match=r"no/such/config\.json: No such file"):
        build("no/such/config.json", seq=16, micro_batch=1)
    with pytest.raises(UnknownNameError, match=r"did you mean 'deepseek-v3'"):
        build("deepseek-v33", seq=16, micro_batch=1)
    with pytest.raises(UnknownNameError, match=r"unknown dtype 'fp8'"):
        build("llama3-8b", seq=16, micro_batch=1, dtype="fp8")


@pytest.mark.parametrize("sizes", [{"seq": 0, "micro_batch": 1}, {"seq": 1, "micro_batch": -1},
                                   {"seq": 1, "micro_batch": 1, "imbalance": 0.5},
                                   {"seq": 1, "micro_batch": 1, "imbalance": float("nan")}])
def test_sizes_below_one(sizes: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="expected 1 or more"):
        build("llama3-8b", **sizes)


def test_positions_that_the_model_does_not_have() -> None:
    with pytest.raises(InvalidInputError, match="seq 513 for bert-large; expected at most 512"):
        build("bert-large", seq=513, micro_batch=1)
    assert "longer than" in build("llama3-8b", seq=8193, micro_batch=1).notes[0]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hers.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def sized(seq, micro_batch):\n"
        "    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(4)))\n"
        "    return model, torch.randn(micro_batch, seq, 8)\n"
        "def reads():\n    return nn.Linear(2, int(torch.ones(1).item())), torch.ones(2)\n"
        "def number():\n    return 3\n")
    yield tmp_path
    sys.modules.pop("hers", None)


def test_a_callable_gets_the_sizes(module: Path) -> None:
    model = capture_model("hers:sized", seq=6, micro_batch=5)
    assert model.tokens == 30 and model.order == (0, 1, 2, 2, 2, 3)
    assert model.kinds[1].flops_forward == model.kinds[2].flops_forward == 2 * 30 * 8 * 32 * 2
    assert model.kinds[1].flops_backward < model.kinds[2].flops_backward  # nobody wants the gradient of the data
    assert model.kinds[1].parameters[0].dtype == "float32"


@pytest.mark.parametrize(("name", "message"), [
    ("number", "gave a int; expected a pair"), ("nothing", "has no attribute 'nothing'"),
    ("reads", "fails on the meta device"),
])
def test_callables_that_give_no_model(module: Path, name: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build(f"hers:{name}", seq=6, micro_batch=1)
