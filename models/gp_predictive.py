"""The value of a Gaussian process at a new place, with its lengthscale unknown; exact by quadrature.

l ~ Gamma(3, 6),  f ~ GP(0, exp(-(x - x')^2 / (2 l^2))),  y_i = f(x_i) + N(0, 0.001),  i = 1..10;  wanted: l and f(x*)

The program draws f(x*) first and the data given it, so that both unknowns are latent sites.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.program import Program

__all__ = ["gp_posterior", "gp_predictive"]

SHAPE, RATE = 3.0, 6.0  # of the lengthscale's prior
NOISE = 1e-3  # variance


def _kernel(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return torch.exp(-0.5 * ((x[..., :, None] - y[..., None, :]) / scale[..., None, None]).square())


def gp_predictive(data: int = 10) -> Program:
    """Ten data at random places of the unit interval, one query; places are data with a uniform law.

    Source: Whittle et al. (2025), code: hyperprior, noise and number of data [read]; one dimension, zero mean and unit
        variance are ours.

    Example:
        >>> gp_predictive()
        Program(regression, latents=['scale', 'f'], observed=['query', 'x', 'y'])
    """

    def regression(query: Tensor, x: Tensor, y: Tensor) -> None:
        zero, one = y.new_zeros(()), y.new_ones(())
        query = pyro.sample("query", dist.Uniform(zero, one), obs=query)
        x = pyro.sample("x", dist.Uniform(y.new_zeros(data), 1.0).to_event(1), obs=x)
        scale = pyro.sample("scale", dist.Gamma(y.new_tensor(SHAPE), y.new_tensor(RATE)))
        f = pyro.sample("f", dist.Normal(zero, one))
        cross = _kernel(x, query[None], scale)[:, 0]
        spread = _kernel(x, x, scale) - cross[:, None] * cross + NOISE * torch.eye(data, dtype=y.dtype)
        root = torch.linalg.cholesky(spread)
        pyro.sample("y", dist.MultivariateNormal(cross * f, scale_tril=root), obs=y)

    places = torch.linspace(0.05, 0.95, data, dtype=torch.float64)
    return Program(
        regression, torch.tensor(0.5, dtype=torch.float64), places, torch.zeros_like(places), compile="never"
    )


def gp_posterior(query: Tensor, x: Tensor, y: Tensor, points: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact posterior on a grid of u = log l.

    Args:
        query: (batch,).
        x: (batch, data).
        y: (batch, data).
        points: of the grid, over [-6, 2].

    Returns:
        grid (points,), posterior weight of each point (batch, points), mean and variance of f(x*) there.

    Example:
        >>> x = torch.linspace(0.0, 1.0, 10, dtype=torch.float64)[None]
        >>> grid, weight, mean, variance = gp_posterior(x[:, 4] + 0.01, x, torch.sin(3 * x))
        >>> bool(((weight * mean).sum() - torch.sin(3 * (x[0, 4] + 0.01))).abs() < 0.02)
        True
    """
    grid = torch.linspace(-6.0, 2.0, points, dtype=torch.float64)
    scale = grid.exp()
    log_joint, means, variances = [], [], []
    for q, places, values in zip(query, x, y, strict=True):
        spread = _kernel(places, places, scale) + NOISE * torch.eye(len(places), dtype=values.dtype)
        root = torch.linalg.cholesky(spread)
        cross = _kernel(places, q[None], scale)
        right = torch.cat([values[:, None].expand(points, -1, 1), cross], -1)
        white = torch.linalg.solve_triangular(root, right, upper=False)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_likelihood = -0.5 * white[..., 0].square().sum(-1) - log_det - 0.5 * len(places) * math.log(2 * math.pi)
        log_prior = SHAPE * grid - RATE * scale + SHAPE * math.log(RATE) - math.lgamma(SHAPE)
        log_joint.append(log_likelihood + log_prior)
        means.append((white[..., 0] * white[..., 1]).sum(-1))
        variances.append(1 - white[..., 1].square().sum(-1))
    return grid, torch.stack(log_joint).softmax(1), torch.stack(means), torch.stack(variances)
