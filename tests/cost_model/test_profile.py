"""Profiles: what is refused, scalars that a fit finds again, and what a profile changes of a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from meshwright.cost_model.calibration import calibration_for
from meshwright.cost_model.cluster import Cluster, ClusterError
from meshwright.cost_model.cluster_file import cluster_from_text
from meshwright.cost_model.collectives import all_reduce_s, point_to_point_s
from meshwright.cost_model.group import Group
from meshwright.cost_model.machine_profile import (
    MachineProfile,
    MachineProfileError,
    OverlapPoint,
    profile_from_json,
)
from meshwright.cost_model.profile_fit import fitted_links, fitted_overlap, minimise
from meshwright.cost_model.profile_use import compute_for, device_name, profiled_cluster, use_profile

from .profiles import ALPHA_S, BACKWARD, CPU, GPU, LAUNCH_S, PLANTED, RATE, collectives, linked, profile


@pytest.fixture(scope="module")
def cpu() -> MachineProfile:
    return profile()


@pytest.fixture(scope="module")
def gpu() -> MachineProfile:
    return profile(GPU, processes=8)


# -- the document ---------------------------------------------------------------------------------
def test_a_profile_reads_back(cpu: MachineProfile) -> None:
    assert profile_from_json(cpu.to_json()) == cpu


def changed(cpu: MachineProfile, change: Callable[[Any], None]) -> str:
    data = json.loads(cpu.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d["device"].update(memory_bytes=-8e9), "device.memory_bytes is -8e+09 bytes; expected 1e+06 to"),
    (lambda d: d["device"].update(memory_bytes=8), "is the unit right?"),  # in GB
    (lambda d: d["links"][0].update(latency_s=20), "links.0.latency_s is 20 s; expected 1e-09 to 1 s: is the unit"),
    (lambda d: d["links"][0].update(bandwidth_bytes_per_s=450), "bytes/s: is the unit right?"),  # in GB/s
    (lambda d: d["device"]["peak_flops_per_s"].update(float32=989.4), "FLOP/s: is the unit right?"),  # in TFLOP/s
    (lambda d: d["compute"][0].update(memory_efficiency=70), "memory_efficiency is 70 (a fraction)"),  # in percent
    (lambda d: d["links"][0].update(latency_us=20), "unknown field 'links.0.latency_us'"),
    (lambda d: d["links"][0].update(latency_s="20 us"), "links.0.latency_s: input should be a valid number"),
    (lambda d: d.update(overlap_loss=1.5), "overlap_loss is 1.5"),
    (lambda d: d.pop("torch"), "torch is missing; expected it in every profile"),
    (lambda d: d.update(links=d["links"] * 2), "links inner, inner; expected inner, then network"),
    (lambda d: d.update(links=[]), "expected both or none"),
    (lambda d: d.update(compute=d["compute"] * 2), "compute of 2, 2 processes"),
    (lambda d: d["device"].update(name="h100-sxm"), "expected the name cpu of a CPU only"),
    (lambda d: d["device"].update(name="../x"), "device.name"),
    (lambda d: d["tables"]["products"][0].update(m=0), "tables.products.0.m"),
    (lambda d: d["tables"].update(products=[]), "tables.products"),
])
def test_what_is_no_profile_is_refused_in_one_sentence(cpu: MachineProfile, change: Any, message: str) -> None:
    with pytest.raises(MachineProfileError) as caught:
        profile_from_json(changed(cpu, change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused(cpu: MachineProfile, value: float) -> None:
    with pytest.raises(MachineProfileError):
        profile_from_json(changed(cpu, lambda d: d["device"].update(memory_bandwidth_bytes_per_s=value)))


# -- fits -----------------------------------------------------------------------------------------
def test_planted_scalars_are_found_again(cpu: MachineProfile) -> None:
    [compute] = cpu.compute
    for dtype in ("float32", "bfloat16"):
        found, attention = compute.products[dtype], compute.attention[dtype]
        assert found.efficiency == pytest.approx(PLANTED.gemm_efficiency, rel=0.05)
        assert found.depth_knee == pytest.approx(PLANTED.gemm_depth_knee, rel=0.3)
        assert found.area_knee == pytest.approx(PLANTED.gemm_area_knee, rel=0.3)
        assert attention.efficiency == pytest.approx(PLANTED.attention_efficiency, rel=0.02)
        assert attention.backward == pytest.approx(BACKWARD, rel=0.02)
        assert found.median_error < 0.03 and attention.median_error < 0.01
    assert compute.memory_efficiency == pytest.approx(PLANTED.memory_efficiency, rel=0.01)
    assert compute.kernel_s == compute.eager_op_s == PLANTED.kernel_s


def test_planted_links_are_found_again() -> None:
    launch_s, links = fitted_links(linked(2, 4), collectives(2, 4))
    inner, network = links
    assert launch_s is not None and launch_s == pytest.approx(LAUNCH_S, rel=0.3)
    assert inner.latency_s == pytest.approx(ALPHA_S, rel=0.1)
    assert network.latency_s == pytest.approx(2 * ALPHA_S, rel=0.1)
    assert inner.bandwidth_bytes_per_s == pytest.approx(RATE, rel=0.05)
    assert network.bandwidth_bytes_per_s == pytest.approx(RATE / 3, rel=0.05)
    assert [link.ranks for link in links] == [4, 8] and network.nics_per_node == 4
    assert all(link.median_error < 0.05 for link in links)


def test_one_bad_point_moves_no_link() -> None:
    points = list(collectives(1, 2))
    points[3] = points[3].model_copy(update={"seconds": 50 * points[3].seconds})
    _, [link] = fitted_links(linked(1, 2), points)
    assert link.bandwidth_bytes_per_s == pytest.approx(RATE, rel=0.1)


def test_overlap_loss_is_what_is_added() -> None:
    def point(together_s: float) -> OverlapPoint:
        return OverlapPoint(ranks=2, size_bytes=4, compute_s=0.3, communication_s=0.2, together_s=together_s)

    assert fitted_overlap([point(0.35)]) == pytest.approx(0.25)
    assert fitted_overlap([point(0.29)]) == 0 and fitted_overlap([point(0.6)]) == 1 and fitted_overlap([]) is None


def test_minimise_finds_a_minimum_from_any_start() -> None:
    x = minimise(lambda v: abs(v[0] - 3) + abs(v[1] + 7), [(0.0, 0.0), (30.0, 30.0)])
    assert x == pytest.approx((3, -7), abs=0.01)


# -- use ------------------------------------------------------------------------------------------
def test_a_gpu_profile_replaces_the_presets_scalars(gpu: MachineProfile) -> None:
    cluster = Cluster.parse("2x8 h100-sxm")
    found = use_profile(gpu, cluster, "bfloat16", "abc")
    usual = calibration_for("h100-sxm")
    assert found.calibration.gemm_efficiency == gpu.compute[0].products["bfloat16"].efficiency != usual.gemm_efficiency
    assert found.calibration.kernel_s == PLANTED.kernel_s and found.software.eager_op_s == PLANTED.kernel_s
    assert found.calibration.network_efficiency == usual.network_efficiency  # not measured
    assert found.cluster.device.memory_bytes == 85e9 and found.facts["profile"] == "abc"
    assert found.cluster.device.peak_flops_per_s["float8_e4m3fn"] == cluster.device.peak_flops_per_s["float8_e4m3fn"]
    assert found.doubts == ("the profile has no links between nodes: the preset's stand in",)


def test_collectives_take_as_long_as_measured(gpu: MachineProfile) -> None:
    """Through the calibration, as layers are priced."""
    for one, text in ((gpu, "1x8 h100-sxm"), (profile(CPU, 2), "1x2 cpu")):
        found = use_profile(one, Cluster.parse(text), "bfloat16")
        priced = found.calibration.cluster(found.cluster)
        reached = one.link("inner")
        assert reached is not None
        assert priced.levels[0].effective_bytes_per_s == pytest.approx(reached.bandwidth_bytes_per_s)
        assert priced.levels[0].latency_s == reached.latency_s
        for p in one.tables.collectives:
            if p.collective == "all-reduce" and text == "1x2 cpu":
                seconds = all_reduce_s(priced, Group.contiguous(priced, p.ranks), p.size_bytes)
                assert seconds == pytest.approx(p.seconds, rel=0.15)


def test_a_network_that_was_measured_counts() -> None:
    one = profile(CPU, 2, nodes=2)
    found = use_profile(one, Cluster.parse("2x2 cpu"), "float32")
    priced = found.calibration.cluster(found.cluster)
    network = one.link("network")
    assert network is not None and found.doubts == ()
    assert priced.levels[1].effective_bytes_per_s == pytest.approx(network.bandwidth_bytes_per_s, rel=1e-6)
    group = Group.of(priced, {"rank": 2, "node": 2}, ("rank", "node"), "node")
    assert point_to_point_s(priced, group, 1 << 24) == pytest.approx((1 << 24) / (RATE / 3), rel=0.15)


def test_a_profile_of_another_device_is_refused_by_name(cpu: MachineProfile, gpu: MachineProfile) -> None:
    with pytest.raises(MachineProfileError, match=r"of cpu \(Planted CPU\), the cluster of h100-sxm"):
        use_profile(cpu, Cluster.parse("1x8 h100-sxm"), "float32")
    with pytest.raises(MachineProfileError, match="of h100-sxm .*, the cluster of a100-80"):
        use_profile(gpu, Cluster.parse("1x8 a100-80"), "bfloat16")


def test_a_cpus_plan_depends_on_the_profile_only(cpu: MachineProfile) -> None:
    """Without one this machine is measured anew in every process, and no two plans are alike."""
    alone = profile(CPU, 1)
    for one in (cpu, alone):
        first, second = (use_profile(one, Cluster.parse("1x2 cpu"), "float32") for _ in range(2))
        assert first == second and first.cluster.device.name == "Planted CPU"
        assert first.cluster.device.memory_bytes == 4e9


def test_links_of_a_cluster_file_stay_where_none_were_measured(cpu: MachineProfile) -> None:
    text = ("meshwright_cluster: 1\ndevice: cpu\nnodes: 1\ngpus_per_node: 2\n"
            "links: [{name: mine, joins_gpus: 2, latency_us: 50, bandwidth_gb_per_s: 0.5}]")
    described = cluster_from_text(text)
    kept = use_profile(profile(CPU, 1), described, "float32")
    assert kept.cluster.levels == described.levels
    assert "the profile has no links inside a node: the preset's stand in" in kept.doubts
    assert use_profile(cpu, described, "float32").cluster.levels[0].latency_s == pytest.approx(ALPHA_S, rel=0.1)


def test_the_column_of_as_many_processes_is_read(cpu: MachineProfile) -> None:
    one, two = (cpu.compute[0].model_copy(update={"processes": n, "kernel_s": n * 1e-6}) for n in (1, 2))
    both = cpu.model_copy(update={"compute": (one, two)})
    assert [compute_for(both, n).processes for n in (1, 2, 8)] == [1, 2, 2]
    assert compute_for(cpu, 1).processes == 2
    found = use_profile(both, Cluster.parse("1x4 cpu"), "float16")
    assert found.calibration.kernel_s == 2e-6
    assert found.doubts == ("the profile has no float16 products: those of bfloat16 stand in",
                            "4 processes share the CPU, the profile measured 2",
                            "links were measured with 2 ranks, a node of the cluster has 4")


def test_a_gpu_without_a_preset_is_planned_by_its_own_name(gpu: MachineProfile) -> None:
    own = GPU.model_copy(update={"name": "nvidia-l40s", "hardware": "NVIDIA L40S"})
    one = gpu.model_copy(update={"device": own})
    made = profiled_cluster(one, "1x8 nvidia-l40s")
    assert made is not None and (made.gpus, made.device.name) == (8, "nvidia-l40s")
    assert use_profile(one, made, "bfloat16").cluster.device.peak("bfloat16") == 989.4e12
    assert profiled_cluster(one, "1x8 h100-sxm") is None and profiled_cluster(gpu, "1x8 h100-sxm") is None
    with pytest.raises(MachineProfileError, match="no links between nodes"):
        profiled_cluster(one, "2x8 nvidia-l40s")


@pytest.mark.parametrize(("hardware", "gigabytes", "name"), [
    ("NVIDIA H100 80GB HBM3", 85, "h100-sxm"), ("NVIDIA H100 PCIe", 85, "h100-pcie"), ("NVIDIA H200", 150, "h200"),
    ("NVIDIA A100-SXM4-40GB", 42, "a100-40"), ("NVIDIA A100-SXM4-80GB", 85, "a100-80"),
    ("NVIDIA A100 80GB PCIe", 85, "a100-80"), ("NVIDIA B200", 190, "b200"), ("NVIDIA GB200", 190, "gb200"),
    ("Tesla V100-SXM2-32GB", 34, "v100"), ("NVIDIA GeForce RTX 4090", 25, "rtx-4090"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 17, "nvidia-geforce-rtx-4090-laptop-gpu"),
    ("NVIDIA L40S", 48, "nvidia-l40s"), ("AMD Instinct MI300X", 200, "amd-instinct-mi300x"),
])
def test_gpus_are_known_by_what_torch_calls_them(hardware: str, gigabytes: float, name: str) -> None:
    assert device_name(hardware, gigabytes * 1e9) == name


def test_outer_levels_stay_slower_than_measured_inner_ones(gpu: MachineProfile) -> None:
    """2 GB/s inside a node, where the preset's network has 47: clusters don't take that."""
    found = use_profile(gpu, Cluster.parse("64x8 h100-sxm"), "bfloat16").cluster
    rates = [level.effective_bytes_per_s for level in found.levels]
    assert len(rates) == 3 and rates == sorted(rates, reverse=True)
    with pytest.raises(ClusterError):
        replace(found, levels=(found.levels[0], replace(found.levels[1], efficiency=1.0), found.levels[2]))
