"""How often central intervals of the draws hold the truth, judged by ranks.

With n independent draws and a truth from the same law, the rank of the truth is uniform on 0, ..., n. The interval
between the k-th smallest and the k-th largest draw holds it with probability exactly (n + 1 - 2 k) / (n + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.diagnostics.sliced import random_directions
from ppl.errors import OptionError, ShapeError

__all__ = ["Coverage", "central_coverage", "inside_central", "projected_coverage", "ranks"]


@dataclass(frozen=True)
class Coverage:
    """Coverage of central intervals, one row per level.

    Args:
        level: (levels,) what was asked for.
        nominal: (levels,) probability that intervals of this many draws have exactly, next to the level.
        observed: (levels, *statistic) share of problems whose truth was inside.
        problems: number of problems behind each share.
    """

    level: Tensor
    nominal: Tensor
    observed: Tensor
    problems: int

    @property
    def z(self) -> Tensor:
        """(levels, *statistic) deviations in binomial standard errors of a calibrated method."""
        p = self.nominal.reshape(-1, *(1,) * (self.observed.ndim - 1))
        return (self.observed - p) / (p * (1 - p) / self.problems).sqrt()


def ranks(draws: Tensor, truth: Tensor, *, generator: torch.Generator | None = None, dim: int = 0) -> Tensor:
    """Number of draws below the truth, ties broken at random.

    Args:
        draws: real, with the axis of draws at `dim`; equally weighted (resample weighted ones first) and about
            independent (thin first).
        truth: the shape of draws without that axis.
        generator: breaks ties; without one a tie is refused.
        dim: the axis of draws.

    Returns:
        int64, the shape of truth, in 0, ..., n.

    Raises:
        OptionError: if truth ties with a draw and no generator came.

    Example:
        >>> ranks(torch.tensor([0.0, 1.0, 5.0]), torch.tensor(2.0))
        tensor(2)
    """
    dim = dim % draws.ndim
    if draws.shape[:dim] + draws.shape[dim + 1 :] != truth.shape:
        raise ShapeError(
            f"truth has shape {tuple(truth.shape)}, expected that of draws {tuple(draws.shape)} without axis {dim}"
        )
    t = truth.unsqueeze(dim)
    below, ties = (draws < t).sum(dim), (draws == t).sum(dim)
    if bool((draws != draws).any() | (truth != truth).any()):
        raise OptionError("draws and truth must be numbers; a NaN has no rank")
    if not bool(ties.any()):
        return below
    if generator is None:
        raise OptionError("truth equals some draws (discrete values?); pass a generator to break ties at random")
    u = torch.rand(ties.shape, generator=generator, device=generator.device, dtype=torch.float64).to(ties.device)
    return below + (u * (ties + 1)).long()


def _cut(level: float, draws: int) -> int:
    """Ranks left out at each end for the interval nearest to the level."""
    if not 0 < level < 1:
        raise OptionError(f"levels must lie strictly between 0 and 1, got {level}")
    return max(0, min(round((1 - level) * (draws + 1) / 2), draws // 2))


def inside_central(rank: Tensor, draws: int, level: float) -> Tensor:
    """Whether truths of given rank lie in the central interval.

    Args:
        rank: int, any shape, in 0, ..., draws.
        draws: number of draws n.
        level: of the interval, in (0, 1); rounded to the nearest that n draws can have.

    Returns:
        bool, the shape of rank.

    Example:
        >>> inside_central(torch.arange(10), 9, 0.8)
        tensor([False,  True,  True,  True,  True,  True,  True,  True,  True, False])
    """
    k = _cut(level, draws)
    return (rank >= k) & (rank <= draws - k)


def central_coverage(rank: Tensor, draws: int, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95)) -> Coverage:
    """Coverage from ranks over problems.

    Args:
        rank: (problem, *statistic) in 0, ..., draws.
        draws: number of draws n behind each rank.
        levels: of the intervals.

    Returns:
        Coverage.

    Example:
        >>> central_coverage(torch.arange(10), 9, levels=(0.8,)).observed
        tensor([0.8000], dtype=torch.float64)
    """
    if rank.ndim < 1 or len(rank) == 0:
        raise ShapeError(f"rank must be (problem, *statistic) with a problem or more, got {tuple(rank.shape)}")
    observed = torch.stack([inside_central(rank, draws, level).double().mean(0) for level in levels])
    nominal = torch.tensor(
        [(draws + 1 - 2 * _cut(level, draws)) / (draws + 1) for level in levels], dtype=torch.float64
    )
    level = torch.tensor(list(levels), dtype=torch.float64)
    return Coverage(level, nominal.to(observed.device), observed, len(rank))


def projected_coverage(
    draws: Tensor,
    truth: Tensor,
    *,
    generator: torch.Generator,
    projections: int = 20,
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
) -> Coverage:
    """Coverage of central intervals of random projections, the same directions for every problem.

    Args:
        draws: (problem, draws, *event), equally weighted and about independent.
        truth: (problem, *event).
        generator: draws the directions.
        projections: number of directions.
        levels: of the intervals.

    Returns:
        Coverage with observed (levels, projections).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 20, 3, generator=g)
        >>> float(projected_coverage(x[:, 1:], x[:, 0], generator=g).z.abs().max()) < 5
        True
    """
    if draws.ndim < 2 or draws.shape[:1] + draws.shape[2:] != truth.shape:
        raise ShapeError(
            f"draws (problem, draws, *event) and truth (problem, *event) expected, got {tuple(draws.shape)} and "
            f"{tuple(truth.shape)}"
        )
    problems, n = draws.shape[:2]
    theta = random_directions(projections, max(1, truth[0].numel()), generator).to(draws.device)
    x = draws.double().reshape(problems, n, -1) @ theta.T
    t = truth.double().reshape(problems, -1) @ theta.T
    return central_coverage(ranks(x, t, generator=generator, dim=1), n, levels)
