r"""Diffusion posterior sampling: the likelihood at the denoised point.

p(y | x) ~ p(y | D(x, sigma)), gradient through the denoiser. As published the gradient is that of the norm
||y - A D||, added to the step with a fixed size zeta; with `weight="likelihood"` it is that of log p(y | D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inverse.guides.base import Guided, Level, denoise_with_vjp, likelihood_gradient
from inverse.guides.residual import misfit, residual_fn
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import OptionError

__all__ = ["DPSGuide"]


@dataclass(frozen=True)
class DPSGuide:
    r"""DPS: x_next = ancestral step - zeta grad_x ||y - A D(x)||, per draw; or D + sigma^2 grad_x log p(y | D(x)).

    Biased for every zeta: it drops the spread of x_0 given x, and as published also the noise level of the data, so the
    same answer comes out for any sigma_y. Large zeta acts like a point estimate, and diverges.

    The published step is in variance-preserving coordinates x / sqrt(1 + sigma^2); here, where x = x_0 + sigma n, it
    reads x_next -= zeta sqrt(1 + sigma^2) sqrt(1 + sigma_next^2) grad_x ||y - A D(x)||. [derived]

    Args:
        zeta: step size of the published form, in units of the data range [-1, 1]: 0.3 for deblurring and
            super-resolution, 0.5 for inpainting, 1 for phase retrieval in the published code. The paper writes
            zeta' / ||r|| grad ||r||^2, which is twice this zeta. A noise level that was quoted on [0, 1] is half of
            what it is on [-1, 1]: state it in the prior's units in the program.
        weight: "published", or "likelihood" for the gradient of the log likelihood with the noise level of the
            program (any differentiable likelihood; stiff, so it wants many steps at low noise).
        clip: clamp D to this range, as the published code does with (-1, 1); it biases a prior with mass outside.

    Source: Chung et al. (2023), algorithm 1, and DPS2022/diffusion-posterior-sampling [read]; the published code takes
    one norm over the batch, which couples draws, and is not followed there.

    Example:
        >>> DPSGuide(weight="likelihood").acts_in
        'denoiser'
    """

    zeta: float = 0.3
    weight: Literal["published", "likelihood"] = "published"
    clip: tuple[float, float] | None = None

    exact_when: ClassVar[tuple[str, ...]] = ()
    per_lane: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.zeta > 0 and math.isfinite(self.zeta)):
            raise OptionError(f"zeta must be positive, got {self.zeta}; the published values are 0.3 to 1")
        if self.weight not in ("published", "likelihood"):
            raise OptionError(f'weight must be "published" or "likelihood", got {self.weight!r}')
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise OptionError(f"clip must be (low, high) with low < high, or None, got {self.clip}")

    @property
    def acts_in(self) -> str:
        """The published form changes the step, the other one the denoiser."""
        return "step" if self.weight == "published" else "denoiser"

    @property
    def gradient(self) -> bool:
        """The likelihood form is the gradient of its twist."""
        return self.weight == "likelihood"

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> _BoundDPS:
        """The guide as a function for one problem."""
        return _BoundDPS(self, problem, Cost() if cost is None else cost)


class _BoundDPS:
    """DPS for one problem."""

    def __init__(self, options: DPSGuide, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost
        self.acts_in, self.gradient = options.acts_in, options.gradient
        self._residual = residual_fn(problem) if options.weight == "published" else None

    def __repr__(self) -> str:
        return repr(self.options)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, sigma: Level, sigma_next: Level | None = None, state: dict[str, Tensor] | None = None
    ) -> Guided:
        """One denoiser call and one vjp."""
        prior, vjp = denoise_with_vjp(self.problem, x, sigma, self.cost)
        mean, pull = prior, vjp
        if self.options.clip is not None:
            low, high = self.options.clip
            inside = (prior >= low) & (prior <= high)
            mean, pull = prior.clamp(low, high), lambda v: vjp(torch.where(inside, v, torch.zeros_like(v)))
        s = float(sigma)
        if self._residual is None:
            log_twist, gradient = likelihood_gradient(self.problem, mean, self.cost)
            return Guided(prior, mean + s**2 * pull(gradient), log_twist)
        if sigma_next is None:
            raise OptionError("DPS as published acts in the step and needs sigma_next")
        half, gradient = misfit(self._residual, mean)
        self.cost.likelihood_evals += len(x)
        norm = (2 * half).sqrt().reshape(-1, *[1] * (x.ndim - 1))
        # At zero misfit the norm has no gradient; zero is its smallest subgradient.
        slope = pull(torch.where(norm > 0, gradient / norm, torch.zeros_like(gradient)))
        b = float(sigma_next)
        size = self.options.zeta * math.sqrt((1 + s**2) * (1 + b**2)) / (1 - (b / s) ** 2)
        return Guided(prior, mean - size * slope, self.problem.likelihood.log_prob(mean).to(x.dtype))
