"""EDM Heun: d = (x - D(x, a)) / a, x' = x + (b - a) d, then the trapezoid with the slope at x'; churn adds noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sde.solvers.transition import State, Transition, levels

__all__ = ["EDMHeun"]


@dataclass(frozen=True)
class EDMHeun:
    r"""Second-order steps of the probability flow, with as much noise added and removed as `churn` says.

    With churn, a step goes down to sigma_next / (1 + churn) and noise brings it back up to sigma_next. This is the
    sampler of Karras
    et al. with the noise counted at the end of a step and not at the start of the next: the same chain, seen on the
    grid of raised levels, and every step is a Gaussian with a known density.

    Source: Karras et al. (2022), algorithm 2 [read]; the shift of the grid [derived].

    Args:
        churn: gamma in [0, sqrt(2) - 1], which is S_churn / steps of the paper; applied at every level in range.
        churn_min: lowest noise level (after the step) that is churned.
        churn_max: highest noise level that is churned.
        churn_noise: factor on the added noise, S_noise.

    Example:
        >>> import torch
        >>> normal = lambda x, sigma: x / (1 + sigma**2)
        >>> x, a, b = torch.ones(1, 1), torch.tensor(1.0), torch.tensor(0.9)
        >>> move = EDMHeun().step(x, a, b, normal(x, a), denoiser=normal)
        >>> abs(move.mean.item() - (1.81 / 2) ** 0.5) < 1e-3      # the flow of N(0, 1) is sqrt(1 + sigma^2)
        True
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    calls_per_step: ClassVar[int] = 2
    has_history: ClassVar[bool] = False
    order: ClassVar[int] = 2
    exact_for: ClassVar[str] = "a prior concentrated on one point, at any number of steps, without churn"

    def __post_init__(self) -> None:
        if not 0 <= self.churn <= math.sqrt(2) - 1 + 1e-9:
            raise ValueError(
                f"churn must lie in [0, sqrt(2) - 1], got {self.churn}; it is the paper's S_churn over steps"
            )
        if not 0 <= self.churn_min < self.churn_max:
            raise ValueError(f"expected 0 <= churn_min < churn_max, got {self.churn_min} and {self.churn_max}")
        if not self.churn_noise > 0:
            raise ValueError(f"churn_noise must be positive, got {self.churn_noise}")

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.churn > 0

    def step(
        self,
        x: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        denoised: Tensor,
        state: State = None,
        *,
        denoiser: Callable[[Tensor, Tensor], Tensor] | None = None,
        **extra: Any,
    ) -> Transition:
        """The law of x at sigma_next; `denoiser` is called once more, except in the step to 0."""
        a, b = levels(x, sigma, sigma_next)
        if b == 0:
            return Transition(denoised, b.square(), state)
        if denoiser is None:
            raise ValueError("EDMHeun evaluates twice per step and needs step(..., denoiser=...)")
        low = b / (1 + self.churn) if self.churn_min <= b <= self.churn_max else b
        slope = (x - denoised) / a
        euler = x + (low - a) * slope
        slope_next = (euler - denoiser(euler, low)) / low
        mean = x + (low - a) * (slope + slope_next) / 2
        return Transition(mean, self.churn_noise**2 * (b.square() - low.square()), state)
