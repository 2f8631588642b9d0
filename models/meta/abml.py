"""Amortised Bayesian meta-learning: a normal prior from which a few gradient steps give the posterior of an episode.

q_i = N(m_i, diag s_i^2), from (mu, sigma) by gradient steps on  E_q[-log p(D_support)] + KL(q || N(mu, diag sigma^2))
minimise over (mu, sigma):  sum_i E_{q_i}[-log p(D_i)] + KL(q_i || N(mu, diag sigma^2))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.meta.descent import check_of, descend, slope_of
from models.meta.episodes import Episodes, EpisodeSource, Points
from models.meta.network import Likelihood, Network
from models.meta.predictive import Predictive
from ppl.monitor import Monitor
from ppl.option_checks import check_integers, check_positive

__all__ = ["ABML", "FittedABML"]


@dataclass(frozen=True)
class ABML:
    """A peer of `NIWMeta` with posteriors of theta_i by unrolled steps: the same networks, likelihoods and episodes.

    Losses, inner and outer, are divided by the number of points. The path of the inner steps is differentiated, so that
    memory grows with them.

    Args:
        inner_steps: on the support set.
        inner_lr: their size, for means and for logs of spreads.
        draws: of q_i for each step and, in training, for the outer loss.
        spread: sigma at the start.
        steps: of Adam on (mu, log sigma).
        batch: episodes for each.
        lr: at the start; it falls as a cosine to a hundredth.

    Raises:
        OptionError: an option is out of range.

    Source: Ravi & Beatson (2019) [inferred]; without their hyper-prior.

    Example:
        >>> from models.meta import Gaussian, Sinusoids, mlp
        >>> fitted = ABML(steps=2).fit(mlp([1, 8, 1]), Gaussian(0.5), Sinusoids(5, 10))
        >>> fitted.predict(Sinusoids(3, 7)(4, torch.Generator().manual_seed(0)), draws=10).variance.shape
        torch.Size([4, 7])
    """

    inner_steps: int = 5
    inner_lr: float = 0.01
    draws: int = 2
    spread: float = 0.02
    steps: int = 1000
    batch: int = 16
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_integers(self, inner_steps=0, draws=1, steps=1, batch=1)
        check_positive(self, "inner_lr", "spread", "lr")

    def fit(
        self,
        network: Network,
        likelihood: Likelihood,
        episodes: Episodes | EpisodeSource,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
    ) -> FittedABML:
        """The prior that was learned.

        Args:
            network: its parameters are where mu begins.
            likelihood: the law of targets.
            episodes: a set of them with query sets, or an endless source.
            generator: source of all randomness; made from the seed when None.
            seed: see generator.
            monitor: progress, checkpoints, Ctrl-C.

        Raises:
            DataError: episodes without queries.
        """

        def loss(theta: Tensor, drawn: Episodes, generator: torch.Generator) -> Tensor:
            posterior = self.adapted(network, likelihood, theta, drawn.support, generator)
            return self._bound(network, likelihood, posterior, theta, drawn.points, generator).mean()

        begin = network.start
        start = torch.cat([begin, torch.full_like(begin, self.spread).log()])
        check = check_of(network, likelihood)
        theta, history = descend(
            self, start, slope_of(loss), episodes, check=check, generator=generator, seed=seed, monitor=monitor
        )
        return FittedABML(self, network, likelihood, theta, history)

    def adapted(
        self, network: Network, likelihood: Likelihood, theta: Tensor, support: Points, generator: torch.Generator
    ) -> Tensor:
        """(b, 2 d) means and logs of spreads of q_i after the inner steps, differentiable in theta (2 d,)."""
        q = theta.expand(len(support.x), -1)
        for _ in range(self.inner_steps):
            with torch.enable_grad():
                at = q if q.requires_grad else q.detach().requires_grad_()
                bound = self._bound(network, likelihood, at, theta, support, generator)
                (slope,) = torch.autograd.grad(bound.sum(), at, create_graph=theta.requires_grad)
            q = q - self.inner_lr * slope
        return q

    def _bound(
        self,
        network: Network,
        likelihood: Likelihood,
        q: Tensor,
        prior: Tensor,
        points: Points,
        generator: torch.Generator,
    ) -> Tensor:
        """(b,) losses of the episodes per point, KL included."""
        law = likelihood.law(drawn_outputs(network, q, points.x, self.draws, generator))
        loss = -law.log_prob(points.y).masked_fill(~points.mask, 0.0).sum(-1).mean(0)
        (mean, own), (centre, common) = q.chunk(2, -1), prior.chunk(2, -1)
        square = (2 * (own - common)).exp() + ((mean - centre) * (-common).exp()).square()
        return (loss + 0.5 * (square - 1 - 2 * (own - common)).sum(-1)) / points.counts


@dataclass(frozen=True, eq=False)
class FittedABML:
    """A learned prior.

    Args:
        options: of the fit.
        network: of the episodes.
        likelihood: of the targets.
        theta: (2 d,) mu and log sigma.
        history: (steps,) losses per point.
    """

    options: ABML
    network: Network
    likelihood: Likelihood
    theta: Tensor
    history: Tensor

    def predict(self, episodes: Episodes, draws: int = 100, generator: torch.Generator | None = None) -> Predictive:
        """At the query sets, by draws of the posteriors given the support sets.

        Args:
            episodes: new ones.
            draws: of theta for each.
            generator: of all noise; seed 0 when None.
        """
        generator = generator or torch.Generator(self.theta.device).manual_seed(0)
        with torch.no_grad():
            q = self.options.adapted(self.network, self.likelihood, self.theta, episodes.support, generator)
            outputs = drawn_outputs(self.network, q, episodes.query.x, draws, generator)
            return Predictive(self.likelihood.law(outputs))


def drawn_outputs(network: Network, q: Tensor, x: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(draws, b, points, *outputs) at draws of q (b, 2 d)."""
    mean, log_spread = q.chunk(2, -1)
    noise = torch.randn(draws, *mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return network(mean + log_spread.exp() * noise, x.expand(draws, *x.shape))
