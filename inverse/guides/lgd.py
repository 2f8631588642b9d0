r"""Loss-guided diffusion by Monte Carlo: the likelihood averaged over a cloud around the denoised point.

log p(y | x) ~ log mean_k p(y | D + r z_k),   r^2 = s^2 sd^2 / (s^2 + sd^2),   z_k ~ N(0, I)
posterior = D + t u,   u = s^2 J^T sum_k w_k g_k,   g_k = grad log p(y | D + r z_k),   w_k = softmax of log p

    "likelihood":  t = 1
    "damped":      t = min(1, q f),   q = g.u / (g.u + c),   c = sum_k w_k u^T H_k u,
                   f = min(c / (c - Var_w(g_k.u)), 1 / sum_k w_k^2)

q goes as far as the likelihood of single points bends (`inverse/guides/damping.py`). Where the cloud covers x_0 given x
that has been averaged out, by the factor that f finds in the cloud; where one point has all the weight, f = 1.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from inverse.guides.base import Guided, Level, denoise_with_vjp, likelihood_gradient
from inverse.guides.damping import curvature, per_lane, share
from inverse.guides.pigdm import PiGDMGuide
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import OptionError

__all__ = ["LGDGuide", "LGDWeight"]

LGDWeight = Literal["damped", "likelihood"]


@dataclass(frozen=True)
class LGDGuide:
    r"""LGD-MC: guidance for any differentiable likelihood that keeps some of the spread of x_0 given x.

    For linear data with Gaussian noise and many samples it is `PiGDMGuide`. With few samples the average is biased low
    in the log, most where r moves the data by many times their noise: one point has all the weight, and the gradient is
    as stiff as that of DPS. Followed all the way it then leaves the support of the prior: at noise 0.05 on the
    sixteen-dimensional Gaussian problem (100 steps), and for phase retrieval on digits, where the shift was a hundred
    times the size of the data at high levels (measured). "damped" goes as far along it as the likelihood bends. The
    cloud is a function of `seed` and of the noise level, and the same for all lanes, so that the twist is a function of
    x; its gradient is exact.

    Args:
        samples: points of the cloud, K; 3 to 10 published. Each is an evaluation of the likelihood, not of the network.
        data_std: sd of the data, in the prior's units; None takes `prior.data_std`. The published r has sd = 1.
        seed: of the cloud.
        weight: "damped", stable for sharp data, at the price of a second evaluation of the likelihood where it is not
            linear and Gaussian; or "likelihood", the whole gradient as published, which with data_std -> 0 is
            `DPSGuide(weight="likelihood")`.

    Source: Song et al. (2023), "Loss-guided diffusion models", equation 10 [read]; r with the sd of the data
    and "damped" [derived].

    Example:
        >>> LGDGuide(samples=4).gradient, LGDGuide(samples=4, weight="likelihood").gradient
        (False, True)
    """

    samples: int = 10
    data_std: float | None = None
    seed: int = 0
    weight: LGDWeight = "damped"

    exact_when: ClassVar[tuple[str, ...]] = ()
    acts_in: ClassVar[str] = "denoiser"

    def __post_init__(self) -> None:
        if self.weight not in get_args(LGDWeight):
            raise OptionError(f"weight must be one of {get_args(LGDWeight)}, got {self.weight!r}")
        if self.samples < 1:
            raise OptionError(f"samples must be one or more, got {self.samples}; 3 to 10 are published")
        if self.data_std is not None and not (self.data_std > 0 and math.isfinite(self.data_std)):
            raise OptionError(f"data_std must be positive, or None for the prior's own, got {self.data_std}")

    @property
    def gradient(self) -> bool:
        """The likelihood form is the gradient of its twist."""
        return self.weight == "likelihood"

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

    def __init__(self, options: LGDGuide, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost
        self.gradient = options.gradient

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
        points = (prior[None] + r * self.options.cloud(self.problem, s)[:, None]).reshape(-1, *self.problem.shape)
        value, gradient = likelihood_gradient(self.problem, points, self.cost)
        value = value.reshape(samples, len(x))
        weight = torch.softmax(value, 0)
        each = gradient.reshape(samples, *x.shape)
        mean = (weight.reshape(samples, len(x), *[1] * (x.ndim - 1)) * each).sum(0)
        shift = s**2 * vjp(mean)
        if self.options.weight == "damped":
            shift = per_lane(self._share(points, each, weight, mean, shift, s), x) * shift
        log_twist = value.logsumexp(0) - math.log(samples)
        return Guided(prior, prior + shift, log_twist.to(x.dtype))

    def _share(self, points: Tensor, each: Tensor, weight: Tensor, mean: Tensor, u: Tensor, s: float) -> Tensor:
        """t per lane, from the gradients g_k (sample, lanes, *shape) at the points of the cloud and their weights."""
        spread = math.sqrt(PiGDMGuide().variance(s, self.problem.prior.data_std))
        along = (each * u).flatten(2).sum(2)
        centre = (weight * along).sum(0)
        if self.problem.likelihood.is_gaussian:  # H is the same at all points
            curved = curvature(self.problem, u, mean, u, spread, self.cost)
        else:
            over = u.expand_as(each).reshape(points.shape)
            found = curvature(self.problem, points, each.reshape(points.shape), over, spread, self.cost)
            curved = (weight * found.reshape(weight.shape)).sum(0)
        left = curved - (weight * (along - centre).square()).sum(0)
        averaged = torch.where(left > 0, curved / left, torch.inf).clamp(min=1)
        return (share(centre, curved) * torch.minimum(averaged, 1 / weight.square().sum(0))).clamp(max=1)
