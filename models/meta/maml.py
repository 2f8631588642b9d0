"""MAML: a start from which a few gradient steps on an episode's support set do well on its query set.

theta_i = theta - lr grad L_support(theta), repeated;   minimise sum_i L_query(theta_i) over theta
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.meta.descent import check_of, descend, slope_of
from models.meta.episodes import Episodes, EpisodeSource, Points
from models.meta.network import Likelihood, Network
from models.meta.predictive import Predictive
from ppl.errors import OptionError
from ppl.monitor import Monitor
from ppl.option_checks import check_integers, check_positive

__all__ = ["MAML", "FittedMAML", "after_steps"]


@dataclass(frozen=True)
class MAML:
    """Model-agnostic meta-learning, a peer of `NIWMeta`: the same networks, likelihoods and episodes.

    Losses are means over points of -log p(y | x, theta). Memory of a second-order step grows with the inner steps,
    whose whole path is differentiated.

    Args:
        inner_steps: gradient steps on the support set.
        inner_lr: their size.
        order: "second" differentiates through the inner gradients, "first" takes them as constants.
        steps: of the start.
        batch: episodes for each.
        lr: of Adam at the start; it falls as a cosine to a hundredth.

    Raises:
        OptionError: an option is out of range.

    Source: Finn, Abbeel & Levine (2017), algorithm 1 [inferred].

    Example:
        >>> from models.meta import Gaussian, mlp
        >>> g = torch.Generator().manual_seed(0)
        >>> x, slope = torch.randn(32, 8, 1, generator=g), 2.0 + 0.3 * torch.randn(32, 1, generator=g)
        >>> y = slope * x[..., 0]
        >>> episodes = Episodes(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])
        >>> fitted = MAML(steps=200, lr=0.05).fit(mlp([1, 1]), Gaussian(1.0), episodes)
        >>> bool((fitted.theta - torch.tensor([2.0, 0.0])).abs().max() < 0.3)
        True
    """

    inner_steps: int = 5
    inner_lr: float = 0.01
    order: Literal["first", "second"] = "second"
    steps: int = 1000
    batch: int = 16
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_integers(self, inner_steps=0, steps=1, batch=1)
        check_positive(self, "inner_lr", "lr")
        if self.order not in ("first", "second"):
            raise OptionError(f'order must be "first" or "second", got {self.order!r}')

    def fit(
        self,
        network: Network,
        likelihood: Likelihood,
        episodes: Episodes | EpisodeSource,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
    ) -> FittedMAML:
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

        def loss(theta: Tensor, drawn: Episodes, generator: torch.Generator) -> Tensor:
            return self.losses(network, likelihood, theta, drawn).mean()

        check = check_of(network, likelihood)
        theta, history = descend(
            self, network.start, slope_of(loss), episodes, check=check, generator=generator, seed=seed, monitor=monitor
        )
        return FittedMAML(self, network, likelihood, theta, history)

    def losses(self, network: Network, likelihood: Likelihood, start: Tensor, episodes: Episodes) -> Tensor:
        """(b,) mean query losses after adaptation from start (d,), differentiable in it."""
        support, query = episodes.support, episodes.query
        adapted = self.adapted(network, likelihood, start, support)
        return _mean_loss(network, likelihood, adapted, query)

    def adapted(self, network: Network, likelihood: Likelihood, start: Tensor, support: Points) -> Tensor:
        """(b, d) parameters after the inner steps."""
        theta = start.expand(len(support.x), -1)

        def total(theta: Tensor) -> Tensor:
            return _mean_loss(network, likelihood, theta, support).sum()

        for _ in range(self.inner_steps):
            with torch.enable_grad():
                at = theta if theta.requires_grad else theta.detach().requires_grad_()
                second = self.order == "second" and start.requires_grad
                (slope,) = torch.autograd.grad(total(at), at, create_graph=second)
            theta = theta - self.inner_lr * slope
        return theta


@dataclass(frozen=True, eq=False)
class FittedMAML:
    """A learned start.

    Args:
        options: of the fit.
        network: of the episodes.
        likelihood: of the targets.
        theta: (d,) the start.
        history: (steps,) query losses.
    """

    options: MAML
    network: Network
    likelihood: Likelihood
    theta: Tensor
    history: Tensor

    def predict(self, episodes: Episodes, inner_steps: int | None = None) -> Predictive:
        """At the query sets, after gradient steps on the support sets.

        Args:
            episodes: new ones.
            inner_steps: other than in training.
        """
        options = self.options
        if inner_steps is not None:
            options = MAML(inner_steps, options.inner_lr, options.order)
        return after_steps(options, self.network, self.likelihood, self.theta, episodes)


def after_steps(
    options: MAML, network: Network, likelihood: Likelihood, start: Tensor, episodes: Episodes
) -> Predictive:
    """The laws of queries after the inner steps from start (d,) on the support sets."""
    with torch.no_grad():
        adapted = options.adapted(network, likelihood, start, episodes.support)
        return Predictive(likelihood.law(network(adapted, episodes.query.x)[None]))


def _mean_loss(network: Network, likelihood: Likelihood, theta: Tensor, points: Points) -> Tensor:
    """(b,) mean of -log p over the points of each episode: theta (b, d)."""
    log_p = likelihood.law(network(theta, points.x)).log_prob(points.y)
    return -log_p.masked_fill(~points.mask, 0.0).sum(-1) / points.counts.clamp_min(1)
