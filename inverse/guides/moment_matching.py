r"""Moment matching: x_0 | x ~ N(D, C) with the whole Tweedie covariance C = s^2 dD/dx, conditioned on the data.

posterior = D + C B^T (I + B C B^T)^{-1} (d - B D),     log_twist = log N(d; B D, I + B C B^T)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inverse.guides.base import Guided, Level
from inverse.guides.closure import ConditionedCovariance, FactoredGram, Gram, IterativeGram, floored_cholesky
from inverse.guides.pigdm import PiGDMGuide
from inverse.guides.spectrum import GramSpectrum
from inverse.operators import Dense, LinearOperator
from inverse.operators.per_lane import PerLane
from inverse.problem import DiffusionProblem
from ppl.cost import Cost
from ppl.errors import OptionError
from sde import NetworkCovariance, TweedieCovariance

__all__ = ["MomentMatchingGuide"]


@dataclass(frozen=True)
class MomentMatchingGuide:
    r"""Full-covariance guidance; exact for every Gaussian prior.

    Up to `exact_limit` measurements (or that many entries of the site, when there are more measurements than entries)
    S = I + B C B^T is written down from m products with C and factored. Beyond, S^{-1} r takes `cg_steps` steps of
    conjugate gradients, preconditioned with C ~ v I, and log_twist takes its determinant at C = v I, as PiGDM does:
    that part does not depend on x, so at one noise level it is the same for all lanes.

    A network's Jacobian J is not quite symmetric. S that is written down is symmetrised, and where it is not positive
    definite the negative eigenvalues of B C B^T count as zero (`floored` of the bound guide says how many times).
    Conjugate gradients take s^2 J^T for C as it is, one vjp per step, as published; `symmetric` takes its symmetric
    part there too, for a jvp more per step, which costs as much as a call of the network.

    Args:
        exact_limit: most measurements for which S is written down.
        cg_steps: conjugate-gradient steps beyond; each is one product with C, and no other is made.
        symmetric: symmetrise a network's Jacobian in these products.
        dense: build C itself for a network, from one vjp per entry of an event, so that it can be drawn from; a choice
            for small events.

    Raises:
        CapabilityError: on bind, if the likelihood is not linear and Gaussian.

    Source: Rozet et al. (2024), section 4, MMPS [read]; the conditional covariance [derived].
    """

    exact_limit: int = 64
    cg_steps: int = 20
    symmetric: bool = False
    dense: bool = False

    exact_when: ClassVar[tuple[str, ...]] = ("gaussian_prior", "linear_gaussian_likelihood")
    acts_in: ClassVar[str] = "denoiser"
    gradient: ClassVar[bool] = True
    per_lane: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.exact_limit < 0:
            raise OptionError(f"exact_limit must be zero or more measurements, got {self.exact_limit}")
        if self.cg_steps < 1:
            raise OptionError(f"cg_steps must be one or more, got {self.cg_steps}")

    def bind(self, problem: DiffusionProblem, cost: Cost | None = None) -> BoundMomentMatching:
        """The guide as a function for one problem."""
        return BoundMomentMatching(self, problem, Cost() if cost is None else cost)


class BoundMomentMatching:
    """Moment matching for one problem.

    Args:
        options: of the guide.
        problem: prior and likelihood.
        cost: where likelihood evaluations are counted; the prior counts calls and vjps itself.
    """

    acts_in = "denoiser"

    def __init__(self, options: MomentMatchingGuide, problem: DiffusionProblem, cost: Cost) -> None:
        self.options, self.problem, self.cost = options, problem, cost
        self.floored = 0
        gaussian = problem.likelihood.gaussian
        self.operator: LinearOperator = gaussian.operator
        self.data = gaussian.data.to(problem.device, problem.dtype)
        self.log_normaliser = gaussian.log_normaliser
        d, limit, self.size = problem.shape.numel(), options.exact_limit, gaussian.size
        if self.size > limit and d <= limit:
            self._compress(d)
        self.small = self.size <= limit
        self.gradient = self.small
        if self.small:
            self._rows = rows_of(self.operator, problem)
        else:
            self._spectrum = GramSpectrum.of(self.operator)

    def __repr__(self) -> str:
        return repr(self.options)

    def _compress(self, d: int) -> None:
        """B = Q R with d columns: Q^T d says all that d says of x, and the rest is a constant."""
        matrix = self.operator.dense(dtype=torch.float64)
        q, r = torch.linalg.qr(matrix)
        lead = self.data.shape[: self.data.ndim - len(self.operator.out_shape)]  # lanes, where each has its own
        data = self.data.reshape(*lead, self.size).double()
        inside = data @ q
        self.log_normaliser = self.log_normaliser - 0.5 * (data - inside @ q.T).square().sum(-1)
        # Dense keeps float64 and follows the dtype of its argument.
        self.operator = Dense(r, in_shape=tuple(self.problem.shape), out_shape=(d,))
        self.data, self.size = inside.to(self.problem.dtype), d

    def _variance(self, s: float) -> float:
        """v of the scalar closure, for the preconditioner and for the determinant."""
        return PiGDMGuide().variance(s, self.problem.prior.data_std)

    def _towards(self, covariance: TweedieCovariance, s: float) -> Tensor:
        """C B^T, (m, lanes, *shape)."""
        rows = self._rows.expand(len(self._rows), *covariance.mean.shape)
        if isinstance(covariance, NetworkCovariance):
            # vjps alone: symmetrising B C B^T afterwards gives what the symmetrised Jacobian would.
            return s**2 * torch.stack([covariance.vjp(row) for row in rows])
        return covariance.matvec(rows)

    def _product(self, covariance: TweedieCovariance, s: float) -> Callable[[Tensor], Tensor]:
        """v -> C v for conjugate gradients, (*extra, lanes, *shape)."""
        if self.options.symmetric or not isinstance(covariance, NetworkCovariance):
            return covariance.matvec
        shape = covariance.mean.shape

        def product(v: Tensor) -> Tensor:
            parts = [s**2 * covariance.vjp(part) for part in v.reshape(-1, *shape)]
            return torch.stack(parts).reshape(v.shape) if len(parts) != 1 else parts[0].reshape(v.shape)

        return product

    @torch.no_grad()
    def __call__(
        self, x: Tensor, sigma: Level, sigma_next: Level | None = None, state: dict[str, Tensor] | None = None
    ) -> Guided:
        """One denoiser call; m products with C, or `cg_steps` of them."""
        s = float(sigma)
        covariance: TweedieCovariance = self.problem.prior.covariance(x, sigma)
        if self.options.dense and isinstance(covariance, NetworkCovariance):
            covariance = covariance.affine(1.0, 0.0)
        prior = covariance.mean
        m, lanes = self.size, len(x)
        residual = (self.data - self.operator(prior)).reshape(lanes, m)
        self.cost.likelihood_evals += lanes
        gram: Gram
        if self.small:
            towards = self._towards(covariance, s)
            measured = self.operator(towards).reshape(m, lanes, m).movedim(0, -1)
            factor, failed = floored_cholesky((measured + measured.mT) / 2)
            self.floored += int(failed.sum())
            gram = FactoredGram(towards, factor)
            log_det = gram.log_det
        else:
            v = self._variance(s)
            near = (lambda u: self.operator.solve_gram(u, 1.0, v)) if "svd" in self.operator.capabilities else None
            gram = IterativeGram(self.operator, self._product(covariance, s), self.options.cg_steps, near)
            log_det = self._spectrum.log_det(v)
        solved, lifted = gram.solve_and_lift(residual)
        posterior = prior + lifted
        log_twist = self.log_normaliser - 0.5 * (residual * solved).sum(-1) - 0.5 * log_det
        conditioned = ConditionedCovariance(posterior, covariance, self.operator, gram, self.problem.prior.event_shape)
        return Guided(prior, posterior, log_twist.to(x.dtype), covariance=conditioned)


def rows_of(operator: LinearOperator, problem: DiffusionProblem) -> Tensor:
    """B^T of every measurement, (m, 1, *shape), or (m, lanes, *shape) where operators differ from lane to lane."""
    m = math.prod(operator.out_shape)
    eye = torch.eye(m, dtype=problem.dtype, device=problem.device).reshape(m, 1, *operator.out_shape)
    lanes = len(operator.which) if isinstance(operator, PerLane) else 1
    return operator.adjoint(eye.expand(m, lanes, *operator.out_shape))
