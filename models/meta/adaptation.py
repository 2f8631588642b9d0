"""New episodes: from a support set to a posterior of theta, and from there to predictions.

published:    minimise over v = N(m, V):   E_v l(theta) + KL(v || N(m_0, Sigma*)),   Sigma* the mode of q(phi)
closed form:  v = N(m_i, V_i) as in training, around P = E[Sigma^-1]
p(y | x, D) = 1/S sum_s p(y | x, theta^s),   theta^s ~ v
linearised about theta*, normal noise:   y | x, D ~ N(f(x) + J(x) (m_i - theta*), J(x) V_i J(x)' + sigma^2)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.func import jvp, vmap

from models.meta.episodes import Episodes, Points
from models.meta.fitted_meta import FittedMeta
from models.meta.local import LocalFit, LocalNormal, close
from models.meta.network import Gaussian
from models.meta.niw_math import NormalInverseGamma
from models.meta.predictive import Predictive
from ppl.errors import DataError, OptionError, ShapeError
from ppl.option_checks import check_integers, check_positive, whole_number
from ppl.vi.ascent import adam

__all__ = ["TEMPERATURES", "Adaptation", "Adapted", "ClosedForm", "Variational", "adapt", "cooled"]

DRAWS = 100
DERIVATIVES_AT_ONCE = 2**24  # numbers
TEMPERATURES = (0.0, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


class Adaptation(Protocol):
    """From the support sets of b episodes to a posterior of each theta."""

    def __call__(self, fitted: FittedMeta, points: Points, generator: torch.Generator) -> LocalNormal:
        """Posteriors of the episodes."""
        ...


@dataclass(frozen=True)
class ClosedForm:
    """The posterior of training: a quadratic fit of the support loss, completed to a square with E[Sigma^-1].

    Args:
        local: how the loss is fitted; as in training when None.
    """

    local: LocalFit | None = None

    def __call__(self, fitted: FittedMeta, points: Points, generator: torch.Generator) -> LocalNormal:
        """See `Adaptation`."""
        with torch.no_grad():
            law = fitted.law
            form = (self.local or fitted.local)(fitted.hierarchy, law, points, fitted.sigma, generator)
            return close(form, law.mean, law.precision())


@dataclass(frozen=True)
class Variational:
    """Gradient steps on a normal posterior, independent coordinates for the relaxation, from the mode of q(phi).

    Args:
        steps: of Adam; 0 keeps the mode.
        lr: its learning rate at the start, for the mean in units of theta and for the log of the spread; it falls to a
            tenth.
        draws: of v for each step.

    Raises:
        OptionError: an option is out of range.

    Source: Kim & Hospedales (2024) [read: reviews; number of steps and optimiser, inferred]
    """

    steps: int = 10
    lr: float = 0.02
    draws: int = 2

    def __post_init__(self) -> None:
        check_integers(self, steps=0, draws=1)
        check_positive(self, "lr")

    def __call__(self, fitted: FittedMeta, points: Points, generator: torch.Generator) -> LocalNormal:
        """See `Adaptation`."""
        mode, covariance = fitted.law.mode()
        diagonal = isinstance(fitted.law, NormalInverseGamma)
        b, d = len(points.x), len(mode)
        root = covariance.sqrt() if diagonal else torch.linalg.cholesky(covariance)
        raw = root.log() if diagonal else (root.tril(-1) + torch.diag(root.diagonal().log()))
        theta = torch.cat([mode.expand(b, d).reshape(-1), raw.expand(b, *raw.shape).reshape(-1)])
        first, second = torch.zeros_like(theta), torch.zeros_like(theta)

        def unpack(theta: Tensor) -> LocalNormal:
            mean, own = theta[: b * d].reshape(b, d), theta[b * d :].reshape(b, *raw.shape)
            if diagonal:
                return LocalNormal.diagonal(mean, (2 * own).exp())
            return LocalNormal.dense(mean, own.tril(-1) + torch.diag_embed(own.diagonal(dim1=-2, dim2=-1).exp()))

        for k in range(self.steps):
            with torch.enable_grad():
                at = theta.detach().requires_grad_()
                q = unpack(at)
                loss = fitted.hierarchy.losses(q.draw(self.draws, generator), points, fitted.sigma).mean(0)
                off = q.mean - mode
                if diagonal:
                    square = ((q.variance + off.square()) / covariance).sum(-1)
                else:
                    inverse = torch.cholesky_inverse(root)
                    square = (inverse * q.covariance).sum((-2, -1)) + ((off @ inverse) * off).sum(-1)
                (grad,) = torch.autograd.grad((loss + 0.5 * (square - q.log_det)).sum(), at)
            rate = self.lr * (1 - 0.9 * k / self.steps)
            theta, first, second = adam(theta, first, second, k + 1, -grad, rate)
        return unpack(theta.detach())


@dataclass(frozen=True, eq=False)
class Adapted:
    """Posteriors of theta of b episodes.

    Args:
        fitted: the hierarchy they come from.
        local: N(m_i, V_i).
    """

    fitted: FittedMeta
    local: LocalNormal

    def predict(
        self,
        x: Tensor,
        draws: int | None = None,
        generator: torch.Generator | None = None,
        linearised: bool = False,
        temperature: float = 1.0,
    ) -> Predictive:
        """The laws of targets at queries under draws of theta; targets without an axis of their own.

        Args:
            x: (b, points, *x).
            draws: S of theta. None for 100 of them, or for none where the law is known: linearised, with normal noise.
                There draws only add to its error, most where the noise is small beside what is not known of theta.
            generator: of the draws; seed 0 when None.
            linearised: take the network as linear about the point where a Gauss-Newton fit did, or about m_i after any
                other: the model that the posterior is exact for, however far its draws go.
            temperature: T; draws are of N(m_i, T V_i). 1 is Bayes' rule; 0 is the one network at m_i, whatever `draws`.
                For networks of classes see `cooled`.

        Raises:
            OptionError: no draws, or a negative temperature.
            ShapeError: x has another number of episodes.

        Source: of the linearised form, Immer, Korzepa & Bauer (2021) [inferred]; of cold posteriors, Wenzel, Roth,
        Veeling et al. (2020) [inferred].
        """
        if draws is not None:
            whole_number("draws", draws, 1)
        if len(x) != len(self.local.mean):
            raise ShapeError(f"x has {len(x)} episodes, and {len(self.local.mean)} were adapted to")
        if not 0 <= temperature < math.inf:
            raise OptionError(f"temperature must be finite and at least 0, got {temperature!r}")
        generator = generator or torch.Generator(x.device).manual_seed(0)
        network = self.fitted.hierarchy.network
        point = self.local.mean if self.local.point is None else self.local.point
        with torch.no_grad():
            if linearised and draws is None and isinstance(self.fitted.hierarchy.likelihood, Gaussian):
                return self._normal(point, x, temperature)
            theta = self.local.mean[None]
            if temperature > 0:
                theta = theta + math.sqrt(temperature) * (self.local.draw(draws or DRAWS, generator) - theta)
            if not linearised:
                return self._law(network(theta, x.expand(len(theta), *x.shape)))
            off = theta - point

            def along(at: Tensor, x: Tensor, off: Tensor) -> Tensor:
                value, change = jvp(  # type: ignore[misc]
                    lambda t: network.one(t, x), (at,), (off,)
                )
                return value + change

            over = vmap(along)
            return self._law(vmap(lambda v: over(point, x, v))(off))

    def _normal(self, point: Tensor, x: Tensor, temperature: float) -> Predictive:
        """The linearised law of targets with normal noise, without draws."""
        network, off = self.fitted.hierarchy.network, self.local.mean - point
        means, variances = [], []
        for part in x.split(max(1, DERIVATIVES_AT_ONCE // point.numel()), 1):
            rows = network.jacobian(point, part)
            means.append(network(point, part) + torch.einsum("bpkd,bd->bpk", rows, off))
            variances.append(self.local.spread(rows.flatten(1, 2)).unflatten(1, rows.shape[1:3]))
        noise = self._law(torch.cat(means, 1)[None]).law
        spread = (temperature * torch.cat(variances, 1)[None, ..., 0] + noise.variance).sqrt()
        return Predictive(dist.Normal(noise.mean, spread))

    def _law(self, outputs: Tensor) -> Predictive:
        return Predictive(self.fitted.hierarchy.likelihood.law(outputs, self.fitted.sigma))


def adapt(
    fitted: FittedMeta,
    episodes: Episodes | Points,
    how: Adaptation | None = None,
    generator: torch.Generator | None = None,
) -> Adapted:
    """Posteriors of theta from the support sets of new episodes.

    Args:
        fitted: of `NIWMeta.fit`.
        episodes: whose support sets are used, or the points themselves.
        how: `ClosedForm()` when None, or the published `Variational()`.
        generator: of inner fits; seed 0 when None.
    """
    points = episodes.support if isinstance(episodes, Episodes) else episodes
    fitted.hierarchy.check(points)
    generator = generator or torch.Generator(fitted.law.mean.device).manual_seed(0)
    return Adapted(fitted, (how or ClosedForm())(fitted, points, generator))


def cooled(
    fitted: FittedMeta,
    episodes: Episodes,
    how: Adaptation | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    draws: int | None = None,
    linearised: bool = False,
) -> float:
    """The temperature whose predictions give the queries of episodes the highest likelihood.

    A network of classes has thousands of weights that a few shots do not determine. Drawn from their prior they change
    every class probability at once, while the mode between them is a good classifier: Bayes' rule, T = 1, then knows
    too little, and how much is cold enough is best told by episodes of the kind the law was learned from.

    Args:
        fitted: of `NIWMeta.fit`.
        episodes: with query sets; such as were trained on, not those of a test.
        how: see `adapt`.
        temperatures: to choose from.
        draws: see `Adapted.predict`.
        linearised: see `Adapted.predict`.

    Raises:
        DataError: the episodes have no queries.
    """
    if not bool(episodes.query.mask.any()):
        raise DataError("a temperature is chosen by queries, and these episodes have none; split off some points")
    adapted, query = adapt(fitted, episodes, how), episodes.query

    def value(temperature: float) -> float:
        found = adapted.predict(query.x, draws, linearised=linearised, temperature=temperature)
        return float(found.log_prob(query.y)[query.mask].mean())

    return max(temperatures, key=value)
