"""Clusters: presets and their levels, files, and every mistake as one sentence."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.cost_model.cluster import Cluster, ClusterError, LinkLevel
from meshwright.cost_model.cluster_file import MAX_BYTES, cluster_from_text, read_cluster
from meshwright.cost_model.link_presets import LINKS
from meshwright.cost_model.presets import PRESETS

FILE = """
meshwright_cluster: 1
name: ours
device: h100-sxm
nodes: 8
gpus_per_node: 8
reserved_memory_gib: 4
price_usd_per_gpu_hour: 2.5
power_w_per_gpu: 0.65 kW
links:
- {name: NVLink, joins_gpus: 8, latency_us: 3.4, bandwidth_gb_per_s: 450, efficiency: 82 %}
- {name: InfiniBand, joins_gpus: 64, latency_us: 0.01 ms, bandwidth_gb_per_s: 400 Gbit/s, nics_per_node: 4}
"""


def sizes(text: str) -> list[int]:
    return [level.group_size for level in Cluster.parse(text).levels]


@pytest.mark.parametrize(("text", "expected"), [
    ("1x8 h100-sxm", [8]), ("8x8 h100-sxm", [8, 64]), ("32x8 H100-SXM", [8, 256]),
    ("12288x8 h100-sxm", [8, 256, 98304]),
    ("50x8 a100-80", [8, 200, 400]), ("37x8 a100-80", [8, 296]), ("1x1 v100", [1]), ("4x1 v100", [1, 4]),
    ("18x4 gb200", [72]), ("1x72 gb200", [72]), ("36x4 gb200", [72, 144]), ("8x72 gb200", [72, 576]),
    (" 2 x 4  rtx-4090", [4, 8])])
def test_levels_of_a_short_description(text: str, expected: list[int]) -> None:
    assert sizes(text) == expected


def test_every_device_has_links_and_power() -> None:
    assert LINKS.keys() == PRESETS.keys()
    for name, links in LINKS.items():
        assert 0 < links.inner_efficiency <= 1 and 100 < links.power_w < 2000 and links.source
        assert 1e9 < links.nic_bandwidth_bytes_per_s <= links.inner_bandwidth_bytes_per_s < 1e12
        assert Cluster.parse(f"64x8 {name}").levels[0].name == links.inner_name
    assert LINKS["rtx-4090"].inner_name == "PCIe Gen4"


def test_published_numbers() -> None:
    nvlink, nic = Cluster.parse("8x8 h100-sxm").levels
    assert (nvlink.bandwidth_bytes_per_s, nvlink.latency_s, nvlink.nics_per_node) == (450e9, 3.4e-6, None)
    assert (nic.bandwidth_bytes_per_s, nic.latency_s, nic.nics_per_node) == (50e9, 14e-6, 8)
    assert Cluster.parse("8x8 h100-96-hbm2e").power_w == 500 and Cluster.parse("8x8 h100-sxm").power_w == 700


def test_this_cpu() -> None:
    cluster = Cluster.parse("1x2 cpu")
    assert cluster.device.kind == "cpu" and cluster.gpus == 2 and cluster.power_w is None
    assert 1e6 < cluster.levels[0].bandwidth_bytes_per_s < cluster.device.memory_bandwidth_bytes_per_s


def test_memory_and_nic_shares() -> None:
    cluster = Cluster.parse("8x8 h100-pcie")
    assert replace(cluster, reserved_memory_bytes=4e9).usable_memory_bytes == 79.11 * 2**30 - 4e9
    assert cluster.ports(1) == 4
    assert cluster.bandwidth_per_gpu_bytes_per_s(1) == pytest.approx(50e9 * 0.95 / 2)
    assert json.loads(json.dumps(cluster.as_dict(), allow_nan=False))["levels"][1]["nics_per_node"] == 4


def test_needs_no_torch() -> None:
    code = ("import sys, meshwright.cost_model.cluster_file as f, meshwright.cost_model.collectives\n"
            "f.Cluster.parse('12288x8 h100-sxm'); print('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(("text", "message"), [
    ("8x8 h100", r"unknown device 'h100'; expected one of a100-80, .*\(nearest: h100-sxm, h100-96-hbm2e, h100-pcie\)"),
    ("8x8 h10-sxm", r"nearest: h100-sxm"),
    ("8x8 h100-sxm + 4x8 a100-80", r"mixed GPU types \(h100-sxm, a100-80\)"),
    ("8x8 h100-sxm,v100", r"mixed GPU types \(h100-sxm, v100\)"),
    ("h100-sxm", "'h100-sxm' is not understood; expected nodes x GPUs per node"),
    ("", "'' is not understood"), ("8x8", "'8x8' is not understood"), ("-1x8 v100", "'-1x8 v100' is not understood"),
    ("1.5x8 v100", "is not understood"), ("9" * 5000 + "x8 v100", "is not understood"),
    ("0x8 v100", "nodes is 0; expected a whole number of at least 1"), ("8x0 v100", "gpus_per_node is 0"),
    ("999999999x8 v100", "are 7999999992 GPUs; expected at most 16777216"),
    ("2x80 gb200", "nodes of 80 GPUs; expected at most the 72"), (None, "a cluster of type NoneType")])
def test_bad_descriptions(text: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as caught:
        Cluster.parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(("change", "message"), [
    ({"latency_s": math.nan}, "latency_s is nan"), ({"bandwidth_bytes_per_s": -1.0}, "bandwidth_bytes_per_s is -1"),
    ({"bandwidth_bytes_per_s": math.inf}, "is inf; expected a finite"),
    ({"efficiency": 1.5}, "efficiency is 1.5; expected at"),
    ({"group_size": 0}, "group_size is 0"), ({"nics_per_node": 0}, "nics_per_node is 0"),
    ({"group_size": 60}, "joins 60 GPUs; expected all 64")])
def test_bad_levels(change: dict[str, float], message: str) -> None:
    cluster = Cluster.parse("8x8 a100-80")
    with pytest.raises(ClusterError, match=message):
        replace(cluster, levels=(cluster.levels[0], replace(cluster.levels[1], **change)))


@pytest.mark.parametrize(("levels", "message"), [
    ([("a", 1.0, 3, None), ("b", 1.0, 64, 8)], "joins 64 GPUs; expected a multiple of 3"),
    ([("a", 1.0, 8, None), ("b", 2.0, 64, 8)], "'b' around 'a' is faster"),
    ([("a", 2.0, 8, None), ("b", 1.0, 32, 8), ("c", 1.0, 64, None)], "'c' around 'b' has no NICs"),
    ([("a", 1.0, 4, None), ("b", 1.0, 64, 8)], "expected them around whole nodes of 8"),
    ([("a", 1.0, 64, 8)], "'a' is innermost and has NICs")])
def test_levels_that_do_not_fit(levels: list[tuple[str, float, int, int | None]], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        replace(Cluster.parse("8x8 a100-80"), levels=tuple(LinkLevel(n, 1e-6, b, g, k) for n, b, g, k in levels))


def test_bad_numbers_of_a_cluster() -> None:
    cluster = Cluster.parse("1x8 a100-40")
    for change, message in (({"reserved_memory_bytes": 43e9}, "less than the device's"),
                            ({"power_w": -1.0}, "power_w is -1"),
                            ({"reserved_memory_bytes": math.nan}, "reserved memory is nan"),
                            ({"price_usd_per_gpu_hour": math.nan}, "price_usd_per_gpu_hour is nan")):
        with pytest.raises(ClusterError, match=message):
            replace(cluster, **change)


def test_only_the_innermost_switch_adds_up() -> None:
    inner, outer = Cluster.parse("8x8 h100-sxm").levels
    assert inner.in_switch_efficiency == 0.85 and Cluster.parse("8x8 a100-80").levels[0].in_switch_efficiency is None
    with pytest.raises(ClusterError, match="leaf' has in_switch_efficiency; expected it on the innermost"):
        replace(Cluster.parse("8x8 h100-sxm"), levels=(inner, replace(outer, in_switch_efficiency=0.9)))
    with pytest.raises(ClusterError, match="in_switch_efficiency is 1.5; expected at most 1"):
        replace(inner, in_switch_efficiency=1.5)


# -- files -----------------------------------------------------------------------------------------
def test_file(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(FILE)
    cluster = read_cluster(tmp_path / "ours.yaml")
    assert (cluster.name, cluster.gpus, cluster.device) == ("ours", 64, PRESETS["h100-sxm"])
    assert (cluster.reserved_memory_bytes, cluster.price_usd_per_gpu_hour, cluster.power_w) == (4 * 2**30, 2.5, 650)
    assert cluster.levels[0].efficiency == pytest.approx(0.82)
    assert cluster.levels[1].latency_s == pytest.approx(1e-5)
    assert replace(cluster.levels[1], latency_s=1e-5) == LinkLevel("InfiniBand", 1e-5, 50e9, 64, 4)


def test_the_documented_file_has_three_levels() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cost-model.md").read_text()
    block = page[page.index("    meshwright_cluster: 1"):].split("\n\n")[0]
    cluster = cluster_from_text(textwrap.dedent(block))
    assert [level.name for level in cluster.levels] == ["NVLink", "pod", "between pods"]
    assert cluster.bandwidth_per_gpu_bytes_per_s(2) == 12.5e9 and cluster.levels[0].in_switch_efficiency == 0.85


def test_short_file_takes_the_usual_links_and_json_is_yaml() -> None:
    document = {"meshwright_cluster": 1, "device": "b200", "nodes": 2, "gpus_per_node": 8}
    assert cluster_from_text(json.dumps(document)) == Cluster.parse("2x8 b200")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("h100-sxm", "h100-smx", r"unknown device 'h100-smx'.*nearest: h100-sxm"),
    ("h100-sxm", "[h100-sxm, a100-80]", r"^mixed GPU types \(h100-sxm, a100-80\)"),
    ("h100-sxm", "h100-sxm and v100", r"^mixed GPU types \(h100-sxm, v100\)"),
    ("h100-sxm", "[h100-sxm]", "device is of type list; expected text"),
    ("per_s: 450", "per_s: 900 GB", r"links.0.bandwidth_gb_per_s is '900 GB'; expected a bandwidth in GB/s.*Gbit/s"),
    ("per_s: 450", "per_s: 450 Gb/s", "is '450 Gb/s'; expected a bandwidth"),
    ("per_s: 450", "per_s: .nan", "'NVLink': bandwidth_bytes_per_s is nan; expected a finite number above 0"),
    ("per_s: 450", "per_s: nan", "is 'nan'; expected a bandwidth"),
    ("per_s: 450", "per_s: .inf", "bandwidth_bytes_per_s is inf"),
    ("per_s: 450", "per_s: -450", "bandwidth_bytes_per_s is -4.5e"),
    ("per_s: 450", "per_s: 0", "bandwidth_bytes_per_s is 0; expected a finite number above 0"),
    ("per_s: 450", "per_s: true", "is True; expected a bandwidth"),
    ("per_s: 450", "per_s:", "is empty; expected a bandwidth"),
    ("per_s: 450", "per_s: " + "9" * 400, "is too large; expected a bandwidth"),
    ("latency_us: 3.4", "latency_us: 3.4 GB/s", "latency_us is '3.4 GB/s'; expected a time in µs"),
    ("per_s: 450", "per_s: 450e9", r"is 4.5e\+11 GB/s; expected 0.001 to 100000 GB/s: is the unit right\?"),
    ("latency_us: 3.4", "latency_us: 3.4e-6", r"is 3.4e-06 us; expected 0.01 to 1e\+06 us: is the unit right\?"),
    ("reserved_memory_gib: 4", "reserved_memory_gib: 4000000000", "is 4e.09 GiB; expected 0.001 to 100000 GiB"),
    ("latency_us: 3.4", "latency: 3.4", "links.0.latency_us is missing"),
    ("nodes: 8", "nodes: 8\nnode: 3", r"unknown field 'node'; expected one of meshwright_cluster, name, device"),
    ("nodes: 8", "nodes: 8.5", "nodes is 8.5; expected a whole number"),
    ("nodes: 8", "nodes: 0", "nodes is 0; expected"),
    ("nodes: 8", "nodes: '8'", "nodes is '8'; expected a whole number"), ("nodes: 8", "", "nodes is missing"),
    ("nodes: 8", "nodes: 8\nnodes: 9", "the field 'nodes' is given twice"),
    ("joins_gpus: 8", "joins_gpus: 8, joins_gpus: 9", "the field 'joins_gpus' is given twice"),
    ("reserved_memory_gib: 4", "reserved_memory_gib: 90", "the reserved memory is 9.66.*less than the device's 8.49"),
    ("cluster: 1", "cluster: 2", "meshwright_cluster is 2; expected 1, the version"),
    ("cluster: 1", "cluster: true", "meshwright_cluster is True; expected 1"),
    ("meshwright_cluster: 1", "", "no field meshwright_cluster; expected 1"),
    ("name: ours", "name: &a ours", "anchor or alias"),
    ("name: ours", "name: !!python/object/apply:os.system [ls]", "not a YAML document: could not"),
    ("name: ours", "name: " + "[" * 10_000 + "]" * 10_000, "nested deeper than 8 levels"),
    ("name: ours", "name: " + "{a: " * 10_000 + "}" * 10_000, "nested deeper than 8 levels"),
    ("name: ours", "name: [", "not a YAML document"), ("name: ours", "? [a]\n: b", "not a YAML document"),
    ("name: ours", "--- 3", "not a YAML document"), (FILE, "3", "the document is 3"),
    (FILE, "", "the document is empty"),
    (FILE, "[]", "the document is of type list"), (FILE, "\x00", "not a YAML document")])
def test_bad_files(old: str, new: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as caught:
        cluster_from_text(FILE.replace(old, new, 1))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    for name, message in (("none.yaml", "none.yaml can't be read: No such file"),
                          (".", "can't be read: Is a directory"),
                          ("latin.yaml", "latin.yaml: not UTF-8 text"), ("big.yaml", "larger than 64 KiB")):
        with pytest.raises(ClusterError, match=message):
            read_cluster(tmp_path / name)
