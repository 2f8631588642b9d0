"""Prototypical network: a class is the mean of its embedded support images, a query belongs to the nearest.

c_k = mean of f(x) over the support of class k,   p(k | x) = softmax_k( -|f(x) - c_k|^2 )
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from models.meta.descent import descend, slope_of
from models.meta.episodes import Episodes, EpisodeSource
from models.meta.network import Categorical, Network
from models.meta.predictive import Predictive
from ppl.errors import DataError
from ppl.monitor import Monitor
from ppl.option_checks import check_integers, check_positive

__all__ = ["FittedPrototypes", "Prototypical"]


@dataclass(frozen=True)
class Prototypical:
    """A peer of `NIWMeta` for classes: one embedding for all episodes, and nothing to adapt but the class means.

    Args:
        steps: of Adam.
        batch: episodes for each.
        lr: at the start; it falls as a cosine to a hundredth.

    Raises:
        OptionError: an option is out of range.

    Source: Snell, Swersky & Zemel (2017) [inferred].

    Example:
        >>> from models.meta import few_shot_digits, mlp
        >>> fitted = Prototypical(steps=3).fit(mlp([64, 32, 16]), few_shot_digits(way=3, shots=1, queries=2))
        >>> new = few_shot_digits(way=5, shots=2, queries=3)(4, torch.Generator().manual_seed(0))
        >>> fitted.predict(new).mean.shape
        torch.Size([4, 15, 5])
    """

    steps: int = 1000
    batch: int = 16
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_integers(self, steps=1, batch=1)
        check_positive(self, "lr")

    def fit(
        self,
        network: Network,
        episodes: Episodes | EpisodeSource,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
    ) -> FittedPrototypes:
        """The embedding, by the likelihood of queries given support sets.

        Args:
            network: x -> embedding; its parameters are where training begins.
            episodes: a set of them with query sets and a way, or an endless source.
            generator: source of all randomness; made from the seed when None.
            seed: see generator.
            monitor: progress, checkpoints, Ctrl-C.

        Raises:
            DataError: episodes without queries or without classes, or a class without support.
        """

        def check(drawn: Episodes) -> None:
            Categorical().check(drawn.points)
            network.check(drawn.support.x[0])

        def loss(theta: Tensor, drawn: Episodes, generator: torch.Generator) -> Tensor:
            log_p = Categorical().law(logits(network, theta, drawn)).log_prob(drawn.query.y)
            return -log_p[drawn.query.mask].mean()

        theta, history = descend(
            self, network.start, slope_of(loss), episodes, check=check, generator=generator, seed=seed, monitor=monitor
        )
        return FittedPrototypes(network, theta, history)


@dataclass(frozen=True, eq=False)
class FittedPrototypes:
    """A trained embedding.

    Args:
        network: x -> embedding.
        theta: its parameters.
        history: (steps,) losses per query.
    """

    network: Network
    theta: Tensor
    history: Tensor

    def predict(self, episodes: Episodes) -> Predictive:
        """At the query sets given the support sets."""
        with torch.no_grad():
            return Predictive(dist.Categorical(logits=logits(self.network, self.theta, episodes)[None]))


def logits(network: Network, theta: Tensor, episodes: Episodes) -> Tensor:
    """(episodes, queries, way) minus the squared distance to each prototype.

    Raises:
        DataError: the episodes have no classes, or a class has no support.
    """
    if episodes.way is None:
        raise DataError("prototypes are of classes, and these episodes have none; give them a way")
    support = episodes.support
    belongs = torch.nn.functional.one_hot(support.y.long(), episodes.way).to(theta.dtype) * support.mask[..., None]
    count = belongs.sum(1)
    if not bool((count > 0).all()):
        raise DataError("a class of an episode has no support image, and so no prototype; leave the episode out")
    centre = belongs.mT @ network.shared(theta, support.x) / count[..., None]
    z = network.shared(theta, episodes.query.x)
    return -(z[:, :, None] - centre[:, None]).square().sum(-1)
