r"""Weights of Ornstein-Uhlenbeck factors for fractional Brownian motion, and the error they leave, in closed form.

w = A^-1 b minimises E int_0^1 (B^H - B)^2 dt = c - 2 b.w + w.A w, over a horizon of 1. For rates g and order
a = H + 1/2, with the functions of `sde.incomplete_gamma`,

    type II   A_ij = psi(g_i + g_j) / (g_i + g_j)             b = g^(-a-1) (g P(a, g) - a P(a + 1, g))
    type I    A_ij = (psi(g_i) + psi(g_j)) / (g_i + g_j)      b = g^(-a-1) (2 g - g^a / Gamma(a + 1) + e^-g - E(a, g))

psi(x) = 1 - (1 - e^-x) / x, in the kernel normalisation.

Source: Daems et al. (ICLR 2024), the public code [read]; forms without cancellation, rate 0 and the error [derived].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sde.fractional import Kind, unit_scale
from sde.incomplete_gamma import SWITCH, ScaledGamma

__all__ = ["MarkovWeights"]


def _psi(x: Tensor) -> Tensor:
    """1 - (1 - e^-x) / x, to the last digit for small x too."""
    term, total = x / 2, x / 2
    for n in range(3, 16):  # x^13 / 15! is below rounding at 0.3
        term = -term * x / n
        total = total + term
    safe = torch.where(x < 0.3, torch.ones_like(x), x)
    return torch.where(x < 0.3, total, 1 + torch.expm1(-safe) / safe)


def _gram(rates: Tensor, kind: Kind) -> Tensor:
    """A over horizon 1, (K, K); a rate of 0 is allowed."""
    both = rates[:, None] + rates
    if kind == "II":
        return torch.where(both > 0, _psi(both) / both.clamp_min(1e-300), 0.5)
    psi = _psi(rates)
    return torch.where(both > 0, (psi[:, None] + psi) / both.clamp_min(1e-300), 0.5)


def _sinh_minus(x: Tensor) -> Tensor:
    """sinh x - x below `SWITCH`."""
    n = torch.arange(3.0, 33.0, 2.0, dtype=torch.float64, device=x.device)
    return (n * x.log()[:, None] - torch.lgamma(n + 1)).exp().sum(-1)


def _cross(rates: Tensor, order: Tensor, kind: Kind) -> Tensor:
    """b over horizon 1 for positive rates on one side of `SWITCH`: (*order, rates)."""
    gamma, a, x = ScaledGamma(rates), order[..., None], rates
    if kind == "II":
        value = x * gamma.lower(order) - a * gamma.lower(order + 1)
    elif bool((x < SWITCH).all()):
        value = gamma.series(order, first=1) - 2 * _sinh_minus(x)
    else:
        value = 2 * x - (a * x.log() - torch.lgamma(a + 1)).exp() + (-x).exp() - gamma.upper(order)
    return value * (-(a + 1) * x.log()).exp()


def _total(order: Tensor, kind: Kind) -> Tensor:
    """c, the integral of Var B^H over horizon 1, in the kernel normalisation."""
    hurst = order - 0.5
    if kind == "II":
        return (-2 * torch.lgamma(order)).exp() / (2 * hurst * (2 * hurst + 1))
    return 1 / (unit_scale(hurst, "I") ** 2 * (2 * hurst + 1))


@dataclass(frozen=True)
class MarkovWeights:
    """Weights for a set of rates over horizon 1, as a function of the Hurst index.

    Args:
        rates: (K,) float64, ascending; the first may be 0.
        kind: "I" or "II".
        ridge: added to the normal equations once their diagonal is 1.

    Example:
        >>> one = MarkovWeights(torch.ones(1, dtype=torch.float64), "I", 0.0)
        >>> round(one.weights(torch.tensor(0.7, dtype=torch.float64)).item(), 6)  # H = 0.2
        1.680368
    """

    rates: Tensor
    kind: Kind
    ridge: float

    @cached_property
    def gram(self) -> Tensor:
        """A, (K, K)."""
        return _gram(self.rates, self.kind)

    @cached_property
    def _scale(self) -> Tensor:
        """Diagonal that gives A a diagonal of ones."""
        return self.gram.diagonal().rsqrt()

    @cached_property
    def _factor(self) -> Tensor:
        """Cholesky factor of the scaled and ridged A."""
        scaled = self._scale[:, None] * self.gram * self._scale
        eye = torch.eye(len(scaled), dtype=torch.float64, device=scaled.device)
        factor, info = torch.linalg.cholesky_ex(scaled + self.ridge * eye)
        if bool(info):
            raise ValueError(
                f"the {len(scaled)} rates are so close that their weights are not determined (condition number "
                f"{float(torch.linalg.cond(scaled)):.1e}); take fewer factors, a wider grid, or a ridge above "
                f"{self.ridge}"
            )
        return factor

    def cross(self, order: Tensor) -> Tensor:
        """b, (*order, K)."""
        parts: list[Tensor] = []
        for part in (self.rates == 0, (self.rates > 0) & (self.rates < SWITCH), self.rates >= SWITCH):
            if not bool(part.any()):
                continue
            if bool((self.rates[part] == 0).all()):
                parts.append((-torch.lgamma(order + 2)).exp()[..., None].expand(*order.shape, int(part.sum())))
            else:
                parts.append(_cross(self.rates[part], order, self.kind))
        return torch.cat(parts, -1)  # rates ascend, so the parts are in order

    def weights(self, order: Tensor) -> Tensor:
        """A^-1 b, (*order, K)."""
        b = (self._scale * self.cross(order))[..., None]
        return self._scale * torch.cholesky_solve(b, self._factor)[..., 0]

    def relative_error(self, order: Tensor, weights: Tensor) -> Tensor:
        """sqrt(E int (B^H - B)^2 dt / E int (B^H)^2 dt) for any weights in the kernel normalisation, (*order)."""
        total = _total(order, self.kind)
        square = total - 2 * (self.cross(order) * weights).sum(-1) + ((weights @ self.gram) * weights).sum(-1)
        return (square / total).clamp_min(0).sqrt()
