"""FPS-SMC against the exact posterior of the discretised program, whatever its slack and the number of levels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from particle_checks import (
    F64,
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
from inverse.particles import FPSSMC
from inverse.particles.conjugate import Said
from inverse.particles.fps import FPSKernel
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from sde import GaussianMixture
from sde.solvers import DDIM, Ancestral

TALL = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -0.4], [0.5, 0.1, 0.9], [1.0, 1.0, 0.0]], dtype=F64)
UNSEEN = torch.linalg.svd(TALL)[0][:, 3]  # what no x explains
CASES = {
    "wide": (TALL[:2], torch.tensor([1.5, -0.5], dtype=F64)),
    "tall": (TALL, TALL @ torch.tensor([1.0, -0.5, 0.2], dtype=F64) + 0.6 * UNSEEN),
}


@pytest.mark.parametrize("slack", [0.5, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_few_levels_are_exact_for_the_discretised_program(case: str, slack: float) -> None:
    """Eight coarse levels; seven statistics, family-wise false alarm 1e-4, and no slack for discretisation.

    More data than unknowns leave a part of them that no x explains, which is in the evidence alone.
    """
    matrix, y = CASES[case]
    sigma, prior = 0.3, hidden(gaussian_prior(), sigma_min=0.1)
    program = program_of(prior, matrix, sigma, y)
    backend = FPSSMC(steps=8, particles=8000, runs=2, solver=Ancestral(), slack=slack)
    sigmas = backend.levels(DiffusionProblem.of(program))

    def step(x: Tensor, level: int) -> Tensor:
        return Ancestral().step(x, sigmas[level], sigmas[level + 1], prior.denoise(x, sigmas[level])).mean

    variance = [float(b**2 * (1 - (b / a) ** 2)) for a, b in pairwise(sigmas)]
    exact = observed(run_chain(prior, sigmas, step, variance), matrix, sigma, y)
    check_gaussian(ppl.infer(program, backend, draws=8000, seed=0), exact)


def test_weights_of_two_modes() -> None:
    """False alarm 1e-4 by the root ESS, plus 0.02 for 80 levels."""
    prior, matrix, sigma, y = two_modes()
    backend = FPSSMC(steps=80, particles=3000, runs=3)
    posterior = ppl.infer(program_of(prior, matrix, sigma, y), backend, draws=3000, seed=0)
    exact, evidence = prior.condition_linear(matrix, y, sigma**2), prior.log_evidence(matrix, y, sigma**2)
    check_modes(posterior, exact, evidence, slack=0.02)


class _Published(FPSKernel):
    """The factors of all levels, as though each had noise of its own."""

    def said(self, seen: Tensor, level: int, own: dict[str, Tensor]) -> Said:
        return Said(own["next"], self.tau.square(), self.every)


@dataclass(frozen=True)
class _PublishedFPS(FPSSMC):
    def kernel(self, problem: DiffusionProblem, cost: Cost) -> FPSKernel:
        return _Published(problem, self.levels(problem), self.solver, self.chunk, 1e-6)


def test_forgetting_the_shared_noise_counts_the_data_again_at_every_level() -> None:
    """Why the weights have a memory: without, one dimension's posterior sd shrinks from 0.71 to under half of it."""
    one = torch.ones(1, dtype=F64)
    prior = GaussianMixture(one, torch.zeros(1, 1, dtype=F64), one)
    program = program_of(prior, torch.ones(1, 1, dtype=F64), 1.0, torch.tensor([1.0], dtype=F64))
    sd = {}
    for backend in (FPSSMC, _PublishedFPS):
        sd[backend] = float(ppl.infer(program, backend(steps=100, particles=2000, runs=2), draws=2000).sd("x"))
    assert abs(sd[FPSSMC] / 0.5**0.5 - 1) < 0.2
    assert sd[_PublishedFPS] < 0.5 * 0.5**0.5


def test_data_far_noisier_than_the_lowest_level_in_single_precision() -> None:
    """v_b (1 - l) for tau = 500 and levels down to 0.002, against double precision; 1 - l itself rounds to zero."""
    y, found = torch.tensor([1.0]), {}
    for dtype in (torch.float32, F64):
        one = torch.ones(1, dtype=dtype)
        prior = GaussianMixture(one, torch.zeros(1, 1, dtype=dtype), one)
        problem = DiffusionProblem.of(program_of(prior, torch.ones(1, 1, dtype=dtype), 500.0, y.to(dtype)))
        backend = FPSSMC(steps=50)
        kernel = FPSKernel(problem, prior.grid(20.0, 0.002, 50), backend.solver, None, backend.slack)
        own = {"now": torch.zeros(1, 1, dtype=dtype), "next": torch.zeros(1, 1, dtype=dtype)}
        found[dtype] = [float(kernel.said(own["now"], level, own).variance) for level in range(50)]
    assert min(found[F64]) > 0
    assert found[torch.float32] == pytest.approx(found[F64], rel=1e-5)


def test_options_are_checked_when_built() -> None:
    with pytest.raises(ppl.OptionError, match="slack"):
        FPSSMC(slack=0.0)
    with pytest.raises(ppl.OptionError, match="backwards"):
        FPSSMC(solver=DDIM(eta=0.5))
