"""The posterior of one episode's parameters given the global law, in closed form around a quadratic fit.

l_i(theta) ~ 1/2 theta' A_i theta - h_i' theta + const,      P = E[Sigma^-1] = n_0 V_0^-1
V_i = (A_i + P)^-1,      m_i = V_i (h_i + P m_0)

The fit runs without a graph and nothing of it is kept; m_i and V_i carry gradients to the global law alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import vmap

from models.meta.distributed import episode_noise
from models.meta.episodes import Points
from models.meta.niw_math import GlobalLaw
from models.meta.program import Hierarchy

__all__ = [
    "LocalFit",
    "LocalNormal",
    "Quadratic",
    "close",
    "curvature_of",
    "losses_and_gradients",
    "multiplied",
    "second_moment",
    "start_at",
]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Quadratic forms l_i(theta) ~ 1/2 theta' A theta - h' theta + constant of b episodes.

    Args:
        natural: h, (b, d).
        diagonal: A where it is diagonal, (b, d); None where `root` is given.
        root: B with A = B' B, (b, q, d), one row for each output of each point.
        constant: (b,) what makes the form equal to l_i where it was fitted.
        point: (b, d) where the network was linearised; None where it was not.
    """

    natural: Tensor
    diagonal: Tensor | None
    root: Tensor | None
    constant: Tensor
    point: Tensor | None = None

    def times(self, vector: Tensor) -> Tensor:
        """A vector: (b, d) -> (b, d)."""
        if self.root is None:
            assert self.diagonal is not None
            return self.diagonal * vector
        return torch.einsum("bqd,bq->bd", self.root, torch.einsum("bqd,bd->bq", self.root, vector))

    def expected(self, local: LocalNormal) -> Tensor:
        """(b,) expectation of the form under the local posteriors."""
        m = local.mean
        value = 0.5 * (m * self.times(m)).sum(-1) - (self.natural * m).sum(-1) + self.constant
        if self.root is None:
            assert self.diagonal is not None
            return value + 0.5 * (self.diagonal * local.variance).sum(-1)
        return value + 0.5 * local.trace(self.root)


@dataclass(frozen=True, eq=False)
class LocalNormal:
    """Normal posteriors N(m_i, V_i) of the parameters of b episodes.

    V_i is diagonal (`factor` None), dense (`factor` its Cholesky factor (b, d, d)), or (P + B' B)^-1 with a diagonal P
    and few rows in B, whose matrix is never formed.

    Args:
        mean: (b, d) m_i.
        variance: (b, d) diagonal of V_i.
        log_det: (b,) log |V_i|.
        factor: see above.
        precision: (d,) P.
        root: (b, q, d) B.
        inner: (b, q, q) Cholesky factor of I + B P^-1 B'.
        point: (b, d) where the network was linearised to get here; None where it was not.
    """

    mean: Tensor
    variance: Tensor
    log_det: Tensor
    factor: Tensor | None = None
    precision: Tensor | None = None
    root: Tensor | None = None
    inner: Tensor | None = None
    point: Tensor | None = None

    @classmethod
    def diagonal(cls, mean: Tensor, variance: Tensor) -> LocalNormal:
        """Independent coordinates."""
        return cls(mean, variance, variance.log().sum(-1))

    @classmethod
    def dense(cls, mean: Tensor, factor: Tensor) -> LocalNormal:
        """V = factor factor', factor lower triangular."""
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return cls(mean, factor.square().sum(-1), log_det, factor=factor)

    @property
    def covariance(self) -> Tensor:
        """V_i as global laws take it: dense (b, d, d), or its diagonal."""
        return self.variance if self.factor is None else self.factor @ self.factor.mT

    def draw(self, draws: int, generator: torch.Generator) -> Tensor:
        """(draws, b, d), differentiable in the posterior."""
        size = (draws, *self.mean.shape[:-1])
        own: dict[str, Any] = {"generator": generator, "dtype": self.mean.dtype, "device": self.mean.device}
        noise = episode_noise(lambda shape: torch.randn(shape, **own), (*size, self.mean.shape[-1]), generator, 1)
        if self.factor is not None:
            return self.mean + torch.einsum("bij,sbj->sbi", self.factor, noise)
        if self.root is None or self.precision is None:
            return self.mean + self.variance.sqrt() * noise
        # V u with u ~ N(0, V^-1) is a draw of N(0, V).
        rows = episode_noise(lambda shape: torch.randn(shape, **own), (*size, self.root.shape[1]), generator, 1)
        u = self.precision.sqrt() * noise + torch.einsum("bqd,sbq->sbd", self.root, rows)
        return self.mean + self._solve(u)

    def spread(self, rows: Tensor) -> Tensor:
        """The diagonal of B V B' for B (b, q, d) -> (b, q)."""
        if self.factor is not None:
            return (rows @ self.factor).square().sum(-1)
        if self.root is None or self.precision is None or self.inner is None:
            return (rows.square() * self.variance[:, None]).sum(-1)
        thin = rows / self.precision
        known = torch.linalg.solve_triangular(self.inner, self.root @ thin.mT, upper=False).square().sum(-2)
        return (rows * thin).sum(-1) - known

    def trace(self, root: Tensor) -> Tensor:
        """tr(B V B') for B (b, q, d) -> (b,)."""
        if root is self.root and self.inner is not None:  # B V B' = I - (I + B P^-1 B')^-1
            eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
            inverse = torch.linalg.solve_triangular(self.inner, eye.expand_as(self.inner), upper=False)
            return root.shape[1] - inverse.square().sum((-2, -1))
        return self.spread(root).sum(-1)

    def _solve(self, u: Tensor) -> Tensor:
        """(P + B' B)^-1 u by Woodbury's identity, (s, b, d) -> (s, b, d)."""
        assert self.precision is not None
        assert self.root is not None
        assert self.inner is not None
        scaled = u / self.precision
        rows = torch.einsum("bqd,sbd->bqs", self.root, scaled)
        back = torch.einsum("bqd,bqs->sbd", self.root, torch.cholesky_solve(rows, self.inner))
        return scaled - back / self.precision


