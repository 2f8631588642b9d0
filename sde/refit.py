r"""Markov approximations whose increments have the exact law on one regular grid, for a Hurst index that is inferred.

`MarkovNoise.refit` fits weights to the Cholesky factor of the exact covariance for one H. They are smooth in H, so a
Chebyshev series through a few of them serves all H, with gradients. What it buys: at H = 0.1 and a grid of hundreds of
steps the best weights in continuous time give an increment less than half of its variance, which an inferred H pays
for; refitted ones give all of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sde.incomplete_gamma import Array, constant
from sde.markov import MarkovNoise

__all__ = ["refitted_noise"]

LOW, HIGH, NODES = 0.01, 0.99, 16
GRID = (0.1, 1e4)  # rates times horizon


def refitted_noise(hurst: Tensor | float, dt: float, steps: int, factors: int = 8) -> MarkovNoise:
    r"""Unit fractional Brownian motion of type II for `steps` steps of `dt`, differentiable in H.

    Weights w(H) = T^(H - 1/2) sum_n c_n T_n(u), with u in (-1, 1) linear in H and T the horizon, steps dt. The first
    call for a number of steps makes the series, which takes `NODES` Cholesky factors: a second at 300 steps.

    Args:
        hurst: in (0.01, 0.99), a number or a tensor of any batch shape.
        dt: time step.
        steps: how many; a path on fewer steps of dt has nearly the same law.
        factors: K.

    Returns:
        A noise for paths whose steps are all `dt`.

    Raises:
        ValueError: a Hurst index out of range, or fewer than two steps.

    Source: weights of one H as `MarkovNoise.refit` [derived]; the series in H [derived].

    Example:
        >>> noise = refitted_noise(torch.tensor(0.1), dt=1 / 252, steps=20)
        >>> noise.weights().shape, round(noise.horizon * 252)
        (torch.Size([8]), 20)
    """
    if not (isinstance(steps, int) and steps >= 2):
        raise ValueError(f"steps must be an integer of at least two, got {steps!r}")
    horizon = dt * steps
    base = MarkovNoise(
        hurst if isinstance(hurst, Tensor) else float(hurst), horizon, "II", factors, grid=GRID, max_error=math.inf
    )
    h = torch.as_tensor(hurst, dtype=torch.float64)
    u = (2 * h - (LOW + HIGH)) / (HIGH - LOW)
    polynomials = [torch.ones_like(u), u]
    while len(polynomials) < NODES:
        polynomials.append(2 * u * polynomials[-1] - polynomials[-2])
    weights = torch.stack(polynomials, -1) @ constant(_series(steps, factors), u)
    return replace(base, fitted=weights * (math.log(horizon) * (h - 0.5)).exp()[..., None])


@lru_cache(maxsize=16)
def _series(steps: int, factors: int) -> Array:
    """Chebyshev coefficients of the refitted weights for horizon 1: (NODES, factors)."""
    angles = math.pi * (np.arange(NODES) + 0.5) / NODES
    nodes = (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * np.cos(angles)
    fitted = [
        MarkovNoise(float(h), 1.0, "II", factors, grid=GRID, max_error=math.inf).refit(1 / steps, steps) for h in nodes
    ]
    values = np.stack([noise.weights(dtype=torch.float64).numpy() for noise in fitted])
    basis = np.cos(np.arange(NODES)[:, None] * angles)  # T_n at the nodes: (n, node)
    return (2 - (np.arange(NODES) == 0))[:, None] / NODES * (basis @ values)
