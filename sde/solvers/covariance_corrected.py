"""Ancestral step with C = Cov[x_0 | x].

x_b ~ N(rho^2 x + kappa D, c^2 I + kappa^2 C),  kappa = 1 - rho^2,  c^2 = b^2 kappa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sde.covariance import TweedieCovariance
from sde.solvers.transition import State, Transition, levels

__all__ = ["CovarianceCorrected"]


@dataclass(frozen=True)
class CovarianceCorrected:
    """The exact law of x_b given x_a for x_0 | x_a ~ N(D, C), which holds when the prior is Gaussian.

    With the moments of x_0 | x_a, y in place of D and C it is exact for the posterior, again at any number of steps.
    The last step
    (sigma_next = 0) is a draw from N(D, C). Source: [derived]; the idea is that of Bao et al. (2022), Analytic-DPM.

    Example:
        >>> import torch
        >>> from sde.mixture import GaussianMixture
        >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> x = torch.ones(1, 2)
        >>> covariance = prior.covariance(x, 2.0)
        >>> move = CovarianceCorrected().step(x, 2.0, 1.0, covariance.mean, covariance=covariance)
        >>> round(move.covariance.dense()[0, 0, 0].item(), 4)           # 0.75 + 0.75^2 * 4 / 5
        1.2
    """

    calls_per_step: ClassVar[int] = 1
    has_history: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True
    needs_covariance: ClassVar[bool] = True
    order: ClassVar[int] = 1
    exact_for: ClassVar[str] = "a Gaussian prior, at any number of steps"

    def step(
        self,
        x: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        denoised: Tensor,
        state: State = None,
        *,
        covariance: TweedieCovariance | None = None,
        **extra: Any,
    ) -> Transition:
        """The law of x at sigma_next; `covariance` is Cov[x_0 | x] at (x, sigma)."""
        a, b = levels(x, sigma, sigma_next)
        if covariance is None:
            raise ValueError(
                "CovarianceCorrected needs step(..., covariance=prior.covariance(x, sigma)); "
                "without a covariance use Ancestral or DPMSolver2MSDE"
            )
        ratio = (b / a).square()
        kappa = 1 - ratio
        return Transition(ratio * x + kappa * denoised, covariance.affine(kappa.square(), b.square() * kappa), state)
