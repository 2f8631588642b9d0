"""Bounds on the evidence, each written in the language of `Context`.

w = p(x, z) / q(z), z ~ q; all are maximised, and per datum where guide and model share plates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl.errors import OptionError
from ppl.objectives.context import Context
from ppl.objectives.draw import logmeanexp
from ppl.objectives.sir import SIR
from ppl.objectives.stochastic import Marginal

__all__ = ["DIWHVI", "ELBO", "HVI", "IWELBO", "IWHVI", "VIMCO", "Renyi", "leave_one_out"]


@dataclass(frozen=True)
class ELBO:
    """E log w = log p(x) - KL(q || posterior)."""

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        z = ctx.sim(guide)
        return ctx.density(model, z) - z.density


@dataclass(frozen=True)
class IWELBO:
    """E log (1/K) sum_k w_k: below log p(x), closer with every particle.

    Args:
        particles: K.

    Raises:
        OptionError: there are no particles.

    Source: Burda, Grosse & Salakhutdinov (2016) [inferred].
    """

    particles: int = 5

    def __post_init__(self) -> None:
        _some(self.particles)

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        with ctx.particles(self.particles):
            z = ctx.sim(guide)
            weight = ctx.density(model, z) - z.density
        return logmeanexp(weight)


@dataclass(frozen=True)
class VIMCO:
    """IWELBO whose score terms take, for particle k, the bound with w_k replaced by the geometric mean of the others.

    Args:
        particles: K, two or more.

    Raises:
        OptionError: there are fewer than two particles.

    Source: Mnih & Rezende (2016) [inferred].
    """

    particles: int = 5

    def __post_init__(self) -> None:
        if self.particles < 2:
            raise OptionError(f"VIMCO leaves one particle out and needs two or more, got {self.particles}")

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        with ctx.particles(self.particles) as particles:
            z = ctx.sim(guide)
            weight = ctx.density(model, z) - z.density
        particles.baseline(leave_one_out(weight))
        return logmeanexp(weight)


def leave_one_out(log_weight: Tensor) -> Tensor:
    """log mean exp with each entry in turn replaced by the mean of the other logs: (K, ...) -> (K, ...).

    Example:
        >>> leave_one_out(torch.tensor([0.0, 1.0]))       # each is replaced by the other
        tensor([1., 0.])
    """
    size = len(log_weight)
    others = (log_weight.sum(0) - log_weight) / (size - 1)
    own = torch.eye(size, dtype=torch.bool, device=log_weight.device).reshape(size, size, *(1,) * (log_weight.ndim - 1))
    return logmeanexp(torch.where(own, others[None], log_weight[None]), 1)


@dataclass(frozen=True)
class Renyi:
    """E (1 / (1 - alpha)) log (1/K) sum_k w_k^(1 - alpha): the IWELBO at alpha 0, the ELBO as alpha goes to 1.

    Its gradient is that of this bound with K particles, not of its limit.

    Args:
        alpha: order, other than 1.
        particles: K.

    Raises:
        OptionError: alpha is one, or there are no particles.

    Source: Li & Turner (2016), equation 11 [inferred].
    """

    alpha: float = 0.0
    particles: int = 5

    def __post_init__(self) -> None:
        _some(self.particles)
        if self.alpha == 1 or not math.isfinite(self.alpha):
            raise OptionError(
                f"alpha must be finite and other than 1 (that is ppl.objectives.ELBO()), got {self.alpha}"
            )

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        with ctx.particles(self.particles):
            z = ctx.sim(guide)
            weight = ctx.density(model, z) - z.density
        return logmeanexp((1 - self.alpha) * weight) / (1 - self.alpha)


@dataclass(frozen=True, eq=False)
class DIWHVI:
    """IWELBO with n particles of a guide whose auxiliary sites are integrated out by m draws of a reverse model.

    E log (1/n) sum_i p(x, z_i) / [(1/m) sum_j q(z_i, u_ij) / r(u_ij | z_i)], u_i1 the one that made z_i

    Args:
        reverse: r, a Pyro program called with a dict of the kept sites and then the model's arguments; `None` takes the
            guide's own law of its auxiliary sites.
        particles: n.
        inner: m.
        keep: the guide's sites that are the model's; by default all latent sites of the model.

    Raises:
        OptionError: there are no particles.

    Source: Sobolev & Vetrov (2019) [inferred].
    """

    reverse: Any = None
    particles: int = 5
    inner: int = 5
    keep: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _some(self.particles)
        SIR(self.inner)

    def __call__(self, ctx: Context, model: Any, guide: Any) -> Tensor:
        """The objective."""
        keep = ctx.latents(model) if self.keep is None else self.keep
        return IWELBO(self.particles)(ctx, model, Marginal(guide, keep, SIR(self.inner, self.reverse)))


def IWHVI(reverse: Any = None, inner: int = 5, keep: Sequence[str] | None = None) -> DIWHVI:
    """`DIWHVI` with one particle."""
    return DIWHVI(reverse, 1, inner, keep)


def HVI(reverse: Any = None, keep: Sequence[str] | None = None) -> DIWHVI:
    """E[log p(x, z) - log q(z, u) + log r(u | z)]: `DIWHVI` with one particle and one auxiliary draw."""
    return DIWHVI(reverse, 1, 1, keep)


def _some(particles: int) -> None:
    if not isinstance(particles, int) or particles < 1:
        raise OptionError(f"a nested expectation needs samples: particles must be one or more, got {particles!r}")