def close(quadratic: Quadratic, mean: Tensor, precision: Tensor) -> LocalNormal:
    """The local posterior in closed form, differentiable in the global law.

    V = (A + P)^-1,  m = m_0 + V (h - A m_0)

    Args:
        quadratic: of b episodes.
        mean: (d,) m_0.
        precision: (d, d) P, or its diagonal (d,).

    Source: [derived]
    """
    ahead = quadratic.natural - quadratic.times(mean.expand_as(quadratic.natural))
    root = quadratic.root
    if precision.ndim == 2 or (root is not None and root.shape[1] > root.shape[2]):
        prior = precision if precision.ndim == 2 else torch.diag(precision)
        curvature = torch.diag_embed(quadratic.diagonal) if root is None else root.mT @ root  # type: ignore[arg-type]
        lower = torch.linalg.cholesky(curvature + prior)
        inverse = torch.cholesky_inverse(lower)
        shift = torch.einsum("bij,bj->bi", inverse, ahead)
        return replace(LocalNormal.dense(mean + shift, torch.linalg.cholesky(inverse)), point=quadratic.point)
    if root is None:
        assert quadratic.diagonal is not None
        variance = 1 / (quadratic.diagonal + precision)
        return LocalNormal.diagonal(mean + variance * ahead, variance)
    eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
    thin = root / precision
    inner = torch.linalg.cholesky(eye + thin @ root.mT)
    variance = 1 / precision - torch.linalg.solve_triangular(inner, thin, upper=False).square().sum(-2)
    log_det = -precision.log().sum() - 2 * inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    local = LocalNormal(mean.expand_as(ahead), variance, log_det, None, precision, root, inner)
    shift = local._solve(ahead[None])[0]
    return replace(local, mean=mean + shift, point=quadratic.point)


def second_moment(mean: Tensor, covariance: Tensor, full: bool) -> Tensor:
    """Average of V_i + m_i m_i' over episodes, or of its diagonal."""
    if full:
        return (covariance + mean[:, :, None] * mean[:, None, :]).mean(0)
    variance = covariance if covariance.ndim == 2 else covariance.diagonal(dim1=-2, dim2=-1)
    return (variance + mean.square()).mean(0)


class LocalFit(Protocol):
    """Fits a quadratic form to the loss of each of b episodes; keeps no graph and no state.

    Noise is drawn by `models.meta.distributed.episode_noise`, so that episodes can be shared between processes.
    """

    def __call__(
        self, hierarchy: Hierarchy, law: GlobalLaw, points: Points, sigma: Tensor | None, generator: torch.Generator
    ) -> Quadratic:
        """The forms at the present global law."""
        ...


def start_at(law: GlobalLaw, points: Points) -> Tensor:
    """m_0 for each episode, (b, d)."""
    return law.mean.detach().expand(len(points.x), -1).clone()


def multiplied(precision: Tensor, vectors: Tensor) -> Tensor:
    """P times each of (b, d)."""
    return vectors @ precision if precision.ndim == 2 else vectors * precision


def losses_and_gradients(
    hierarchy: Hierarchy, theta: Tensor, points: Points, sigma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses (b,) and their gradients (b, d)."""
    with torch.enable_grad():
        at = theta.detach().requires_grad_()
        losses = hierarchy.losses(at, points, sigma)
        (grad,) = torch.autograd.grad(losses.sum(), at)
    return losses.detach(), grad


def curvature_of(hierarchy: Hierarchy, outputs: Tensor, points: Points, sigma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Slope (b, p, k) and half (b, p, k, k) of the loss in the outputs; zero where there is no point."""
    slope, half = vmap(lambda o, y: hierarchy.likelihood.curvature(o, y, sigma))(outputs, points.y)
    shown = points.mask.to(slope)
    slope = slope.reshape(*shown.shape, -1) * shown[..., None]
    return slope, half.reshape(*slope.shape, slope.shape[-1]) * shown[..., None, None]
