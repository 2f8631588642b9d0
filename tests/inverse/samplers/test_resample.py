"""ReSample against matrices, without Monte Carlo, and on a latent prior."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from affine import Matrices, gaussian, law, program_of, seeded
from torch import Tensor

import ppl
from inverse.problem import DiffusionProblem
from inverse.samplers.resample import RIDGE, ReSample
from inverse.samplers.trajectory import trajectory_levels
from models.references import gaussian_problem
from ppl import Program
from ppl.errors import CapabilityError, OptionError
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64


@pytest.mark.parametrize(
    "options", [{}, {"every": 1, "skip": 0.0}, {"every": 3, "skip": 0.5, "eta": 0.7, "gamma": 5.0}], ids=str
)
def test_the_law_is_that_of_the_formulas(options: dict[str, Any]) -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 0.3))
    p, sampler = Matrices.of(problem), ReSample(steps=12, tolerance=0.0, **options)
    levels = trajectory_levels(None, 12, problem).tolist()
    every, skip = options.get("every", 10), options.get("skip", 1 / 3)
    eta, gamma = options.get("eta", 0.0), options.get("gamma", 40.0)
    m = len(p.d)
    ridge = RIDGE * torch.linalg.matrix_norm(p.B, 2) ** 2
    inverse = p.B.T @ torch.linalg.inv(p.B @ p.B.T + ridge * torch.eye(m, dtype=F64))
    mean, cov = p.m0.clone(), p.C0 + levels[0] ** 2 * p.eye
    for i, (a, b) in enumerate(pairwise(levels)):
        J, k = p.denoiser(a)
        c = eta * b * math.sqrt(1 - (b / a) ** 2)
        keep = math.sqrt(b**2 - c**2) / a
        free, shift, spread = keep * p.eye + (1 - keep) * J, (1 - keep) * k, c**2
        if i == 11 or (i >= 12 * skip and i % every == 0):
            fit, fit_shift = J - inverse @ p.B @ J, k + inverse @ (p.d - p.B @ k)
            g = gamma * b**2 * (1 - (b / a) ** 2)
            w = 1.0 if b == 0 else g / (g + b**2)
            free, shift = w * fit + (1 - w) * free, w * fit_shift + (1 - w) * shift
            spread = (1 - w) ** 2 * spread + (w * b**2)
        mean, cov = free @ mean + shift, free @ cov @ free.T + spread * p.eye
    found_mean, found = law(sampler.method(problem))
    torch.testing.assert_close(found_mean, mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found, cov, rtol=1e-6, atol=1e-7)


def test_the_published_weights_are_these() -> None:
    """(gamma' alpha x* + sigma^2 x_b) / (gamma' + sigma^2) with gamma' = 40 (1 - a_b) / (1 - a_a) (1 - a_a / a_b)."""
    a, b = 2.3, 1.7
    alpha_a, alpha_b = 1 / (1 + a**2), 1 / (1 + b**2)  # squared
    published = 40 * (1 - alpha_b) / (1 - alpha_a) * (1 - alpha_a / alpha_b)
    ours = 40 * b**2 * (1 - (b / a) ** 2)
    share = published * math.sqrt(alpha_b) / (published + 1 - alpha_b) / math.sqrt(alpha_b)
    assert share == pytest.approx(ours / (ours + b**2))
    variance = 1 / (1 / published + 1 / (1 - alpha_b)) / alpha_b
    assert variance == pytest.approx(ours * b**2 / (ours + b**2))


def test_which_steps() -> None:
    assert ReSample(steps=30).consistent_steps() == (10, 20, 29)
    assert ReSample(steps=4, every=1, skip=0.0).consistent_steps() == (0, 1, 2, 3)
    assert ReSample(steps=1).consistent_steps() == (0,)


