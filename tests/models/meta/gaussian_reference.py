"""Twelve Gaussian episodes whose posterior is known by quadrature.

1 / Sigma ~ Gamma(3/2, 1/2),  mu | Sigma ~ N(0, Sigma / 0.1),  y_i ~ N(mu, Sigma + 0.25)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.meta import Episodes, Gaussian, Hierarchy, Network, NormalInverseGamma, NormalInverseWishart

F = {"dtype": torch.float64}
Y = torch.tensor([0.8761, 1.4995, 0.9926, 0.378, 1.66, 1.1694, 0.2294, 1.2823, 1.2619, 1.0702, 1.6671, 1.8899], **F)


@dataclass(frozen=True)
class Exact:
    """Log evidence, and the joint law of mu and precision on a grid."""

    log_evidence: float
    mu: Tensor
    precision: Tensor
    weight: Tensor

    def mean(self, values: Tensor) -> float:
        """Of a function on the grid (precision, mu)."""
        return float((self.weight * values).sum())

    @property
    def moments(self) -> dict[str, float]:
        """By name, as the sheet lists them."""
        mu, precision = self.mu.expand_as(self.weight), self.precision[:, None].expand_as(self.weight)
        theta = [(4 * Y[i] + mu * precision) / (4 + precision) for i in (0, 4)]
        centre = self.mean(mu)
        return {
            "mu": centre,
            "mu_sd": self.mean((mu - centre).square()) ** 0.5,
            "variance": self.mean(1 / precision),
            "precision": self.mean(precision),
            "theta_1": self.mean(theta[0]),
            "theta_5": self.mean(theta[1]),
        }

    def draws(self, number: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Independent draws of all sites: the grid's cells, jittered, then theta by its normal conditional."""
        cell = torch.multinomial(self.weight.reshape(-1), number, replacement=True, generator=generator)
        rows, columns = cell // len(self.mu), cell % len(self.mu)
        jitter = torch.rand(2, number, generator=generator, **F) - 0.5
        log_precision = self.precision.log()
        precision = (log_precision[rows] + jitter[0] * (log_precision[1] - log_precision[0])).exp()
        mu = self.mu[columns] + jitter[1] * (self.mu[1] - self.mu[0])
        total = 4 + precision[:, None]
        noise = torch.randn(number, len(Y), generator=generator, **F)
        theta = (4 * Y + (mu * precision)[:, None]) / total + noise * total.rsqrt()
        return {"mu": mu[:, None], "precision": precision[:, None], "theta": theta[..., None]}


@functools.cache
def exact() -> Exact:
    """By the trapezium rule in mu and log precision."""
    u, mu = torch.linspace(-6, 9, 1201, **F), torch.linspace(-6, 8, 1401, **F)
    precision = u.exp()
    half = torch.tensor(0.5, **F)
    value = (dist.Gamma(3 * half, half).log_prob(precision) + u)[:, None]
    value = value + dist.Normal(0 * half, (0.1 * precision).rsqrt()[:, None]).log_prob(mu)
    spread = (1 / precision + 0.25).sqrt()[:, None]
    value = value + sum(dist.Normal(mu, spread).log_prob(y) for y in Y)
    area = math.log(float((u[1] - u[0]) * (mu[1] - mu[0])))
    evidence = float(value.flatten().logsumexp(0)) + area
    return Exact(evidence, mu, precision, (value + area - evidence).exp())


def hierarchy(full: bool = False, **options: object) -> Hierarchy:
    """One weight for each episode, whose only input is 1."""
    network = Network(nn.Linear(1, 1, bias=False).double())
    zero, count, df = torch.zeros(1, **F), torch.tensor(0.1, **F), torch.tensor(3.0, **F)
    prior = (
        NormalInverseWishart(zero, count, df, torch.ones(1, 1, **F))
        if full
        else NormalInverseGamma(zero, count, df, torch.ones(1, **F))
    )
    return Hierarchy(network, Gaussian(0.5), prior, **options)  # type: ignore[arg-type]


def episodes() -> Episodes:
    """One target each."""
    return Episodes(torch.ones(12, 1, 1, **F), Y[:, None])
