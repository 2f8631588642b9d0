"""Trajectory length of HMC by the ChEES criterion, from all chains of a problem at once.

    ChEES(T) = E[ (|x' - c|^2 - |x - c|^2)^2 ] / 4,     x = z / sd,   c = E[x],   x' = x after time u T

The change of the estimator of the expected square: it grows until a trajectory turns back in its widest direction. Its
gradient in log T, which Adam climbs, needs what a trajectory leaves behind and no more:

    d ChEES / d log T = E[ (|x' - c|^2 - |x - c|^2) <x' - c, dx'/dt> u T ]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TrajectoryLength", "chees_gradient", "halton_jitter"]

RATE, DECAY = 0.025, 0.95  # of Adam without momentum
AVERAGE = 0.5  # the average over steps weighs the last ones more: count^-0.5
MEMORY = 16  # chains whose mean is trusted half for the centre; fewer remember more of the steps before


def halton_jitter(step: int) -> float:
    """u in [1/2, 3/2): van der Corput's sequence in base 2, shifted, so that short and long trajectories take turns.

    Example:
        >>> [halton_jitter(i) for i in range(4)]
        [1.0, 0.75, 1.25, 0.625]
    """
    value, unit, i = 0.0, 0.5, step + 1
    while i:
        value += unit * (i & 1)
        i, unit = i >> 1, unit / 2
    return 0.5 + value


def chees_gradient(start: Tensor, end: Tensor, velocity: Tensor, time: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the criterion in the log of the length, chains weighted by their acceptance.

    Args:
        start: points before the trajectories, less the centre: (problem, chain, dim).
        end: points after them, proposals whether accepted or not.
        velocity: their time derivative at the end.
        time: length of the trajectories (problem,).
        weight: acceptance (problem, chain); those of weight zero may be NaN.

    Returns:
        (problem,); zero where no chain has a weight.

    Source: Hoffman, Radul & Sountsov (2021), equation 11 [inferred].

    Example:
        >>> x, v = torch.tensor([[[1.0]]]), torch.tensor([[[0.5]]])
        >>> chees_gradient(x, 2 * x, v, torch.tensor([3.0]), torch.ones(1, 1))  # (4 - 1) * 2 * 0.5 * 3
        tensor([9.])
    """
    rise = end.square().sum(-1) - start.square().sum(-1)
    each = rise * (end * velocity).sum(-1)
    each = torch.where(weight > 0, each, 0.0).nan_to_num(0.0, 0.0, 0.0)
    total = weight.sum(1)
    return time * (weight * each).sum(1) / total.clamp_min(torch.finfo(total.dtype).tiny)


@dataclass
class TrajectoryLength:
    """Lengths (problem,) that climb the criterion, in preconditioned units.

    Args:
        log_length: log of the lengths in use.
        log_average: their average, used after warmup.
        square: running mean of squared gradients.
        centre: running mean of the points (problem, dim).
        count: updates so far.

    Example:
        >>> length = TrajectoryLength.start(torch.tensor([0.3]), torch.zeros(1, 1))
        >>> generator = torch.Generator().manual_seed(0)
        >>> for step in range(400):  # a standard normal: x' = x cos t + p sin t
        ...     x, p = torch.randn(2, 1, 64, 1, generator=generator)
        ...     t = halton_jitter(step) * length.value
        ...     end, velocity = x * t.cos() + p * t.sin(), p * t.cos() - x * t.sin()
        ...     length.update(x, end, velocity, torch.ones(1, 1), t, torch.ones(1, 64), 100.0 * torch.ones(1))
        >>> bool((length.log_average.exp() - 1.43).abs() < 0.15)  # where (sin T - sin 3T) / T is largest
        True
    """

    log_length: Tensor
    log_average: Tensor
    square: Tensor
    centre: Tensor
    count: int = 0

    @classmethod
    def start(cls, length: Tensor, centre: Tensor) -> TrajectoryLength:
        """Begin at lengths (problem,) and a guess of the mean (problem, dim)."""
        return cls(length.log(), length.log(), torch.zeros_like(length), centre)

    @property
    def value(self) -> Tensor:
        """Lengths (problem,) in use."""
        return self.log_length.exp()

    def update(
        self, start: Tensor, end: Tensor, velocity: Tensor, sd: Tensor, time: Tensor, accept: Tensor, most: Tensor
    ) -> None:
        """Take in one transition of every chain.

        Args:
            start: points before it (problem, chain, dim).
            end: proposals.
            velocity: time derivative of the proposals.
            sd: scales (problem, dim) of the coordinates.
            time: lengths of the trajectories (problem,).
            accept: acceptances (problem, chain).
            most: longest lengths (problem,) that the step size leaves room for.
        """
        self.count += 1
        chains = start.shape[1]
        # With many chains their mean is known now; with few, only from steps before as well.
        share = max(1 / (self.count + 1), chains / (chains + MEMORY))
        self.centre = (1 - share) * self.centre + share * start.mean(1)
        centre, scale = self.centre[:, None], sd[:, None]
        gradient = chees_gradient((start - centre) / scale, (end - centre) / scale, velocity / scale, time, accept)
        self.square = DECAY * self.square + (1 - DECAY) * gradient.square()
        size = (self.square / (1 - DECAY**self.count)).sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)
        self.log_length = torch.minimum(self.log_length + RATE * gradient / size, most.log())
        share = self.count**-AVERAGE
        self.log_average = share * self.log_length + (1 - share) * self.log_average


def quarter_turn(widest: Tensor) -> Tensor:
    """The length that carries a Gaussian of sd `widest` to an independent point: pi/2 times that sd."""
    return math.pi / 2 * widest