def test_fits_stop_at_the_noise_level() -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 0.3))
    x = torch.cat([problem.prior.start(problem.noise(6, seeded(7)), 1.0), torch.full((1, 4), 30.0, dtype=F64)])
    g = problem.likelihood.gaussian

    def chi(x: Tensor) -> Tensor:
        return g.residual(x).square().mean(1).sqrt()

    for tolerance in (0.0, 1.0, 2.0):
        closed = ReSample(tolerance=tolerance).method(problem)._project(x)
        torch.testing.assert_close(chi(closed), chi(x).clamp(max=tolerance), rtol=1e-4, atol=1e-3)
    method = ReSample(tolerance=1.0, inner="adam", inner_steps=2000, learning_rate=0.05).method(problem)
    climbed = method._climb(x)
    assert bool((chi(climbed)[:6] <= 1.0).all())
    torch.testing.assert_close(method._climb(x[2:3]), climbed[2:3])  # whatever else is in the batch
    inside = g.operator.adjoint(torch.zeros(1, 2, dtype=F64)) + torch.linalg.pinv(g.operator.dense()) @ g.data
    assert torch.equal(method._climb(inside), inside)


def test_adam_is_that_of_torch() -> None:
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 3, dtype=F64), torch.full((1,), 4.0, dtype=F64))

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.factor("loss", -(x - 1).pow(4).sum(-1))

    problem = DiffusionProblem.of(Program(model))
    x = problem.noise(2, seeded())
    found = ReSample(inner_steps=9, learning_rate=0.03).method(problem)._climb(x)
    leaf = x.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=0.03 * 2.0)
    for _ in range(9):
        adam.zero_grad()
        (leaf - 1).pow(4).sum().backward()
        adam.step()
    torch.testing.assert_close(found, leaf.detach(), rtol=1e-6, atol=1e-8)


def test_measured_bias() -> None:
    """500 draws: the mean is good to 0.05 sd, variances to some 6 %."""
    problem = gaussian_problem(0.05)
    x, exact = ppl.infer(problem.program, ReSample(), draws=500)["x"][0], problem.posterior
    basis, C = torch.linalg.svd(problem.matrix)[2], exact.covariance_matrix
    assert 0.5 < float((x.mean(0) - exact.mean).norm() / C.trace().sqrt()) < 0.85
    ratios = [float((s @ x.T.cov() @ s.T).trace() / (s @ C @ s.T).trace()) for s in (basis[:6], basis[6:])]
    assert 0.35 < ratios[0] < 0.65
    assert 0.75 < ratios[1] < 1.15


@pytest.mark.parametrize("factor", [False, True])
def test_a_latent_prior_is_fitted_through_its_decoder(factor: bool) -> None:
    """Site z, data on decoder(z): draws fit the data as well as the noise does."""
    prior = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 3, dtype=F64), torch.ones(1, dtype=F64))
    weight = torch.randn(6, 3, generator=seeded(5), dtype=F64)

    def decoder(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T)

    def model(y: Tensor) -> None:
        z = pyro.sample("z", prior)
        x = pyro.deterministic("x", decoder(z), event_dim=1)
        if factor:
            pyro.factor("loss", -(y - x).square().sum(-1) / (2 * 0.1**2))
        else:
            pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)

    truth = decoder(torch.tensor([0.5, -1.0, 0.3], dtype=F64))
    y = truth + 0.1 * torch.randn(6, generator=seeded(6), dtype=F64)
    posterior = ppl.infer(Program(model, y), ReSample(steps=40, inner_steps=60), draws=20)
    miss = ((posterior["x"][0] - y) / 0.1).square().mean(1).sqrt()
    assert float(miss.median()) < 1.5
    assert posterior.cost.vjps == 0


def test_costs_and_capabilities() -> None:
    network = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (4,), sigma_max=10.0, dtype=F64)
    cost = ppl.infer(program_of(network), ReSample(steps=30), draws=5).cost
    assert (cost.denoiser_calls, cost.vjps, cost.likelihood_evals) == (30, 0, 15)

    def model() -> None:
        pyro.factor("loss", -pyro.sample("x", gaussian()).square().sum(-1))

    with pytest.raises(CapabilityError, match=r"pyro\.factor"):
        ppl.infer(Program(model), ReSample(steps=3, inner="closed"), draws=2)


def test_options_are_checked() -> None:
    for bad in (
        {"inner": "nuts"},
        {"every": 0},
        {"inner_steps": 0},
        {"gamma": 0.0},
        {"learning_rate": -1.0},
        {"skip": 1.5},
        {"eta": -0.1},
        {"tolerance": -1.0},
    ):
        with pytest.raises(OptionError):
            ReSample(**bad)
