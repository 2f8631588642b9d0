"""Shares of draws that belong to the components of a Gaussian mixture, and their distance from the exact weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inverse.metrics.weights import draw_weights
from ppl.errors import OptionError, ShapeError

__all__ = ["mode_weight_tv", "mode_weights"]


def mode_weights(
    draws: Tensor,
    means: Tensor,
    covariances: Tensor | None = None,
    component_weights: Tensor | None = None,
    *,
    log_weight: Tensor | None = None,
    soft: bool = False,
) -> Tensor:
    """Share of the draws that belongs to each component of a Gaussian mixture.

    Hard shares count each draw for its nearest mean or, given covariances, for its most responsible component; they
    fit separated components. Soft shares average the responsibilities r_k(x), whose expectation under the mixture is
    exactly its weight w_k, also where components overlap.

    Args:
        draws: (draws, *event).
        means: (components, *event).
        covariances: (components,) variances, (components, d) diagonals or (components, d, d) matrices; None for the
            nearest mean.
        component_weights: (components,) of the mixture, for the responsibilities; equal when None.
        log_weight: (draws,) up to a constant; equal when None.
        soft: average responsibilities instead of counting; needs covariances.

    Returns:
        (components,) float64, sum one.

    Example:
        >>> mode_weights(torch.tensor([[0.1], [0.2], [9.0]]), torch.tensor([[0.0], [10.0]]))
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    if draws.shape[1:] != means.shape[1:] or 0 in (len(draws), len(means)):
        raise ShapeError(
            "draws (draws, *event) and means (components, *event) expected, "
            f"got {tuple(draws.shape)} and {tuple(means.shape)}"
        )
    weights = draw_weights(draws, log_weight)
    k = len(means)
    x, m = draws.double().reshape(len(draws), -1), means.double().reshape(k, -1)
    if covariances is None:
        if soft or component_weights is not None:
            raise OptionError("responsibilities need covariances; pass them, or leave soft and component_weights out")
        score = -torch.cdist(x, m, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        score = _component_log_prob(x, m, covariances.double())
        if component_weights is not None:
            score = score + component_weights.double().log()
    share = torch.softmax(score, -1) if soft else torch.nn.functional.one_hot(score.argmax(-1), k).double()
    return weights @ share


def _component_log_prob(x: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """log N(x; m_k, C_k), (draws, components)."""
    k, d = means.shape
    delta = x[:, None] - means
    if covariances.shape == (k,):
        covariances = covariances[:, None].expand(k, d)
    if covariances.shape == (k, d):
        square = (delta.square() / covariances).sum(-1)
        log_det = covariances.log().sum(-1)
    elif covariances.shape == (k, d, d):
        factor = torch.linalg.cholesky(covariances)
        z = torch.linalg.solve_triangular(factor, delta.permute(1, 2, 0), upper=False)  # (k, d, draws)
        square = z.square().sum(1).T
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        raise ShapeError(f"covariances must be {(k,)}, {(k, d)} or {(k, d, d)}, got {tuple(covariances.shape)}")
    return -0.5 * (square + log_det + d * math.log(2 * math.pi))


def mode_weight_tv(
    draws: Tensor,
    weights: Tensor,
    means: Tensor,
    covariances: Tensor | None = None,
    *,
    log_weight: Tensor | None = None,
    soft: bool = False,
) -> Tensor:
    """Total variation between the mode weights of the draws and the exact ones, 1/2 sum_k |share_k - w_k|.

    Exact draws score about n^(-1/2): compare with that floor, not with zero.

    Args:
        draws: (draws, *event).
        weights: (components,) exact mixture weights, sum one.
        means: (components, *event).
        covariances: as in mode_weights; None assigns each draw to its nearest mean.
        log_weight: (draws,) up to a constant; equal when None.
        soft: use average responsibilities, right for overlapping components.

    Returns:
        0-d float64 in [0, 1].

    Example:
        >>> x = torch.tensor([[0.1], [0.2], [0.3], [9.0]])
        >>> mode_weight_tv(x, torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [10.0]]))
        tensor(0.2500, dtype=torch.float64)
    """
    exact = weights.double()
    if exact.shape != means.shape[:1] or abs(float(exact.sum()) - 1) > 1e-4:
        raise ShapeError(
            f"weights must be {(len(means),)} with sum one, got {tuple(exact.shape)}, sum {float(exact.sum())}"
        )
    prior = None if covariances is None else exact
    share = mode_weights(draws, means, covariances, prior, log_weight=log_weight, soft=soft)
    return 0.5 * (share - exact).abs().sum()
