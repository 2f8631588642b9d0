"""Families of programs whose posteriors are known for every prior: what amortised inference is judged on.

a, b ~ Gamma(4, 6),  x ~ InverseGamma(a, b),  y ~ N(0, x)         posterior InverseGamma(a + 1/2, b + y^2 / 2)
x ~ a mixture of Gaussians,  y ~ N(x, noise^2 I)                  posterior a mixture: `ppl.Mixture.conditioned`
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.amortised import Mixture
from ppl.errors import OptionError
from ppl.program import Program

__all__ = ["gamma_parameters", "inverse_gamma_family", "log_variance_posterior", "normal_family", "normal_posterior"]

SHAPE, RATE = 4.0, 6.0  # of both parameters of the prior: the wide family


def gamma_parameters(
    a: Tensor, b: Tensor, like: Tensor, shape: float = SHAPE, rate: float = RATE
) -> tuple[Tensor, Tensor]:
    """The sites "a" and "b": both parameters of a prior, as data under the law Gamma(shape, rate).

    Example:
        >>> a, b = torch.ones(2)
        >>> trace = pyro.poutine.trace(gamma_parameters).get_trace(a, b, like=a)
        >>> round(float(trace.log_prob_sum()), 4)                      # 2 (4 ln 6 - ln 3! - 6)
        -1.2494
    """
    law = dist.Gamma(like.new_tensor(shape), like.new_tensor(rate))
    return pyro.sample("a", law, obs=a), pyro.sample("b", law, obs=b)


def inverse_gamma_family(shape: float = SHAPE, rate: float = RATE) -> Program:
    """Variance of one normal datum, under a prior whose two parameters are data, with Gamma(shape, rate) as their law.

    Args:
        shape: 4 and 6 are the wide family, 1e4 and 2e4 the narrow one.
        rate: see shape.

    Source: Whittle et al. (2025), code [read].

    Example:
        >>> inverse_gamma_family()
        Program(inverse_gamma, latents=['x'], observed=['a', 'b', 'y'])
    """

    def inverse_gamma(a: Tensor, b: Tensor, y: Tensor) -> None:
        a, b = gamma_parameters(a, b, y, shape, rate)
        x = pyro.sample("x", dist.InverseGamma(a, b))
        pyro.sample("y", dist.Normal(y.new_zeros(()), x.sqrt()), obs=y)

    half = torch.tensor(0.5, dtype=torch.float64)
    return Program(inverse_gamma, half, half, half, compile="never")


def log_variance_posterior(a: Tensor, b: Tensor, y: Tensor) -> dist.TransformedDistribution:
    """The exact law of log x: (batch,) parameters and data.

    Example:
        >>> law = log_variance_posterior(torch.ones(1), torch.ones(1), torch.ones(1))
        >>> grid = torch.linspace(-10.0, 20.0, 3001)
        >>> round(float(law.log_prob(grid).exp().sum() * 0.01), 3)
        1.0
    """
    variance = dist.InverseGamma(a + 0.5, b + 0.5 * y.square())
    return dist.TransformedDistribution(variance, dist.transforms.ExpTransform().inv)


def normal_family(dim: int = 1, noise: float = 1.0) -> Program:
    """A vector seen under Gaussian noise; its prior is to be replaced by mixtures.

    Args:
        dim: length of the vector.
        noise: standard deviation of the noise.

    Source: Whittle et al. (2025), code, with dim 1 and noise 1 [read].
    """
    if noise <= 0 or not math.isfinite(noise):
        raise OptionError(f"noise must be positive and finite, got {noise}")

    def normal(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(y.new_zeros(dim), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    return Program(normal, torch.zeros(dim, dtype=torch.float64), compile="never")


def normal_posterior(prior: Mixture, y: Tensor, noise: float = 1.0) -> tuple[Mixture, Tensor]:
    """Exact posterior and log evidence of `normal_family`: prior a batch or one, y (*batch, dim).

    Example:
        >>> prior = Mixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
        >>> normal_posterior(prior, torch.tensor([2.0]))[0].mean
        tensor([1.0000])
    """
    eye = torch.eye(prior.dim, dtype=y.dtype, device=y.device)
    return prior.conditioned(eye, y, noise**2 * eye)
