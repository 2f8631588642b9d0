r"""Pseudo-inverse guidance: x_0 | x ~ N(D, v I), so y | x ~ N(A D, R + v A A^T), v = s^2 sd^2 / (s^2 + sd^2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inverse.guides.base import Guided, Level, denoise_with_vjp
from inverse.guides.spectrum import GramSpectrum
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import OptionError

__all__ = ["PiGDMGuide"]


@dataclass(frozen=True)
class PiGDMGuide:
    r"""PiGDM with the noise level of the program: g = B^T (I + v B B^T)^{-1} (d - B D), whitened.

    With the Jacobian E[x_0 | x, y] ~ D + s^2 J^T g; without, D + v g. Exact for a prior N(m, sd^2 I). Published with
    sd = 1 and the correction multiplied by v, which is left out here: it is no part of the posterior mean.

    Args:
        data_std: sd of the data, in the prior's units; None takes `prior.data_std`, the sd along the widest direction.
        jacobian: differentiate the denoiser (one vjp). False costs a forward pass alone, and drops what the prior knows
            of how measured entries move the others.

    Raises:
        CapabilityError: on bind, if the likelihood is not linear and Gaussian.

    Source: Song et al. (2023), section 3 [read]; the two types after Peng et al. (2024) [read].

    Example:
        >>> PiGDMGuide(data_std=0.5).variance(0.5)
        0.125
    """

    data_std: float | None = None
    jacobian: bool = True

    acts_in: ClassVar[str] = "denoiser"
    per_lane: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.data_std is not None and not (self.data_std > 0 and math.isfinite(self.data_std)):
            raise OptionError(f"data_std must be positive, or None for the prior's own, got {self.data_std}")

    @property
    def exact_when(self) -> tuple[str, ...]:
        """An isotropic prior of this data_std, which only the prior's own is known to be."""
        return ("isotropic_prior", "linear_gaussian_likelihood") if self.data_std is None else ()

    @property
    def gradient(self) -> bool:
        """With the Jacobian, the correction is the gradient of the twist."""
        return self.jacobian

    def variance(self, sigma: float, data_std: float = 1.0) -> float:
        """v = s^2 sd^2 / (s^2 + sd^2)."""
        sd = data_std if self.data_std is None else self.data_std
        return sigma**2 * sd**2 / (sigma**2 + sd**2)

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> _BoundPiGDM:
        """The guide as a function for one problem."""
        return _BoundPiGDM(self, problem, Cost() if cost is None else cost)


class _BoundPiGDM:
    """PiGDM for one problem."""

    acts_in = "denoiser"

    def __init__(self, options: PiGDMGuide, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost
        self.gradient = options.gradient
        self.gaussian = problem.likelihood.gaussian
        self._data = self.gaussian.data.to(problem.device, problem.dtype)
        self._spectrum = GramSpectrum.of(self.gaussian.operator)

    def __repr__(self) -> str:
        return repr(self.options)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, sigma: Level, sigma_next: Level | None = None, state: dict[str, Tensor] | None = None
    ) -> Guided:
        """One denoiser call, and one vjp with the Jacobian."""
        s = float(sigma)
        v = self.options.variance(s, self.problem.prior.data_std)
        if self.options.jacobian:
            prior, vjp = denoise_with_vjp(self.problem, x, sigma, self.cost)
        else:
            prior = self.problem.prior.denoise(x, sigma)
        operator = self.gaussian.operator
        residual = self._data - operator(prior)
        solved = operator.solve_gram(residual, 1.0, v)
        gradient = operator.adjoint(solved)
        self.cost.likelihood_evals += len(x)
        fit = (residual * solved).reshape(len(x), self.gaussian.size).sum(-1)
        log_twist = self.gaussian.log_normaliser - 0.5 * fit - 0.5 * self._spectrum.log_det(v)
        posterior = prior + (s**2 * vjp(gradient) if self.options.jacobian else v * gradient)
        return Guided(prior, posterior, log_twist.to(x.dtype))
