"""Samplers of azula, on vectors (draws, d) with entries in [-1, 1].

azula's DPS takes one norm over the whole batch, so that its step shrinks with the number of draws made together. Its
zeta is multiplied by sqrt(draws) here, which gives about the step that a batch of one draw would get.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from azula.denoise import Denoiser as AzulaDenoiser
from azula.denoise import DiracPosterior
from azula.guidance import (
    DiffPIRDenoiser,
    DPSSampler,
    MMPSDenoiser,
    PGDMSampler,
    TDSSampler,
    TMPDenoiser,
)
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import Schedule, VESchedule, VPSchedule
from azula.sample import DDPMSampler, Sampler
from torch import Tensor

from benchmarks.inverse.methods import Method
from benchmarks.inverse.problems import Task


class Denoiser(AzulaDenoiser):
    """The exact denoiser in the coordinates of a schedule, x_t = alpha_t x + sigma_t n."""

    def __init__(self, task: Task, schedule: Schedule) -> None:
        super().__init__()
        self.task, self.schedule = task, schedule

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
        alpha, sigma = self.schedule(t)
        return DiracPosterior(mean=self.task.denoise(x_t / alpha, sigma / alpha))


def _denoiser(task: Task, schedule: str) -> Denoiser:
    """With the package's VP schedule, or with VE levels that cover prior and data."""
    return Denoiser(task, VPSchedule() if schedule == "vp" else VESchedule(task.lowest, task.largest))


def _draw(sampler: Sampler, task: Task, draws: int) -> Tensor:
    """From the package's own start, which takes mean and variance of the data."""
    start = sampler.init((draws, task.dim), mean=0.0, var=task.variance, dtype=torch.float64)
    return sampler(start)


def _options(steps: int) -> dict[str, Any]:
    return {"steps": steps, "silent": True, "dtype": torch.float64}


def _operator(task: Task) -> Any:
    matrix = task.problem.matrix
    return lambda x: x @ matrix.T


def dps(task: Task, draws: int, zeta: float = 1.0, steps: int = 64, schedule: str = "vp") -> Tensor:
    """azula.guidance.DPSSampler."""
    sampler = DPSSampler(
        _denoiser(task, schedule), task.y, _operator(task), zeta=zeta * math.sqrt(draws), **_options(steps)
    )
    return _draw(sampler, task, draws)


def pgdm(task: Task, draws: int, eta: float = 0.0, steps: int = 64, schedule: str = "vp") -> Tensor:
    """azula.guidance.PGDMSampler."""
    inverse = torch.linalg.pinv(task.problem.matrix)
    sampler = PGDMSampler(
        _denoiser(task, schedule), task.y, _operator(task), lambda y: y @ inverse.T, eta=eta, **_options(steps)
    )
    return _draw(sampler, task, draws)


def mmps(task: Task, draws: int, steps: int = 64, schedule: str = "vp", **options: Any) -> Tensor:
    """azula.guidance.MMPSDenoiser in the DDPM sampler."""
    noise = IsotropicCovariance(torch.tensor(task.sigma**2, dtype=torch.float64))
    denoiser = MMPSDenoiser(_denoiser(task, schedule), task.y, _operator(task), noise, **options)
    return _draw(DDPMSampler(denoiser, **_options(steps)), task, draws)


def tmpd(task: Task, draws: int, steps: int = 64, schedule: str = "vp") -> Tensor:
    """azula.guidance.TMPDenoiser in the DDPM sampler."""
    denoiser = TMPDenoiser(_denoiser(task, schedule), task.y, _operator(task), task.sigma**2)
    return _draw(DDPMSampler(denoiser, **_options(steps)), task, draws)


def diffpir(task: Task, draws: int, steps: int = 64, schedule: str = "vp", **options: Any) -> Tensor:
    """azula.guidance.DiffPIRDenoiser in the DDPM sampler."""
    denoiser = DiffPIRDenoiser(_denoiser(task, schedule), task.y, _operator(task), task.sigma**2, **options)
    return _draw(DDPMSampler(denoiser, **_options(steps)), task, draws)


def tds(task: Task, draws: int, steps: int = 64, schedule: str = "vp", spread: str = "data") -> Tensor:
    """azula.guidance.TDSSampler, particles as many as draws; the twist is the user's to give.

    log p(y | x_t) ~ log N(y; A x^, sigma_y^2 I + r^2 A A^T), r^2 = s^2 v / (s^2 + v), v the variance of the data or
    that of one component.
    """
    matrix, y = task.problem.matrix, task.y
    v = task.variance if spread == "data" else task.smallest**2
    values, left = torch.linalg.eigh(matrix @ matrix.T)

    def twist(x: Tensor, s: Tensor) -> Tensor:
        variance = task.sigma**2 + s.square() * v / (s.square() + v) * values
        residual = (y - x @ matrix.T) @ left
        return -0.5 * (residual.square() / variance + variance.log())

    return _draw(TDSSampler(_denoiser(task, schedule), twist, **_options(steps)), task, draws)


CLOSE = ("MMPS", "DPS", "TDS")


def methods() -> list[Method]:
    """All of them, with the settings to choose from."""

    def method(name: str, sample: Any, settings: Mapping[str, Mapping[str, Any]]) -> Method:
        return Method("azula", name, sample, settings, close=name in CLOSE)

    longer = {"ve, 250 steps": {"steps": 250, "schedule": "ve"}}
    solve = {"solver": "cg", "iterations": 5}
    return [
        method("MMPS", mmps, {
            "default": {},
            "5 CG steps": solve,
            "ve, 250 steps, 5 CG steps": {"steps": 250, "schedule": "ve", **solve},
        }),
        method("TMPD", tmpd, {"default": {}, **longer}),
        method("PGDM", pgdm, {
            "default": {},
            "eta=1": {"eta": 1.0},
            "eta=1, ve, 250 steps": {"eta": 1.0, "steps": 250, "schedule": "ve"},
        }),
        method("DiffPIR", diffpir, {
            "default": {},
            **{
                f"lambda={lam:g}, 250 steps, 5 CG steps": {"lmbda": lam, "steps": 250, **solve}
                for lam in (1.0, 3.0, 10.0)
            },
            "lambda=1, ve, 250 steps, 5 CG steps": {"lmbda": 1.0, "steps": 250, "schedule": "ve", **solve},
        }),
        method("DPS", dps, {
            "default": {},
            **{f"zeta={z:g}": {"zeta": z} for z in (0.03, 0.1, 0.3)},
            **{f"zeta={z:g}, 250 steps": {"zeta": z, "steps": 250} for z in (0.03, 0.1)},
            **{f"zeta={z:g}, 1000 steps": {"zeta": z, "steps": 1000} for z in (0.03, 0.1, 0.3)},
        }),
        method("TDS", tds, {
            "default": {},
            "component variance": {"spread": "component"},
            "ve, 250 steps": {"steps": 250, "schedule": "ve"},
            "component variance, ve, 250 steps": {"spread": "component", "steps": 250, "schedule": "ve"},
        }),
    ]  # fmt: skip
