r"""FreeDoM: any differentiable loss at the denoised point, its gradient through the denoiser.

posterior = D + shift,   u = s^2 J^T grad log p(y | D),   J = dD/dx, so that s^2 J is the covariance of x_0 given x

    "damped":      shift = scale t u, t from the curvature of the loss (inverse/guides/damping.py)
    "likelihood":  shift = scale u
    "relative":    shift = scale rms(x - D) u / rms(u)
    "alpha":       x_next gets scale sqrt(1 + sigma_next^2) u / s^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from inverse.guides.base import Guided, Level, denoise_with_vjp, likelihood_gradient
from inverse.guides.damping import damping, per_lane, rms
from inverse.guides.pigdm import PiGDMGuide
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import OptionError

__all__ = ["FreeDoMGuide", "FreeDoMWeight"]

FreeDoMWeight = Literal["damped", "likelihood", "relative", "alpha"]


@dataclass(frozen=True)
class FreeDoMGuide:
    r"""Training-free guidance by the program's log likelihood, its `pyro.factor` sites included.

    Any loss becomes data by a factor: `pyro.factor("loss", -loss(x))` weighs x by exp(-loss), and the scale of the loss
    is its inverse temperature. Biased for every weight: the loss is taken at the mean of x_0 given x. "likelihood" is
    `DPSGuide(weight="likelihood")`, and diverges where the data are sharp.

    Args:
        weight: "damped", stable for any data; "likelihood"; "relative", published for text and style, whose guidance
            has the same size whatever the loss; or "alpha", published for faces, a step of fixed size along the
            gradient, for data of unit scale and a loss whose scale was tuned by hand. The last two know no noise level.
        scale: of the shift; None is 1, and for "relative" the published 0.02.

    Source: Yu et al. (2023) in the form of vvictoryuki/FreeDoM [read], whose norms over the batch are taken per draw
    here; the steps in coordinates of the noise level, and "damped" [derived].

    Example:
        >>> import ppl, pyro
        >>> from inverse import FreeDoM
        >>> from sde import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> def model():
        ...     x = pyro.sample("x", prior)
        ...     pyro.factor("near the circle", -10 * (x.norm() - 1).square())
        >>> posterior = ppl.infer(ppl.Program(model), FreeDoM(steps=50), draws=100)
        >>> bool((posterior["x"].norm(dim=-1) - 1).abs().mean() < 0.4)                 # 0.5 under the prior
        True
    """

    weight: FreeDoMWeight = "damped"
    scale: float | None = None

    exact_when: ClassVar[tuple[str, ...]] = ()
    per_lane: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weight not in get_args(FreeDoMWeight):
            raise OptionError(f"weight must be one of {get_args(FreeDoMWeight)}, got {self.weight!r}")
        if self.scale is not None and not (self.scale > 0 and math.isfinite(self.scale)):
            raise OptionError(f"scale must be positive, or None for the default, got {self.scale}")

    @property
    def acts_in(self) -> str:
        """ "alpha" is made for the ancestral step; the others change the denoiser."""
        return "step" if self.weight == "alpha" else "denoiser"

    @property
    def gradient(self) -> bool:
        """The likelihood form is the gradient of its twist."""
        return self.weight == "likelihood" and self.scale in (None, 1.0)

    @property
    def size(self) -> float:
        """The scale with its default."""
        return self.scale if self.scale is not None else (0.02 if self.weight == "relative" else 1.0)

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> _BoundFreeDoM:
        """The guide as a function for one problem."""
        return _BoundFreeDoM(self, problem, Cost() if cost is None else cost)


class _BoundFreeDoM:
    """FreeDoM for one problem."""

    def __init__(self, options: FreeDoMGuide, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost
        self.acts_in, self.gradient = options.acts_in, options.gradient

    def __repr__(self) -> str:
        return repr(self.options)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, sigma: Level, sigma_next: Level | None = None, state: dict[str, Tensor] | None = None
    ) -> Guided:
        """One denoiser call and one vjp."""
        s, size = float(sigma), self.options.size
        prior, vjp = denoise_with_vjp(self.problem, x, sigma, self.cost)
        log_twist, gradient = likelihood_gradient(self.problem, prior, self.cost)
        u = s**2 * vjp(gradient)
        if self.options.weight == "damped":
            spread = math.sqrt(PiGDMGuide().variance(s, self.problem.prior.data_std))
            u = per_lane(damping(self.problem, prior, gradient, u, spread, self.cost), x) * u
        elif self.options.weight == "relative":
            tiny = torch.finfo(x.dtype).tiny
            u = per_lane(rms(x - prior) / rms(u).clamp(min=tiny), x) * u
        elif self.options.weight == "alpha":
            if sigma_next is None:
                raise OptionError('weight="alpha" acts in the step and needs sigma_next')
            b = float(sigma_next)
            u = math.sqrt(1 + b**2) / (s**2 - b**2) * u
        return Guided(prior, prior + size * u, log_twist)
