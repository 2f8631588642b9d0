"""Moments, quantiles and resampling of weighted draws.

    mean = sum_i W_i x_i      variance = sum_i W_i |x_i - mean|^2 / (1 - sum_i W_i^2)      Kish ESS = 1 / sum_i W_i^2

with W normalised; equal weights give the usual estimates. Values are (problem, draw, *event), weights (problem, draw)
or None; draws of weight zero never enter, whatever their value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl.errors import NotFiniteError, OptionError

__all__ = ["kish_ess", "mean", "merged_root_ess", "normalise", "quantile", "sd", "systematic", "systematic_from"]


def normalise(log_weight: Tensor) -> Tensor:
    """Weights that sum to one over the last axis, in float64.

    Args:
        log_weight: (problem, draw), up to a constant per problem.

    Raises:
        NotFiniteError: if a log weight is NaN or plus infinity, or all of a problem are minus infinity.

    Example:
        >>> normalise(torch.tensor([[1000.0, 1000.0]])).tolist()
        [[0.5, 0.5]]
    """
    log_weight = log_weight.double()
    if log_weight.shape[-1] == 0:
        return log_weight
    top = log_weight.amax(-1)  # NaN wins in amax
    if not bool(torch.isfinite(top).all()):
        raise NotFiniteError(
            "log weights must be numbers below infinity with at least one above minus infinity; got a largest one of "
            f"{top.tolist()}: every draw was given probability zero, or the density is not finite"
        )
    return torch.softmax(log_weight, -1)


def kish_ess(weights: Tensor) -> Tensor:
    """1 / sum W^2 over the last axis: how many equally weighted draws the weights are worth, roots aside."""
    worth = 1 / weights.square().sum(-1)
    return worth if weights.shape[-1] else torch.zeros_like(worth)


def merged_root_ess(root_ess: Tensor, share: Tensor) -> Tensor:
    """R = 1 / sum_r share_r^2 / R_r: root ESS of runs merged with shares that sum to one. Source: [derived].

    Args:
        root_ess: (*batch, run), root ESS of each run.
        share: (*batch, run), share of the total weight that each run carries.
    """
    parts = torch.where(share > 0, share.square() / root_ess.double(), torch.zeros((), dtype=torch.float64))
    return 1 / parts.sum(-1)


def mean(x: Tensor, weights: Tensor | None) -> Tensor:
    """(problem, *event) means in float64 or complex128."""
    x = _wide(x)
    if weights is None:
        return x.mean(1)
    w, x = _masked(x, weights)
    return (w * x).sum(1) if x.shape[1] else x.mean(1)


def sd(x: Tensor, weights: Tensor | None) -> Tensor:
    """(problem, *event) standard deviations in float64; NaN for a single draw; complex: the root of E|x - mean|^2."""
    x = _wide(x)
    deviation = (x - mean(x, weights).unsqueeze(1)).abs().square()
    if weights is None:
        return (deviation.mean(1) / (1 - 1 / x.shape[1])).sqrt() if x.shape[1] > 1 else deviation.mean(1) * torch.nan
    w, deviation = _masked(deviation, weights)
    left = (1 - weights.square().sum(1)).clamp_min(0)
    left = left.reshape(-1, *(1,) * (x.ndim - 2)) * (x.shape[1] > 0)
    # One draw with all the weight says nothing about spread: 0 / 0 is NaN, on purpose.
    return ((w * deviation).sum(1) / left).sqrt()


def quantile(x: Tensor, weights: Tensor | None, q: Tensor) -> Tensor:
    """(q, problem, *event) quantiles in float64.

    Equal weights: linear interpolation between order statistics, as NumPy and ArviZ do. Weighted: the smallest value at
    which the weighted distribution function reaches q, so a draw of weight 3 counts as three draws.

    Args:
        x: (problem, draw, *event), real.
        weights: (problem, draw) or None.
        q: (q,) in [0, 1].

    Raises:
        OptionError: for complex values, or q outside [0, 1].
    """
    if x.is_complex():
        raise OptionError("complex numbers have no order, so no quantiles; take them of the real and imaginary parts")
    q = q.to(device=x.device, dtype=torch.float64)
    if not bool(((q >= 0) & (q <= 1)).all()):
        raise OptionError(f"quantiles are asked for at q in [0, 1], got {q.tolist()}")
    x = x.double()
    count = x.shape[1]
    if count == 0:
        return x.new_full((len(q), x.shape[0], *x.shape[2:]), torch.nan)
    if weights is not None:
        # Sorted to the end, and out of the reach of any q.
        x = torch.where(_like(weights > 0, x), x, torch.inf)
    ordered, order = x.sort(1)
    results = []
    if weights is None:
        for position in (q * (count - 1)).tolist():
            low = min(int(position), count - 1)
            high = min(low + 1, count - 1)
            fraction = position - low
            # Not lerp where it is not needed: inf - inf.
            between = ordered[:, low] + fraction * (ordered[:, high] - ordered[:, low])
            results.append(between if fraction > 0 else ordered[:, low])
    else:
        reached = _like(weights, x).expand_as(x).gather(1, order).cumsum(1)
        for level in q.tolist():
            index = (reached < level - 1e-12).sum(1, keepdim=True).clamp_max(count - 1)
            results.append(ordered.gather(1, index).squeeze(1))
    bad = torch.isnan(x).any(1)
    return torch.stack([torch.where(bad, torch.nan, result) for result in results]) if results else x[:0, 0]


def systematic(weights: Tensor | None, total: int, count: int, problems: int, generator: torch.Generator) -> Tensor:
    """Ascending indices of draws, (problem, count): draw i comes count W_i times on average, rounded up or down.

    Args:
        weights: (problem, total) or None for equal weights.
        total: number of draws to choose from.
        count: number of indices.
        problems: leading axis of the result.
        generator: gives one uniform number per problem.

    Source: Kitagawa (1996), appendix.

    Example:
        >>> w = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64)
        >>> systematic(w, 3, 4, 1, torch.Generator().manual_seed(0)).tolist()
        [[0, 0, 2, 2]]
    """
    if count == 0:
        return torch.zeros(problems, 0, dtype=torch.long)
    if total == 0:
        raise OptionError(f"cannot resample {count} draws from none")
    start = torch.rand(problems, 1, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    if weights is None:
        points = (torch.arange(count, dtype=torch.float64) + start) / count
        return (points * total).long().clamp_max(total - 1)
    return systematic_from(weights.cpu(), count, start)


def systematic_from(weights: Tensor, count: int, start: Tensor) -> Tensor:
    """`systematic` from given uniform numbers, where the weights live; weights of zero are never drawn.

    Args:
        weights: (problem, total) float64, with a positive sum.
        count: number of indices.
        start: (problem, 1) float64 uniform draws on [0, 1).

    Returns:
        (problem, count) ascending.

    Example:
        >>> systematic_from(torch.tensor([[0.5, 0.25, 0.25]]).double(), 4, torch.tensor([[0.5]]).double()).tolist()
        [[0, 0, 1, 2]]
    """
    points = (torch.arange(count, dtype=torch.float64, device=weights.device) + start) / count
    reached = weights.cumsum(1)
    # The sum is one only up to rounding; the last point must not fall off the end, nor on a draw of weight zero.
    index = torch.searchsorted(reached / reached[:, -1:], points, right=True)
    place = torch.arange(1, weights.shape[1] + 1, device=weights.device)
    return torch.minimum(index, (weights > 0).long().mul(place).amax(1, keepdim=True) - 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128) if x.is_complex() else x.double()


def _like(weights: Tensor, x: Tensor) -> Tensor:
    """Weights with as many axes as the values."""
    return weights.reshape(*weights.shape, *(1,) * (x.ndim - 2)).to(x.device)


def _masked(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights shaped like the values, and values with zero where the weight is zero (0 * inf is NaN)."""
    w = _like(weights, x)
    return w, torch.where(w > 0, x, torch.zeros((), dtype=x.dtype, device=x.device))
