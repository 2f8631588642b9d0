"""How many independent draws a result is worth, and the bounds that follow.

Kish ESS = 1 / sum_i W_i^2 over draws      root ESS = 1 / sum_a W_a^2, W_a = weight of all descendants of ancestor a
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError
from ppl.weighted import normalise

__all__ = [
    "ess_of",
    "kish_ess",
    "log_evidence_stderr",
    "merge_root_ess",
    "pareto_khat",
    "root_ess",
    "root_weights",
    "z_bound",
]


def z_bound(alpha: float, tests: int = 1) -> float:
    """Two-sided normal bound: all of `tests` standard normals stay inside with probability at least 1 - alpha.

    Args:
        alpha: family-wise false-alarm rate, in (0, 1).
        tests: number of statistics compared with it (Bonferroni).

    Returns:
        The (1 - alpha / (2 tests)) quantile of the normal law.

    Example:
        >>> round(z_bound(0.05), 6), round(z_bound(1e-5, tests=6), 3)
        (1.959964, 4.79)
    """
    if not 0 < alpha < 1 or tests < 1:
        raise OptionError(f"alpha must lie in (0, 1) and tests be one or more, got {alpha} and {tests}")
    return -float(torch.special.ndtri(torch.tensor(alpha / (2 * tests), dtype=torch.float64)))


def kish_ess(log_weight: Tensor) -> Tensor:
    """Effective sample size of weights, (sum w)^2 / sum w^2. After resampling it flatters: use root_ess there.

    Args:
        log_weight: (*batch, draws), up to a constant.

    Returns:
        (*batch,) float64 in [1, draws].

    Example:
        >>> kish_ess(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor(2., dtype=torch.float64)
    """
    return 1 / normalise(log_weight).square().sum(-1)


def root_weights(log_weight: Tensor, root: Tensor, particles: int) -> Tensor:
    """Final weight carried by all descendants of each initial particle.

    Args:
        log_weight: (*batch, draws) final log weights, up to a constant.
        root: (*batch, draws) int64, index of the initial particle each draw descends from.
        particles: number of initial particles P.

    Returns:
        (*batch, particles) float64, sum one.

    Example:
        >>> root_weights(torch.zeros(4), torch.tensor([0, 0, 0, 2]), 3)
        tensor([0.7500, 0.0000, 0.2500], dtype=torch.float64)
    """
    if root.shape != log_weight.shape:
        raise ShapeError(f"root has shape {tuple(root.shape)}, expected that of log_weight, {tuple(log_weight.shape)}")
    weights = normalise(log_weight)
    return torch.zeros((*weights.shape[:-1], particles), dtype=weights.dtype, device=weights.device).scatter_add(
        -1, root, weights
    )


def root_ess(log_weight: Tensor, root: Tensor, particles: int) -> Tensor:
    """Honest number of independent draws of a particle run, R = 1 / sum_a W_a^2.

    SW / floor is about sqrt((1 + n / R) / 2). ESS reads P after each resampling, and distinct roots flatter.

    Args:
        log_weight: (*batch, draws) final log weights.
        root: (*batch, draws) ancestors.
        particles: number of initial particles.

    Returns:
        (*batch,) float64.

    Source: [derived].

    Example:
        >>> root_ess(torch.zeros(4), torch.tensor([0, 0, 3, 3]), 4)
        tensor(2., dtype=torch.float64)
    """
    return 1 / root_weights(log_weight, root, particles).square().sum(-1)


def log_evidence_stderr(log_weight: Tensor, root: Tensor, particles: int) -> Tensor:
    """Standard error of log Z from one run, sqrt(sum_a W_a^2 - 1 / P).

    Args:
        log_weight: (*batch, draws) final log weights.
        root: (*batch, draws) ancestors.
        particles: number of initial particles P.

    Returns:
        (*batch,) float64.

    Source: [derived].

    Example:
        >>> log_evidence_stderr(torch.zeros(4), torch.tensor([0, 0, 3, 3]), 4)
        tensor(0.5000, dtype=torch.float64)
    """
    return (root_weights(log_weight, root, particles).square().sum(-1) - 1 / particles).clamp_min(0).sqrt()


def merge_root_ess(log_evidence: Tensor, root_ess: Tensor) -> Tensor:
    """Root ESS of independent runs merged by evidence, 1 / sum_r omega_r^2 / R_r with omega_r proportional to Z_r.

    Args:
        log_evidence: (*batch, runs), log Z_r (plus log of the number of particles if it differs between runs).
        root_ess: (*batch, runs).

    Returns:
        (*batch,) float64.

    Source: [derived].

    Example:
        >>> merge_root_ess(torch.zeros(3), torch.tensor([10.0, 10.0, 10.0]))
        tensor(30.0000, dtype=torch.float64)
    """
    share = normalise(log_evidence)
    return 1 / (share.square() / root_ess.double()).sum(-1)


def ess_of(x: Tensor, method: str = "mean") -> Tensor:
    """Effective sample size of a statistic of autocorrelated chains, by ArviZ. Each statistic needs its own.

    Args:
        x: (chain, draw, *event): the statistic itself, e.g. squares for a test of the variance.
        method: ArviZ's: "mean" for z-tests of means, "bulk", "tail", "sd", "median", ...

    Returns:
        (*event) float64.

    Example:
        >>> x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> bool(ess_of(x) > 1500)
        True
    """
    if x.ndim < 2 or x.shape[1] < 4:
        raise ShapeError(f"x must be (chain, draw, *event) with four draws or more, got {tuple(x.shape)}")
    import arviz

    flat = x.detach().double().cpu().reshape(*x.shape[:2], -1)
    values = [float(arviz.ess(flat[:, :, i].numpy(), method=method)) for i in range(flat.shape[2])]
    return torch.tensor(values, dtype=torch.float64).reshape(x.shape[2:])


def pareto_khat(log_weight: Tensor) -> Tensor:
    """Pareto shape of the largest weights, by ArviZ: below 0.7 importance sampling is reliable; above, it is not.

    Args:
        log_weight: (*batch, draws), up to a constant, all finite.

    Returns:
        (*batch,) float64; minus infinity where all weights are equal.

    Source: Vehtari et al. (2024) [inferred].

    Example:
        >>> w = torch.randn(2000, generator=torch.Generator().manual_seed(0))
        >>> bool(pareto_khat(w) < 0.7)
        True
    """
    if log_weight.ndim < 1 or log_weight.shape[-1] < 10:
        raise ShapeError(f"log_weight must be (*batch, draws) with ten draws or more, got {tuple(log_weight.shape)}")
    if not bool(torch.isfinite(log_weight).all()):
        raise OptionError("log weights must be finite for a Pareto fit; leave out draws of weight zero")
    import arviz

    rows = log_weight.detach().double().cpu().reshape(-1, log_weight.shape[-1])
    values = []
    for row in rows:
        if float(row.max() - row.min()) < 1e-12:
            values.append(-math.inf)  # no tail to fit
        else:
            values.append(float(arviz.psislw(row.numpy())[1]))
    return torch.tensor(values, dtype=torch.float64).reshape(log_weight.shape[:-1])
