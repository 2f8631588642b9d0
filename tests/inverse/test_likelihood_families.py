"""Any likelihood that a program can write: posterior moments against quadrature over the plane.

Nothing is said to a backend but the program. The reference integrates p(x) p(y | x) on a grid, with the density of y
from scipy or written out by hand, so that a density that the program gets wrong shows as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import Tensor

import ppl
from inverse.guides import DPSGuide
from inverse.operators import Clip, Dense
from inverse.particles import TwistedSMC
from inverse.sensor import Censored, Quantised, log_normal_cdf
from ppl.diagnostics.ess import ess_of, z_bound
from sde import GaussianMixture

F64 = torch.float64
A = Dense(torch.tensor([[1.0, 0.5], [-0.3, 1.0]], dtype=F64))
SIGMA = 0.6

MIXTURE = GaussianMixture(
    torch.tensor([0.4, 0.6], dtype=F64),
    torch.tensor([[-1.0, 0.6], [0.9, -0.4]], dtype=F64),
    torch.tensor([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]], dtype=F64),
    sigma_min=0.02,  # a guided kernel ends with x_0 = D(x), which loses what is below the last noise level
)
GAUSSIAN = GaussianMixture(
    torch.ones(1, dtype=F64),
    torch.tensor([[0.3, -0.2]], dtype=F64),
    torch.tensor([[[0.9, 0.4], [0.4, 0.7]]], dtype=F64),
)


def laplace(mean: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Laplace(mean, SIGMA).to_event(1), obs=y)


def student(mean: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.StudentT(3.0, mean, SIGMA).to_event(1), obs=y)


def poisson(mean: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Poisson(torch.exp(mean)).to_event(1), obs=y)


def bernoulli(mean: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Bernoulli(logits=2 * mean).to_event(1), obs=y)


def censored(mean: Tensor, y: Tensor) -> None:
    """A sensor that stops at 0.5."""
    pyro.sample("y", Censored(mean, SIGMA, high=0.5).to_event(1), obs=y)


def quantised(mean: Tensor, y: Tensor) -> None:
    """Noisy readings rounded to steps of one."""
    pyro.sample("y", Quantised(mean, SIGMA, 1.0).to_event(1), obs=y)


def factored(mean: Tensor, y: Tensor) -> None:
    """The same sensor by hand: one entry was read, of the other is known only that it is beyond."""
    pyro.sample("y", dist.Normal(mean[..., 1], SIGMA), obs=y[1])
    pyro.factor("beyond", log_normal_cdf((mean[..., 0] - 0.5) / SIGMA))


def clipped(mean: Tensor, y: Tensor) -> None:
    """Noise after the clipping: the mean is no longer linear in x."""
    pyro.sample("y", dist.Normal(Clip((2,), -0.4, 0.5)(mean), SIGMA).to_event(1), obs=y)


@dataclass(frozen=True)
class Family:
    """What is observed, data, and their density by other means: means (..., 2) -> (...)."""

    observe: Callable[[Tensor, Tensor], None]
    y: tuple[float, float]
    log_density: Callable[[np.ndarray], np.ndarray]


def log_censored(m: np.ndarray) -> np.ndarray:
    return stats.norm.logsf(0.5, m[..., 0], SIGMA) + stats.norm.logpdf(-0.8, m[..., 1], SIGMA)


FAMILIES = {
    "laplace": Family(laplace, (0.9, -0.7), lambda m: stats.laplace.logpdf([0.9, -0.7], m, SIGMA).sum(-1)),
    "student": Family(student, (0.9, 3.0), lambda m: stats.t.logpdf([0.9, 3.0], 3.0, m, SIGMA).sum(-1)),
    "poisson": Family(poisson, (3.0, 0.0), lambda m: stats.poisson.logpmf([3, 0], np.exp(m)).sum(-1)),
    "bernoulli": Family(bernoulli, (1.0, 0.0), lambda m: stats.bernoulli.logpmf([1, 0], special.expit(2 * m)).sum(-1)),
    "censored": Family(censored, (0.5, -0.8), log_censored),
    "factored": Family(factored, (0.5, -0.8), log_censored),
    "quantised": Family(
        quantised,
        (1.0, -1.0),
        lambda m: np.log(stats.norm.cdf([1.5, -0.5], m, SIGMA) - stats.norm.cdf([0.5, -1.5], m, SIGMA)).sum(-1),
    ),
    "clipped": Family(
        clipped, (0.9, -0.7), lambda m: stats.norm.logpdf([0.9, -0.7], np.clip(m, -0.4, 0.5), SIGMA).sum(-1)
    ),
}


def program_of(family: Family, prior: GaussianMixture) -> ppl.Program:
    def model(y: Tensor) -> None:
        family.observe(A(pyro.sample("x", prior)), y)

    return ppl.Program(model, torch.tensor(family.y, dtype=F64))


@dataclass(frozen=True)
class Exact:
    """Posterior by quadrature: E x, E (x - E x)^2 of both entries, E of the product, log p(y)."""

    mean: Tensor
    variance: Tensor
    covariance: float
    log_evidence: float


def quadrature(family: Family, prior: GaussianMixture, points: int = 601) -> Exact:
    """Sum over a grid of [-6, 6]^2: spectrally accurate where smooth, better than 1e-4 at kinks."""
    line = torch.linspace(-6, 6, points, dtype=F64)
    x = torch.cartesian_prod(line, line)
    parts = [
        math.log(w) + stats.multivariate_normal.logpdf(x.numpy(), m.numpy(), c.numpy())
        for w, m, c in zip(prior.weights, prior.means, prior.covariances, strict=True)
    ]
    with np.errstate(divide="ignore"):  # bins far from the mean have mass zero
        log_joint = np.logaddexp.reduce(parts) + family.log_density(x.numpy() @ np.asarray(A.matrix).T)
    weight = torch.softmax(torch.from_numpy(log_joint), 0)[:, None]
    mean = (weight * x).sum(0)
    second = (weight * (x - mean).square()).sum(0)
    cross = float((weight[:, 0] * (x - mean).prod(-1)).sum())
    evidence = float(special.logsumexp(log_joint)) + 2 * math.log(12 / (points - 1))
    return Exact(mean, second, cross, evidence)


def deviations(x: Tensor, exact: Exact) -> Tensor:
    """(*draws, 5): first and centred second moments of each draw, less their expectations."""
    d = x - exact.mean
    return torch.cat([d, d.square() - exact.variance, d.prod(-1, keepdim=True) - exact.covariance], -1)


@pytest.mark.parametrize("name", ["laplace", "student", "poisson", "bernoulli", "censored", "quantised"])
def test_guided_particles_have_the_moments_of_the_posterior(name: str) -> None:
    """Two means, two variances, the covariance and the evidence, under a prior of two components.

    False alarm 1e-4 a family, with standard errors from the root ESS that are honest within 1.3. The prior is
    discretised to 50 levels, which moves nothing here by more than 0.02 sd.
    """
    family = FAMILIES[name]
    exact = quadrature(family, MIXTURE)
    backend = TwistedSMC(steps=50, guide=DPSGuide(weight="likelihood"), particles=6000, runs=2)
    posterior = ppl.infer(program_of(family, MIXTURE), backend, draws=6000, seed=1)
    found = deviations(posterior.flatten("x"), exact)
    size = 1 / (1 / len(found) + 1 / float(posterior.info["root_ess"].sum()))
    z = found.mean(0) / found.std(0) * math.sqrt(size)
    assert posterior.log_evidence is not None
    z_evidence = (posterior.log_evidence.value - exact.log_evidence) / posterior.log_evidence.stderr
    assert float(torch.cat([z, z_evidence[None]]).abs().max()) < 1.3 * z_bound(1e-4, 6)


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_space_has_the_moments_of_the_posterior(name: str) -> None:
    """The same moments by HMC on the noise of a Gaussian prior, which is exact; each with its own ESS, alarm 1e-4."""
    family = FAMILIES[name]
    exact = quadrature(family, GAUSSIAN)
    backend = ppl.NoiseSpace(ppl.HMC(warmup=100))
    posterior = ppl.infer(program_of(family, GAUSSIAN), backend, draws=200, chains=16, seed=1)
    found = deviations(posterior["x"], exact)
    z = found.mean((0, 1)) / found.std((0, 1)) * ess_of(found).sqrt()
    assert float(z.abs().max()) < z_bound(1e-4, 5)


def test_a_sensor_by_hand_and_by_name_agree() -> None:
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    by_name, by_hand = (program_of(FAMILIES[n], MIXTURE).log_likelihood({"x": x}) for n in ("censored", "factored"))
    torch.testing.assert_close(by_name, by_hand)
    exact = torch.from_numpy(log_censored((x @ A.matrix.T).numpy()))
    torch.testing.assert_close(by_name, exact)


def test_quadrature_knows_the_conjugate_case() -> None:
    """The reference itself, on a Gaussian likelihood with a closed form."""
    y = torch.tensor([0.9, -0.7], dtype=F64)
    normal = Family(laplace, (0.9, -0.7), lambda m: stats.norm.logpdf(y.numpy(), m, SIGMA).sum(-1))
    exact, closed = quadrature(normal, MIXTURE), MIXTURE.condition_linear(A.matrix, y, SIGMA**2)
    torch.testing.assert_close(exact.mean, closed.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(exact.variance, closed.variance, rtol=0, atol=1e-8)
    assert math.isclose(exact.log_evidence, float(MIXTURE.log_evidence(A.matrix, y, SIGMA**2)), abs_tol=1e-8)
