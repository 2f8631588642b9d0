"""DDRM against matrices: mean and covariance propagated direction by direction, without Monte Carlo."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from affine import Matrices, gaussian, isotropic, law, posterior_of, program_of
from torch import Tensor

import ppl
from inverse import DDRM
from inverse.operators import FunctionOperator
from inverse.problem import DiffusionProblem
from inverse.samplers.trajectory import trajectory_levels
from ppl import Program
from ppl.errors import CapabilityError, OptionError
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64


def by_hand(
    problem: DiffusionProblem, levels: list[float], eta: float = 0.85, eta_b: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The formulas of the paper in the full singular basis, one direction at a time."""
    p = Matrices.of(problem)
    U, s, Vt = torch.linalg.svd(p.B, full_matrices=True)
    d, r = len(p.m0), len(s)
    tau = torch.cat([1 / s, torch.full((d - r,), math.inf, dtype=F64)])
    ybar = torch.cat([(U.T @ p.d)[:r] / s, torch.zeros(d - r, dtype=F64)])
    top = levels[0]
    mean, cov = Vt @ p.m0, Vt @ p.C0 @ Vt.T + top**2 * p.eye
    # What the data say at the first level replaces the prior there.
    for i in range(d):
        if tau[i] <= top:
            mean[i], cov[i], cov[:, i] = ybar[i], 0, 0
            cov[i, i] = top**2 - tau[i] ** 2
    for a, b in pairwise(levels):
        J, k = p.denoiser(a)
        J, k = Vt @ J @ Vt.T, Vt @ k
        F, f, noise = torch.zeros(d, d, dtype=F64), torch.zeros(d, dtype=F64), torch.zeros(d, dtype=F64)
        for i in range(d):
            if math.isinf(tau[i]):
                g = math.sqrt(1 - eta**2) * b / a
                F[i], f[i], noise[i] = (1 - g) * J[i] + g * p.eye[i], (1 - g) * k[i], eta**2 * b**2
            elif b < tau[i]:
                g = math.sqrt(1 - eta**2) * b / tau[i]
                F[i], f[i], noise[i] = (1 - g) * J[i], (1 - g) * k[i] + g * ybar[i], eta**2 * b**2
            else:
                F[i], f[i] = (1 - eta_b) * J[i], (1 - eta_b) * k[i] + eta_b * ybar[i]
                noise[i] = b**2 - eta_b**2 * tau[i] ** 2
        mean, cov = F @ mean + f, F @ cov @ F.T + torch.diag(noise)
    return Vt.T @ mean, Vt.T @ cov @ Vt


@pytest.mark.parametrize("options", [{}, {"eta": 0.3, "eta_b": 0.7}], ids=str)
@pytest.mark.parametrize("noise", [0.05, 1.0, torch.tensor([0.05, 3.0], dtype=F64)], ids=["low", "high", "unequal"])
def test_the_law_is_that_of_the_formulas(options: dict[str, float], noise: Tensor | float) -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), noise))
    sampler = DDRM(steps=12, **options)
    mean, covariance = law(sampler.method(problem))
    expected_mean, expected = by_hand(problem, trajectory_levels(None, 12, problem).tolist(), **options)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-10)


def test_it_forgets_the_spread_of_the_denoised_point() -> None:
    """Not exact for a Gaussian prior, however many steps: unmeasured directions come out too narrow."""
    problem = DiffusionProblem.of(program_of(gaussian(), 0.1))
    exact = posterior_of(problem)
    _, covariance = law(DDRM(steps=300).method(problem))
    assert 0.01 < float(covariance.trace() / exact.covariance_matrix.trace()) < 0.9


def test_precise_data_are_met_to_their_noise() -> None:
    """As the noise of the data falls, A x = y."""
    program = program_of(isotropic(), 1e-3)
    posterior = ppl.infer(program, DDRM(steps=50), draws=50)
    assert float(posterior.info["residual_chi"].max()) < 6


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(OptionError, match="eta"):
        DDRM(eta=1.5)
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1))

    def poisson(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="Poisson"):
        ppl.infer(Program(poisson, torch.ones(3)), DDRM(steps=2), draws=1)
    n = 3000
    large = FunctionOperator(lambda x: x + 0.5 * x.roll(1, -1), (n,), linear=True, dtype=torch.float32)
    wide = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (n,), dtype=torch.float32)

    def big(y: Tensor) -> None:
        x = pyro.sample("x", wide)
        pyro.sample("y", dist.Normal(large(x), 0.1).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="DDRM works in the singular basis"):
        ppl.infer(Program(big, torch.zeros(n)), DDRM(steps=2), draws=1)
