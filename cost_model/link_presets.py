"""Published links and power of the devices in `presets.py`: what a cluster is made of besides its processors.

Sources, with what they say
  [NVLink]  Data sheets give both directions together, a direction is half: V100 300 GB/s, A100 600, H100 and H200 900,
            B200 to GB300 1800. The NVL72 datasheets: 72 GPUs in one NVLink domain, 130 TB/s (72 · 1.8). The RTX
            4090 has none; the H100 PCIe's bridge (600 GB/s) joins pairs and is an option: describe it in a file.
  [PCIe]    PCI Express base specification: 16 and 32 GT/s a lane, 128b/130b; sixteen lanes carry 31.5 GB/s (Gen4) and
            63 GB/s (Gen5) per direction. The H100 datasheet gives its card Gen5. Assumption: Gen4 for the RTX 4090.
  [topo]    NCCL 2.30.7, src/graph/topo.h, what it expects of one NVLink in GB/s: SM70 and SM80 20.0 of 25, SM90 20.6
            of 25, SM100 40.1 of 50; PCI_BW 12.0, "PCI Gen3 x16", of 15.75. Its maintainers name 370 GB/s on the H100
            (450 · 20.6 / 25; NVIDIA/nccl-tests issue 212).
  [tuning]  NCCL 2.30.7, src/graph/tuning.cc, µs of a ring's step (Simple protocol): NVLINK 3.4, PCI 5.7, NET 14.0;
            base 8.4; nvlsEfficiency 0.85 on Hopper, 0.74 on Blackwell, none before.
  [NIC]     DGX-1: four ConnectX-4 EDR, 100 Gbit/s, for eight GPUs. DGX A100 datasheet, as centres that run it quote it:
            "8x Single-Port Mellanox ConnectX-6 VPI 200Gb/s HDR InfiniBand". DGX BasePOD reference architecture, core
            components: DGX H100, H200 and B200 with eight single-port ConnectX-7, up to 400 Gbit/s each; MLPerf system
            descriptions: at least eight of 400 Gbit/s for H200 and B200, four ConnectX-7 for the four GPUs of a
            GB200 tray. Assumption: these run at 400 Gbit/s. HGX B300 and GB300 NVL72: one ConnectX-8 of 800 Gbit/s for
            each GPU (acecloud.ai/blog/nvidia-hgx-b300, vendordeep.com's report on the GB300, after NVIDIA's pages).
  [H100T]   As in `presets.py`: "400 Gb/s per GPU", "500W power limit".
  [POD]     DGX SuperPOD (RA-11333-001): "SUs of 32 DGX H100 systems each", leaf switches by rail, full bisection
            above.
  [TDP]     Maximum power in the data sheets: V100 300 W, A100 400, H100 700 and as a card 350, H200 700, RTX 4090 450;
            B200 1000 and GB200 1200 in the Blackwell datasheet; B300 1100 and GB300 1400 in [B300] of `presets.py`.

Assumptions, no document: 95 % of a NIC's line rate (packet headers), 2 µs more through a spine (two more switches),
PCIe's 12.0 of 15.75 for later generations too, NICs of PCIe servers (one for four RTX 4090, one for two H100 PCIe),
and all links of a CPU. That GeForce cards can't read each other's memory, so that NCCL copies through the host's, is
not priced.
"""

from __future__ import annotations

from dataclasses import dataclass

COLLECTIVE_LAUNCH_S = 8.4e-6  # [tuning]
NIC_LATENCY_S = 14e-6  # [tuning]
NIC_EFFICIENCY = 0.95  # assumed
SPINE_LATENCY_S = NIC_LATENCY_S + 2e-6  # assumed
NODES_PER_LEAF = 32  # [POD]
_GB = 1e9
_GBIT = 1e9 / 8


@dataclass(frozen=True)
class LinkPreset:
    """The usual links of one device. Bandwidths in bytes/s per GPU or NIC and direction; `inner_efficiency`: what
    collectives reach of the inner link, `in_switch_efficiency` as in `LinkLevel`; `domain_gpus`: how many GPUs it
    joins, 0 for those of a node; `power_w`: per GPU, 0 where unknown."""

    inner_name: str
    inner_bandwidth_bytes_per_s: float
    inner_efficiency: float
    inner_latency_s: float
    nic_name: str
    nic_bandwidth_bytes_per_s: float
    gpus_per_nic: float
    power_w: float
    source: str
    domain_gpus: int = 0
    in_switch_efficiency: float | None = None


