"""Inverse problems whose posteriors are known exactly: what every backend can be judged on.

Prior sum_k w_k N(m_k, C_k) and data y = A x + n with Gaussian n give a posterior of the same kind, with its evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inverse.operators import Dense
from ppl.program import Program
from sde.mixture import GaussianMixture

__all__ = ["ExactProblem", "gaussian_problem", "linear_problem", "mixture_problem"]


@dataclass(frozen=True)
class ExactProblem:
    """A program with its exact answer.

    Args:
        program: x ~ prior, y ~ N(A x, sigma^2 I).
        prior: the prior of x.
        matrix: A, (m, d).
        sigma: standard deviation of the noise.
        truth: the x that made the data, (d,).
        posterior: the exact posterior.
        log_evidence: the exact log p(y), 0-d.
    """

    program: Program
    prior: GaussianMixture
    matrix: Tensor
    sigma: float
    truth: Tensor
    posterior: GaussianMixture
    log_evidence: Tensor


def linear_problem(prior: GaussianMixture, matrix: Tensor, sigma: float, generator: torch.Generator) -> ExactProblem:
    """Draw a truth and data from the model and condition on the data exactly.

    Args:
        prior: over vectors (d,).
        matrix: A, (m, d).
        sigma: standard deviation of the noise, positive.
        generator: source of the truth and the noise.
    """
    operator = Dense(matrix)
    truth = prior.draw((), generator)
    noise = torch.randn(len(matrix), generator=generator, dtype=matrix.dtype)
    y = matrix @ truth + sigma * noise

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(operator(x), sigma).to_event(1), obs=y)

    variance = sigma**2
    return ExactProblem(
        Program(model, y),
        prior,
        matrix,
        sigma,
        truth,
        prior.condition_linear(matrix, y, variance),
        prior.log_evidence(matrix, y, variance),
    )


def gaussian_problem(sigma: float, seed: int = 0, *, dim: int = 16, observations: int = 6) -> ExactProblem:
    """A correlated Gaussian prior with a dense operator: sixteen dimensions, six observations.

    Example:
        >>> problem = gaussian_problem(0.05)
        >>> problem.posterior.mean.shape, problem.program.data["y"].shape
        (torch.Size([16]), torch.Size([6]))
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = normal(dim, dim) / dim**0.5
    covariance = root @ root.T + 0.05 * torch.eye(dim, dtype=torch.float64)
    prior = GaussianMixture(torch.ones(1, dtype=torch.float64), normal(1, dim), covariance[None])
    return linear_problem(prior, normal(observations, dim) / dim**0.5, sigma, generator)


def mixture_problem(dim: int, observations: int, seed: int = 0) -> ExactProblem:
    """The mixture of 25 components on which posterior samplers of the literature are compared.

    Means (-8i, -8j, -8i, ...) with i, j in {-2, ..., 2}, identity covariances, weights proportional to N(0, 1)^2;
    A with random orthogonal factors and sorted uniform singular values, noise uniform times the largest of them.
    Source: Cardoso et al. (2024), as in the code of Janati et al. (2024) [read].

    Example:
        >>> problem = mixture_problem(8, 2, seed=3)
        >>> problem.prior.components, problem.matrix.shape
        (25, torch.Size([2, 8]))
    """
    generator = torch.Generator().manual_seed(seed)
    grid = [[-8.0 * i, -8.0 * j] * (dim // 2) for i in range(-2, 3) for j in range(-2, 3)]
    weights = torch.randn(25, generator=generator, dtype=torch.float64).square()
    one = torch.ones(25, dtype=torch.float64)
    prior = GaussianMixture(weights / weights.sum(), torch.tensor(grid, dtype=torch.float64), one)
    raw = torch.randn(observations, dim, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(raw, full_matrices=False)
    values = torch.rand(observations, generator=generator, dtype=torch.float64).sort(descending=True).values
    sigma = float(torch.rand((), generator=generator, dtype=torch.float64) * values[0])
    return linear_problem(prior, left * values @ right, sigma, generator)
