"""Step size, mass matrix and trajectory length of HMC, learned from all chains of a problem together.

log eps_{t+1} = m - sqrt(t) / gamma * mean_s(target - accept_s)            (dual averaging)
T = pi/2 * sqrt(largest eigenvalue of corr(z))                             (a quarter turn of the slowest direction)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DualAveraging", "Moments", "windows"]

DELAY, DECAY = 10.0, 0.75


@dataclass
class DualAveraging:
    """Step sizes (problem,) driven to a target acceptance.

    Source: Nesterov (2009), as used by Hoffman & Gelman (2014), section 3.2 [inferred].

    Args:
        log_step: current log step size (problem,).
        log_average: its weighted average, used after warmup.
        error: running mean of target minus acceptance.
        centre: where log_step is pulled to.
        count: updates so far.
        gamma: how strongly log_step is held to the centre.

    Example:
        >>> adapt = DualAveraging.start(torch.tensor([0.1]))
        >>> for _ in range(200):  # acceptance falls as the step grows: exp(-step) = 0.8 at 0.223
        ...     adapt.update(torch.exp(-adapt.log_step.exp()), 0.8)
        >>> bool((adapt.log_average.exp() - 0.223).abs() < 0.02)
        True
    """

    log_step: Tensor
    log_average: Tensor
    error: Tensor
    centre: Tensor
    count: int = 0
    gamma: float = 0.05

    @classmethod
    def start(cls, step: Tensor, gamma: float = 0.05, ambition: float = 10.0) -> DualAveraging:
        """Begin, or begin anew, at step sizes (problem,), pulled to `ambition` times as large ones."""
        return cls(step.log(), step.log(), torch.zeros_like(step), (ambition * step).log(), gamma=gamma)

    def state(self, prefix: str = "adapt.") -> dict[str, Tensor]:
        """What `resumed` goes on from; gamma is the user's to know."""
        tensors = {prefix + n: getattr(self, n) for n in ("log_step", "log_average", "error", "centre")}
        return tensors | {prefix + "count": torch.tensor(self.count)}

    @classmethod
    def resumed(cls, state: Mapping[str, Tensor], gamma: float = 0.05, prefix: str = "adapt.") -> DualAveraging:
        """Go on from the entries of `state()` among others."""
        step, average, error, centre = (state[prefix + n] for n in ("log_step", "log_average", "error", "centre"))
        return cls(step, average, error, centre, int(state[prefix + "count"]), gamma)

    def update(self, accept: Tensor, target: float) -> None:
        """Take in the acceptance (problem,) of one transition."""
        self.count += 1
        weight = 1 / (self.count + DELAY)
        self.error = (1 - weight) * self.error + weight * (target - accept)
        self.log_step = self.centre - math.sqrt(self.count) / self.gamma * self.error
        share = self.count**-DECAY
        self.log_average = share * self.log_step + (1 - share) * self.log_average


class Moments:
    """Pooled draws of one warmup window: variances (problem, dim) and the spread of the widest direction (problem,).

    Args:
        problems: number of problems.
        chains: chains of each.
        dim: dimension.
        length: draws of the window, of which at most `most` pooled points are kept.
        like: a tensor of the type and device wanted.
        most: pooled points kept for each problem.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> moments = Moments(1, 200, 3, 10, torch.zeros(()))
        >>> for step in range(10):
        ...     moments.add(step, torch.randn(200, 3, generator=generator) * torch.tensor([1.0, 2.0, 3.0]))
        >>> variance, spread = moments.estimate()
        >>> bool(((variance.sqrt() - torch.tensor([[1.0, 2.0, 3.0]])).abs() < 0.2).all()), bool(spread < 1.1)
        (True, True)
    """

    def __init__(self, problems: int, chains: int, dim: int, length: int, like: Tensor, most: int = 2048) -> None:
        self.problems, self.chains = problems, chains
        self.rows = max(1, min(length, most // chains))
        self.every = max(1, length // self.rows)
        self.kept = like.new_zeros((0, problems * chains, dim))

    def add(self, step: int, z: Tensor) -> None:
        """Keep the draws of one transition of the window, if it is its turn."""
        if step % self.every == 0:
            self.kept = torch.cat([self.kept, z[None]])

    def estimate(self) -> tuple[Tensor, Tensor]:
        """Variances, shrunk to a small one as Stan does, and the largest sd in coordinates of unit variance."""
        count = len(self.kept) * self.chains
        x = self.kept.reshape(len(self.kept), self.problems, self.chains, -1).transpose(0, 1)
        x = x.reshape(self.problems, count, -1)
        x = x - x.mean(1, keepdim=True)
        raw = x.square().sum(1) / max(count - 1, 1)
        variance = (count * raw + 5 * 1e-3) / (count + 5)
        return variance, _widest(x / variance.sqrt()[:, None])


def _widest(x: Tensor, rounds: int = 30) -> Tensor:
    """Largest sd over directions of pooled points (problem, points, dim), by power iteration.

    A sample of n points in d dimensions shows sqrt(1 + sqrt(d / n))-fold too wide a spread where there is none, so the
    edge of that noise, 1 + sqrt(d / n), is divided out.
    """
    points, dim = x.shape[1:]
    v = x.new_ones(len(x), dim, 1) + 0.1 * torch.linspace(-1, 1, dim, dtype=x.dtype, device=x.device)[:, None]
    for _ in range(rounds):
        v = x.transpose(1, 2) @ (x @ v)
        v = v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    largest = ((x @ v).square().sum((1, 2)) / max(points - 1, 1)).sqrt()
    return (largest / (1 + math.sqrt(dim / points))).clamp_min(1.0)


def windows(warmup: int) -> list[tuple[int, int]]:
    """Where mass matrices are learned: [start, stop) of each window, doubling, between a start and an end phase.

    The end phase is a tenth, but not below 30 transitions where a third of the warmup has as many: a step size that is
    learned anew for the last mass matrix needs them.

    Example:
        >>> windows(500)
        [(75, 100), (100, 150), (150, 250), (250, 450)]
        >>> windows(60)
        [(9, 40)]
    """
    start, end = round(0.15 * warmup), warmup - max(round(0.1 * warmup), min(30, warmup // 3), 1)
    out, size = [], 25
    while start < end:
        # The last window takes what is left, when the one after it would not fit.
        stop = end if start + 3 * size > end else start + size
        out.append((start, stop))
        start, size = stop, 2 * size
    return out
