"""Exact laws of chains at a noise level: with a mixture prior and linear data each is a mixture again.

Chains that start from exact draws have to keep their law. Lanes are independent, so that error bars need no estimate of
autocorrelation, and one wrong term of an acceptance shows after a few steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import ppl
from models.references import ExactProblem, linear_problem
from ppl.diagnostics import z_bound
from sde import DiffusionPrior, GaussianMixture

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(gap: float = 2.0) -> GaussianMixture:
    """Three components of unequal weights and shapes in two dimensions."""
    means = gap * torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.5]], dtype=F64)
    spread = torch.tensor([[0.3, 0.5], [0.4, 0.2], [0.2, 0.3]], dtype=F64)
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), means, spread)


def problem_of(prior: GaussianMixture, sigma: float = 0.8, seed: int = 5) -> ExactProblem:
    """One observation of the sum of coordinates, weighted."""
    d = prior.event_shape.numel()
    return linear_problem(prior, torch.linspace(1.0, -0.4, d, dtype=F64)[None], sigma, seeded(seed))


def at_level(problem: ExactProblem, s: float, final: bool) -> GaussianMixture:
    """The density that replicas at level s walk on."""
    prior = problem.prior
    d = prior.event_shape.numel()
    wide = GaussianMixture(prior.weights, prior.means, prior.covariances + s**2 * torch.eye(d, dtype=F64))
    B = problem.matrix / problem.sigma
    R = torch.eye(len(B), dtype=F64) + (-1 if final else 1) * s**2 * B @ B.T
    return wide.condition_linear(B, problem.program.data["y"] / problem.sigma, R)


def z_scores(x: Tensor, exact: GaussianMixture) -> Tensor:
    """Means, squares and probabilities of components for independent draws (n, d), in standard errors."""
    r = exact.responsibilities(x, 1e-9)
    found = torch.cat([x, x.square(), r], -1)
    wanted = torch.cat([exact.mean, exact.variance + exact.mean.square(), exact.weights])
    kept = found.std(0) > 1e-6
    return ((found.mean(0) - wanted) / found.std(0) * math.sqrt(len(x)))[kept]


def worst(x: Tensor, exact: GaussianMixture, alpha: float) -> float:
    """The largest z score over its bound at family-wise false alarm alpha; above 1 is a failure."""
    z = z_scores(x, exact)
    return float(z.abs().max()) / z_bound(alpha, len(z))


def as_network(prior: GaussianMixture, **options: Any) -> DiffusionPrior:
    """The mixture as a prior that knows nothing but its denoiser."""
    return DiffusionPrior(
        lambda x, sigma: prior.denoise(x, sigma),
        prior.event_shape,
        sigma_min=options.pop("sigma_min", 0.01),
        sigma_max=options.pop("sigma_max", prior.sigma_max),
        data_std=prior.data_std,
        dtype=F64,
        **options,
    )


def with_prior(problem: ExactProblem, prior: Any) -> ppl.Program:
    """The same data under another prior object."""
    import pyro
    import pyro.distributions as dist

    from inverse.operators import Dense

    operator = Dense(problem.matrix)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(operator(x), problem.sigma).to_event(1), obs=y)

    return ppl.Program(model, problem.program.data["y"])
