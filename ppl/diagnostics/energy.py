"""Energy distance between samples, and the scores of a predictive sample against what came true.

    CRPS = E|x - y| - 1/2 E|x - x'|,   energy distance^2 = 2 E|x - y| - E|x - x'| - E|y - y'|

Fair estimators leave out the pairs (i, i), so their mean does not depend on the number of draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError

__all__ = ["SpreadSkill", "crps", "energy_distance", "energy_score", "spread_skill"]


def crps(draws: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score of each scalar, fair estimator; smaller is better.

    Args:
        draws: (draws, *event), two or more.
        truth: (*event).

    Returns:
        (*event) float64, in the unit of the draws.

    Source: Gneiting & Raftery (2007), section 4; fair form Ferro (2014) [inferred].

    Example:
        >>> crps(torch.tensor([0.0, 2.0]), torch.tensor(0.0))         # 1 - 2 / 2
        tensor(0., dtype=torch.float64)
    """
    _check(draws, truth)
    n = len(draws)
    x = draws.double().sort(0).values
    # sum_{i<j} (x_j - x_i) = sum_i (2 i - n + 1) x_i for sorted x, i from 0.
    rank = (2 * torch.arange(n, dtype=torch.float64, device=x.device) - n + 1).reshape(n, *(1,) * (x.ndim - 1))
    spread = 2 * (rank * x).sum(0) / (n * (n - 1))
    return (x - truth.double()).abs().mean(0) - spread / 2


def energy_score(draws: Tensor, truth: Tensor) -> Tensor:
    """Energy score of whole events, fair estimator: CRPS with Euclidean distances; smaller is better.

    Args:
        draws: (draws, *event), two or more.
        truth: (*event).

    Returns:
        0-d float64.

    Example:
        >>> energy_score(torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.zeros(2))
        tensor(5., dtype=torch.float64)
    """
    _check(draws, truth)
    n = len(draws)
    x, y = draws.double().reshape(n, -1), truth.double().reshape(1, -1)
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x, y, compute_mode=exact).mean() - torch.cdist(x, x, compute_mode=exact).sum() / (
        2 * n * (n - 1)
    )


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared energy distance between two samples, unbiased, so it may be negative.

    Args:
        x: (n, *event), two or more.
        y: (m, *event), two or more.

    Returns:
        0-d float64, 2 E|x - y| - E|x - x'| - E|y - y'|; zero on average for one law.

    Example:
        >>> energy_distance(torch.zeros(2, 1), torch.ones(2, 1))
        tensor(2., dtype=torch.float64)
    """
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise ShapeError(
            "two samples (draws, *event) of one event shape, two draws or more each, expected; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    n, m = len(x), len(y)
    u, v = x.double().reshape(n, -1), y.double().reshape(m, -1)
    exact = "donot_use_mm_for_euclid_dist"
    within = torch.cdist(u, u, compute_mode=exact).sum() / (n * (n - 1))
    within = within + torch.cdist(v, v, compute_mode=exact).sum() / (m * (m - 1))
    return 2 * torch.cdist(u, v, compute_mode=exact).mean() - within


@dataclass(frozen=True)
class SpreadSkill:
    """Whether the spread of the draws matches the error of their mean, over many problems.

    Args:
        spread: root mean variance of the draws.
        error: root mean square error of the mean of the draws.
        ratio: sqrt((n + 1) / n) spread / error; one when calibrated, less when the draws are too sure.
    """

    spread: float
    error: float
    ratio: float


def spread_skill(draws: Tensor, truth: Tensor) -> SpreadSkill:
    """Spread-skill ratio over problems and entries.

    Args:
        draws: (problem, draws, *event), two draws or more.
        truth: (problem, *event).

    Returns:
        SpreadSkill(spread, error, ratio).

    Source: Fortin et al. (2014) [inferred].

    Example:
        >>> spread_skill(torch.tensor([[-1.0, 1.0]]), torch.tensor([2.0])).spread
        1.4142135623730951
    """
    if draws.ndim < 2 or draws.shape[1] < 2 or draws.shape[:1] + draws.shape[2:] != truth.shape:
        raise ShapeError(
            f"draws (problem, draws >= 2, *event) and truth (problem, *event) expected, got {tuple(draws.shape)} and "
            f"{tuple(truth.shape)}"
        )
    x, n = draws.double(), draws.shape[1]
    spread = float(x.var(1).mean().sqrt())
    error = float((x.mean(1) - truth.double()).square().mean().sqrt())
    if error == 0:
        raise OptionError(
            "the mean of the draws equals the truth everywhere, so the ratio is undefined; use more problems"
        )
    return SpreadSkill(spread, error, ((n + 1) / n) ** 0.5 * spread / error)


def _check(draws: Tensor, truth: Tensor) -> None:
    if draws.ndim < 1 or len(draws) < 2 or draws.shape[1:] != truth.shape:
        raise ShapeError(
            f"draws (draws >= 2, *event) and truth (*event) expected, got {tuple(draws.shape)} and {tuple(truth.shape)}"
        )
