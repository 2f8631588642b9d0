r"""The prior's Gaussian start at the first level, conditioned on Gaussian factors of spectral coordinates.

x = m + L n,  n ~ N(0, I),  factors N(V^T x; o, diag(v)):      x* = x + G (o - V^T x - e),   e ~ N(0, diag(v)),

G = L L^T V (V^T L L^T V + diag(v))^{-1} (Matheron), and the factors integrate to N(o; V^T m, V^T L L^T V + diag(v)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.many import lane_zeros
from inverse.operators.decomposition import SVD
from inverse.problem import DiffusionProblem

__all__ = ["GaussianStart"]


@dataclass(frozen=True)
class GaussianStart:
    """How the start moves with what is said of its coordinates.

    Args:
        svd: maps to and from the basis.
        mean: (1, r) V^T m; (particle, r) where operators differ from particle to particle.
        scale: L where it is a multiple of the identity, otherwise None.
        columns: (r, 1, *site) or (r, particle, *site) L L^T V where it is not.
    """

    svd: SVD
    mean: Tensor
    scale: float | None
    columns: Tensor | None

    @classmethod
    def of(cls, problem: DiffusionProblem, svd: SVD, sigma: Tensor) -> GaussianStart:
        """Read L off the prior's start, which is affine in its noise."""
        zero = lane_zeros(problem)
        origin = problem.prior.start(zero, sigma)
        probe = torch.randn(zero.shape, generator=torch.Generator().manual_seed(0), dtype=zero.dtype).to(zero)
        moved, scale = problem.prior.start(probe, sigma) - origin, float(sigma)
        mean = svd.to_spectral(origin)
        if torch.allclose(moved, scale * probe):
            return cls(svd, mean, scale, None)
        eye = torch.eye(svd.rank, dtype=zero.dtype, device=zero.device)[:, None]
        rows = svd.from_spectral(eye.expand(-1, len(zero), -1))
        pull = torch.func.vjp(lambda n: problem.prior.start(n, sigma), torch.zeros_like(rows))[1]
        return cls(svd, mean, None, problem.prior.start(pull(rows)[0], sigma) - origin)

    def gain(self, gap: Tensor, variance: Tensor) -> Tensor:
        """G gap: (particle, r) -> (particle, *site), for factors of variance (r,) or (particle, r)."""
        if self.scale is not None:
            return self.svd.from_spectral(gap * (self.scale**2 / (self.scale**2 + variance)))
        assert self.columns is not None
        solved = torch.cholesky_solve(gap[..., None], self._factor(variance))[..., 0]
        return torch.einsum("pr,rp...->p...", solved, self.columns.expand(-1, len(gap), *self.columns.shape[2:]))

    def log_prob(self, center: Tensor, variance: Tensor) -> Tensor:
        """Log of the integral of the start times the factors, (*batch, r) -> (*batch) float64."""
        gap, scale = (center - (self.mean[0] if len(self.mean) == 1 else self.mean)).double(), self.scale
        if scale is not None:
            return torch.distributions.Normal(0.0, (scale**2 + variance.double()).sqrt()).log_prob(gap).sum(-1)
        law = torch.distributions.MultivariateNormal(torch.zeros_like(gap), scale_tril=self._factor(variance).double())
        return law.log_prob(gap).reshape(gap.shape[:-1])

    def _factor(self, variance: Tensor) -> Tensor:
        assert self.columns is not None
        gram = self.svd.to_spectral(self.columns).movedim(0, -2)
        return torch.linalg.cholesky((gram + gram.mT) / 2 + variance.diag_embed())
