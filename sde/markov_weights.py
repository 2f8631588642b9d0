r"""Weights of Ornstein-Uhlenbeck factors for fractional Brownian motion, and the error they leave, in closed form.

w = A^-1 b minimises E int_0^1 (B^H - B)^2 dt = c - 2 b.w + w.A w, over a horizon of 1. For rates g and order
a = H + 1/2, with the functions of `sde.incomplete_gamma`,

    type II   A_ij = psi(g_i + g_j) / (g_i + g_j)             b = g^(-a-1) (g P(a, g) - a P(a + 1, g))
    type I    A_ij = (psi(g_i) + psi(g_j)) / (g_i + g_j)      b = g^(-a-1) (2 g - g^a / Gamma(a + 1) + e^-g - E(a, g))

psi(x) = 1 - (1 - e^-x) / x, in the kernel normalisation. What depends on the rates alone is computed in NumPy, so
that a trace sees constants.

Source: Daems et al. (ICLR 2024), the public code [read]; forms without cancellation, rate 0 and the error [derived].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sde.fractional import Kind, unit_scale
from sde.incomplete_gamma import SWITCH, Array, ScaledGamma, constant

__all__ = ["MarkovWeights"]


def _psi(x: Array) -> Array:
    """1 - (1 - e^-x) / x, to the last digit for small x too."""
    term, total = x / 2, x / 2
    for n in range(3, 16):  # x^13 / 15! is below rounding at 0.3
        term = -term * x / n
        total = total + term
    safe = np.where(x < 0.3, 1.0, x)
    return np.where(x < 0.3, total, 1 + np.expm1(-safe) / safe)


def _gram(rates: Array, kind: Kind) -> Array:
    """A over horizon 1, (K, K); a rate of 0 is allowed."""
    both = rates[:, None] + rates
    psi = _psi(both) if kind == "II" else _psi(rates)[:, None] + _psi(rates)
    return np.where(both > 0, psi / np.maximum(both, 1e-300), 0.5)


@lru_cache(maxsize=256)
def _constants(rates: tuple[float, ...], kind: Kind, ridge: float) -> tuple[Array, Array, Array]:
    """A, the scale that gives it a diagonal of ones, and the Cholesky factor of the scaled and ridged matrix."""
    gram = _gram(np.array(rates), kind)
    scale = gram.diagonal() ** -0.5
    scaled = scale[:, None] * gram * scale
    try:
        factor = np.linalg.cholesky(scaled + ridge * np.eye(len(rates)))
    except np.linalg.LinAlgError:
        raise ValueError(
            f"the {len(rates)} rates are so close that their weights are not determined (condition number "
            f"{np.linalg.cond(scaled):.1e}); take fewer factors, a wider grid, or a ridge above {ridge}"
        ) from None
    return gram, scale, np.asarray(factor)


def _cross(rates: Array, order: Tensor, kind: Kind) -> Tensor:
    """b over horizon 1 for positive rates on one side of `SWITCH`: (*order, rates)."""
    gamma, a = ScaledGamma(rates), order[..., None]
    x, log_x = constant(rates, order), constant(np.log(rates), order)
    if kind == "II":
        value = x * gamma.lower(order) - a * gamma.lower(order + 1)
    elif rates[-1] < SWITCH:
        odd = np.arange(3.0, 33.0, 2.0)  # sinh x - x by its own series
        rest = (rates[:, None] ** odd / [float(math.factorial(int(n))) for n in odd]).sum(-1)
        value = gamma.series(order, first=1) - constant(2 * rest, order)
    else:
        rest = constant(2 * rates + np.exp(-rates), order)
        value = rest - (a * log_x - torch.lgamma(a + 1)).exp() - gamma.upper(order)
    return value * (-(a + 1) * log_x).exp()


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
        rates: K rates, ascending; the first may be 0.
        kind: "I" or "II".
        ridge: added to the normal equations once their diagonal is 1.

    Example:
        >>> one = MarkovWeights((1.0,), "I", 0.0)
        >>> round(one.weights(torch.tensor(0.7, dtype=torch.float64)).item(), 6)  # H = 0.2
        1.680368
    """

    rates: tuple[float, ...]
    kind: Kind
    ridge: float

    @property
    def _constants(self) -> tuple[Array, Array, Array]:
        return _constants(self.rates, self.kind, self.ridge)

    def cross(self, order: Tensor) -> Tensor:
        """b, (*order, K)."""
        rates = np.array(self.rates)
        parts: list[Tensor] = []
        if rates[0] == 0:
            parts.append((-torch.lgamma(order + 2)).exp()[..., None])
        sides = ((rates > 0) & (rates < SWITCH), rates >= SWITCH)
        parts += [_cross(rates[side], order, self.kind) for side in sides if side.any()]
        return torch.cat(parts, -1)  # rates ascend, so the parts are in order

    def weights(self, order: Tensor) -> Tensor:
        """A^-1 b, (*order, K)."""
        _, scale, factor = (constant(c, order) for c in self._constants)
        return scale * torch.cholesky_solve((scale * self.cross(order))[..., None], factor)[..., 0]

    def relative_error(self, order: Tensor, weights: Tensor) -> Tensor:
        """sqrt(E int (B^H - B)^2 dt / E int (B^H)^2 dt) for any weights in the kernel normalisation, (*order)."""
        total, gram = _total(order, self.kind), constant(self._constants[0], order)
        square = total - 2 * (self.cross(order) * weights).sum(-1) + ((weights @ gram) * weights).sum(-1)
        return (square / total).clamp_min(0).sqrt()
