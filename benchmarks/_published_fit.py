"""Fit calibrations and software coefficients to published step times: a maximum a posteriori estimate.

Minimised: Σ over distinct runs of ρ(log(predicted / measured) / SCATTER) + Σ over parameters ((log θ - log θ₀) / σ)², ρ
quadratic up to TAIL and linear beyond (Huber). Priors are what is known without the data: data sheets, libraries'
documentation, microbenchmarks. Gauss-Newton steps in log space with numeric derivatives, a fixed number of them: no
random numbers, so the same rows give the same bytes. What was not published is chosen again after every few steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from benchmarks._published_price import placement_of, predict, price
from benchmarks._published_rows import Row, Run
from meshwright.cost_model.calibration import (
    CHIP,
    FAMILY,
    FOLDER,
    Calibration,
    Software,
    calibration_for,
    committed_software,
    file_of,
    power_share,
    transferred,
)

SCATTER, TAIL = 0.04, 2.0  # what repeats of one configuration differ by is 2.6 % in the median, 7.8 % at nine in ten
EXPERT_SCATTER = 0.15  # what is not described of runs with experts must not bend the numbers that all runs share
STEPS, ROUNDS, DELTA = 4, 2, 0.02

DEVICE_PRIORS = {  # name: (value, standard deviation of its logarithm)
    "gemm_efficiency": (0.8, 0.1),  # of a GPU whose power limit is as generous as the A100's: see `power_share`
    "gemm_depth_knee": (128.0, 0.7), "gemm_area_knee": (1.5e6, 0.7),
    # FlashAttention-2 reaches 73 % of the A100's peak forward and 63 % backward (arXiv:2307.08691, section 4.1), with
    # exponentials: products alone 0.89 and 0.67, somewhat less where masks cut blocks
    "attention_efficiency": (0.8, 0.12), "memory_efficiency": (0.85, 0.1), "kernel_s": (2e-6, 0.7),
    "inner_efficiency": (0.78, 0.15), "network_efficiency": (0.8, 0.25), "latency_factor": (1.0, 0.3),
    "overlap_loss": (0.15, 0.7)}
SOFTWARE_PRIORS = {
    "attention_backward": (0.75, 0.1), "per_year": (1.03, 0.03),
    "eager_op_s": (5e-6, 0.5), "async_tp": (0.8, 0.3),
    "expert_overlap": (0.8, 0.3), "expert_pass_s": (1e-3, 1.0), "expert_product": (0.8, 0.2),
    # what limits products in bf16, power, limits them in fp8 as much
    "fp8.tensorwise": (0.95, 0.1), "fp8.rowwise": (0.7, 0.3), "fp8.mxfp8": (0.95, 0.1), "fp8.delayed": (0.95, 0.1),
    # FlashAttention in Triton against FlashAttention-2: 1.3 to 1.5 times slower forward, 2 times backward (Dao,
    # arXiv:2307.08691, section 4.1)
    "attention.triton": (0.71, 0.1), "attention.flash-2": (1.0, 0.1), "attention_backwards.triton": (0.71, 0.1),
    **{f"generation.{name}": (1.0, 0.07) for name in (
        "megatron-2021-04", "megatron-2021-01", "composer-2023", "torchtitan", "nemo-25", "nemo-26", "megatron-core")}}


@dataclass(frozen=True)
class Fitted:
    """Calibrations by device and the software's coefficients."""

    calibrations: Mapping[str, Calibration]
    software: Software
    parameters: int

    def of(self, gpu: str) -> Calibration:
        """A device's calibration, else its family's, else the priors'."""
        found = self.calibrations.get(chip(gpu)) or self.calibrations.get(FAMILY.get(chip(gpu), ""))
        return transferred(found, chip(gpu)) if found else _calibration(gpu, {})


def fit(rows: Sequence[Row]) -> Fitted:
    """Fit everything that `rows` say something about; the rest stays at its prior."""
    runs, measured = distinct(rows)
    devices = sorted({chip(r.gpu) for r in runs})
    names = [*(f"{d}/{n}" for d in devices for n in DEVICE_PRIORS), *SOFTWARE_PRIORS]
    prior = np.array([math.log(_prior(n)[0]) for n in names])
    width = np.array([_prior(n)[1] for n in names])
    theta = prior.copy()
    for _ in range(ROUNDS):
        made = _fitted(names, theta)
        filled = [p.run if (p := predict(r, made.of(r.gpu), made.software)) else r for r in runs]
        jacobian = _jacobian(names, theta, filled, measured)
        for _ in range(STEPS):
            theta = _step(names, theta, prior, width, filled, measured, jacobian)
    return _fitted(names, theta)


def write(made: Fitted) -> list[Path]:
    """One file per chip with its numbers, one with the software's."""
    paths = []
    documents: dict[str, dict[str, object]] = {d: {"calibration": asdict(c)} for d, c in made.calibrations.items()}
    for name, document in {**documents, "software": {"software": asdict(made.software)}}.items():
        paths.append(file_of(name))
        whole = {"fitted_by": "benchmarks/costmodel_published.py --refit", **document}
        paths[-1].write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    return paths


def committed() -> Fitted:
    """What `write` wrote last."""
    names = [p.stem.removeprefix("calibration-") for p in sorted(FOLDER.glob("calibration-*.json"))]
    found = {name: calibration_for(name) for name in names if name != "software"}
    return Fitted(found, committed_software(), len(found) * len(DEVICE_PRIORS) + len(SOFTWARE_PRIORS))


