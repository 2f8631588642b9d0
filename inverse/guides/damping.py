r"""How far to go along a guidance direction: one step of conjugate gradients for the Gaussian closure.

x_0 | x ~ N(D, C), g = grad log p(y | D), u = C g:    maximise log p(y | D + t u) - t^2 u^T C^{-1} u / 2 in t

    t = g.u / (g.u + u^T H u),    H = -Hessian of log p(y | .) at D,    0 < t <= 1

t = 1 where the data say little, and g.u / u^T H u where they are stiff, so that no step overshoots. Exact when C and H
are multiples of the identity on the measured directions. Source: [derived].
"""

from __future__ import annotations

import torch
from torch import Tensor

from inverse.guides.base import likelihood_gradient
from inverse.problem import DiffusionProblem
from ppl.cost import Cost

__all__ = ["curvature", "damping", "per_lane", "rms", "share"]

SECANT = 1e-3
"""Length of the move over which curvature is measured, in units of the entries of u."""


def per_lane(value: Tensor, x: Tensor) -> Tensor:
    """(lanes,) with axes to multiply (lanes, *shape)."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


def rms(x: Tensor) -> Tensor:
    """Root mean square of every lane, (lanes,)."""
    return x.square().flatten(1).mean(1).sqrt()


def curvature(
    problem: DiffusionProblem, point: Tensor, gradient: Tensor, direction: Tensor, spread: float, cost: Cost
) -> Tensor:
    """u^T H u per lane, (lanes,), no less than zero.

    Args:
        problem: says the likelihood.
        point: D (lanes, *shape).
        gradient: g at D.
        direction: u = C g.
        spread: sd of x_0 given x; what is not Gaussian is measured over a thousandth of it.
        cost: where the second likelihood evaluation is counted.
    """
    if problem.likelihood.is_gaussian:
        found = problem.likelihood.gaussian.operator(direction).square().flatten(1).sum(1)
    else:
        tiny = torch.finfo(point.dtype).tiny
        h = SECANT * spread / rms(direction).clamp(min=tiny)
        # In float32 a shorter move would be lost in rounding.
        h = h * (30.0 if point.dtype == torch.float32 else 1.0)
        after = likelihood_gradient(problem, point + per_lane(h, point) * direction, cost)[1]
        found = ((gradient - after) * direction).flatten(1).sum(1) / h
    return found.to(point).clamp(min=0)


def share(along: Tensor, curved: Tensor) -> Tensor:
    """t = g.u / (g.u + u^T H u), and 0 where u does not climb: the Jacobian of a network need not be positive."""
    return torch.where(along > 0, along / (along + curved), torch.zeros_like(along))


def damping(
    problem: DiffusionProblem, point: Tensor, gradient: Tensor, direction: Tensor, spread: float, cost: Cost
) -> Tensor:
    """t per lane, (lanes,); arguments as in `curvature`."""
    along = (gradient * direction).flatten(1).sum(1)
    return share(along, curvature(problem, point, gradient, direction, spread, cost))
