"""What the tests of particle backends share: small problems, and exact answers for the chains that they simulate.

With a Gaussian prior and affine steps the chain of all levels is Gaussian, so that a Kalman filter over them gives what
a particle method must find at any number of levels, discretisation included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import ppl
from inverse.operators import Dense
from ppl.diagnostics.ess import z_bound
from ppl.program import Program
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64
Step = Callable[[Tensor, int], Tensor]  # x at a level and the index of the level -> mean at the next


def hidden(prior: GaussianMixture, sigma_min: float = 0.02) -> DiffusionPrior:
    """The same prior as a network would offer it: a denoiser without an exact covariance."""
    return DiffusionPrior(
        prior.denoise, prior.event_shape, sigma_min=sigma_min, sigma_max=5 * prior.data_std, data_std=prior.data_std,
        dtype=F64,
    )  # fmt: skip


def program_of(prior: object, matrix: Tensor, sigma: float, y: Tensor) -> Program:
    operator = Dense(matrix)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(operator(x), sigma).to_event(1), obs=y)

    return Program(model, y)


def gaussian_prior() -> GaussianMixture:
    """Three correlated dimensions with a mean."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.5, 0.7]], dtype=F64)
    mean = torch.tensor([[0.5, -1.0, 0.3]], dtype=F64)
    return GaussianMixture(torch.ones(1, dtype=F64), mean, (root @ root.T)[None])


def two_modes() -> tuple[GaussianMixture, Tensor, float, Tensor]:
    """Prior, matrix, noise and data whose posterior has two modes with weights of about 0.3 and 0.7."""
    means = torch.tensor([[-2.0, -1.0], [2.0, -1.5], [0.0, 2.5]], dtype=F64)
    weights = torch.tensor([0.3, 0.4, 0.3], dtype=F64)
    prior = GaussianMixture(weights, means, torch.full((3,), 0.1, dtype=F64))
    return prior, torch.tensor([[0.2, 1.0]], dtype=F64), 0.3, torch.tensor([-1.3], dtype=F64)


@dataclass
class Chain:
    """Mean, covariance and log evidence of a Gaussian x that moves and is observed."""

    mean: Tensor
    covariance: Tensor
    log_evidence: float = 0.0

    def observe(self, rows: Tensor, y: Tensor, variance: Tensor) -> None:
        """y_i = rows_i x + N(0, variance_i)."""
        if not len(rows):
            return
        gram = rows @ self.covariance @ rows.T + variance.diag()
        gap = y - rows @ self.mean
        self.log_evidence += float(dist.MultivariateNormal(torch.zeros_like(gap), gram).log_prob(gap))
        gain = torch.linalg.solve(gram, rows @ self.covariance).T
        self.mean = self.mean + gain @ gap
        self.covariance = self.covariance - gain @ rows @ self.covariance

    def move(self, step: Callable[[Tensor], Tensor], variance: float) -> None:
        """x <- step(x) + N(0, variance I), for an affine step."""
        d = len(self.mean)
        offset = step(torch.zeros(1, d, dtype=F64))[0]
        matrix = (step(torch.eye(d, dtype=F64)) - offset).T
        self.mean = matrix @ self.mean + offset
        self.covariance = matrix @ self.covariance @ matrix.T + variance * torch.eye(d, dtype=F64)


def chain_at_start(prior: DiffusionPrior | GaussianMixture, sigma: Tensor) -> Chain:
    """The law of the prior's start."""
    d = prior.event_shape.numel()
    chain = Chain(torch.zeros(d, dtype=F64), torch.eye(d, dtype=F64))
    chain.move(lambda n: prior.start(n, sigma), 0.0)
    return chain


def run_chain(prior: DiffusionPrior | GaussianMixture, sigmas: Tensor, step: Step, variance: list[float]) -> Chain:
    """The prior as its steps make it: the law of x_0."""
    chain = chain_at_start(prior, sigmas[0])
    for level, c in enumerate(variance):
        chain.move(lambda x, level=level: step(x, level), c)
    return chain


def observed(chain: Chain, matrix: Tensor, sigma: float, y: Tensor) -> Chain:
    """The posterior of x_0."""
    chain.observe(matrix, y, torch.full_like(y, sigma**2))
    return chain


def independent_draws(posterior: ppl.Posterior) -> float:
    """Draws resampled from particles: their own number and that of the roots both limit them."""
    return 1 / (1 / len(posterior.flatten("x")) + 1 / float(posterior.info["root_ess"].sum()))


def check_gaussian(posterior: ppl.Posterior, exact: Chain, *, alpha: float = 1e-4, slack: float = 0.0) -> None:
    """Means and variances in whitened coordinates, and the evidence; false alarm alpha for all together.

    Args:
        posterior: of a site x.
        exact: what it should be.
        alpha: of all statistics, whose errors follow from the root ESS. That estimate, and the standard error of the
            evidence, are honest within a factor 1.3, which the bound has.
        slack: for a discretisation, in posterior standard deviations, shares of the variance, and nats.
    """
    d = len(exact.mean)
    factor = torch.linalg.cholesky(exact.covariance)
    gap = posterior.flatten("x") - exact.mean
    u = torch.linalg.solve_triangular(factor, gap.T, upper=False).T
    size, bound = independent_draws(posterior), 1.3 * z_bound(alpha, 2 * d + 1)
    assert float(u.mean(0).abs().max()) < bound / math.sqrt(size) + slack, u.mean(0)
    assert float((u.square().mean(0) - 1).abs().max()) < bound * math.sqrt(2 / size) + slack, u.square().mean(0)
    assert posterior.log_evidence is not None
    value, stderr = posterior.log_evidence
    assert abs(float(value) - exact.log_evidence) < bound * float(stderr) + slack, (value, stderr, exact.log_evidence)


def check_modes(
    posterior: ppl.Posterior, exact: GaussianMixture, log_evidence: Tensor, *, alpha: float = 1e-4, slack: float = 0.0
) -> None:
    """Weights of the modes and the evidence; false alarm alpha for all together, errors from the root ESS."""
    weights = exact.responsibilities(posterior.flatten("x"), 1e-3).mean(0)
    bound = 1.3 * z_bound(alpha, len(weights) + 1)
    spread = (exact.weights * (1 - exact.weights) / independent_draws(posterior)).sqrt()
    assert bool(((weights - exact.weights).abs() < bound * spread + slack).all()), (weights, exact.weights, spread)
    assert posterior.log_evidence is not None
    value, stderr = posterior.log_evidence
    assert abs(float(value - log_evidence)) < bound * float(stderr) + slack, (value, stderr, log_evidence)