def distinct(rows: Sequence[Row]) -> tuple[list[Run], list[float]]:
    """Each configuration once, with the median of its measurements."""
    found: dict[Run, list[float]] = {}
    for row in rows:
        if row.step_s:
            found.setdefault(row.run, []).append(row.step_s)
    return list(found), [float(np.median(v)) for v in found.values()]


def _jacobian(names: Sequence[str], theta: np.ndarray, runs: Sequence[Run], measured: Sequence[float]) -> np.ndarray:
    """Derivatives of the residuals, by differences; kept for the steps of a round, which are small."""
    base = _residuals(names, theta, runs, measured, range(len(runs)))
    jacobian = np.zeros((len(runs), len(names)))
    for j, name in enumerate(names):
        touched = [i for i, r in enumerate(runs) if _matters(name, r)]
        if touched:
            moved = theta.copy()
            moved[j] += DELTA
            shifted = _residuals(names, moved, runs, measured, touched)
            jacobian[touched, j] = (shifted[touched] - base[touched]) / DELTA
    return jacobian


def _step(names: Sequence[str], theta: np.ndarray, prior: np.ndarray, width: np.ndarray, runs: Sequence[Run],
          measured: Sequence[float], jacobian: np.ndarray) -> np.ndarray:
    """One damped Gauss-Newton step."""
    base = _residuals(names, theta, runs, measured, range(len(runs)))
    scatter = np.array([EXPERT_SCATTER if "experts" in r.model else SCATTER for r in runs])
    scaled = np.abs(base) / scatter
    weight = np.where(scaled <= TAIL, 1.0, TAIL / np.maximum(scaled, TAIL)) / scatter**2
    normal = jacobian.T @ (jacobian * weight[:, None]) + np.diag(1 / width**2)
    gradient = jacobian.T @ (weight * base) + (theta - prior) / width**2
    move = np.clip(np.linalg.solve(normal, gradient), -0.4, 0.4)
    return np.array(np.minimum(theta - move, [_highest(n) for n in names]))


def _residuals(names: Sequence[str], theta: np.ndarray, runs: Sequence[Run], measured: Sequence[float],
               which: Sequence[int] | range) -> np.ndarray:
    made, out = _fitted(names, theta), np.zeros(len(runs))
    for i in which:
        priced = price(runs[i], made.of(runs[i].gpu), made.software)
        out[i] = math.log(priced[0].step_ns / 1e9 / measured[i]) if priced else 0.0
    return out


def _matters(name: str, run: Run) -> bool:
    """Whether a parameter can change a run's prediction."""
    device, _, scalar = name.rpartition("/")
    t = run.training
    if device:
        one_node = len(placement_of(run.gpu, run.nodes, run.gpus_per_node, run.pp).cluster.levels) == 1
        return device == chip(run.gpu) and not (scalar == "network_efficiency" and one_node)
    group, _, key = name.partition(".")
    uses = {"fp8": t.fp8_recipe, "attention": t.attention_kernel, "attention_backwards": t.attention_kernel,
            "generation": t.software}
    if key:
        return uses[group] == key
    host = t.cuda_graphs != "step"
    used = {"async_tp": t.async_tp, "expert_overlap": run.ep > 1 and t.overlap_experts,
            "expert_pass_s": run.ep > 1 and t.cuda_graphs == "none", "expert_product": "experts" in run.model,
            "eager_op_s": t.fusion != "compiled" and host}
    return used.get(name, True)


def chip(gpu: str) -> str:
    """The device whose numbers a GPU is fitted with: parts of one chip that differ in memory only share them."""
    return CHIP.get(gpu, gpu)


def _prior(name: str) -> tuple[float, float]:
    device, _, scalar = name.rpartition("/")
    if not device:
        return SOFTWARE_PRIORS[name]
    value, width = DEVICE_PRIORS[scalar]
    return (value * power_share(device) if scalar == "gemm_efficiency" else value), width


def _highest(name: str) -> float:
    scalar = name.rpartition("/")[2]
    if scalar == "expert_overlap":
        return 0.0
    return math.log(0.97) if "efficiency" in scalar or scalar == "overlap_loss" else math.inf


def _fitted(names: Sequence[str], theta: np.ndarray) -> Fitted:
    values = {n: float(f"{math.exp(t):.5g}") for n, t in zip(names, theta, strict=True)}
    devices = sorted({n.partition("/")[0] for n in names if "/" in n})
    return Fitted({d: _calibration(d, values) for d in devices}, _software(values), len(names))


def _calibration(device: str, values: Mapping[str, float]) -> Calibration:
    base = Calibration(device, **{n: _prior(f"{device}/{n}")[0] for n in DEVICE_PRIORS})
    found = {n: values[f"{device}/{n}"] for n in DEVICE_PRIORS if f"{device}/{n}" in values}
    return replace(base, **found)  # type: ignore[arg-type]


def _software(values: Mapping[str, float]) -> Software:
    plain = {f.name: values[f.name] for f in fields(Software) if f.name in values}
    groups = {g: {n.partition(".")[2]: v for n, v in values.items() if n.startswith(f"{g}.")}
              for g in ("fp8", "attention", "attention_backwards", "generation")}
    return Software(**plain, **groups)  # type: ignore[arg-type]
