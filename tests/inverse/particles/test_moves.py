"""Rejuvenation: noise all particles up, lead them back, and accept by the weights of the paths."""

from __future__ import annotations

import math

import pytest
import torch
from particle_checks import F64, Chain, check_gaussian, gaussian_prior, hidden, program_of, two_modes

import ppl
from inverse.guides import PiGDMGuide
from inverse.particles import NoiseAndReturn, TwistedSMC
from inverse.particles.closure import ClosureKernel
from inverse.particles.moves import NoiseUp
from inverse.problem import DiffusionProblem
from models.references import gaussian_problem
from ppl.diagnostics.ess import z_bound
from sde import GaussianMixture, log_grid
from sde.denoiser import count_calls
from sde.solvers import DDIM


def line() -> ppl.Program:
    """One dimension, two modes of the prior, data between them and nearer to one."""
    means, sds = torch.tensor([[-2.0], [2.0]], dtype=F64), torch.tensor([0.3, 0.3], dtype=F64)
    prior = GaussianMixture(torch.tensor([0.5, 0.5], dtype=F64), means, sds.square())
    return program_of(prior, torch.ones(1, 1, dtype=F64), 1.5, torch.tensor([0.4], dtype=F64))


@pytest.mark.parametrize("climb", [5, 40])
def test_a_move_leaves_its_level_as_it_is(climb: int) -> None:
    """20,000 draws of p_j psi_j, by inversion of its distribution function, are that still after two moves.

    Mean, variance, and the share of one mode, false alarm 1e-4, plus 0.01 for levels that are 2 % apart. Power: with
    every proposal accepted, or acceptance turned round, the share is off by 0.05 and more.
    """
    problem = DiffusionProblem.of(line())
    sigmas = log_grid(3.0, 0.15, 150)
    kernel = ClosureKernel(problem, sigmas)
    level, count = 90, 20_000
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        grid = torch.linspace(-6, 6, 6001, dtype=F64)[:, None]
        log_density = problem.prior.log_prob_at(grid, sigmas[level]) + kernel.at(grid, level).log_twist
        density = torch.softmax(log_density, 0)
        u = (torch.arange(count, dtype=F64) + torch.rand(count, generator=generator, dtype=F64)) / count
        x = grid[torch.searchsorted(density.cumsum(0), u).clamp(max=6000)]
        moved, share = NoiseUp(problem, kernel, sigmas, 2, climb)(kernel.at(x, level), level, generator)
    x, grid = moved.x[:, 0], grid[:, 0]
    mean = (density * grid).sum()
    variance = (density * (grid - mean).square()).sum()
    fourth = (density * (grid - mean) ** 4).sum()
    right = density[grid > 0].sum()
    error = torch.stack([x.mean() - mean, (x - mean).square().mean() - variance, (x > 0).double().mean() - right])
    stderr = torch.stack([variance, fourth - variance.square(), right * (1 - right)]).sqrt() / math.sqrt(count)
    assert bool((error.abs() < z_bound(1e-4, 3) * stderr + 0.01).all()), (error, stderr)
    assert 0.3 < share < 1


def test_acceptance_is_one_where_the_closure_is_exact() -> None:
    """A Gaussian prior: all paths have the same weight, whatever the levels, and every particle moves."""
    problem = DiffusionProblem.of(gaussian_problem(0.3, dim=3, observations=2).program)
    kernel = ClosureKernel(problem, problem.prior.sigmas(6))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = kernel.at(problem.noise(500, generator), 4)
        after, share = NoiseUp(problem, kernel, kernel.sigmas, 2, 3)(before, 4, generator)
    # Equal weights differ by rounding, and a uniform draw within rounding of one is rare.
    assert share == 1.0
    assert bool((after.x != before.x).any(1).all())


def test_moves_with_a_guide_keep_the_posterior() -> None:
    """A network's prior led by PiGDM: false alarm 1e-4 by the root ESS, plus 0.05 for 60 levels and their history."""
    prior = gaussian_prior()
    matrix, y = torch.tensor([[1.0, -0.5, 0.2]], dtype=F64), torch.tensor([1.5], dtype=F64)
    backend = TwistedSMC(steps=60, particles=3000, guide=PiGDMGuide(), threshold=0.9, moves=1, runs=2)
    posterior = ppl.infer(program_of(hidden(prior), matrix, 0.3, y), backend, draws=3000, seed=0)
    exact = prior.condition_linear(matrix, y, 0.09)
    chain = Chain(exact.mean, exact.covariance_matrix, float(prior.log_evidence(matrix, y, 0.09)))
    assert 0.2 < float(posterior.info["acceptance_rate"].mean()) <= 1
    check_gaussian(posterior, chain, slack=0.05)


def test_every_denoiser_call_of_a_move_is_counted() -> None:
    """2 (climb + 1) rows per particle, fewer near the first level; the posterior's cost and a hook agree."""
    prior, matrix, sigma, y = two_modes()
    program, particles, climb, steps = program_of(prior, matrix, sigma, y), 30, 2, 6
    with count_calls(prior) as count:
        backend = TwistedSMC(steps=steps, particles=particles, runs=1, threshold=1.0, moves=1, climb=climb)
        posterior = ppl.infer(program, backend, draws=10, seed=0)
    assert int(posterior.info["resampled"]) == steps - 1
    rows = steps + 2 * sum(min(climb, level) + 1 for level in range(1, steps - 1))
    assert posterior.cost.denoiser_evals == count.evals == particles * rows


def test_without_resampling_there_is_no_move() -> None:
    prior, matrix, sigma, y = two_modes()
    program = program_of(prior, matrix, sigma, y)
    never = ppl.infer(program, TwistedSMC(steps=5, particles=20, runs=1, threshold=1e-6, moves=3), draws=10, seed=0)
    plain = ppl.infer(program, TwistedSMC(steps=5, particles=20, runs=1, threshold=1e-6), draws=10, seed=0)
    assert torch.equal(never["x"], plain["x"])
    assert "acceptance_rate" not in never.info


def test_options_are_checked_when_built() -> None:
    with pytest.raises(ppl.OptionError, match="moves"):
        TwistedSMC(moves=-1)
    with pytest.raises(ppl.OptionError, match="climb"):
        TwistedSMC(climb=0)
    with pytest.raises(ppl.OptionError, match="backwards"):
        TwistedSMC(guide=PiGDMGuide(), solver=DDIM(eta=0.5), moves=1)
    with pytest.raises(ppl.OptionError, match="backwards"):
        NoiseAndReturn(solver=DDIM(eta=0.5))
    assert TwistedSMC(guide=PiGDMGuide(), solver=DDIM(eta=0.5)).moves == 0
