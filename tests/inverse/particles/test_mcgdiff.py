"""MCGdiff against the exact posterior of its chain, at few levels, and against exact posteriors, at many."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from particle_checks import (
    F64,
    Chain,
    chain_at_start,
    check_gaussian,
    check_modes,
    gaussian_prior,
    hidden,
    program_of,
    two_modes,
)
from torch import Tensor

import ppl
from inverse.particles import MCGdiff
from inverse.problem import DiffusionProblem
from models.references import gaussian_problem
from sde import DiffusionPrior, GaussianMixture
from sde.solvers import DDIM, Ancestral, DPMSolver2M, DPMSolver2MSDE

Y = torch.tensor([1.5, -0.5], dtype=F64)


def chain_of_mcgdiff(prior: DiffusionPrior | GaussianMixture, sigmas: Tensor, matrix: Tensor, sigma: float) -> Chain:
    """Exact law of x_0 when y_i is the path at the largest level below tau_i, with the noise that is left over."""
    u, s, rows = torch.linalg.svd(matrix / sigma, full_matrices=False)
    y, tau = (u.T @ Y / sigma) / s, 1 / s
    chain = chain_at_start(prior, sigmas[0])
    for level in range(len(sigmas)):
        here = float(sigmas[level])
        above = float(sigmas[level - 1]) if level else math.inf
        absorbed = (tau >= here) & (tau < above)
        chain.observe(rows[absorbed], y[absorbed], tau[absorbed].square() - here**2)
        if level + 1 < len(sigmas):
            a, b = sigmas[level], sigmas[level + 1]
            variance = float(b**2 * (1 - (b / a) ** 2))
            chain.move(lambda x, a=a, b=b: Ancestral().step(x, a, b, prior.denoise(x, a)).mean, variance)
    chain.log_evidence += -float(s.log().sum()) - len(Y) * math.log(sigma)  # from y_i back to the data
    return chain


@pytest.mark.parametrize(
    ("values", "sigma"),
    [((1.0, 0.5), 0.3), ((1.0, 0.004), 0.1), ((20.0, 0.5), 0.1)],
    ids=["between levels", "noisier than the first level", "finer than the last level"],
)
@pytest.mark.parametrize("known", [True, False], ids=["mixture", "network"])
def test_few_levels_are_exact_for_the_chain(values: tuple[float, float], sigma: float, known: bool) -> None:
    """Eight coarse levels; seven statistics, family-wise false alarm 1e-4, and no slack for discretisation.

    Power: levels are a factor 2.6 apart, so that noise that is dropped with a coordinate, up to 85 % of its variance,
    changes the variance along it several times over; a factor too many or too few halves or doubles it.
    """
    exact_prior = gaussian_prior()
    prior = exact_prior if known else hidden(exact_prior, sigma_min=0.05)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=F64))[0]
    matrix = torch.tensor(values, dtype=F64)[:, None] * turn[:2]
    program = program_of(prior, matrix, sigma, Y)
    backend = MCGdiff(steps=8, particles=8000, runs=2, solver=Ancestral())
    sigmas = backend.levels(DiffusionProblem.of(program))
    posterior = ppl.infer(program, backend, draws=8000, seed=0)
    check_gaussian(posterior, chain_of_mcgdiff(prior, sigmas, matrix, sigma))


def test_the_gaussian_posterior_at_many_levels() -> None:
    """The posterior of the program: false alarm 1e-4 by the root ESS, plus 0.04 for 100 levels."""
    problem = gaussian_problem(0.3, dim=4, observations=2)
    posterior = ppl.infer(problem.program, MCGdiff(steps=100, particles=3000, runs=3), draws=3000, seed=0)
    exact = Chain(problem.posterior.mean, problem.posterior.covariance_matrix, float(problem.log_evidence))
    check_gaussian(posterior, exact, slack=0.04)


def test_weights_of_two_modes() -> None:
    """False alarm 1e-4 by the root ESS, plus 0.02 for 80 levels; unweighted paths are off by 0.2 and more."""
    prior, matrix, sigma, y = two_modes()
    backend = MCGdiff(steps=80, particles=3000, runs=3)
    posterior = ppl.infer(program_of(prior, matrix, sigma, y), backend, draws=3000, seed=0)
    exact, evidence = prior.condition_linear(matrix, y, sigma**2), prior.log_evidence(matrix, y, sigma**2)
    check_modes(posterior, exact, evidence, slack=0.02)


def test_solvers_whose_paths_are_not_noising_reversed_are_refused() -> None:
    for solver in (DDIM(eta=0.5), DPMSolver2MSDE(eta=0.5)):
        with pytest.raises(ppl.OptionError, match="backwards"):
            MCGdiff(solver=solver)
    with pytest.raises(ppl.OptionError, match="stochastic solver"):
        MCGdiff(solver=DPMSolver2M())


def test_data_without_a_decomposition_are_refused() -> None:
    prior = gaussian_prior()

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x.square(), 1.0).to_event(1), obs=y)

    with pytest.raises(ppl.CapabilityError, match="linear"):
        ppl.infer(ppl.Program(model, torch.ones(3, dtype=F64)), MCGdiff(steps=3), draws=4)
