r"""Markov approximations whose increments have the exact law on one regular grid, for a Hurst index that is inferred.

Type II takes the weights of `MarkovNoise.refit`, from the Cholesky factor of the exact covariance for one H; type I,
whose increments are stationary, those of `sde.innovation_fit`. Both are smooth in H, so a Chebyshev series through a
few of them serves all H, with gradients. What it buys: at H = 0.1 and a grid of hundreds of steps the best weights in
continuous time give an increment less than half of its variance, which an inferred H pays for; refitted ones give all
of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sde.fractional import Kind
from sde.incomplete_gamma import Array, constant
from sde.innovation_fit import innovation_weights
from sde.markov import MarkovNoise

__all__ = ["refitted_noise"]

LOW, HIGH = 0.01, 0.99
NODES = {"I": 48, "II": 16}


def _grid(kind: Kind, steps: int) -> tuple[float, float]:
    """Rates times horizon: what steps can tell apart and the past before them (I), or what serves any number (II)."""
    return (3e-3, 4.0 * steps) if kind == "I" else (0.1, 1e4)


def refitted_noise(hurst: Tensor | float, dt: float, steps: int, factors: int = 8, kind: Kind = "II") -> MarkovNoise:
    r"""Unit fractional Brownian motion for `steps` steps of `dt`, differentiable in H.

    Weights w(H) = T^(H - 1/2) sum_n c_n T_n(u), with u in (-1, 1) linear in H and T the horizon, steps dt (type I: T
    is dt). The first call for a number of steps makes the series, which for type II takes 16 Cholesky factors: a second
    at 300 steps.

    Args:
        hurst: a number or a tensor of any batch shape; beyond 0.01 and 0.99 weights are those of the ends.
        dt: time step.
        steps: how many; a path on fewer steps of dt has nearly the same law.
        factors: K.
        kind: "I", for stationary increments, or "II".

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
    index = hurst if isinstance(hurst, Tensor) else float(hurst)
    base = MarkovNoise(index, horizon, kind, factors, grid=_grid(kind, steps), max_error=math.inf)
    h = torch.as_tensor(hurst, dtype=torch.float64)
    u = ((2 * h - (LOW + HIGH)) / (HIGH - LOW)).clamp(-1, 1)  # a series grows fast outside
    polynomials = [torch.ones_like(u), u]
    while len(polynomials) < NODES[kind]:
        polynomials.append(2 * u * polynomials[-1] - polynomials[-2])
    weights = torch.stack(polynomials, -1) @ constant(_series(kind, steps, factors), u)
    unit = math.log(horizon if kind == "II" else dt)
    return replace(base, fitted=weights * (unit * (h - 0.5)).exp()[..., None])


@lru_cache(maxsize=16)
def _series(kind: Kind, steps: int, factors: int) -> Array:
    """Chebyshev coefficients of the refitted weights for horizon 1, or for steps of 1 (type I): (nodes, factors)."""
    count = NODES[kind]
    angles = math.pi * (np.arange(count) + 0.5) / count
    nodes = (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * np.cos(angles)
    if kind == "I":
        shape = MarkovNoise(0.5, float(steps), "I", factors, grid=_grid(kind, steps), max_error=math.inf)
        values = innovation_weights(nodes, *shape.transition(1.0), steps)
    else:
        grid = _grid(kind, steps)
        each = [MarkovNoise(float(h), 1.0, "II", factors, grid=grid, max_error=math.inf) for h in nodes]
        values = np.stack([noise.refit(1 / steps, steps).weights(dtype=torch.float64).numpy() for noise in each])
    basis = np.cos(np.arange(count)[:, None] * angles)  # T_n at the nodes: (n, node)
    return (2 - (np.arange(count) == 0))[:, None] / count * (basis @ values)
