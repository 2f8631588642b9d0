"""Rates of the factors that stand for fractional Brownian motion: geometric grids, in rate times horizon."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from sde.fractional import Kind
from sde.incomplete_gamma import Array
from sde.markov_weights import MarkovWeights

__all__ = ["best_grid", "geometric", "paper_grid", "with_zero"]

SEARCH_RIDGE = 1e-10  # keeps the search away from grids whose weights alternate in sign
# log10 of the best two ends for 8 factors at H = 0.05, 0.10 .. 0.95, from `_search`; type I with the factor of rate 0.
TABLE = {
    "I": (
        (0.23, 8.03),
        (0.07, 8.03),
        (-0.12, 7.74),
        (-0.41, 6.68),
        (-0.77, 5.74),
        (-1.15, 5.05),
        (-1.42, 4.52),
        (-1.79, 4.01),
        (-2.07, 3.64),
        (-2.46, 3.25),
        (-2.85, 2.86),
        (-3.23, 2.56),
        (-3.75, 2.21),
        (-4.27, 1.94),
        (-4.99, 1.53),
        (-5.9, 1.19),
        (-6.08, 1.04),
        (-6.08, 0.95),
        (-6.08, 0.84),
    ),
    "II": (
        (-0.02, 8.03),
        (-0.1, 8.03),
        (-0.21, 8.03),
        (-0.83, 6.68),
        (-0.79, 6.06),
        (-0.78, 5.57),
        (-0.8, 5.19),
        (-0.86, 4.9),
        (-0.98, 4.74),
        (-1.05, 4.41),
        (-1.13, 4.07),
        (-1.07, 3.93),
        (-1.03, 3.8),
        (-1.01, 3.67),
        (-1.0, 3.57),
        (-1.0, 3.47),
        (-1.01, 3.39),
        (-1.03, 3.32),
        (-1.05, 3.26),
    ),
}
# Rates times horizon that serve all Hurst indices at once: good where the index is learned.
WIDE = {"I": (1e-4, 1e4), "II": (1e-1, 1e4)}


def geometric(low: float, high: float, factors: int) -> Array:
    """(factors,) rates from low to high in equal ratios; the geometric mean for one."""
    return np.array([math.sqrt(low * high)]) if factors == 1 else np.geomspace(low, high, factors)


def paper_grid(factors: int, horizon: float, fastest: float = 20.0) -> Array:
    """Rates times horizon of the published grid, from 1 / fastest to fastest in absolute units.

    Example:
        >>> paper_grid(3, horizon=2.0).round(6).tolist()
        [0.1, 2.0, 40.0]
    """
    return geometric(1 / fastest, fastest, factors) * horizon


def best_grid(hurst: float, kind: Kind, factors: int, zero: bool) -> Array:
    """Rates times horizon, geometric between the two ends that leave the smallest error for one Hurst index.

    Example:
        >>> rates = best_grid(0.3, "II", 8, zero=False)
        >>> len(rates), bool(rates[-1] / rates[0] > 1e5)
        (8, True)
    """
    if factors == 8 and zero == (kind == "I"):
        place = min(max((hurst - 0.05) / 0.05, 0.0), 17.999)
        left, part = int(place), place - int(place)
        low, high = (a + part * (b - a) for a, b in zip(TABLE[kind][left], TABLE[kind][left + 1], strict=True))
    else:
        low, high = _search(round(hurst, 3), kind, factors, zero)
    return with_zero(geometric(10**low, 10**high, factors), zero)


def with_zero(rates: Array, zero: bool) -> Array:
    """The rates, with 0 before them if wanted."""
    return np.concatenate([[0.0], rates]) if zero else rates


@lru_cache(maxsize=256)
def _search(hurst: float, kind: Kind, factors: int, zero: bool) -> tuple[float, float]:
    """log10 of the best two ends, by Nelder and Mead from two starts."""
    from scipy.optimize import minimize

    order = torch.tensor(hurst + 0.5, dtype=torch.float64)

    def loss(ends: Any) -> float:
        # Slower than 1e-6 / T is a constant, faster than 1e8 / T white noise on any grid of times.
        low, width = float(ends[0]), float(ends[1])
        if not (low > -6 and width > 0.05 * factors and low + width < 8):
            return 1e3
        rates = with_zero(geometric(10**low, 10 ** (low + width), factors), zero)
        grid = MarkovWeights(tuple(rates.tolist()), kind, SEARCH_RIDGE)
        return math.log(float(grid.relative_error(order, grid.weights(order))) + 1e-9)

    with torch.no_grad():
        options = {"maxiter": 60, "xatol": 0.01, "fatol": 0.002}
        tries = [minimize(loss, s, method="Nelder-Mead", options=options) for s in ((-2.6, 3.9), (-0.4, 4.8))]
    low, width = min(tries, key=lambda found: found.fun).x
    return float(low), float(low + width)