def _nvlink(gb_per_s: float, efficiency: float, nic: str, nic_gbit_per_s: float, power_w: float, source: str, *,
            gpus_per_nic: float = 1, domain_gpus: int = 0, in_switch: float | None = None) -> LinkPreset:
    return LinkPreset("NVLink", gb_per_s * _GB, efficiency, 3.4e-6, nic, nic_gbit_per_s * _GBIT, gpus_per_nic, power_w,
                      f"{source}; {_NCCL}", domain_gpus, in_switch)  # 3.4 µs: [tuning]


def _hopper(nic: str, power_w: float, source: str) -> LinkPreset:
    return _nvlink(450, 20.6 / 25, nic, 400, power_w, source, in_switch=0.85)  # [NVLink], [topo], [NIC], [tuning]


def _blackwell(power_w: float, source: str, domain_gpus: int = 0, nic: str = "InfiniBand NDR",
               nic_gbit_per_s: float = 400) -> LinkPreset:
    return _nvlink(900, 40.1 / 50, nic, nic_gbit_per_s, power_w, source, domain_gpus=domain_gpus, in_switch=0.74)


def _pcie(name: str, gb_per_s: float, nic: str, nic_gbit_per_s: float, power_w: float, source: str, *,
          gpus_per_nic: float) -> LinkPreset:
    return LinkPreset(name, gb_per_s * _GB, 12.0 / 15.75, 5.7e-6, nic, nic_gbit_per_s * _GBIT, gpus_per_nic, power_w,
                      f"{source}; {_NCCL}")  # [topo], [tuning]


_NCCL = "NCCL 2.30.7, src/graph/topo.h and tuning.cc"
_VOLTA = _AMPERE = 20.0 / 25.0  # [topo]
_A100 = _nvlink(300, _AMPERE, "InfiniBand HDR", 200, 400, "NVIDIA A100 and DGX A100 datasheets")
_PCIE = "PCI Express base specification"

LINKS: dict[str, LinkPreset] = {  # bandwidths [NVLink] or [PCIe], NICs [NIC], watts [TDP]
    "v100": _nvlink(150, _VOLTA, "InfiniBand EDR", 100, 300, "NVIDIA V100 datasheet; DGX-1 user guide", gpus_per_nic=2),
    "a100-40": _A100,
    "a100-80": _A100,
    "h100-sxm": _hopper("InfiniBand NDR", 700, "NVIDIA H100 datasheet; DGX SuperPOD reference architecture"),
    "h100-96-hbm2e": _hopper("RoCE", 500, "torchtitan benchmarks/llama3_h100_202412_torchtitan.md; NVIDIA H100 "
                             "datasheet"),  # [H100T]
    "h100-pcie": _pcie("PCIe Gen5", 63, "InfiniBand NDR", 400, 350, f"NVIDIA H100 datasheet; {_PCIE}", gpus_per_nic=2),
    "h200": _hopper("InfiniBand NDR", 700, "NVIDIA H200 datasheet; DGX H200 user guide"),
    "b200": _blackwell(1000, "NVIDIA Blackwell datasheet; DGX BasePOD reference architecture"),
    "gb200": _blackwell(1200, "NVIDIA GB200 NVL72 datasheet", domain_gpus=72),
    "b300": _blackwell(1100, "Verda, GB300 NVL72 architecture; acecloud.ai, HGX B300", nic="InfiniBand XDR",
                       nic_gbit_per_s=800),
    "gb300": _blackwell(1400, "Verda, GB300 NVL72 architecture; NVIDIA GB300 NVL72 datasheet", domain_gpus=72,
                        nic="InfiniBand XDR", nic_gbit_per_s=800),
    "rtx-4090": _pcie("PCIe Gen4", 31.5, "Ethernet", 100, 450, f"NVIDIA Ada GPU architecture white paper; {_PCIE}",
                      gpus_per_nic=4),
}


def cpu_links(memory_bandwidth_bytes_per_s: float, processes: int) -> LinkPreset:
    """Links of `processes` on one CPU that talk through shared memory (gloo). Assumptions, except for the memory."""
    share = memory_bandwidth_bytes_per_s / 4 / processes  # every byte is copied twice, and a copy reads and writes
    return LinkPreset("shared memory", share, 1.0, 20e-6, "Ethernet", min(10 * _GBIT, share), processes, 0.0,
                      "memory bandwidth measured on this machine; the rest assumed")
