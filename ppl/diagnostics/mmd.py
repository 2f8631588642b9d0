"""Maximum mean discrepancy with Gaussian kernels, and its permutation test.

MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError

__all__ = ["MMDTest", "mmd_squared", "mmd_test"]


@dataclass(frozen=True)
class MMDTest:
    """Outcome of a permutation test.

    Args:
        statistic: unbiased MMD^2, may be negative.
        p_value: share of permutations, the observed order among them, that score at least as much.
    """

    statistic: float
    p_value: float


def _kernel(x: Tensor, y: Tensor, scales: Sequence[float], bandwidth: float | None) -> Tensor:
    """Gram matrix of the joint sample, (n + m, n + m), mean over bandwidths, in float64."""
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise ShapeError(
            "two samples (draws, *event) of one event shape, two draws or more each, expected; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not scales:
        raise OptionError("scales must name at least one multiple of the bandwidth")
    both = torch.cat([x.double().reshape(len(x), -1), y.double().reshape(len(y), -1)])
    square = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    if bandwidth is None:
        n = len(both)
        upper = square[torch.triu(torch.ones(n, n, dtype=torch.bool, device=both.device), 1)]
        bandwidth = float(upper.median().sqrt())
    if not bandwidth > 0:
        raise OptionError(
            f"bandwidth must be positive, got {bandwidth}; more than half of the pairs coincide, give one"
        )
    return torch.stack([torch.exp(-square / (2 * (c * bandwidth) ** 2)) for c in scales]).mean(0)


def _u_statistic(kernel: Tensor, first: Tensor) -> Tensor:
    """MMD^2 for splits given as (splits, n + m) indicators of the first sample."""
    a, b = first.double(), 1 - first.double()
    n, m = a.sum(-1), b.sum(-1)
    diagonal = kernel.diagonal()
    aa = ((a @ kernel) * a).sum(-1) - a @ diagonal
    bb = ((b @ kernel) * b).sum(-1) - b @ diagonal
    ab = ((a @ kernel) * b).sum(-1)
    return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * ab / (n * m)


def mmd_squared(
    x: Tensor, y: Tensor, *, bandwidth: float | None = None, scales: Sequence[float] = (0.5, 1.0, 2.0)
) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy, Gaussian kernel exp(-|x - y|^2 / (2 h^2)).

    Args:
        x: (n, *event).
        y: (m, *event).
        bandwidth: h; the median distance between points of the joint sample when None.
        scales: multiples of h whose kernels are averaged.

    Returns:
        0-d float64; zero on average when both samples have one law, so it may be negative.

    Source: Gretton et al. (2012), lemma 6 [inferred].

    Example:
        >>> x, y = torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [1.0]])
        >>> mmd_squared(x, y, bandwidth=1.0, scales=(1.0,))          # 2 - 2 exp(-1/2)
        tensor(0.7869, dtype=torch.float64)
    """
    kernel = _kernel(x, y, scales, bandwidth)
    first = torch.zeros(1, len(kernel), dtype=torch.bool, device=kernel.device)
    first[:, : len(x)] = True
    return _u_statistic(kernel, first)[0]


def mmd_test(
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator,
    permutations: int = 999,
    bandwidth: float | None = None,
    scales: Sequence[float] = (0.5, 1.0, 2.0),
) -> MMDTest:
    """Test whether two independent samples of independent draws have one law.

    Args:
        x: (n, *event).
        y: (m, *event).
        generator: draws the permutations.
        permutations: number of relabelings; the smallest p-value is 1 / (permutations + 1).
        bandwidth: as in mmd_squared.
        scales: as in mmd_squared.

    Returns:
        MMDTest(statistic, p_value); the p-value is valid at any sample size.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> mmd_test(torch.randn(30, 2, generator=g), torch.randn(30, 2, generator=g) + 2, generator=g).p_value
        0.001
    """
    if permutations < 1:
        raise OptionError(f"permutations must be one or more, got {permutations}")
    kernel = _kernel(x, y, scales, bandwidth)
    total, device = len(kernel), kernel.device
    rank = torch.rand(permutations + 1, total, generator=generator, device=generator.device).to(device).argsort(-1)
    rank[0] = torch.arange(total, device=device)
    values = _u_statistic(kernel, rank < len(x))
    # Rounding must not decide between equal splits.
    slack = 1e-12 * float(kernel.abs().max())
    return MMDTest(float(values[0]), float((values >= values[0] - slack).double().mean()))
