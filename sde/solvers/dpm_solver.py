r"""DPM-Solver++(2M) and its SDE form, in h = log(a / b), h_prev and D_prev of the step before:

x_b = rho^(1 + eta) x + (1 - rho^(1 + eta)) [D + (D - D_prev) h / (2 h_prev)] + b sqrt(1 - rho^(2 eta)) z,  rho = b / a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sde.solvers.transition import State, Transition, levels

__all__ = ["DPMSolver2M", "DPMSolver2MSDE"]


def _two_step(x: Tensor, a: Tensor, b: Tensor, denoised: Tensor, state: State, eta: float) -> Transition:
    """One step of either form; the first step and the step to 0 are first order."""
    ratio = b / a
    kept = ratio ** (1 + eta)
    h = -ratio.log()
    estimate = denoised
    if state is not None and b > 0:
        previous = state["log_ratio"].reshape(-1, *[1] * (x.ndim - 1))
        estimate = (denoised - state["denoised"]).mul_(h / (2 * previous)).add_(denoised)
    # One value per particle, so that resampling can permute all of the state alike.
    history = {"denoised": denoised, "log_ratio": h.to(denoised).expand(x.shape[:1])}
    variance = b.square() * (1 - ratio ** (2 * eta))
    return Transition(torch.lerp(estimate, x, kept), variance, history)


@dataclass(frozen=True)
class DPMSolver2M:
    """Second-order multistep solver of the probability flow: one evaluation per step, 10 to 25 steps as a rule.

    Source: Lu et al. (2022), algorithm 2 [read].

    Example:
        >>> import torch
        >>> move = DPMSolver2M().step(torch.ones(1, 2), torch.tensor(2.0), torch.tensor(1.0), torch.zeros(1, 2))
        >>> move.mean.tolist(), sorted(move.state)
        ([[0.5, 0.5]], ['denoised', 'log_ratio'])
    """

    calls_per_step: ClassVar[int] = 1
    has_history: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    order: ClassVar[int] = 2
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
        """x at sigma_next; the last step returns `denoised` itself."""
        a, b = levels(x, sigma, sigma_next)
        return _two_step(x, a, b, denoised, state, 0.0)


@dataclass(frozen=True)
class DPMSolver2MSDE:
    """Second-order multistep solver of the reverse SDE: the default for stochastic sampling.

    Source: crowsonkb/k-diffusion, sampling.py, sample_dpmpp_2m_sde with the midpoint rule [read].

    Args:
        eta: amount of noise; 1 is the reverse SDE, 0 is `DPMSolver2M`.

    Example:
        >>> import torch
        >>> DPMSolver2MSDE().step(torch.ones(1, 2), 2.0, 1.0, torch.zeros(1, 2)).covariance.item()
        0.75
    """

    eta: float = 1.0

    calls_per_step: ClassVar[int] = 1
    has_history: ClassVar[bool] = True
    order: ClassVar[int] = 2
    exact_for: ClassVar[str] = "a prior concentrated on one point, at any number of steps"

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ValueError(f"eta must be zero or more, got {self.eta}")

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
        return _two_step(x, a, b, denoised, state, self.eta)
