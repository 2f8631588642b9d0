"""DDSMC against the exact posterior of its chain, at few levels, and against exact posteriors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from particle_checks import (
    F64,
    Chain,
    check_gaussian,
    check_modes,
    gaussian_prior,
    hidden,
    observed,
    program_of,
    run_chain,
    two_modes,
)
from torch import Tensor

import ppl
from inverse.particles import DDSMC
from inverse.problem import DiffusionProblem
from models.references import gaussian_problem
from sde import GaussianMixture, edm_grid
from sde.solvers import Ancestral, DPMSolver2M, sample

MATRIX = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -0.4]], dtype=F64)
Y = torch.tensor([1.5, -0.5], dtype=F64)


@pytest.mark.parametrize("sigma", [0.5, 0.1])
@pytest.mark.parametrize("reconstruction", ["flow", "tweedie"])
def test_few_levels_are_exact_for_the_chain(reconstruction: str, sigma: float) -> None:
    """Eight coarse levels, a flow of three coarse steps; seven statistics, family-wise false alarm 1e-4, no slack."""
    prior = hidden(gaussian_prior(), sigma_min=0.1)
    program = program_of(prior, MATRIX, sigma, Y)
    backend = DDSMC(steps=8, particles=8000, runs=2, reconstruction=reconstruction, ode_steps=3, solver=Ancestral())  # type: ignore[arg-type]
    sigmas = backend.levels(DiffusionProblem.of(program))
    pairs = list(pairwise(sigmas.tolist()))

    def ancestral(x: Tensor, level: int) -> Tensor:
        return Ancestral().step(x, sigmas[level], sigmas[level + 1], prior.denoise(x, sigmas[level])).mean

    def flow(x: Tensor, level: int) -> Tensor:
        if level == len(pairs) - 1:
            return prior.denoise(x, sigmas[level])
        levels = edm_grid(float(sigmas[level]), float(sigmas[-2]), min(3, len(pairs) - level))
        return sample(DPMSolver2M(), prior.denoise, x, levels)

    if reconstruction == "flow":
        chain = run_chain(prior, sigmas, flow, [b**2 for _, b in pairs])
    else:
        chain = run_chain(prior, sigmas, ancestral, [b**2 * (1 - (b / a) ** 2) for a, b in pairs])
    check_gaussian(ppl.infer(program, backend, draws=8000, seed=0), observed(chain, MATRIX, sigma, Y))


@pytest.mark.parametrize(
    "backend",
    [DDSMC(steps=100, particles=3000, runs=3), DDSMC(steps=25, particles=3000, runs=3, reconstruction="flow")],
    ids=["tweedie", "flow"],
)
def test_the_gaussian_posterior(backend: DDSMC) -> None:
    """The posterior of the program: false alarm 1e-4 by the root ESS, plus 0.04 for the discretisation."""
    problem = gaussian_problem(0.3, dim=4, observations=2)
    exact = Chain(problem.posterior.mean, problem.posterior.covariance_matrix, float(problem.log_evidence))
    check_gaussian(ppl.infer(problem.program, backend, draws=3000, seed=0), exact, slack=0.04)


@pytest.mark.parametrize(
    "backend",
    [DDSMC(steps=80, particles=3000, runs=3), DDSMC(steps=25, particles=3000, runs=3, reconstruction="flow")],
    ids=["tweedie", "flow"],
)
def test_weights_of_two_modes(backend: DDSMC) -> None:
    """False alarm 1e-4 by the root ESS, plus 0.02 for the discretisation."""
    prior, matrix, sigma, y = two_modes()
    posterior = ppl.infer(program_of(prior, matrix, sigma, y), backend, draws=3000, seed=0)
    exact, evidence = prior.condition_linear(matrix, y, sigma**2), prior.log_evidence(matrix, y, sigma**2)
    check_modes(posterior, exact, evidence, slack=0.02)


def test_an_isotropic_gaussian_prior_gives_equal_weights() -> None:
    """The twist is exact there: after the start no weight changes, at any number of levels."""
    one = torch.ones(1, dtype=F64)
    prior = GaussianMixture(one, torch.tensor([[0.5, -1.0, 0.3]], dtype=F64), 0.7 * one)
    backend = DDSMC(steps=5, particles=50, runs=1, threshold=1e-6, solver=Ancestral())
    posterior = ppl.infer(program_of(prior, MATRIX, 0.3, Y), backend, draws=50, seed=0)
    ess = posterior.info["ess"][0]
    torch.testing.assert_close(ess, ess[:1].expand_as(ess), rtol=1e-9, atol=0)


def test_options_are_checked_when_built() -> None:
    with pytest.raises(ppl.OptionError, match="reconstruction"):
        DDSMC(reconstruction="ode")  # type: ignore[arg-type]
    with pytest.raises(ppl.OptionError, match="ode_steps"):
        DDSMC(ode_steps=1)
