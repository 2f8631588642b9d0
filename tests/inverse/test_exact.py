"""Exact conditioning against textbook formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl
from inverse import Exact
from ppl import Program
from ppl.errors import CapabilityError
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(d: int = 3, k: int = 3) -> GaussianMixture:
    means = 2 * torch.randn(k, d, generator=seeded(2), dtype=F64)
    weights = torch.linspace(1, 2, k, dtype=F64)
    return GaussianMixture(weights, means, torch.linspace(0.5, 1.0, k, dtype=F64))


MATRIX = torch.randn(2, 3, generator=seeded(3), dtype=F64)
Y = torch.tensor([0.5, -1.0], dtype=F64)
NOISE = torch.tensor([0.3, 0.8], dtype=F64)


def model_of(prior: Any, noise: Tensor = NOISE) -> Any:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(1.0 + x @ MATRIX.T, noise).to_event(1), obs=y)

    return model


def test_evidence_is_that_of_the_data_in_their_own_units() -> None:
    prior = mixture()
    posterior = ppl.infer(Program(model_of(prior), Y), Exact(), draws=5)
    covariance = MATRIX @ prior.covariances @ MATRIX.T + NOISE.square().diag()
    parts = dist.MultivariateNormal(1.0 + prior.means @ MATRIX.T, covariance).log_prob(Y)
    expected = torch.logsumexp(parts + prior.weights.log(), 0)
    torch.testing.assert_close(posterior.log_evidence.value, expected, rtol=1e-12, atol=0)
    assert posterior.log_evidence.stderr == 0


def test_draws_have_the_exact_moments() -> None:
    """20 000 draws; 6 standard errors for 9 statistics: a false alarm in 1e-8 of runs."""
    prior = mixture(k=1)
    posterior = ppl.infer(Program(model_of(prior), Y), Exact(), draws=10_000, chains=2)
    x = posterior.flatten("x")
    precision = torch.linalg.inv(prior.covariance_matrix) + MATRIX.T @ (MATRIX / NOISE.square()[:, None])
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (
        torch.linalg.solve(prior.covariance_matrix, prior.mean) + MATRIX.T @ ((Y - 1.0) / NOISE.square())
    )
    torch.testing.assert_close(posterior.guide.mean, mean)
    sd = covariance.diagonal().sqrt()
    n = len(x)
    assert ((x.mean(0) - mean).abs() < 6 * sd / math.sqrt(n)).all()
    found = (x - mean).T @ (x - mean) / n
    assert ((found - covariance).abs() < 6 * torch.outer(sd, sd) * math.sqrt(2 / n)).all()


def test_the_density_of_the_posterior_is_joint_over_evidence() -> None:
    """p(x | y) = p(x) p(y | x) / p(y) at any point: no Monte Carlo, no second implementation."""
    program = Program(model_of(mixture()), Y)
    posterior = ppl.infer(program, Exact(), draws=50)
    x = posterior["x"][0]
    joint = program.log_joint({"x": x})
    torch.testing.assert_close(posterior.guide.log_prob(x), joint - posterior.log_evidence.value)


def test_plates_are_conditioned_one_by_one() -> None:
    prior = mixture()
    ys = torch.randn(4, 2, generator=seeded(8), dtype=F64)

    def plated(y: Tensor) -> None:
        with pyro.plate("copies", 4):
            model_of(prior)(y)

    program = Program(plated, ys)
    posterior = ppl.infer(program, Exact(), draws=2000)
    assert posterior["x"].shape == (1, 2000, 4, 3)
    singles = [ppl.infer(Program(model_of(prior), ys[i]), Exact(), draws=5) for i in range(4)]
    total = torch.stack([s.log_evidence.value for s in singles]).sum()
    torch.testing.assert_close(posterior.log_evidence.value, total)
    for i in range(4):
        # 12 means at 6 standard errors.
        gap = posterior["x"][0, :, i].mean(0) - singles[i].guide.mean
        assert (gap.abs() < 6 * singles[i].guide.variance.sqrt() / math.sqrt(2000)).all()

    def mixed(y: Tensor) -> None:
        with pyro.plate("copies", 4):
            x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x.sum(0), 1.0).to_event(1), obs=y)

    data = ys[0].repeat(2)[:3]
    tied = ppl.infer(Program(mixed, data), Exact(), draws=5)
    assert tied["x"].shape == (1, 5, 4, 3)
    weights, means, variances = prior.weights.log(), prior.means, prior.covariances[:, 0, 0]
    terms = [
        weights[list(k)].sum()
        + dist.MultivariateNormal(means[list(k)].sum(0), (1 + variances[list(k)].sum()) * torch.eye(3)).log_prob(data)
        for k in itertools.product(range(3), repeat=4)
    ]
    torch.testing.assert_close(tied.log_evidence.value, torch.stack(terms).logsumexp(0))
    many = mixture(k=25)

    def too_many(y: Tensor) -> None:
        with pyro.plate("copies", 4):
            x = pyro.sample("x", many)
        pyro.sample("y", dist.Normal(x.sum(0), 1.0).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="several"):
        ppl.infer(Program(too_many, data), Exact(), draws=5)


def test_plates_that_nothing_measures_keep_the_prior() -> None:
    prior = mixture(k=1)

    def model(y: Tensor) -> None:
        with pyro.plate("copies", 3):
            x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x[..., 0, :], 0.1).to_event(1), obs=y)

    posterior = ppl.infer(Program(model, torch.zeros(3, dtype=F64)), Exact(), draws=4000)
    for i in (1, 2):
        gap = posterior["x"][0, :, i].mean(0) - prior.mean
        assert (gap.abs() < 6 * prior.variance.sqrt() / math.sqrt(4000)).all()
    assert posterior["x"][0, :, 0].abs().max() < 1


def test_same_seed_same_draws_and_deterministic_sites() -> None:
    prior = mixture()

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        twice = pyro.deterministic("twice", 2 * x)
        pyro.sample("y", dist.Normal(twice, 1.0).to_event(1), obs=y)

    program = Program(model, torch.zeros(3, dtype=F64))
    a, b, c = (ppl.infer(program, Exact(), draws=6, chains=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(a["x"], b["x"])
    assert not torch.equal(a["x"], c["x"])
    torch.testing.assert_close(a["twice"], 2 * a["x"])
    assert a.cost.denoiser_calls == 0


def test_problems_are_conditioned_in_turn() -> None:
    program = Program(model_of(mixture()), Y)
    ys = torch.stack([Y, Y + 1])
    posterior = ppl.infer(program.over(y=ys), Exact(), draws=4)
    each = [ppl.infer(program.with_data(y=y), Exact(), draws=4).log_evidence.value for y in ys]
    torch.testing.assert_close(posterior.log_evidence.value, torch.stack(each))


def test_what_cannot_be_conditioned_is_refused() -> None:
    network = DiffusionPrior(lambda x, sigma: x / (1 + sigma**2), (3,), sigma_max=10.0, sigma_min=0.01, dtype=F64)
    with pytest.raises(CapabilityError, match="condition_linear"):
        ppl.infer(Program(model_of(network), Y), Exact(), draws=3)

    prior = mixture()

    def laplace(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Laplace(x, 1.0).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="Laplace"):
        ppl.infer(Program(laplace, torch.zeros(3, dtype=F64)), Exact(), draws=3)

    def nuisance(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + shift, 1.0).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="shift"):
        ppl.infer(Program(nuisance, torch.zeros(3, dtype=F64)), Exact(), draws=3)
