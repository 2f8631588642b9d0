r"""Tweedie moment projection: x_0 | x ~ N(D, diag(v)) with v the row sums of the Tweedie covariance, v = s^2 J^T 1.

S = I + B diag(v) B^T,   g = B^T S^{-1} (d - B D),   posterior = D + s^2 J^T g   or   D + v g without the Jacobian
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inverse.guides.base import Guided, Level, denoise_with_vjp
from inverse.guides.spectrum import GramSpectrum
from inverse.operators import conjugate_gradient
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import OptionError

__all__ = ["TMPDGuide"]


@dataclass(frozen=True)
class TMPDGuide:
    r"""TMPD: a variance for every entry from one vjp of ones, where PiGDM has one number.

    Exact for a prior N(m, sd^2 I), without being told sd. For other priors a row sum stands for the diagonal; where
    entries are negatively correlated it can be negative, and counts as zero there (`floored` of the bound guide says
    how many times).

    Up to `exact_limit` measurements S is written down and factored; beyond, S^{-1} r takes `cg_steps` steps of
    conjugate gradients, and log_twist the determinant at the mean of v.

    Args:
        jacobian: correct by s^2 J^T g (a second vjp); False corrects by v g.
        exact_limit: most measurements for which S is written down.
        cg_steps: conjugate-gradient steps beyond; they need no vjp.

    Raises:
        CapabilityError: on bind, if the likelihood is not linear and Gaussian.

    Source: Boys et al. (2023), section 4 [read]; the floor and the determinant for many measurements [derived].

    Example:
        >>> TMPDGuide(jacobian=False).exact_when
        ('gaussian_prior', 'isotropic_prior', 'linear_gaussian_likelihood')
    """

    jacobian: bool = True
    exact_limit: int = 64
    cg_steps: int = 20

    # gaussian_prior follows from the next; it says for whom the twist has the gradient below, v being constant there.
    exact_when: ClassVar[tuple[str, ...]] = ("gaussian_prior", "isotropic_prior", "linear_gaussian_likelihood")
    acts_in: ClassVar[str] = "denoiser"

    def __post_init__(self) -> None:
        if self.exact_limit < 0:
            raise OptionError(f"exact_limit must be zero or more measurements, got {self.exact_limit}")
        if self.cg_steps < 1:
            raise OptionError(f"cg_steps must be one or more, got {self.cg_steps}")

    @property
    def gradient(self) -> bool:
        """With the Jacobian, the correction is the gradient of the twist, up to how v changes with x."""
        return self.jacobian

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> BoundTMPD:
        """The guide as a function for one problem."""
        return BoundTMPD(self, problem, Cost() if cost is None else cost)


class BoundTMPD:
    """TMPD for one problem.

    Args:
        options: of the guide.
        problem: prior and likelihood.
        cost: where vjps and likelihood evaluations are counted.
    """

    acts_in = "denoiser"

    def __init__(self, options: TMPDGuide, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost
        self.gradient = options.gradient
        self.floored = 0
        gaussian = problem.likelihood.gaussian
        self.operator = gaussian.operator
        self.log_normaliser = gaussian.log_normaliser
        self.data = gaussian.data.to(problem.device, problem.dtype)
        m = self.data.numel()
        self.small = m <= options.exact_limit
        if self.small:
            eye = torch.eye(m, dtype=problem.dtype, device=problem.device)
            self._rows = self.operator.adjoint(eye.reshape(m, *self.operator.out_shape)).reshape(m, -1)
        else:
            self._spectrum = GramSpectrum.of(self.operator)

    def __repr__(self) -> str:
        return repr(self.options)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, sigma: Level, sigma_next: Level | None = None, state: dict[str, Tensor] | None = None
    ) -> Guided:
        """One denoiser call, one vjp for v and one for the correction."""
        s = float(sigma)
        prior, vjp = denoise_with_vjp(self.problem, x, sigma, self.cost)
        v = s**2 * vjp(torch.ones_like(prior))
        self.floored += int((v < 0).sum())
        v = v.clamp(min=0)
        residual = self.data - self.operator(prior)
        self.cost.likelihood_evals += len(x)
        solved, log_det = self._factored(v, residual) if self.small else self._iterated(v, residual)
        gradient = self.operator.adjoint(solved)
        fit = (residual * solved).reshape(len(x), self.data.numel()).sum(-1)
        log_twist = self.log_normaliser - 0.5 * fit - 0.5 * log_det
        posterior = prior + (s**2 * vjp(gradient) if self.options.jacobian else v * gradient)
        return Guided(prior, posterior, log_twist.to(x.dtype))

    def _factored(self, v: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """S^{-1} r and log det S (lanes,), from the factor of S."""
        m, lanes = len(self._rows), len(v)
        gram = torch.einsum("md,ld,nd->lmn", self._rows, v.reshape(lanes, self._rows.shape[-1]), self._rows)
        factor = torch.linalg.cholesky(gram + torch.eye(m, dtype=v.dtype, device=v.device))
        solved = torch.cholesky_solve(residual.reshape(lanes, m, 1), factor)[..., 0]
        return solved.reshape(residual.shape), 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _iterated(self, v: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """S^{-1} r by conjugate gradients, and the determinant at the mean of v."""
        solved = conjugate_gradient(
            lambda u: u + self.operator(v * self.operator.adjoint(u)),
            residual,
            event_ndim=self.data.ndim,
            fixed_steps=self.options.cg_steps,
        ).x
        spectrum, mean = self._spectrum, v.flatten(1).mean(1).double()
        log_det = (spectrum.weights * torch.log1p(mean[:, None] * spectrum.values)).sum(-1)
        return solved, log_det
