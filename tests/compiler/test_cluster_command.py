"""`meshwright cluster`: levels and times as a table and as JSON, mistakes as one line with exit code 2."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meshwright.compiler import cli
from meshwright.compiler.cluster_command import describe, group_sizes, load_cluster
from meshwright.cost_model.cluster import Cluster
from meshwright.runtime.errors import InvalidInputError


def test_json_has_levels_and_every_collective() -> None:
    done = CliRunner().invoke(cli.app, ["cluster", "8x8 h100-sxm", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [level["group_size"] for level in data["cluster"]["levels"]] == [8, 64]
    rows = data["collectives"]
    assert {row["collective"] for row in rows} == {"all-reduce", "all-gather", "reduce-scatter", "all-to-all",
                                                   "broadcast", "point-to-point"}
    assert {row["group_size"] for row in rows} == {2, 4, 8, 16, 32, 64}
    assert all(0 < row["seconds"] < 1 and math.isfinite(row["seconds"]) for row in rows)
    assert {row["size_bytes"] for row in rows} == {10**6, 10**7, 10**8, 10**9}


def test_table_names_links_and_sources() -> None:
    done = CliRunner().invoke(cli.app, ["cluster", "8x8 h100-sxm"])
    assert done.exit_code == 0, done.output
    for text in ("64 x h100-sxm", "NVLink", "InfiniBand NDR leaf", "NVIDIA H100 datasheet", "all-to-all, ms", "1 GB"):
        assert text in done.stdout


def test_mesh_shows_where_groups_lie() -> None:
    """Two nodes of eight: tp inside a node, dp of two nodes' eight pairs, each pair with one of the eight NICs."""
    done = CliRunner().invoke(cli.app, ["cluster", "2x8 h100-sxm", "--mesh", "tp=4, cp=2, dp=2,pp=1", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    layouts = {g["group"]: [(v["members_per_block"], v["blocks"], v["groups_sharing_a_block"]) for v in g["levels"]]
               for g in data["groups"]}
    assert layouts == {"tp 4": [(4, 1, 2), (4, 1, 4)], "cp 2": [(2, 1, 4), (2, 1, 8)], "dp 2": [(1, 2, 8), (2, 1, 8)]}
    assert {row["group"] for row in data["collectives"]} == set(layouts)
    assert [level["level"] for level in data["groups"][0]["levels"]] == ["NVLink", "InfiniBand NDR leaf"]
    shown = CliRunner().invoke(cli.app, ["cluster", "2x8 h100-sxm", "--mesh", "dp=16"]).stdout
    assert "dp 16" in shown and "8 x 2, 1" in shown


@pytest.mark.parametrize(("mesh", "message"), [
    ("tp=8,dp=3", "has 24 ranks; expected the cluster's 16"),
    ("tp=8,tp=2", "the mesh 'tp=8,tp=2'; expected every axis"),
    ("tp8,dp=2", "expected every axis once with its degree"), ("", "the mesh ''; expected"),
    ("tp=0,dp=2", "degree of tp is 0"), ("tp=-8,dp=2", "expected every axis"),
    ("tp=" + "9" * 5000, "expected every axis")])
def test_bad_meshes(mesh: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        describe("2x8 a100-80", mesh)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_wrong_unit_is_one_line_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text("meshwright_cluster: 1\ndevice: a100-80\nnodes: 1\ngpus_per_node: 4\nlinks:\n- {name: NVLink, "
                    "joins_gpus: 4, latency_us: 3.4, bandwidth_gb_per_s: 300 Gb}\n")
    monkeypatch.setattr("sys.argv", ["meshwright", "cluster", str(file)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert (caught.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert "links.0.bandwidth_gb_per_s is '300 Gb'; expected a bandwidth in GB/s" in err and "Traceback" not in err


def test_group_sizes_reach_from_two_to_all() -> None:
    assert group_sizes(Cluster.parse("1x1 v100")) == []
    assert group_sizes(Cluster.parse("3x8 v100")) == [2, 4, 8, 24]
    found = group_sizes(Cluster.parse("12288x8 h100-sxm"))
    assert found[:4] == [2, 4, 8, 16] and 256 in found and found[-1] == 98304 and len(found) <= 17


def test_a_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    text = "meshwright_cluster: 1\ndevice: a100-80\nnodes: 2\ngpus_per_node: 4\n"
    for name in ("ours.yml", "ours"):
        (tmp_path / name).write_text(text)
        assert load_cluster(str(tmp_path / name)) == Cluster.parse("2x4 a100-80")
    assert describe("2x4 a100-80").as_dict()["cluster"]["gpus"] == 8


@pytest.mark.parametrize(("description", "message"), [
    ("8x8 h100-smx", "unknown device 'h100-smx'"), ("missing.yaml", "missing.yaml can't be read"),
    ("", "not understood"),
    ("8x8 h100-sxm, 8x8 a100-80", "mixed GPU types"), ("x" * 5000, "not understood"), ("a\0b", "not understood"),
    ("a\0b.yaml", "can't be read")])
def test_mistakes_are_one_sentence(description: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        load_cluster(description)
    assert "\n" not in str(caught.value)


def test_the_program_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["meshwright", "cluster", "8x8 nothing"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert (caught.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("meshwright: unknown device 'nothing'; expected one of")
