"""DiffPIR against matrices, without Monte Carlo."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from affine import Matrices, gaussian, law, program_of
from torch import Tensor

import ppl
from inverse import DiffPIR
from inverse.problem import DiffusionProblem
from inverse.samplers.trajectory import trajectory_levels
from ppl.errors import OptionError
from sde import DiffusionPrior

F64 = torch.float64


def by_hand(problem: DiffusionProblem, levels: list[float], lam: float, zeta: float) -> tuple[Tensor, Tensor]:
    """The proximal point from its normal equations, (B^T B + lambda / a^2) x = B^T d + lambda / a^2 D."""
    p = Matrices.of(problem)
    mean, cov = p.m0.clone(), p.C0 + levels[0] ** 2 * p.eye
    for a, b in pairwise(levels):
        J, k = p.denoiser(a)
        inverse = torch.linalg.inv(p.B.T @ p.B + lam / a**2 * p.eye)
        slope, offset = inverse @ (lam / a**2 * J), inverse @ (p.B.T @ p.d + lam / a**2 * k)
        g = b * math.sqrt(1 - zeta) / a
        F = (1 - g) * slope + g * p.eye
        mean, cov = F @ mean + (1 - g) * offset, F @ cov @ F.T + zeta * b**2 * p.eye
    return mean, cov


@pytest.mark.parametrize("options", [{}, {"lam": 3.0, "zeta": 1.0}, {"zeta": 0.0}], ids=str)
@pytest.mark.parametrize("noise", [0.05, 1.0], ids=["low", "high"])
def test_the_law_is_that_of_the_formulas(options: dict[str, float], noise: float) -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), noise))
    sampler = DiffPIR(steps=12, **options)  # type: ignore[arg-type]
    mean, covariance = law(sampler.method(problem))
    expected_mean, expected = by_hand(problem, trajectory_levels(None, 12, problem).tolist(), sampler.lam, sampler.zeta)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-9)


def test_no_vjp_is_spent() -> None:
    network = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (4,), sigma_max=10.0, dtype=F64)
    cost = ppl.infer(program_of(network), DiffPIR(steps=7), draws=5).cost
    assert (cost.denoiser_calls, cost.denoiser_evals, cost.vjps) == (7, 35, 0)


def test_options_are_checked() -> None:
    for bad in ({"lam": 0.0}, {"zeta": 1.1}, {"steps": -1}, {"chunk": 0}):
        with pytest.raises(OptionError):
            DiffPIR(**bad)  # type: ignore[arg-type]
