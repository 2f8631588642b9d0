"""Pyro guides of a `Hierarchy`, for `ppl.SVI(guide=...)`: empirical Bayes, and an amortised posterior.

empirical Bayes:   q = delta(mu) delta(Sigma) prod_i N(theta_i; a_i, diag b_i^2)
amortised:         q = q(mu) q(Sigma) prod_i N(theta_i; a(D_i), diag b(D_i)^2),   a, b: a network that reads points
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models.meta.episodes import Points
from models.meta.network import mlp
from models.meta.niw_math import NormalInverseGamma
from models.meta.program import Hierarchy
from ppl.errors import OptionError

__all__ = ["amortised_guide", "empirical_bayes_guide"]

Guide = Callable[[Tensor, Tensor, Tensor], None]
POSITIVE = dist.constraints.positive


def _relaxed(hierarchy: Hierarchy) -> NormalInverseGamma:
    """The prior of a centred hierarchy with independent coordinates."""
    if not isinstance(hierarchy.prior, NormalInverseGamma) or not hierarchy.centred:
        raise OptionError("this guide takes a centred hierarchy with a NormalInverseGamma prior")
    return hierarchy.prior


def _size(hierarchy: Hierarchy, episodes: int) -> int | None:
    return None if hierarchy.batch is None or hierarchy.batch >= episodes else hierarchy.batch


def empirical_bayes_guide(hierarchy: Hierarchy, width: float = 0.1) -> Guide:
    """Point values of mu and Sigma, and independent normal coordinates of every theta.

    Args:
        hierarchy: a centred one, with a NormalInverseGamma prior.
        width: standard deviation of theta at the start.

    Raises:
        OptionError: the hierarchy is another.
    """
    prior = _relaxed(hierarchy)

    def guide(x: Tensor, y: Tensor, mask: Tensor) -> None:
        start = prior.mean.expand(len(x), -1).clone()
        precision = pyro.param("precision_point", prior.precision().clone(), constraint=POSITIVE)
        mu = pyro.param("mu_point", prior.mean.clone())
        mean = pyro.param("theta_mean", start)
        spread = pyro.param("theta_sd", torch.full_like(start, width), constraint=POSITIVE)
        pyro.sample("precision", dist.Delta(precision, event_dim=1))
        pyro.sample("mu", dist.Delta(mu, event_dim=1))
        with pyro.plate("episodes", len(x), subsample_size=_size(hierarchy, len(x))) as index:
            pyro.sample("theta", dist.Normal(mean[index], spread[index]).to_event(1))

    return guide


def amortised_guide(hierarchy: Hierarchy, points: Points, hidden: int = 32) -> Guide:
    """A network that reads the points of an episode and gives the posterior of its theta; mu and Sigma stay mean-field.

    Points are embedded one by one and averaged, so that their order does not matter and padded ones do not count.

    Args:
        hierarchy: a centred one, with a NormalInverseGamma prior.
        points: of any episodes; for shapes.
        hidden: width of the network.

    Raises:
        OptionError: the hierarchy is another.
    """
    prior = _relaxed(hierarchy)
    d = prior.dim
    features = points.x[0, 0].numel() + points.y[0, 0].numel()
    embed, head = mlp([features, hidden, hidden]), mlp([hidden + 1, hidden, 2 * d], nn.Tanh)

    def guide(x: Tensor, y: Tensor, mask: Tensor) -> None:
        variance = prior.scale / prior.df
        rate = pyro.param("precision_log_mean", -variance.log())
        rate_sd = pyro.param("precision_log_sd", torch.full_like(variance, 0.3), constraint=POSITIVE)
        pyro.sample("precision", dist.LogNormal(rate, rate_sd).to_event(1))
        mu = pyro.param("mu_mean", prior.mean.clone())
        mu_sd = pyro.param("mu_sd", 0.3 * variance.sqrt(), constraint=POSITIVE)
        pyro.sample("mu", dist.Normal(mu, mu_sd).to_event(1))
        first = pyro.param("encoder_points", embed.start.to(prior.mean))
        second = pyro.param("encoder_sets", 0.3 * head.start.to(prior.mean))
        with pyro.plate("episodes", len(x), subsample_size=_size(hierarchy, len(x))) as index:
            shown = mask[index]
            seen = torch.cat([v[index].to(first).reshape(*shown.shape, -1) for v in (x, y)], -1)
            count = shown.sum(1, keepdim=True).to(first)
            read = embed.one(first, seen.flatten(0, 1)).unflatten(0, seen.shape[:2]) * shown[..., None]
            together = torch.cat([read.sum(1) / count, count.log()], -1)
            shift, log_sd = head.one(second, together).split(d, -1)
            spread = variance.sqrt()
            pyro.sample("theta", dist.Normal(mu + spread * shift, 0.5 * spread * log_sd.exp()).to_event(1))

    return guide
