"""The loss of an episode from the moments of Langevin iterates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.meta.distributed import episode_noise
from models.meta.episodes import Points
from models.meta.local import Quadratic, losses_and_gradients, start_at
from models.meta.niw_math import GlobalLaw
from models.meta.program import Hierarchy
from ppl.errors import OptionError
from ppl.option_checks import check_integers, check_positive

__all__ = ["SGLD"]


@dataclass(frozen=True)
class SGLD:
    """Moments of stochastic-gradient Langevin iterates from m_0: A^-1 is their variance, the fit's centre their mean.

    theta <- theta - step / 2 grad l_i(theta) + sqrt(step) xi

    Args:
        steps: iterates.
        burnin: first iterates left out of the moments.
        step: size of a step, in squared units of theta.
        precision_max: largest A of a coordinate.

    Raises:
        OptionError: an option is out of range.

    Source: Kim & Hospedales (2024) [read: reviews and the README; which moments, inferred]
    """

    steps: int = 5
    burnin: int = 0
    step: float = 1e-3
    precision_max: float = 1e3

    def __post_init__(self) -> None:
        check_integers(self, steps=2, burnin=0)
        if self.steps - self.burnin < 2:
            raise OptionError(f"a variance takes two iterates after the burn-in, got {self.steps} - {self.burnin}")
        check_positive(self, "step", "precision_max")

    @torch.no_grad()
    def __call__(
        self, hierarchy: Hierarchy, law: GlobalLaw, points: Points, sigma: Tensor | None, generator: torch.Generator
    ) -> Quadratic:
        """See `LocalFit`."""
        theta = start_at(law, points)
        mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
        own: dict[str, Any] = {"generator": generator, "dtype": theta.dtype, "device": theta.device}
        for k in range(self.steps):
            _, grad = losses_and_gradients(hierarchy, theta, points, sigma)
            noise = episode_noise(lambda shape: torch.randn(shape, **own), theta.shape, generator)
            theta = theta - 0.5 * self.step * grad + math.sqrt(self.step) * noise
            if k >= self.burnin:
                off = theta - mean
                mean = mean + off / (k - self.burnin + 1)
                square = square + off * (theta - mean)
        curvature = ((self.steps - self.burnin - 1) / square).clamp(max=self.precision_max)
        constant = hierarchy.losses(mean, points, sigma) + 0.5 * (curvature * mean.square()).sum(-1)
        return Quadratic(curvature * mean, curvature, None, constant)
