"""A linear Gaussian likelihood, whitened once for every guide and every particle engine.

For y ~ N(A x + b, R) with L L^T = R,  B = L^{-1} A  and  d = L^{-1} (y - b),

    log p(y | x) = -|d - B x|^2 / 2 - log|2 pi R| / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.operators import LinearOperator, stack

__all__ = ["GaussianLikelihood", "stacked"]


@dataclass(frozen=True)
class GaussianLikelihood:
    """A whitened linear Gaussian likelihood, d ~ N(B x, I).

    With data of its own for every lane (see `many`), data, log_normaliser and stddev have a lane axis in front.

    Args:
        operator: B, from the shape of the site to the shape of d.
        data: d, (*out_shape).
        log_normaliser: -log|2 pi R| / 2 (times the factor of a `poutine.scale`), 0-d.
        measured: A before whitening, for pictures and pseudo-inverses.
        stddev: standard deviation of the noise, (*out_shape), or None when the noise is correlated.
    """

    operator: LinearOperator
    data: Tensor
    log_normaliser: Tensor
    measured: LinearOperator
    stddev: Tensor | None

    @property
    def size(self) -> int:
        """Number of measurements."""
        return math.prod(self.operator.out_shape)

    def residual(self, x: Tensor) -> Tensor:
        """d - B x: (*batch, *site) -> (*batch, *out_shape)."""
        return self.data - self.operator(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y | x): (*batch, *site) -> (*batch)."""
        r = self.residual(x)
        lead = r.shape[: r.ndim - len(self.operator.out_shape)]
        return self.log_normaliser - 0.5 * r.square().reshape(*lead, self.size).sum(-1)


def stacked(parts: list[GaussianLikelihood]) -> GaussianLikelihood:
    """Several observed sites as one measurement."""
    data = torch.cat([p.data.flatten() for p in parts])
    stddev = None
    if all(p.stddev is not None for p in parts):
        stddev = torch.cat([p.stddev.flatten() for p in parts if p.stddev is not None])
    total = torch.stack([p.log_normaliser for p in parts]).sum()
    white, plain = stack(*(p.operator for p in parts)), stack(*(p.measured for p in parts))
    return GaussianLikelihood(white, data.reshape(white.out_shape), total, plain, stddev)
