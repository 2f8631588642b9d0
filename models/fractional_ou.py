r"""The fractional Ornstein-Uhlenbeck process: a program with its path as a site, and its exact law.

    dX = rate (mean - X) dt + scale dB^H,   y_i = X(t_i) + N(0, noise^2)

B^H is unit fractional Brownian motion of type I. Its path in the program is the Markov approximation; `marginal` is the
same model with the path integrated out exactly, whose posterior the program is judged by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl.errors import OptionError
from ppl.program import Program
from sde import MarkovNoise, MeanRevertingPath
from sde.fractional import check_hurst
from sde.incomplete_gamma import Array, constant
from sde.prior import can_look

__all__ = ["FractionalOU", "fou_covariance", "fou_stationary_covariance", "fou_stationary_spectrum"]

Prior = dist.TorchDistribution | float
POINTS = 64  # of the quadrature
FAR = 45.0  # e^-FAR is nothing
PARAMETERS = ("rate", "mean", "scale", "hurst")
ZERO = torch.zeros((), dtype=torch.float64)
STANDARD, POSITIVE = dist.Normal(ZERO, 1.0), dist.LogNormal(ZERO, 1.0)
ANY_INDEX = dist.Uniform(ZERO + 0.02, ZERO + 0.98)


# The exact law -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _nodes() -> tuple[Array, Array, Array]:
    """Places in (0, 1), their distance to 1, and weights: Gauss-Legendre, graded at both ends, where powers are."""
    x, weight = np.polynomial.legendre.leggauss(POINTS)
    y, z = (1 + x) / 2, (1 - x) / 2

    def graded(u: Array) -> Array:
        return u**4 * (35 - 84 * u + 70 * u**2 - 20 * u**3)

    return graded(y), graded(z), weight / 2 * 140 * (y * z) ** 3


def _forward(length: Tensor, gap: Tensor, rate: Tensor, power: Tensor) -> Tensor:
    """int_0^length e^(-rate x) (gap + x)^power dx."""
    length, gap, rate, power = torch.broadcast_tensors(length, gap, rate, power)
    place, _, weight = (constant(part, length) for part in _nodes())
    reach = torch.minimum(length, FAR / rate.detach())[..., None]
    x = reach * place
    return (reach * weight * (-rate[..., None] * x).exp() * (gap[..., None] + x) ** power[..., None]).sum(-1)


def _backward(length: Tensor, rate: Tensor, power: Tensor) -> Tensor:
    """int_0^length e^(-rate (length - x)) x^power dx."""
    length, rate, power = torch.broadcast_tensors(length, rate, power)
    place, left, weight = (constant(part, length) for part in _nodes())
    reach = torch.minimum(length, FAR / rate.detach())[..., None]
    x = (length[..., None] - reach) + reach * left
    return (reach * weight * (-rate[..., None] * reach * place).exp() * x ** power[..., None]).sum(-1)


def fou_covariance(
    s: Tensor, t: Tensor, rate: Tensor | float, hurst: Tensor | float, scale: Tensor | float = 1.0
) -> Tensor:
    r"""Cov(X(s), X(t)) of dX = -rate X dt + scale dB^H, X(0) = 0, for every H, differentiable in all but the times.

    X(t) = B(t) - rate int_0^t e^(-rate (t - v)) B(v) dv; the double integral over the covariance of B comes down to
    single ones: with p = 2H, d = t - s >= 0, A(t) = int_0^t e^(-rate (t - x)) x^p dx,

        2 C = e^(-rate t) s^p + e^(-rate s) t^p - d^p + rate/2 (e^(-rate d) G(s) + A(d) + Q(s, d)
              - e^(-rate s) A(t) - e^(-rate t) A(s)),   Q(s, d) = int_0^s e^(-rate x) (d + x)^p dx,   G(s) = Q(s, 0)

    Args:
        s: times of at least 0, any shape that broadcasts with t.
        t: likewise.
        rate: positive; broadcasts with the times, as the others do.
        hurst: in (0, 1).
        scale: of the noise.

    Returns:
        The covariance in float64, of the broadcast shape.

    Raises:
        ValueError: a Hurst index outside (0, 1), or a rate that is not positive.

    Source: the double integral [read]; single ones [derived].

    Example:
        >>> one = torch.tensor(1.0)
        >>> [round(fou_covariance(one, one, 1.0, h).item(), 4) for h in (0.2, 0.5, 0.9)]
        [0.4849, 0.4323, 0.4037]
    """
    theta, p, scale = _checked(rate, hurst, scale)
    s, t = s.double(), t.double()
    gap = (t - s).abs()
    fade_s, fade_t, fade = (-theta * s).exp(), (-theta * t).exp(), (-theta * gap).exp()
    until_s, until_t = _backward(s, theta, p), _backward(t, theta, p)
    shared = torch.minimum(_forward(s, 0 * s, theta, p), _forward(t, 0 * t, theta, p))  # G of the earlier time
    double = fade * shared + _backward(gap, theta, p) + _forward(torch.minimum(s, t), gap, theta, p)
    double = double - fade_s * until_t - fade_t * until_s
    return scale**2 / 2 * (fade_t * s**p + fade_s * t**p - gap**p + theta / 2 * double)


def fou_stationary_covariance(
    lag: Tensor, rate: Tensor | float, hurst: Tensor | float, scale: Tensor | float = 1.0
) -> Tensor:
    r"""Cov(X(t), X(t + lag)) of the process that has run for ever; Gamma(2H + 1) / (2 rate^2H) at lag 0.

    Args:
        lag: of at least 0, any shape.
        rate: positive.
        hurst: in (0, 1).
        scale: of the noise.

    Returns:
        The covariance in float64; it cancels where rate times lag is in the thousands.

    Source: `fou_covariance` for late times [derived].

    Example:
        >>> fou_stationary_covariance(torch.tensor([0.0, 1.0]), 2.0, 0.5)         # e^(-2 lag) / 4
        tensor([0.2500, 0.0338], dtype=torch.float64)
    """
    theta, p, scale = _checked(rate, hurst, scale)
    lag = lag.double()
    gamma = torch.lgamma(p + 1).exp() * theta ** (-p - 1)
    whole = _forward(FAR / theta, lag, theta, p) + _backward(lag, theta, p) + (-theta * lag).exp() * gamma
    return scale**2 / 2 * (theta / 2 * whole - lag**p)


def fou_stationary_spectrum(
    frequency: Tensor, rate: Tensor | float, hurst: Tensor | float, scale: Tensor | float = 1.0
) -> Tensor:
    r"""Gamma(2H + 1) sin(pi H) / (2 pi) |w|^(1 - 2H) / (rate^2 + w^2), whose integral over all w is the variance.

    Example:
        >>> w = torch.linspace(-4e3, 4e3, 2_000_001, dtype=torch.float64)
        >>> round(torch.trapezoid(fou_stationary_spectrum(w, 2.0, 0.5), w).item(), 3)
        0.25
    """
    theta, p, scale = _checked(rate, hurst, scale)
    level = scale**2 * torch.lgamma(p + 1).exp() * torch.sin(math.pi * p / 2) / (2 * math.pi)
    return level * frequency.double().abs() ** (1 - p) / (theta**2 + frequency.double() ** 2)


def _checked(rate: Tensor | float, hurst: Tensor | float, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Rate, 2H and scale in float64."""
    check_hurst(hurst)
    theta = torch.as_tensor(rate, dtype=torch.float64)
    if can_look(theta) and not bool((theta > 0).all()):
        raise ValueError(f"the rate must be positive, got {rate}")
    return theta, 2 * torch.as_tensor(hurst, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64)


