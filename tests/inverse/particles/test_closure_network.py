"""The moment closure on priors that show no more than a denoiser, as networks do."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inverse
import models
import ppl
from inverse.operators import Dense, Mask
from inverse.particles import MomentClosure
from inverse.problem import DiffusionProblem
from ppl.diagnostics.ess import z_bound
from ppl.errors import OptionError
from ppl.program import Program
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64


def hidden(prior: GaussianMixture) -> DiffusionPrior:
    """The same prior as a network would offer it."""
    spread = prior.data_std
    return DiffusionPrior(prior.denoise, prior.event_shape, sigma_min=0.02, sigma_max=20 * spread, data_std=spread)


def observed(prior: object, matrix: Tensor, sigma: float, y: Tensor) -> Program:
    operator = Dense(matrix)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(operator(x), sigma).to_event(1), obs=y)

    return Program(model, y)


@pytest.fixture(scope="module")
def gaussian() -> GaussianMixture:
    factor = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=F64) / torch.arange(1, 9)
    covariance = factor @ factor.T + 0.05 * torch.eye(8, dtype=F64)
    return GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 8, dtype=F64), covariance[None])


MATRIX = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
Y = torch.tensor([1.5, -2.0], dtype=F64)


def test_all_weights_are_equal_for_a_gaussian_once_every_direction_is_asked(gaussian: GaussianMixture) -> None:
    """Three levels; what differs from the exact evidence is the start, of order (sd / sigma_max)^2 per dimension."""
    program = observed(hidden(gaussian), MATRIX, 0.3, Y)
    posterior = ppl.infer(
        program, inverse.TwistedSMC(steps=3, particles=300, guide=MomentClosure(6), runs=1), draws=300
    )
    assert posterior.log_evidence is not None
    exact = float(gaussian.log_evidence(MATRIX, Y, 0.09))
    assert abs(float(posterior.log_evidence.value) - exact) < 0.05
    assert float(posterior.info["root_ess"]) > 0.98 * 300
    # Eight vjps for eight entries, at three levels.
    assert (posterior.cost.denoiser_evals, posterior.cost.vjps) == (3 * 300, 8 * 3 * 300)


def test_few_directions_still_find_the_posterior(gaussian: GaussianMixture) -> None:
    """One random direction beside two measured: 40 levels leave a bias of a few per cent, the weights the rest.

    Means are within 5 standard errors by root ESS and 5 % of a prior sd; eight checks, false alarm below 1e-5.
    """
    program = observed(hidden(gaussian), MATRIX, 0.3, Y)
    posterior = ppl.infer(
        program, inverse.TwistedSMC(steps=40, particles=2000, guide=MomentClosure(1), runs=1), draws=2000
    )
    exact = gaussian.condition_linear(MATRIX, Y, 0.09)
    sd = exact.covariance_matrix.diagonal().sqrt()
    root = float(posterior.info["root_ess"])
    assert root > 500
    x = posterior.flatten("x")
    assert float(((x.mean(0) - exact.mean).abs() / sd).max()) < z_bound(1e-5, 8) / root**0.5 + 0.05
    assert posterior.log_evidence is not None
    gap = abs(float(posterior.log_evidence.value - gaussian.log_evidence(MATRIX, Y, 0.09)))
    assert gap < 5 * float(posterior.log_evidence.stderr) + 0.05
    ratio = x.var(0) / sd.square()
    assert float((ratio - 1).abs().max()) < 5 * (2 / root) ** 0.5 + 0.05


def test_chunks_change_nothing(gaussian: GaussianMixture) -> None:
    program = observed(hidden(gaussian), MATRIX, 0.3, Y)
    draws = [
        ppl.infer(
            program, inverse.TwistedSMC(steps=4, particles=20, guide=MomentClosure(), chunk=chunk), draws=20, seed=3
        )
        for chunk in (None, 7)
    ]
    torch.testing.assert_close(draws[0].draws["x"], draws[1].draws["x"], rtol=1e-10, atol=1e-10)


def test_a_network_of_784_pixels_draws_without_its_matrix() -> None:
    """Three levels of the shipped prior: one call and m + 2 vjps per particle and level, whatever the image's size."""
    prior = models.load("fashion28x28")
    seen = torch.zeros(1, 28, 28, dtype=torch.bool)
    seen[0, 10:20:5, 14] = True
    mask = Mask(seen)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(mask(x), 0.3).to_event(1), obs=y)

    program = Program(model, torch.zeros(2))
    posterior = ppl.infer(program, inverse.TwistedSMC(steps=3, particles=4, guide=MomentClosure(), runs=1), draws=4)
    assert posterior.draws["x"].isfinite().all()
    assert (posterior.cost.denoiser_evals, posterior.cost.vjps) == (12, 12 * 4)


def test_in_other_engines_it_is_moment_matching(gaussian: GaussianMixture) -> None:
    problem = DiffusionProblem.of(observed(hidden(gaussian), MATRIX, 0.3, Y))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = MomentClosure().bind(problem)(x, 0.5)
    expected = inverse.MomentMatchingGuide().bind(problem)(x, 0.5)
    torch.testing.assert_close(found.posterior, expected.posterior)
    with pytest.raises(OptionError, match="one direction or more"):
        MomentClosure(random=0)
