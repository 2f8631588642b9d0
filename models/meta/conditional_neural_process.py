"""Conditional neural process: a support set is encoded point by point and averaged; a decoder gives a law for a query.

r_i = mean_j e(x_ij, y_ij),   y | x, D_i ~ N(a, s^2),   (a, log s) = d(r_i, x)
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from models.meta.descent import descend, slope_of
from models.meta.episodes import Episodes, EpisodeSource
from models.meta.network import Gaussian, Network, mlp
from models.meta.predictive import Predictive
from ppl.errors import ShapeError
from ppl.monitor import Monitor
from ppl.option_checks import check_integers, check_positive

__all__ = ["ConditionalNeuralProcess", "FittedNeuralProcess"]


@dataclass(frozen=True)
class ConditionalNeuralProcess:
    """A peer of `NIWMeta` for scalar regression that learns the map from a support set to predictions itself.

    Args:
        width: of the two hidden layers of encoder and decoder, and of the code of a support set.
        floor: least standard deviation of a prediction, in the unit of y.
        steps: of Adam.
        batch: episodes for each.
        lr: at the start; it falls as a cosine to a hundredth.

    Raises:
        OptionError: an option is out of range.

    Source: Garnelo, Rosenbaum, Maddison et al. (2018) [inferred].

    Example:
        >>> from models.meta import Sinusoids
        >>> fitted = ConditionalNeuralProcess(steps=2).fit(Sinusoids(5, 10))
        >>> fitted.predict(Sinusoids(3, 7)(4, torch.Generator().manual_seed(0))).mean.shape
        torch.Size([4, 7])
    """

    width: int = 32
    floor: float = 0.01
    steps: int = 1000
    batch: int = 16
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_integers(self, width=1, steps=1, batch=1)
        check_positive(self, "floor", "lr")

    def fit(
        self,
        episodes: Episodes | EpisodeSource,
        *,
        inputs: int = 1,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
    ) -> FittedNeuralProcess:
        """Encoder and decoder, by the likelihood of queries given support sets.

        Args:
            episodes: a set of them with query sets, or an endless source.
            inputs: length of x.
            generator: source of all randomness, the start of the networks excepted; made from the seed when None.
            seed: see generator.
            monitor: progress, checkpoints, Ctrl-C.

        Raises:
            DataError: episodes without queries, or targets that are no numbers.
            ShapeError: x or y has other axes.
        """
        w = self.width
        encoder, decoder = mlp([inputs + 1, w, w, w], torch.nn.ReLU), mlp([w + inputs, w, w, 2], torch.nn.ReLU)
        start = torch.cat([encoder.start, decoder.start])

        def check(drawn: Episodes) -> None:
            Gaussian().check(drawn.points)
            if drawn.x_support.ndim != 3 or drawn.x_support.shape[-1] != inputs:
                raise ShapeError(f"x is {tuple(drawn.x_support.shape)}, expected (episodes, points, {inputs})")

        def loss(theta: Tensor, drawn: Episodes, generator: torch.Generator) -> Tensor:
            fitted = FittedNeuralProcess(self, encoder, decoder, theta, theta.new_empty(0))
            log_p = fitted.law(drawn).log_prob(drawn.query.y)
            return -log_p[drawn.query.mask].mean()

        theta, history = descend(
            self, start, slope_of(loss), episodes, check=check, generator=generator, seed=seed, monitor=monitor
        )
        return FittedNeuralProcess(self, encoder, decoder, theta, history)


@dataclass(frozen=True, eq=False)
class FittedNeuralProcess:
    """Trained encoder and decoder.

    Args:
        options: of the fit.
        encoder: of a point (x, y).
        decoder: of (code, x).
        theta: parameters of both.
        history: (steps,) losses per query.
    """

    options: ConditionalNeuralProcess
    encoder: Network
    decoder: Network
    theta: Tensor
    history: Tensor

    def law(self, episodes: Episodes) -> dist.Normal:
        """Of the query targets, batch shape (episodes, queries)."""
        one, two = self.theta.split([self.encoder.dim, self.decoder.dim])
        support, x = episodes.support, episodes.query.x
        codes = self.encoder(one, torch.cat([support.x, support.y[..., None]], -1)) * support.mask[..., None]
        code = codes.sum(1, keepdim=True) / support.counts[:, None, None]
        out = self.decoder(two, torch.cat([code.expand(-1, x.shape[1], -1), x], -1))
        return dist.Normal(out[..., 0], self.options.floor + torch.nn.functional.softplus(out[..., 1]))

    def predict(self, episodes: Episodes) -> Predictive:
        """At the query sets given the support sets."""
        with torch.no_grad():
            law = self.law(episodes)
            return Predictive(dist.Normal(law.loc[None], law.scale[None]))
