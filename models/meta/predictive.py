"""Predictions at the queries of episodes, as an equal mixture of laws, and how good they are.

p(y | x, D) = 1/S sum_s p_s(y | x)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.errors import OptionError, ShapeError

__all__ = ["Predictive", "expected_calibration_error", "pit_error"]


@dataclass(frozen=True, eq=False)
class Predictive:
    """What every learner says about the queries of new episodes.

    Args:
        law: batch shape (S, episodes, queries): normal for scalar regression, categorical for classes.

    Example:
        >>> import pyro.distributions as dist
        >>> two = Predictive(dist.Normal(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1), 0.5))
        >>> float(two.mean), float(two.variance), float(two.cdf(torch.zeros(1, 1)))
        (0.0, 1.25, 0.5)
    """

    law: dist.TorchDistribution

    def __post_init__(self) -> None:
        if len(self.law.batch_shape) != 3 or self.law.event_shape:
            raise ShapeError(
                "expected a law with batch shape (draws, episodes, queries) and scalar targets, got "
                f"{tuple(self.law.batch_shape)} and {tuple(self.law.event_shape)}"
            )

    @property
    def classes(self) -> bool:
        """Whether targets are classes."""
        return hasattr(self.law, "probs")

    @property
    def mean(self) -> Tensor:
        """(episodes, queries) of a target; of classes their probabilities (episodes, queries, way)."""
        return (self.law.probs if self.classes else self.law.mean).mean(0)

    @property
    def variance(self) -> Tensor:
        """(episodes, queries) of a target: within the laws and between them."""
        if self.classes:
            raise OptionError("classes have probabilities, `mean`, and no variance")
        return self.law.variance.mean(0) + self.law.mean.var(0, correction=0)

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x, D) of each query, (episodes, queries)."""
        return self.law.log_prob(y).logsumexp(0) - math.log(self.law.batch_shape[0])

    def cdf(self, y: Tensor) -> Tensor:
        """P(target <= y | x, D), uniform when calibrated: (episodes, queries)."""
        if self.classes:
            raise OptionError("classes have no order; use expected_calibration_error")
        return self.law.cdf(y).mean(0)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """sum_b n_b / n |accuracy_b - confidence_b| over equal bins of the highest probability.

    Args:
        probabilities: (n, classes).
        labels: (n,) integers.
        bins: of [0, 1].

    Example:
        >>> float(expected_calibration_error(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1])))
        0.0
    """
    confidence, best = probabilities.double().max(-1)
    right = (best == labels).double()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=right.device).index_add_(0, which, right - confidence)
    return gap.abs().sum() / len(labels)


def pit_error(cdf: Tensor, levels: int = 20) -> Tensor:
    """Mean over levels p of |share of cdf values <= p, less p|: 0 when calibrated, 1/4 for a point at the median.

    Args:
        cdf: (n,) values of the predictive distribution function at the targets.
        levels: at (k - 1/2) / levels.

    Example:
        >>> float(pit_error(torch.arange(1000) / 1000)) < 1e-3, float(pit_error(torch.full((10,), 0.5))) == 0.25
        (True, True)
    """
    at = (torch.arange(levels, dtype=torch.float64, device=cdf.device) + 0.5) / levels
    share = (cdf.double().reshape(-1, 1) <= at).double().mean(0)
    return (share - at).abs().mean()
