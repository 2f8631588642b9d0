"""Reptile: a start that moves towards where a few gradient steps on an episode lead.

theta <- theta + rate * mean_i(theta_i - theta),   theta_i by gradient steps on all points of episode i
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.meta.descent import check_of, descend
from models.meta.episodes import Episodes, EpisodeSource
from models.meta.maml import MAML, after_steps
from models.meta.network import Likelihood, Network
from models.meta.predictive import Predictive
from ppl.monitor import Monitor
from ppl.option_checks import check_integers, check_positive

__all__ = ["FittedReptile", "Reptile"]


@dataclass(frozen=True)
class Reptile:
    """A peer of `NIWMeta` without second derivatives: the same networks, likelihoods and episodes.

    Losses are means over points of -log p(y | x, theta). Support and query points alike are trained on.

    Args:
        inner_steps: gradient steps on an episode; one alone learns the start of joint training.
        inner_lr: their size.
        test_steps: on a support set, for predictions.
        steps: of the start.
        batch: episodes for each.
        lr: share of the way to the mean of the theta_i at the start; it falls as a cosine to a hundredth.

    Raises:
        OptionError: an option is out of range.

    Source: Nichol, Achiam & Schulman (2018), algorithm 1 [inferred]; full batches and the cosine are ours.

    Example:
        >>> from models.meta import Gaussian, mlp
        >>> g = torch.Generator().manual_seed(0)
        >>> x, slope = torch.randn(32, 8, 1, generator=g), 2.0 + 0.3 * torch.randn(32, 1, generator=g)
        >>> y = slope * x[..., 0]
        >>> episodes = Episodes(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])
        >>> fitted = Reptile(inner_lr=0.2, steps=50).fit(mlp([1, 1]), Gaussian(1.0), episodes)
        >>> bool((fitted.theta - torch.tensor([2.0, 0.0])).abs().max() < 0.3)
        True
    """

    inner_steps: int = 10
    inner_lr: float = 0.02
    test_steps: int = 32
    steps: int = 1000
    batch: int = 16
    lr: float = 1.0

    def __post_init__(self) -> None:
        check_integers(self, inner_steps=1, test_steps=0, steps=1, batch=1)
        check_positive(self, "inner_lr", "lr")

    def fit(
        self,
        network: Network,
        likelihood: Likelihood,
        episodes: Episodes | EpisodeSource,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
    ) -> FittedReptile:
        """The start that was learned.

        Args:
            network: its parameters are where training begins.
            likelihood: the law of targets.
            episodes: a set of them with query sets, or an endless source.
            generator: source of all randomness; made from the seed when None.
            seed: see generator.
            monitor: progress, checkpoints, Ctrl-C.

        Raises:
            DataError: episodes without queries.
        """
        inner = MAML(self.inner_steps, self.inner_lr, "first")

        def direction(theta: Tensor, drawn: Episodes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            off = theta - inner.adapted(network, likelihood, theta, drawn.points)
            return off.square().sum(-1).mean(), off.mean(0)

        check = check_of(network, likelihood)
        theta, history = descend(
            self,
            network.start,
            direction,
            episodes,
            check=check,
            generator=generator,
            seed=seed,
            monitor=monitor,
            plain=True,
        )
        return FittedReptile(self, network, likelihood, theta, history)


@dataclass(frozen=True, eq=False)
class FittedReptile:
    """A learned start.

    Args:
        options: of the fit.
        network: of the episodes.
        likelihood: of the targets.
        theta: (d,) the start.
        history: (steps,) mean square distances that the inner steps went.
    """

    options: Reptile
    network: Network
    likelihood: Likelihood
    theta: Tensor
    history: Tensor

    def predict(self, episodes: Episodes) -> Predictive:
        """At the query sets, after gradient steps on the support sets."""
        inner = MAML(self.options.test_steps, self.options.inner_lr, "first")
        return after_steps(inner, self.network, self.likelihood, self.theta, episodes)
