"""What a solver step returns: x_next = mean + covariance^(1/2) noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sde.covariance import TweedieCovariance

__all__ = ["Solver", "State", "Transition"]

State = Any
"""None, or a dict of tensors with a leading particle axis."""


@dataclass(frozen=True)
class Transition:
    """One Gaussian step of a sampler.

    Args:
        mean: (*batch, *event).
        covariance: 0-d variance c^2 (0 for a deterministic step), or a covariance operator.
        state: what the next step needs; None, or tensors with a leading particle axis.
    """

    mean: Tensor
    covariance: Tensor | TweedieCovariance
    state: State = None

    def sample(self, noise: Tensor) -> Tensor:
        """mean + covariance^(1/2) noise, for standard normal noise of the shape of the mean."""
        if isinstance(self.covariance, Tensor):
            return torch.addcmul(self.mean, self.covariance.sqrt().to(self.mean), noise)
        return self.mean + self.covariance.sample(noise)


class Solver(Protocol):
    """One step of a reverse diffusion, from noise sigma to sigma_next."""

    calls_per_step: ClassVar[int]
    has_history: ClassVar[bool]

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        ...

    def step(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, denoised: Tensor, state: State = None, **extra: Any
    ) -> Transition:
        """The law of x at sigma_next given x at sigma and `denoised` = E[x_0 | x].

        Args:
            x: (*batch, *event) at noise level sigma.
            sigma: 0-d, positive.
            sigma_next: 0-d, below sigma; 0 gives the clean value.
            denoised: (*batch, *event); guided samplers pass E[x_0 | x, y].
            state: what the previous step returned; None at first.
            **extra: `denoiser` for a solver that evaluates twice, `covariance` for one that uses Cov[x_0 | x].
        """
        ...


def levels(x: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> tuple[Tensor, Tensor]:
    """Two 0-d float64 levels on the CPU or where they live; checked in order."""
    # A Python float would become float32 and lose half of its digits.
    a, b = (s if isinstance(s, Tensor) else torch.as_tensor(s, dtype=torch.float64) for s in (sigma, sigma_next))
    if a.ndim or b.ndim:
        raise ValueError(
            f"a solver step takes one noise level for all rows, got shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.device.type == "cpu" and b.device.type == "cpu" and not (0 <= b < a):
        raise ValueError(f"expected 0 <= sigma_next < sigma, got sigma={float(a)} and sigma_next={float(b)}")
    return a.to(torch.float64), b.to(torch.float64)
