"""Regression tasks for meta-learning: sources of sinusoids, lines and hierarchical linear regressions.

y = f_i(x) + noise N(0, sigma^2),   f_i drawn anew for each episode
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.meta.episodes import Episodes, Points
from models.meta.local import LocalNormal
from ppl.errors import OptionError, ShapeError
from ppl.option_checks import check_integers

__all__ = ["LineSine", "LinearRegressions", "Sinusoids"]


@dataclass(frozen=True)
class Sinusoids:
    """y = a sin(x - b) + noise, a ~ U[0.1, 5], b ~ U[0, pi], x ~ U[-5, 5]: the regression test of MAML.

    Args:
        shots: points of a support set.
        queries: points of a query set; 0 for none.
        noise: standard deviation; 0 in the publication.

    Raises:
        OptionError: an option is out of range.

    Source: Finn, Abbeel & Levine (2017), section 5.1 [inferred].

    Example:
        >>> Sinusoids(shots=5, queries=10)(3, torch.Generator().manual_seed(0))
        Episodes(3 episodes, support 5, query 10)
    """

    shots: int = 5
    queries: int = 15
    noise: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, episodes: int, generator: torch.Generator) -> Episodes:
        """See `EpisodeSource`."""
        amplitude = _uniform(0.1, 5.0, (episodes, 1), generator)
        phase = _uniform(0.0, math.pi, (episodes, 1), generator)
        return _drawn(self, episodes, lambda x: amplitude * (x - phase).sin(), generator)


@dataclass(frozen=True)
class LineSine:
    """With probability one half a sinusoid as in `Sinusoids`, otherwise a line of slope and intercept ~ U[-3, 3].

    Args:
        shots: points of a support set.
        queries: points of a query set; 0 for none.
        noise: standard deviation.

    Raises:
        OptionError: an option is out of range.

    Source: Finn, Xu & Levine (2018), in the form of the GMM-NP repository [inferred].

    Example:
        >>> LineSine(shots=10, queries=6)(4, torch.Generator().manual_seed(0)).query.y.shape
        torch.Size([4, 6])
    """

    shots: int = 5
    queries: int = 15
    noise: float = 0.25

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, episodes: int, generator: torch.Generator) -> Episodes:
        """See `EpisodeSource`."""
        amplitude = _uniform(0.1, 5.0, (episodes, 1), generator)
        phase = _uniform(0.0, math.pi, (episodes, 1), generator)
        slope, intercept = (_uniform(-3.0, 3.0, (episodes, 1), generator) for _ in range(2))
        line = _uniform(0.0, 1.0, (episodes, 1), generator) < 0.5

        def f(x: Tensor) -> Tensor:
            return torch.where(line, slope * x + intercept, amplitude * (x - phase).sin())

        return _drawn(self, episodes, f, generator)


@dataclass(frozen=True, eq=False)
class LinearRegressions:
    """y = w_i' x + c_i + noise, theta_i = (w_i, c_i) ~ N(mean, diag(spread^2)), x ~ N(0, I): answers are known.

    Args:
        mean: (d + 1,) of slopes and intercept, in the order of `mlp([d, 1])`.
        spread: (d + 1,) standard deviations between episodes.
        noise: standard deviation of y, positive.
        shots: points of a support set.
        queries: points of a query set; 0 for none.

    Raises:
        OptionError: an option is out of range.
        ShapeError: mean and spread differ in shape.

    Example:
        >>> tasks = LinearRegressions(torch.tensor([2.0, 0.0]), torch.tensor([0.5, 0.5]), noise=0.1)
        >>> episodes = tasks(2, torch.Generator().manual_seed(0))
        >>> tasks.posterior(episodes.support).mean.shape
        torch.Size([2, 2])
    """

    mean: Tensor
    spread: Tensor
    noise: float = 0.25
    shots: int = 5
    queries: int = 15

    def __post_init__(self) -> None:
        _check(self)
        if self.noise == 0:
            raise OptionError("noise must be positive for the posterior to have a density, got 0")
        if self.mean.ndim != 1 or len(self.mean) < 2 or self.mean.shape != self.spread.shape:
            raise ShapeError(
                f"mean and spread are (inputs + 1,) each, got {tuple(self.mean.shape)} and {tuple(self.spread.shape)}"
            )
        if not bool(((self.spread > 0) & torch.isfinite(self.spread)).all()):
            raise OptionError(f"spread is a standard deviation and must be positive, got {self.spread.tolist()}")

    def __call__(self, episodes: int, generator: torch.Generator) -> Episodes:
        """See `EpisodeSource`."""
        points, d = self.shots + self.queries, len(self.mean)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=generator.device)

        theta, x = self.mean + self.spread * normal(episodes, d), normal(episodes, points, d - 1)
        y = (self._design(x) @ theta[..., None])[..., 0] + self.noise * normal(episodes, points)
        return _split(x, y, self.shots)

    def posterior(self, points: Points) -> LocalNormal:
        """The exact posterior of theta_i given points of the episodes: (diag(spread^-2) + A'A / noise^2)^-1 and so on.

        Args:
            points: of b episodes.
        """
        design = self._design(points.x) * points.mask[..., None]
        precision = torch.diag(self.spread**-2) + design.mT @ design / self.noise**2
        covariance = torch.linalg.inv(precision)
        natural = self.mean * self.spread**-2 + (design.mT @ points.y[..., None])[..., 0] / self.noise**2
        return LocalNormal.dense((covariance @ natural[..., None])[..., 0], torch.linalg.cholesky(covariance))

    def predictive(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Exact mean and variance of each query target given the support set, (b, queries)."""
        posterior, design = self.posterior(episodes.support), self._design(episodes.query.x)
        mean = (design @ posterior.mean[..., None])[..., 0]
        return mean, ((design @ posterior.covariance) * design).sum(-1) + self.noise**2

    def _design(self, x: Tensor) -> Tensor:
        """Inputs and a column of ones."""
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def _check(options: Sinusoids | LineSine | LinearRegressions) -> None:
    """Sizes and noise of a source."""
    check_integers(options, shots=1, queries=0)
    if not (math.isfinite(options.noise) and options.noise >= 0):
        raise OptionError(f"noise is a standard deviation, at least 0 and finite, got {options.noise!r}")


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """U[low, high]."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def _drawn(
    options: Sinusoids | LineSine, episodes: int, f: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Episodes:
    """Points of f at x ~ U[-5, 5], with noise."""
    x = _uniform(-5.0, 5.0, (episodes, options.shots + options.queries), generator)
    y = f(x) + options.noise * torch.randn(x.shape, generator=generator, device=generator.device)
    return _split(x[..., None], y, options.shots)


def _split(x: Tensor, y: Tensor, shots: int) -> Episodes:
    """The first points are the support set, the others the query set."""
    if x.shape[1] == shots:
        return Episodes(x, y)
    return Episodes(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])
