r"""Loss-guided diffusion by Monte Carlo: the likelihood averaged over a cloud around the denoised point.

log p(y | x) ~ log mean_k p(y | D + r z_k),   r^2 = s^2 sd^2 / (s^2 + sd^2),   z_k ~ N(0, I)
posterior = D + s^2 J^T sum_k w_k grad log p(y | D + r z_k),   w_k = softmax_k log p(y | D + r z_k)
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inverse.guides.base import Guided, Level, denoise_with_vjp, likelihood_gradient
from inverse.guides.pigdm import PiGDMGuide
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import OptionError

__all__ = ["LGDGuide"]


@dataclass(frozen=True)
class LGDGuide:
    r"""LGD-MC: guidance for any differentiable likelihood that keeps some of the spread of x_0 given x.

    With data_std -> 0 it is `DPSGuide(weight="likelihood")`; for linear data with Gaussian noise and many samples it is
    `PiGDMGuide`. With few samples the average is biased low in the log, most where r moves the data by many
    times their noise. The gradient is as stiff there as that of DPS: steps of both diverge at noise 0.05 on the
    sixteen-dimensional Gaussian problem (measured, 100 steps). The cloud is a function of `seed` and of the noise
    level, and the same for all lanes, so that the twist is a function of x and its gradient is exact.

    Args:
        samples: points of the cloud, K; 3 to 10 published. Each is an evaluation of the likelihood, not of the network.
        data_std: sd of the data, in the prior's units; None takes `prior.data_std`. The published r has sd = 1.
        seed: of the cloud.

    Source: Song et al. (2023), "Loss-guided diffusion models", equation 10 [read]; r with the sd of the data [derived].

    Example:
        >>> LGDGuide(samples=4).gradient
        True
    """

    samples: int = 10
    data_std: float | None = None
    seed: int = 0

    exact_when: ClassVar[tuple[str, ...]] = ()
    acts_in: ClassVar[str] = "denoiser"
    gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise OptionError(f"samples must be one or more, got {self.samples}; 3 to 10 are published")
        if self.data_std is not None and not (self.data_std > 0 and math.isfinite(self.data_std)):
            raise OptionError(f"data_std must be positive, or None for the prior's own, got {self.data_std}")

    def cloud(self, problem: DiffusionProblem, sigma: float) -> Tensor:
        """z_k (samples, *shape) at a noise level."""
        # Neighbouring levels get unrelated clouds: the bits of the level are part of the seed.
        bits = struct.unpack("<q", struct.pack("<d", sigma))[0]
        generator = torch.Generator().manual_seed((bits ^ (self.seed * 0x9E3779B97F4A7C15)) % 2**63)
        z = torch.randn((self.samples, *problem.shape), generator=generator, dtype=problem.dtype)
        return z.to(problem.device)

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> BoundLGD:
        """The guide as a function for one problem."""
        return BoundLGD(self, problem, Cost() if cost is None else cost)


class BoundLGD:
    """LGD for one problem.

    Args:
        options: of the guide.
        problem: prior and likelihood.
        cost: where vjps and likelihood evaluations are counted.
    """

    acts_in = "denoiser"
    gradient = True

    def __init__(self, options: LGDGuide, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost

    def __repr__(self) -> str:
        return repr(self.options)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, sigma: Level, sigma_next: Level | None = None, state: dict[str, Tensor] | None = None
    ) -> Guided:
        """One denoiser call, `samples` evaluations of the likelihood and one vjp."""
        s, samples = float(sigma), self.options.samples
        prior, vjp = denoise_with_vjp(self.problem, x, sigma, self.cost)
        r = math.sqrt(PiGDMGuide(self.options.data_std).variance(s, self.problem.prior.data_std))
        points = prior[None] + r * self.options.cloud(self.problem, s)[:, None]
        value, gradient = likelihood_gradient(self.problem, points.reshape(-1, *self.problem.shape), self.cost)
        value, gradient = value.reshape(samples, len(x)), gradient.reshape(points.shape)
        weight = torch.softmax(value, 0).reshape(samples, len(x), *[1] * (x.ndim - 1))
        log_twist = value.logsumexp(0) - math.log(samples)
        return Guided(prior, prior + s**2 * vjp((weight * gradient).sum(0)), log_twist.to(x.dtype))
