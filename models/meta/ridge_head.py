"""Ridge-regression head: a common embedding, and for each episode the Bayesian linear regression on it in closed form.

k(x, x') = f(x)'f(x') / lambda,   K = k(X, X) + s^2 I
mean = k(x, X) K^-1 y,   variance = s^2 + k(x, x) - k(x, X) K^-1 k(X, x)
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from models.meta.descent import descend, slope_of
from models.meta.episodes import Episodes, EpisodeSource
from models.meta.network import Categorical, Gaussian, Network
from models.meta.predictive import Predictive
from ppl.monitor import Monitor
from ppl.option_checks import check_integers, check_positive

__all__ = ["FittedRidgeHead", "RidgeHead"]


@dataclass(frozen=True)
class RidgeHead:
    """A peer of `NIWMeta` that learns features, lambda and noise, and solves for the last layer alone.

    For classes the targets are +-1 around their mean for each class, and predictive means times a learned scale are
    logits.

    Args:
        noise: s at the start, in the unit of y.
        steps: of Adam.
        batch: episodes for each.
        lr: at the start; it falls as a cosine to a hundredth.

    Raises:
        OptionError: an option is out of range.

    Source: Bertinetto, Henriques, Torr & Vedaldi (2019) [inferred]; variances [derived].

    Example:
        >>> from models.meta import Sinusoids, mlp
        >>> fitted = RidgeHead(steps=2).fit(mlp([1, 32, 16]), Sinusoids(5, 10))
        >>> fitted.predict(Sinusoids(3, 7)(4, torch.Generator().manual_seed(0))).variance.shape
        torch.Size([4, 7])
    """

    noise: float = 0.5
    steps: int = 1000
    batch: int = 16
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_integers(self, steps=1, batch=1)
        check_positive(self, "noise", "lr")

    def fit(
        self,
        network: Network,
        episodes: Episodes | EpisodeSource,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
    ) -> FittedRidgeHead:
        """The embedding, by the likelihood of queries given support sets.

        Args:
            network: x -> features; its parameters are where training begins.
            episodes: a set of them with query sets, or an endless source; classes where they have a way.
            generator: source of all randomness; made from the seed when None.
            seed: see generator.
            monitor: progress, checkpoints, Ctrl-C.

        Raises:
            DataError: episodes without queries, or targets that are neither numbers nor classes.
        """

        def check(drawn: Episodes) -> None:
            (Gaussian() if drawn.way is None else Categorical()).check(drawn.points)
            network.check(drawn.support.x[0])

        def loss(theta: Tensor, drawn: Episodes, generator: torch.Generator) -> Tensor:
            log_p = FittedRidgeHead(network, theta, theta.new_empty(0)).law(drawn).log_prob(drawn.query.y)
            return -log_p[drawn.query.mask].mean()

        begin = network.start
        start = torch.cat([begin, begin.new_tensor([1.0, self.noise, 1.0]).log()])
        theta, history = descend(
            self, start, slope_of(loss), episodes, check=check, generator=generator, seed=seed, monitor=monitor
        )
        return FittedRidgeHead(network, theta, history)


@dataclass(frozen=True, eq=False)
class FittedRidgeHead:
    """A trained embedding.

    Args:
        network: x -> features.
        theta: its parameters, and the logs of lambda, s and the scale of logits.
        history: (steps,) losses per query.
    """

    network: Network
    theta: Tensor
    history: Tensor

    def law(self, episodes: Episodes) -> dist.TorchDistribution:
        """Of the query targets, batch shape (episodes, queries)."""
        weights, (ridge, noise, scale) = self.theta[:-3], self.theta[-3:].exp()
        support = episodes.support
        near = self._features(weights, support.x) * support.mask[..., None] / ridge.sqrt()
        far = self._features(weights, episodes.query.x) / ridge.sqrt()
        # Masked points have no features and targets of zero, so that their rows of K stand alone.
        eye = torch.eye(near.shape[1], dtype=near.dtype, device=near.device)
        root = torch.linalg.cholesky(near @ near.mT + noise.square() * eye)
        cross = torch.linalg.solve_triangular(root, near @ far.mT, upper=False)
        if episodes.way is None:
            white = torch.linalg.solve_triangular(root, support.y[..., None], upper=False)
            variance = noise.square() + (far.square().sum(-1) - cross.square().sum(1)).clamp_min(0)
            return dist.Normal((cross.mT @ white)[..., 0], variance.sqrt())
        target = 2.0 * torch.nn.functional.one_hot(support.y.long(), episodes.way).to(near) - 2.0 / episodes.way
        white = torch.linalg.solve_triangular(root, target * support.mask[..., None], upper=False)
        return dist.Categorical(logits=scale * (cross.mT @ white))

    def predict(self, episodes: Episodes) -> Predictive:
        """At the query sets given the support sets."""
        with torch.no_grad():
            law = self.law(episodes)
            return Predictive(law.expand((1, *law.batch_shape)))

    def _features(self, weights: Tensor, x: Tensor) -> Tensor:
        """f(x) and a constant."""
        f = self.network.shared(weights, x)
        return torch.cat([f, torch.ones_like(f[..., :1])], -1)
