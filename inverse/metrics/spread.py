"""Residuals, coverage, and spread of draws where the operator looks and where it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.metrics.weights import draw_weights
from inverse.operators.base import LinearOperator
from inverse.operators.events import flatten_event
from ppl.diagnostics.coverage import inside_central, ranks
from ppl.errors import OptionError, ShapeError

__all__ = ["VarianceRatio", "coverage_map", "residual_chi", "variance_ratio"]


def residual_chi(operator: LinearOperator, x: Tensor, y: Tensor, sigma: float | Tensor) -> Tensor:
    """Size of the residual in units of the noise, ||y - A x|| / (sigma sqrt(m)).

    About one for the true x; a posterior draw is near one when the data are many; below one the noise is overfitted.

    Args:
        operator: A, linear or not.
        x: (*batch, *in_shape).
        y: (*out_shape), m numbers.
        sigma: noise standard deviation, a number or (*out_shape).

    Returns:
        (*batch,) float64.

    Example:
        >>> from inverse.operators import Identity
        >>> residual_chi(Identity((4,)), torch.zeros(4), torch.full((4,), 0.2), 0.1)
        tensor(2.0000, dtype=torch.float64)
    """
    if tuple(y.shape) != operator.out_shape:
        raise ShapeError(f"y has shape {tuple(y.shape)}, but the operator returns {operator.out_shape}")
    scale = torch.as_tensor(sigma, dtype=torch.float64, device=y.device)
    if not bool((scale > 0).all()):
        raise OptionError("sigma must be positive; a residual without noise has no unit")
    z = (y.double() - operator(x.double())) / scale
    return flatten_event(z, len(operator.out_shape)).square().mean(-1).sqrt()


def coverage_map(
    draws: Tensor, truth: Tensor, level: float = 0.9, *, generator: torch.Generator | None = None
) -> Tensor:
    """Which entries of the truth lie in the central interval of the draws.

    The interval between order statistics nearest to the level is used, whose probability is exact at any number of
    draws. Average maps over problems, or over pixels.

    Args:
        draws: (draws, *event), equally weighted and about independent.
        truth: (*event).
        level: of the interval.
        generator: breaks ties between truth and draws.

    Returns:
        (*event) bool.

    Example:
        >>> coverage_map(torch.arange(19.0)[:, None].repeat(1, 2), torch.tensor([9.5, 30.0]))
        tensor([ True, False])
    """
    return inside_central(ranks(draws, truth, generator=generator), len(draws), level)


@dataclass(frozen=True)
class VarianceRatio:
    """Total variance of the draws over the exact one, where the operator looks and where it does not.

    Args:
        row: in the row space of A; None where it has none.
        null: in the null space of A; None where it has none.
        total: in all directions.
    """

    row: float | None
    null: float | None
    total: float


def variance_ratio(
    draws: Tensor, operator: LinearOperator, covariance: Tensor, *, log_weight: Tensor | None = None
) -> VarianceRatio:
    """tr(P S_draws) / tr(P S), P the projector on the row space of A and on its null space.

    Args:
        draws: (draws, *in_shape), two or more.
        operator: A, with a decomposition.
        covariance: (d, d) exact posterior covariance of the flattened x.
        log_weight: (draws,) up to a constant; equal when None.

    Returns:
        VarianceRatio(row, null, total); one is right, less is too sure.

    Example:
        >>> from inverse.operators import Mask
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])                  # variance 2 in each entry
        >>> variance_ratio(x, Mask(torch.tensor([True, False])), torch.diag(torch.tensor([4.0, 1.0])))
        VarianceRatio(row=0.5, null=2.0, total=0.8)
    """
    d = math.prod(operator.in_shape)
    if tuple(covariance.shape) != (d, d):
        raise ShapeError(f"covariance must be {(d, d)} on the flattened x, got {tuple(covariance.shape)}")
    if tuple(draws.shape[1:]) != operator.in_shape or len(draws) < 2:
        raise ShapeError(f"draws must be (draws >= 2, *{operator.in_shape}), got {tuple(draws.shape)}")
    svd = operator.svd()
    weights = draw_weights(draws, log_weight)
    x = draws.double()
    centred = x - torch.tensordot(weights, x, 1)
    bessel = 1 - float(weights.square().sum())
    if bessel <= 0:
        raise OptionError("all the weight is on one draw, which says nothing about spread")
    square = lambda z: flatten_event(z, len(operator.in_shape)).square().sum(-1)  # noqa: E731
    total = float(weights @ square(centred)) / bessel
    row = float(weights @ svd.to_spectral(centred).square().sum(-1)) / bessel
    exact = covariance.double()
    exact_total = float(exact.trace())
    # tr(V^T S V), with V^T applied to the columns and then to the rows of S.
    half = svd.to_spectral(exact.reshape(d, *operator.in_shape))  # (d, r) = S V
    exact_row = float(svd.to_spectral(half.T.reshape(svd.rank, *operator.in_shape)).diagonal().sum())
    return VarianceRatio(
        row / exact_row if svd.rank else None,
        (total - row) / (exact_total - exact_row) if svd.rank < d else None,
        total / exact_total,
    )
