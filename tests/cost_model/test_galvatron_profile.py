"""Profile files: the fits are Galvatron's, and every bad value is refused in one sentence that names file and key."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshwright.cost_model.galvatron_profile import ProfileError, fit_line, read_profile

DATA = Path(__file__).parent / "data" / "galvatron"
COMPUTATION = "llama2-7b/computation_profiling_bf16_llama2-7b_all.json"
MEMORY = "llama2-7b/memory_profiling_bf16_llama2-7b_all.json"
ALLREDUCE = "hardware/allreduce_bandwidth_1nodes_8gpus_per_node.json"
P2P = "hardware/p2p_bandwidth_1nodes_8gpus_per_node.json"
TIMES = "hardware/sp_time_1nodes_8gpus_per_node.json"
OVERLAP = "hardware/overlap_coefficient.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA, tmp_path / "profiles"))


def test_lines_are_those_of_its_own_code() -> None:
    profile, fitted = read_profile(DATA, 8), json.loads((DATA / "golden_costs.json").read_text())["fitted"]
    for line, key in ((profile.layer_ms, "layer_forward_line_ms"), (profile.other_ms, "other_forward_line_ms")):
        assert (line.slope, line.intercept) == pytest.approx((fitted[key]["m"], fitted[key]["c"]), rel=1e-6)
    assert profile.layer_static_ms == fitted["layer_forward_static_ms"]
    assert profile.other_static_ms == fitted["other_forward_static_ms"]
    for tables, key in ((profile.allgather, "allgather_line_ms"), (profile.all2all, "all2all_line_ms")):
        for size, table in tables.items():
            assert [table.line.slope, table.line.intercept] == pytest.approx(fitted[key][str(size)], rel=1e-6)


def test_a_table_size_is_looked_up_and_others_lie_on_the_line() -> None:
    times = read_profile(DATA, 8).all2all[4]
    assert times.time_ms(64.0) == 0.3654 != times.line(64.0)
    assert times.time_ms(48.0) == times.line(48.0)


def test_least_squares_of_points_on_a_line() -> None:
    line = fit_line({1.0: 5.0, 2.0: 7.0, 4.0: 11.0})
    assert (line.slope, line.intercept) == pytest.approx((2.0, 3.0))


def set_to(*path: str) -> Callable[[Any], Callable[[Any], None]]:
    def value(new: Any) -> Callable[[Any], None]:
        def change(data: Any) -> None:
            for key in path[:-1]:
                data = data[key]
            if new is None:
                del data[path[-1]]
            else:
                data[path[-1]] = new
        return change
    return value


LAYER = set_to("layertype_0_bsz3_seq2048")
PARAMETERS = set_to("layertype_0_sp", "2048", "parameter_size")
ACTIVATION = set_to("layertype_0_sp", "2048", "tp_activation_per_bsz_dict", "4")
CHECKPOINT = set_to("layertype_0_sp", "2048", "tp_activation_per_bsz_dict", "checkpoint")
STATES = set_to("other_memory_pp_on_last_sp", "2048", "model_states", "8")


@pytest.mark.parametrize(("file", "change", "message"), [
    (COMPUTATION, LAYER(math.nan), "'layertype_0_bsz3_seq2048' is nan; expected a positive number"),
    (COMPUTATION, LAYER(-1.0), "'layertype_0_bsz3_seq2048' is -1; expected a positive number"),
    (COMPUTATION, LAYER(0), "is 0; expected a positive number"),
    (COMPUTATION, LAYER("4 ms"), "is '4 ms'; expected a number"),
    (COMPUTATION, LAYER(True), "is True; expected a number"),
    (COMPUTATION, LAYER(10**400), "is inf; expected a positive number"),
    (COMPUTATION, LAYER(10**6), "line through the forward times is not positive at 1/8 sample"),
    (COMPUTATION, set_to("layertype_1_bsz3_seq2048")(1.0), r"layer types \['0', '1'\]; expected one"),
    (COMPUTATION, set_to("layertype_0_bsz3_seq4096")(1.0), r"sequence lengths \[2048, 4096\]; expected one"),
    (COMPUTATION, lambda data: data.clear(), r"layer types \[\]; expected one"),
    (MEMORY, PARAMETERS(-3.0), "layertype_0_sp: 2048: 'parameter_size' is -3"),
    (MEMORY, PARAMETERS(None), "the key 'parameter_size' is missing"),
    (MEMORY, ACTIVATION(None), "tp_activation_per_bsz_dict: the key '4' is missing"),
    (MEMORY, CHECKPOINT(31.99), "implies a hidden size of 4094.72; give the model's own with --hidden"),
    (MEMORY, STATES(math.inf), "other_memory_pp_on_last_sp: 2048: model_states: '8' is inf"),
    (MEMORY, set_to("other_memory_pp_off_sp")([1]), "'other_memory_pp_off_sp' is a list; expected an object"),
    (MEMORY, set_to("layertype_0_sp", "2048")(None), "layertype_0_sp: the key '2048' is missing"),
    (ALLREDUCE, set_to("allreduce_size_4_consec_0")(0.0), "'allreduce_size_4_consec_0' is 0"),
    (ALLREDUCE, set_to("allreduce_size_8_consec_1")(None), "the key 'allreduce_size_8_consec_1' is missing"),
    (P2P, set_to("pp_size_4")(-2), "'pp_size_4' is -2"),
    (TIMES, set_to("all2all_size_2_64MB_time")(None), "the key 'all2all_size_2_64MB_time' is missing"),
    (TIMES, set_to("allreduce_size_2_1024MB_time")(1e4), "line through the allreduce times of 2 GPUs is negative"),
    (OVERLAP, set_to("overlap_coe")(0.9), "'overlap_coe' is 0.9; expected a number of at least 1"),
])
def test_bad_values_are_refused(folder: Path, file: str, change: Callable[[Any], None], message: str) -> None:
    data = json.loads((folder / file).read_text())
    change(data)
    (folder / file).write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=message) as error:
        read_profile(folder, 8)
    assert Path(file).name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not JSON"), ("[1]", "holds a list; expected a JSON object"), ("", "is not JSON"),
    ("[" * 10_000 + "]" * 10_000, "is nested too deeply|is not JSON|holds a list"),
    ('{"a":' * 10_000 + "1" + "}" * 10_000, "is nested too deeply|missing|layer types"),
    ('{"overlap_coe": ' + "9" * 5000 + "}", "is not JSON"),
])
def test_what_is_no_profile_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / OVERLAP).write_text(text)
    with pytest.raises(ProfileError, match=message):
        read_profile(folder, 8)
    (folder / OVERLAP).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="is not JSON"):
        read_profile(folder, 8)


def test_files_must_be_there_once(folder: Path) -> None:
    with pytest.raises(ProfileError, match="is not a folder"):
        read_profile(folder / "none", 8)
    with pytest.raises(ProfileError, match=r"no allreduce_bandwidth_\*.json for 4 GPUs .*measured: 1 × 8"):
        read_profile(folder, 4)
    shutil.copy(folder / COMPUTATION, folder / "computation_profiling_bf16_other.json")
    with pytest.raises(ProfileError, match=r"has 2 files computation_profiling_bf16_\*.json"):
        read_profile(folder, 8)


def test_gpus_must_be_a_power_of_two(folder: Path) -> None:
    for file in (ALLREDUCE, P2P, TIMES):
        (folder / file).rename(folder / file.replace("8gpus", "6gpus"))
    with pytest.raises(ProfileError, match="6 GPUs; expected a power of two"):
        read_profile(folder, 6)
