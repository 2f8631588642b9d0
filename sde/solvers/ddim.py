"""DDIM: x_b = D + sqrt(b^2 - c^2) (x - D) / a + c z,  c^2 = eta^2 b^2 (1 - b^2 / a^2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sde.solvers.transition import State, Transition, levels

__all__ = ["DDIM"]


@dataclass(frozen=True)
class DDIM:
    """First-order sampler between the Euler step of the probability flow (eta = 0) and `Ancestral` (eta = 1).

    Source: Song, Meng & Ermon (2021), equation 12 [read], in noise-to-signal coordinates [derived].

    Args:
        eta: share of the ancestral noise, in [0, 1].

    Example:
        >>> import torch
        >>> move = DDIM().step(torch.ones(1, 2), torch.tensor(2.0), torch.tensor(1.0), torch.zeros(1, 2))
        >>> move.mean.tolist(), move.covariance.item()
        ([[0.5, 0.5]], 0.0)
    """

    eta: float = 0.0

    calls_per_step: ClassVar[int] = 1
    has_history: ClassVar[bool] = False
    order: ClassVar[int] = 1
    exact_for: ClassVar[str] = "a prior concentrated on one point, at any number of steps"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.eta > 0

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
        variance = self.eta**2 * b.square() * (1 - (b / a).square())
        kept = (b.square() - variance).sqrt() / a
        # A convex combination, not D + kept (x - D): no cancellation when x and D are large and alike.
        return Transition(kept * x + (1 - kept) * denoised, variance, state)