# The model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FractionalOU:
    r"""dX = rate (mean - X) dt + scale dB^H from X(-past) = mean or `initial`, seen at irregular times.

    Every parameter is a distribution (in float64), which makes it a latent site of its name, or a number.

    Args:
        rate: of the pull to the mean, per unit of time.
        mean: to which it pulls.
        scale: of the noise.
        hurst: H.
        noise: standard deviation of an observation; 0 sees the process itself, which `marginal` takes.
        initial: X at the start; None is the mean.
        past: how long the process has run before time 0; many times 1 / rate make it stationary.
        dt: longest step of the path; None steps from time to time. Rough paths (H < 1/2) want several steps between
            times: factors that forget within a step lose variance.
        factors: of the Markov approximation, type I.

    Raises:
        OptionError: an option is out of range.

    Example:
        >>> model = FractionalOU(rate=1.0, mean=0.0, scale=1.0)
        >>> times = torch.tensor([0.1, 0.5, 0.6])
        >>> model.program(times, torch.zeros(3))
        Program(fractional_ou, latents=['hurst', 'x'], observed=['y'])
        >>> model.marginal(times, torch.zeros(3))
        Program(fractional_ou, latents=['hurst'], observed=['y'])
    """

    rate: Prior = POSITIVE
    mean: Prior = STANDARD
    scale: Prior = POSITIVE
    hurst: Prior = ANY_INDEX
    noise: Prior = 0.1
    initial: Prior | None = None
    past: float = 0.0
    dt: float | None = None
    factors: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.noise, int | float) and not self.noise >= 0:
            raise OptionError(f"noise must be zero or more, the standard deviation of an observation, got {self.noise}")
        for name in ("rate", "scale"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise OptionError(f"{name} must be positive, got {value}")
        if isinstance(self.hurst, int | float):
            check_hurst(self.hurst)
        if not (math.isfinite(self.past) and self.past >= 0):
            raise OptionError(f"past must be zero or more, the time before time 0, got {self.past}")

    def path(
        self, at: Tensor, rate: Tensor, mean: Tensor, scale: Tensor, hurst: Tensor, initial: Tensor | None = None
    ) -> MeanRevertingPath:
        """The process as the program has it, at times (n,) counted from its start, `past` before time 0."""
        noise = MarkovNoise(hurst, float(at.numpy()[-1]), "I", self.factors, grid="wide", max_error=1.0)
        start = mean if initial is None else initial
        return MeanRevertingPath(rate, mean, scale, noise, at, start.reshape(1), dt=self.dt)

    def program(self, times: Tensor, y: Tensor) -> Program:
        """The model with its path as the site "x", for every engine that runs on one.

        Args:
            times: (n,) ascending, after 0.
            y: (n,) observations.

        Raises:
            OptionError: observations without noise.
        """
        if isinstance(self.noise, int | float) and self.noise == 0:
            raise OptionError(
                "observations without noise leave no path to infer; take model.marginal(times, y), whose law is exact"
            )

        at = times.double() + self.past

        def fractional_ou(y: Tensor) -> None:
            value = self._parameters()
            noise = value.pop("noise")
            x = pyro.sample("x", self.path(at, **value))
            pyro.sample("y", dist.Normal(x[:, 0], noise).to_event(1), obs=y)

        return Program(fractional_ou, y.double())

    def marginal(self, times: Tensor, y: Tensor) -> Program:
        """The model with its path integrated out: exact for the continuous process, n^3 operations.

        Args:
            times: (n,) ascending, after 0.
            y: (n,) observations.
        """
        at = times.double() + self.past

        def fractional_ou(y: Tensor) -> None:
            mean, covariance = self.law(at, **self._parameters())
            pyro.sample("y", dist.MultivariateNormal(mean, covariance), obs=y)

        return Program(fractional_ou, y.double())

    def law(
        self,
        at: Tensor,
        rate: Tensor,
        mean: Tensor,
        scale: Tensor,
        hurst: Tensor,
        noise: Tensor | float = 0.0,
        initial: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean (n,) and covariance (n, n) of observations at times from the start, exactly."""
        covariance = fou_covariance(at[:, None], at, rate, hurst, scale)
        jitter = 1e-10 * covariance.diagonal().mean()
        start = mean if initial is None else initial
        center = mean + (start - mean) * (-rate * at).exp()
        return center, covariance + (noise**2 + jitter) * torch.eye(len(at), dtype=torch.float64, device=at.device)

    def covariance_error(self, times: Tensor, rate: float, hurst: float) -> float:
        """|C - C_exact| / |C_exact| in Frobenius norm: how far the program's path is from the process.

        Example:
            >>> model = FractionalOU(dt=0.02)
            >>> bool(model.covariance_error(torch.linspace(0.1, 2, 10), rate=1.0, hurst=0.7) < 0.03)
            True
        """
        theta, h, at = ZERO + rate, ZERO + hurst, times.double() + self.past
        path = self.path(at, theta, ZERO, ZERO + 1, h)
        found = path.gaussian().covariances[0].reshape(len(times), len(times))
        exact = fou_covariance(at[:, None], at, theta, h)
        return float((found - exact).norm() / exact.norm())

    def _parameters(self) -> dict[str, Any]:
        """Sites, and numbers as tensors, by name."""
        found: dict[str, Any] = {}
        for name in (*PARAMETERS, "noise", "initial"):
            prior = getattr(self, name)
            if prior is not None:
                fixed = isinstance(prior, int | float)
                found[name] = torch.tensor(prior, dtype=torch.float64) if fixed else pyro.sample(name, prior).double()
        return found
