"""DCPS: its potentials and Langevin steps in matrices, its law without data, and its measured bias."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro
import pytest
import torch
from affine import Matrices, gaussian, law, program_of, seeded
from torch import Tensor

import ppl
from inverse.problem import DiffusionProblem
from inverse.samplers.dcps import DCPS
from inverse.samplers.trajectory import trajectory_levels
from models.references import gaussian_problem
from ppl import Program
from ppl.errors import OptionError
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64


def test_potentials_in_matrices() -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 0.3))
    p, method = Matrices.of(problem), DCPS(steps=9).method(problem)
    x = problem.prior.start(problem.noise(5, seeded(7)), 1.0)
    z = problem.noise(5, seeded(8))
    sd = problem.prior.data_std
    for level, end, used in ((1.3, 0.0, None), (1.3, 0.4, None), (1.3, 0.4, z), (0.4, 0.4, None)):
        J, k = p.denoiser(level)
        ratio = (end / level) ** 2
        slope = p.eye if level == end else ratio * p.eye + (1 - ratio) * J
        ahead = x if level == end else x @ slope.T + (1 - ratio) * k
        if used is not None:
            ahead = ahead + end * math.sqrt(1 - ratio) * used
        tau = sd**2 / (sd**2 + end**2)
        expected = tau * (p.d - ahead @ p.B.T) @ p.B @ slope
        clean, gradient = method.potential(x, level, end, used)
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)
        if level != end:
            torch.testing.assert_close(clean, x @ J.T + k)


def test_langevin_in_matrices() -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 0.3))
    p, gamma = Matrices.of(problem), 0.02
    method = DCPS(steps=9, langevin_size=gamma).method(problem)
    x, z = problem.prior.start(problem.noise(5, seeded(7)), 1.0), problem.noise(5, seeded(8))
    level, end = 1.3, 0.4
    J, k = p.denoiser(level)
    drift = (x @ J.T + k - x) / level**2 + method.potential(x, level, end, None)[1]
    variance = problem.prior.data_std**2 + level**2
    tame = 1 + gamma * math.sqrt(variance) * drift.norm(dim=1, keepdim=True)
    expected = x + gamma * variance * drift / tame + math.sqrt(2 * gamma * variance) * z
    torch.testing.assert_close(method.langevin(x, level, end, z), expected)
    assert float(tame.max()) > 1.05


def test_langevin_keeps_its_target() -> None:
    """At level a with weak data, 3000 steps from far off: mean and variance of p_a(x) g_a(x), 2000 lanes.

    The mean is good to sd / 45, variances to 3.2 %; five errors, and 6 % for the size of the step.
    """
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.ones(1, 2, dtype=F64), torch.ones(1, dtype=F64))
    problem = DiffusionProblem.of(program_of(prior, 1.0, m=2, d=2))
    p, level, end = Matrices.of(problem), 0.8, 0.3
    method = DCPS(steps=9, langevin_size=0.03).method(problem)
    x, generator = torch.full((2000, 2), 3.0, dtype=F64), seeded(1)
    for _ in range(400):
        x = method.langevin(x, level, end, problem.noise(2000, generator))
    J, k = p.denoiser(level)
    ratio, tau = (end / level) ** 2, 1 / (1 + end**2)
    slope, shift = ratio * p.eye + (1 - ratio) * J, (1 - ratio) * k
    precision = torch.linalg.inv(p.C0 + level**2 * p.eye) + tau * slope.T @ p.B.T @ p.B @ slope
    pull = torch.linalg.solve(p.C0 + level**2 * p.eye, p.m0) + tau * slope.T @ p.B.T @ (p.d - p.B @ shift)
    C = torch.linalg.inv(precision)
    assert float((x.mean(0) - C @ pull).norm()) < (5 / 45 + 0.06) * float(C.trace().sqrt())
    torch.testing.assert_close(x.T.cov().diagonal(), C.diagonal(), rtol=5 * 0.032 + 0.06, atol=0)


def test_without_fit_it_is_the_prior() -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 0.3))
    p = Matrices.of(problem)
    levels = trajectory_levels(None, 12, problem).tolist()
    mean, cov = p.m0.clone(), p.C0 + levels[0] ** 2 * p.eye
    for a, b in pairwise(levels):
        J, k = p.denoiser(a)
        ratio = (b / a) ** 2
        F = ratio * p.eye + (1 - ratio) * J
        mean, cov = F @ mean + (1 - ratio) * k, F @ cov @ F.T + b**2 * (1 - ratio) * p.eye
    found_mean, found = law(DCPS(steps=12, fit_steps=0, langevin_steps=0).method(problem))
    torch.testing.assert_close(found_mean, mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found, cov, rtol=1e-8, atol=1e-9)


def test_blocks_and_costs() -> None:
    assert DCPS(steps=10, blocks=3).boundaries() == (3, 7, 10)
    assert DCPS(steps=10, blocks=10).boundaries() == tuple(range(1, 11))
    network = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (4,), sigma_max=10.0, dtype=F64)
    cost = ppl.infer(program_of(network), DCPS(steps=10, blocks=3, langevin_steps=4, fit_steps=2), draws=6).cost
    # Nine fitted steps, of which two end at the end of a block and look at x itself; the last one is not fitted.
    fitted, langevin = 2 * (9 - 2), 3 * 4
    assert (cost.denoiser_calls, cost.vjps) == (10 + fitted + langevin, 6 * (fitted + langevin))
    assert cost.likelihood_evals == 6 * (2 * 9 + langevin)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_measured_bias(noise: float) -> None:
    """500 draws: the mean is good to 0.05 sd, variances to 6 %. Unguided draws are off by 1.4 sd and a factor 200."""
    problem = gaussian_problem(noise)
    x, exact = ppl.infer(problem.program, DCPS(), draws=500)["x"][0], problem.posterior
    basis, C = torch.linalg.svd(problem.matrix)[2], exact.covariance_matrix
    assert float((x.mean(0) - exact.mean).norm() / C.trace().sqrt()) < 0.16
    for seen in (basis[:6], basis[6:]):
        assert 0.6 < float((seen @ x.T.cov() @ seen.T).trace() / (seen @ C @ seen.T).trace()) < 1.3


def test_any_likelihood() -> None:
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", pyro.distributions.Poisson(x[..., 0].exp()), obs=y)
        pyro.factor("loss", -2 * (x[..., 1] - 1).square())

    x = ppl.infer(Program(model, torch.tensor(20.0)), DCPS(steps=40), draws=200)["x"][0]
    # 20 counts say log 20 = 3.0, the prior pulls to about 2.8; the factor gives 0.8 and sd 0.45.
    assert 2.5 < float(x[:, 0].mean()) < 3.1
    assert 0.6 < float(x[:, 1].mean()) < 1.0


def test_options_are_checked() -> None:
    for bad in (
        {"blocks": 0},
        {"steps": 2, "blocks": 3},
        {"langevin_steps": -1},
        {"langevin_size": 0.0},
        {"fit_steps": -1},
        {"learning_rate": 2.0},
        {"optimizer": "lbfgs"},
        {"chunk": 0},
    ):
        with pytest.raises(OptionError):
            DCPS(**bad)
