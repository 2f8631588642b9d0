"""The tail of importance weights: smoothed by the generalised Pareto law fitted to it, whose index is k-hat.

Source: Vehtari et al. (2024) [inferred], by ArviZ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["smooth_tail"]

FEWEST = 25  # weights to which a tail is fitted


def smooth_tail(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Smoothed log weights, and k-hat; the weights as they are and NaN where there are too few for a fit.

    Args:
        log_weight: (draws,) float64; weights of zero (-inf) stay zero.

    Returns:
        (draws,) log weights and the 0-d index: below 0.5 good, above 0.7 not to be trusted, -inf for equal weights.

    Example:
        >>> smooth_tail(torch.zeros(100, dtype=torch.float64))[1]
        tensor(-inf, dtype=torch.float64)
    """
    alive = log_weight > -math.inf
    some = log_weight[alive]
    nan = torch.full((), math.nan, dtype=torch.float64, device=log_weight.device)
    if len(some) < FEWEST:
        return log_weight, nan
    if float(some.max() - some.min()) < 1e-6:  # equal weights up to rounding: there is no tail to fit
        return log_weight, -math.inf + torch.zeros_like(nan)
    import arviz

    smooth, k_hat = arviz.psislw(some.detach().cpu().numpy().copy())
    smoothed = log_weight.clone()
    smoothed[alive] = torch.as_tensor(smooth, dtype=torch.float64).to(log_weight.device)
    return smoothed, torch.as_tensor(float(k_hat), dtype=torch.float64).to(log_weight.device)
