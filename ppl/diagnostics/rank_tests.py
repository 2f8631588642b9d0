"""Tests that ranks are uniform on 0, ..., L: chi-square over bins, and the exact simultaneous band of their ECDF."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError

__all__ = ["chi_square_p_value", "ecdf_band", "ecdf_p_value", "ecdf_p_values"]


def _check(rank: Tensor, draws: int) -> Tensor:
    if rank.ndim != 1 or len(rank) == 0:
        raise ShapeError(f"rank must be (simulations,) with one or more, got {tuple(rank.shape)}")
    if draws < 1 or int(rank.min()) < 0 or int(rank.max()) > draws:
        raise OptionError(f"ranks must lie in 0, ..., draws = {draws}, got {int(rank.min())} to {int(rank.max())}")
    return rank.detach().cpu().long()


def chi_square_p_value(rank: Tensor, draws: int, *, bins: int | None = None) -> float:
    """Pearson's test over bins of nearly equal width, each with its exact probability.

    Args:
        rank: (simulations,) in 0, ..., draws.
        draws: L, number of draws behind each rank.
        bins: number of bins; as many as give five expected counts each, at most 20 and L + 1, when None.

    Returns:
        Probability of a larger statistic under uniform ranks (asymptotic in the number of simulations).

    Source: Talts et al. (2018) [inferred].

    Example:
        >>> chi_square_p_value(torch.arange(100) % 10, 9)
        1.0
    """
    rank = _check(rank, draws)
    n = len(rank)
    bins = max(2, min(20, draws + 1, n // 5)) if bins is None else bins
    if not 2 <= bins <= draws + 1:
        raise OptionError(f"bins must lie in 2, ..., draws + 1 = {draws + 1}, got {bins}")
    label = rank * bins // (draws + 1)
    expected = n * torch.bincount(torch.arange(draws + 1) * bins // (draws + 1), minlength=bins).double() / (draws + 1)
    observed = torch.bincount(label, minlength=bins).double()
    statistic = ((observed - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((bins - 1) / 2, dtype=torch.float64), statistic / 2))


def _points(draws: int, points: int) -> Tensor:
    """Ranks j at which P(rank < j) = j / (L + 1) is compared, at most `points` of them."""
    count = min(draws, points)
    return torch.linspace(1, draws, count, dtype=torch.float64).round().long().unique()


def _two_sided(n: int, probability: Tensor) -> Tensor:
    """(points, n + 1): 2 min(P(Bin <= k), P(Bin >= k)) capped at one."""
    from scipy.stats import binom

    k = torch.arange(n + 1).double().numpy()
    p = probability.double().numpy()[:, None]
    below, above = binom.cdf(k, n, p), binom.sf(k - 1, n, p)
    return torch.minimum(torch.from_numpy(below), torch.from_numpy(above)).mul(2).clamp_max(1)


def _counts(rank: Tensor, at: Tensor, draws: int) -> Tensor:
    """(rows, points) number of ranks below each point; rank is (rows, simulations)."""
    rows = len(rank)
    histogram = torch.zeros(rows, draws + 1, dtype=torch.long).scatter_add(1, rank, torch.ones_like(rank))
    return histogram.cumsum(1)[:, at - 1]


def _smallest(rank: Tensor, at: Tensor, draws: int, table: Tensor) -> Tensor:
    """(rows,) smallest pointwise two-sided probability."""
    return table[torch.arange(len(at)), _counts(rank, at, draws)].amin(1)


def _null(n: int, draws: int, at: Tensor, table: Tensor, replicates: int, generator: torch.Generator) -> Tensor:
    """The same for uniform ranks, (replicates,)."""
    if replicates < 1:
        raise OptionError(f"replicates must be one or more, got {replicates}")
    values = []
    rows = max(1, 2**22 // max(n, draws + 1))
    left = replicates
    while left > 0:
        shape = (min(rows, left), n)
        ranks = torch.randint(draws + 1, shape, generator=generator, device=generator.device).cpu()
        values.append(_smallest(ranks, at, draws, table))
        left -= shape[0]
    return torch.cat(values)


def ecdf_p_value(
    rank: Tensor, draws: int, *, generator: torch.Generator, replicates: int = 2000, points: int = 100
) -> float:
    """Monte Carlo p-value of the largest deviation of the ECDF from uniform, in pointwise binomial probability.

    Args:
        rank: (simulations,) in 0, ..., draws.
        draws: L.
        generator: draws the uniform ranks compared with.
        replicates: number of them; the smallest p-value is 1 / (replicates + 1).
        points: largest number of places where the ECDF is compared.

    Returns:
        Valid p-value at any number of simulations.

    Source: Säilynoja, Bürkner & Vehtari (2022) [inferred].

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> ecdf_p_value(torch.zeros(50, dtype=torch.long), 9, generator=g) < 0.01
        True
    """
    return float(
        ecdf_p_values(_check(rank, draws)[:, None], draws, generator=generator, replicates=replicates, points=points)
    )


def ecdf_p_values(
    rank: Tensor, draws: int, *, generator: torch.Generator, replicates: int = 2000, points: int = 100
) -> Tensor:
    """`ecdf_p_value` of several statistics at once, compared with the same uniform ranks.

    Args:
        rank: (simulations, tests) in 0, ..., draws.
        draws: L.
        generator: draws the uniform ranks.
        replicates: number of them; take 1000 tests or more, or a Bonferroni bound at 1e-3 cannot be reached.
        points: largest number of places where the ECDF is compared.

    Returns:
        (tests,) float64.

    Example:
        >>> rank = torch.stack([torch.arange(50) % 10, torch.zeros(50, dtype=torch.long)], 1)
        >>> p = ecdf_p_values(rank, 9, generator=torch.Generator().manual_seed(0))
        >>> bool(p[0] > 0.9), bool(p[1] < 0.01)
        (True, True)
    """
    columns = torch.stack([_check(column, draws) for column in rank.unbind(1)])
    n = columns.shape[1]
    at = _points(draws, points)
    table = _two_sided(n, at.double() / (draws + 1))
    found = _smallest(columns, at, draws, table)
    null = _null(n, draws, at, table, replicates, generator)
    # Equal counts must compare as equal.
    below = (null <= found[:, None] * (1 + 1e-12)).sum(1)
    return (1 + below).double() / (replicates + 1)


def ecdf_band(
    simulations: int,
    draws: int,
    *,
    generator: torch.Generator,
    level: float = 0.95,
    replicates: int = 2000,
    points: int = 100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Simultaneous band that the ECDF of uniform ranks stays in with the given probability.

    Args:
        simulations: number of ranks.
        draws: L.
        generator: draws uniform ranks.
        level: probability of staying inside everywhere.
        replicates: Monte Carlo size.
        points: largest number of places.

    Returns:
        z (points,) places in (0, 1), lower (points,), upper (points,): ECDF values, all float64.

    Example:
        >>> z, low, high = ecdf_band(100, 9, generator=torch.Generator().manual_seed(0))
        >>> bool(((low < z) & (z < high)).all())
        True
    """
    if simulations < 1 or draws < 1 or not 0 < level < 1:
        raise OptionError(
            f"simulations and draws of one or more, level in (0, 1) expected: {simulations}, {draws}, {level}"
        )
    at = _points(draws, points)
    z = at.double() / (draws + 1)
    table = _two_sided(simulations, z)
    null = _null(simulations, draws, at, table, replicates, generator).sort().values
    gamma = null[max(0, math.ceil((1 - level) * replicates) - 1)]
    inside = table >= gamma
    k = torch.arange(simulations + 1).double()
    lower = torch.where(inside, k, torch.inf).amin(1)
    upper = torch.where(inside, k, -torch.inf).amax(1)
    return z, lower / simulations, upper / simulations
