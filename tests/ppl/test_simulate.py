"""Draws from the joint and the predictive distribution."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import ppl
from ppl.diagnostics.ess import z_bound


def scaled(y: Tensor) -> None:
    """One latent mean, a learnable noise scale."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def test_joint_draws_have_the_moments_of_the_model() -> None:
    """Variance of y is 4 + 1: one statistic from 1,000 draws, false alarm 1e-5."""
    program = ppl.Program(scaled, torch.zeros(1, dtype=torch.float64))
    draws = program.simulate(torch.Generator().manual_seed(0), 1000)
    assert draws["y"].shape == (1000, 1)
    z = (draws["y"].square().mean() / 5 - 1) * math.sqrt(1000 / 2)
    assert abs(float(z)) < z_bound(1e-5)
    torch.testing.assert_close(draws["mu"], program.simulate(torch.Generator().manual_seed(0), 1000)["mu"])


def test_predictions_use_the_parameters_of_the_posterior() -> None:
    """With scale 0.01 in the posterior, predicted data lie on their mean; the initial scale is 100 times larger."""
    program = ppl.Program(scaled, torch.zeros(3, dtype=torch.float64))
    mu = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    posterior = ppl.Posterior({"mu": mu}, parameters={"scale": torch.tensor(0.01, dtype=torch.float64)})
    predicted = program.predict(posterior)["y"]
    assert predicted.shape == (2, 50, 3)
    assert 0.005 < float((predicted - mu[..., None]).std()) < 0.02
