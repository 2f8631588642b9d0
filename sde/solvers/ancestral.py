"""Ancestral sampling: x_b = rho^2 x + (1 - rho^2) D + c z,  c^2 = b^2 (1 - rho^2),  rho = b / a."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sde.solvers.transition import State, Transition, levels

__all__ = ["Ancestral"]


@dataclass(frozen=True)
class Ancestral:
    """The exact law of x_b given x_a and x_0, with x_0 replaced by its mean D (DDPM with the small variance).

    It leaves out Cov[x_0 | x_a], so that draws are too narrow by an amount that vanishes as steps grow;
    `CovarianceCorrected`
    puts it back. Source: Ho et al. (2020), equation 7 [read], in noise-to-signal coordinates [derived].

    Example:
        >>> import torch
        >>> move = Ancestral().step(torch.ones(1, 2), torch.tensor(2.0), torch.tensor(1.0), torch.zeros(1, 2))
        >>> move.mean.tolist(), move.covariance.item()
        ([[0.25, 0.25]], 0.75)
    """

    calls_per_step: ClassVar[int] = 1
    has_history: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True
    order: ClassVar[int] = 1
    exact_for: ClassVar[str] = "a prior concentrated on one point, at any number of steps"

    def step(
        self,
        x: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        denoised: Tensor,
        state: State = None,
        **extra: Any,
    ) -> Transition:
        """The law of x at sigma_next; the last step returns `denoised` itself."""
        a, b = levels(x, sigma, sigma_next)
        ratio = (b / a).square()
        return Transition(ratio * x + (1 - ratio) * denoised, b.square() * (1 - ratio), state)
