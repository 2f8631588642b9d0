r"""Kernel Stein discrepancy: do draws fit a score? No reference draws and no normalising constant are needed.

u(x, x') = s.s' k + s.grad' k + s'.grad k + tr grad grad' k,      k = (1 + |x - x'|^2 / l^2)^(-1/2),   s = score(x)
KSD^2 = mean_{i != j} u(x_i, x_j), zero in expectation where the draws have the density of the score.

It is blind to wrong weights of separated modes, whose scores do not know of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError

__all__ = ["KSDTest", "ksd_test", "stein_kernel"]


@dataclass(frozen=True)
class KSDTest:
    """Outcome of a goodness-of-fit test.

    Args:
        statistic: unbiased KSD^2 over the mean of u(x, x); may be negative, of the order of 1 / draws for exact draws,
            and free of the units of x.
        p_value: share of bootstrap replicates, the observed statistic among them, that are at least as large.
    """

    statistic: float
    p_value: float


def stein_kernel(x: Tensor, score: Tensor, lengthscale: float | None = None) -> Tensor:
    """u(x_i, x_j) for all pairs, (draws, draws) in float64.

    Args:
        x: (draws, *event).
        score: (draws, *event), gradient of the log density at the draws.
        lengthscale: l of the inverse multiquadric kernel; None takes the median distance.

    Raises:
        ShapeError: x and score differ in shape, or there are fewer than two draws.
        OptionError: the length scale is not positive.
    """
    if x.shape != score.shape or x.ndim < 1 or len(x) < 2:
        raise ShapeError(
            "draws (draws, *event) and their scores in the same shape, two draws or more, expected; got "
            f"{tuple(x.shape)} and {tuple(score.shape)}"
        )
    x, s = x.double().reshape(len(x), -1), score.double().reshape(len(x), -1)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    if lengthscale is None:
        upper = torch.triu(torch.ones_like(distance, dtype=torch.bool), 1)
        lengthscale = float(distance[upper].median())
    if not lengthscale > 0:
        raise OptionError(
            f"lengthscale must be positive, got {lengthscale}; more than half of the pairs coincide, give one"
        )
    c, square = lengthscale**-2, distance.square()
    base = 1 + c * square
    own = (s * x).sum(-1)
    cross = s @ x.T
    # (s_i - s_j).(x_i - x_j)
    along = own[:, None] + own[None, :] - cross - cross.T
    return (s @ s.T) * base**-0.5 + c * (along + x.shape[1]) * base**-1.5 - 3 * c**2 * square * base**-2.5


def ksd_test(
    x: Tensor,
    score: Tensor,
    *,
    generator: torch.Generator,
    lengthscale: float | None = None,
    replicates: int = 500,
) -> KSDTest:
    """Test whether independent draws have the density whose score is given, by a multiplier bootstrap.

    Args:
        x: (draws, *event), independent; thin or resample autocorrelated and weighted draws first.
        score: (draws, *event), gradient of the log density at the draws.
        generator: draws the signs of the bootstrap.
        lengthscale: of the kernel; None takes the median distance.
        replicates: bootstrap replicates.

    Source: Liu, Lee & Jordan (2016); Chwialkowski, Strathmann & Gretton (2016) [inferred]; the scaling by the diagonal
    is ours.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 2, generator=g, dtype=torch.float64)
        >>> ksd_test(x, -x, generator=g).p_value > 0.01, ksd_test(1.5 * x, -1.5 * x, generator=g).p_value < 0.01
        (True, True)
    """
    if replicates < 1:
        raise OptionError(f"replicates must be one or more, got {replicates}")
    u = stein_kernel(x, score, lengthscale)
    n = len(u)
    diagonal = u.diagonal()
    pairs = u - torch.diag(diagonal)
    statistic = pairs.sum() / (n * (n - 1))
    coins = torch.randint(0, 2, (replicates, n), generator=generator, device=generator.device)
    signs = 2.0 * coins.to(u) - 1.0
    boot = ((signs @ pairs) * signs).sum(-1) / (n * (n - 1))
    p_value = (1 + int((boot >= statistic).sum())) / (1 + replicates)
    return KSDTest(float(statistic / diagonal.mean()), p_value)
