"""DAPS against matrices, without Monte Carlo: closed form and chains."""

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
from inverse import DAPS
from inverse.problem import DiffusionProblem
from ppl import Program
from ppl.errors import CapabilityError, OptionError
from sde import DiffusionPrior, GaussianMixture, edm_grid

F64 = torch.float64


def by_hand(problem: DiffusionProblem, sampler: DAPS) -> tuple[Tensor, Tensor]:
    """Mean and covariance through flow, conditional draw (or chain, with its velocity) and new noise."""
    p, eye = Matrices.of(problem), Matrices.of(problem).eye
    levels = sampler.levels(problem).tolist()
    n = len(levels) - 1
    mean, cov = p.m0.clone(), p.C0 + levels[0] ** 2 * eye
    for i, (s, after) in enumerate(pairwise(levels)):
        for a, b in pairwise(edm_grid(s, min(0.01, s / 10), sampler.ode_steps + 1)[:-1].tolist()):
            J, k = p.denoiser(a)
            F = eye + (b - a) / a * (eye - J)
            mean, cov = F @ mean - (b - a) / a * k, F @ cov @ F.T
        precision = p.B.T @ p.B + eye / s**2
        if sampler.inner in ("auto", "closed"):
            V = torch.linalg.inv(precision)
            mean, cov = V @ (p.B.T @ p.d + mean / s**2), V + V @ cov @ V / s**4
        else:
            m = sampler.momentum if sampler.inner == "hmc" else 0.0
            eta = sampler.step_size * (1 - (1 - sampler.step_decay) * i / (n - 1))
            # Joint state (center, x, v).
            d = len(mean)
            zero = torch.zeros(d, d, dtype=F64)
            joint = torch.cat([mean, mean, torch.zeros(d, dtype=F64)])
            start = eye if sampler.inner == "hmc" else zero
            joint_cov = torch.cat(
                [torch.cat([cov, cov, zero], 1), torch.cat([cov, cov, zero], 1), torch.cat([zero, zero, start], 1)]
            )
            r = math.sqrt(eta)
            velocity = torch.cat([r * eye / s**2, -r * precision, m * eye], 1)
            keep = torch.cat([eye, zero, zero], 1)
            move = torch.cat([zero, eye, zero], 1) + r * velocity
            F = torch.cat([keep, move, velocity])
            push = r * p.B.T @ p.d
            offset = torch.cat([torch.zeros(d, dtype=F64), r * push, push])
            G = torch.cat([zero, r * eye, eye]) * math.sqrt(2 * (1 - m))
            for _ in range(sampler.inner_steps):
                joint, joint_cov = F @ joint + offset, F @ joint_cov @ F.T + G @ G.T
            mean, cov = joint[d : 2 * d], joint_cov[d : 2 * d, d : 2 * d]
        cov = cov + after**2 * eye
    return mean, cov


@pytest.mark.parametrize(
    "sampler",
    [
        DAPS(steps=8),
        DAPS(steps=5, ode_steps=1, sigma_min=0.1),
        DAPS(steps=4, inner="langevin", inner_steps=5, step_size=1e-3),
        DAPS(steps=4, inner="hmc", inner_steps=5, step_size=1e-3),
    ],
    ids=["closed", "one Euler step", "langevin", "hmc"],
)
def test_the_law_is_that_of_the_formulas(sampler: DAPS) -> None:
    problem = DiffusionProblem.of(program_of(gaussian(), 0.3))
    mean, covariance = law(sampler.method(problem))
    expected_mean, expected = by_hand(problem, sampler)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("inner", ["langevin", "hmc"])
def test_long_chains_agree_with_the_closed_form(inner: str) -> None:
    """At one level; what is left is the discretisation of the chain, of order eta times the curvature."""
    problem = DiffusionProblem.of(program_of(gaussian(), 1.0))
    problem.prior.sigma_max = 2.0
    mean, covariance = law(DAPS(steps=1, sigma_min=1.0).method(problem))
    sampler = DAPS(steps=1, sigma_min=1.0, inner=inner, inner_steps=300, step_size=0.02)  # type: ignore[arg-type]
    found_mean, found = law(sampler.method(problem))
    assert (found_mean - mean).norm() < 0.02 * mean.norm()
    assert (found - covariance).norm() < 0.05 * covariance.norm()


def test_it_is_biased_by_the_width_of_its_closure() -> None:
    problem = DiffusionProblem.of(program_of(isotropic(), 0.3))
    exact = posterior_of(problem)
    mean, covariance = law(DAPS(steps=60).method(problem))
    assert (mean - exact.mean).norm() < exact.stddev.norm()
    assert not 0.99 < float(covariance.trace() / exact.covariance_matrix.trace()) < 1.01


def test_costs_and_other_likelihoods() -> None:
    network = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (4,), sigma_max=10.0, dtype=F64)
    cost = ppl.infer(program_of(network), DAPS(steps=5, ode_steps=3), draws=6).cost
    assert (cost.denoiser_calls, cost.denoiser_evals, cost.vjps) == (15, 90, 0)
    prior = GaussianMixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1))

    def poisson(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    program = Program(poisson, torch.tensor([20.0, 1.0, 3.0]))
    sampler = DAPS(steps=40, inner_steps=20, step_size=1e-2, step_decay=0.1)
    draws = ppl.infer(program, sampler, draws=40)["x"]
    # 20 counts say log 20 = 3.0; the prior pulls to about 2.8.
    assert 2.0 < float(draws[..., 0].mean()) < 3.2
    with pytest.raises(CapabilityError, match="Poisson"):
        ppl.infer(program, DAPS(steps=3, inner="closed"), draws=2)
    with pytest.raises(OptionError, match="too large for the chain"):
        ppl.infer(program, DAPS(steps=3, step_size=1.0, sigma_min=0.01), draws=2)


def test_options_are_checked() -> None:
    for bad in (
        {"inner": "nuts"},
        {"ode_steps": 0},
        {"inner_steps": 0},
        {"step_size": 0.0},
        {"step_decay": 0.0},
        {"momentum": 1.0},
        {"sigma_min": 0.0},
    ):
        with pytest.raises(OptionError):
            DAPS(**bad)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="not below"):
        ppl.infer(program_of(gaussian()), DAPS(sigma_min=1e6), draws=1)
