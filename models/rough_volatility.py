r"""Rough volatility of a market: daily log volatility is a fractional Ornstein-Uhlenbeck process, seen through returns.

    dv = rate (level - v) dt + scale dB^H,   r_i = drift / 252 + e^(v(t_i)) sqrt(1 / 252) eps_i,   eps_i ~ t(tails)

and, where there is one, through a second measure of volatility, proxy_i = offset + v(t_i) + N(0, error^2): the log of
the VIX, or of the day's range. Time is in years of 252 days, volatility per year. H < 1/2 is rough; Gatheral, Jaisson
and Rosenbaum found about 0.1 in volatilities from within days, by structure functions. Here H has a posterior.

The noise of v is refitted to the daily grid (`sde.refitted_noise`), so that the law of its increments is that of
fractional Brownian motion of type II for every H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.market import DAY
from ppl.errors import OptionError
from ppl.posterior import Posterior
from ppl.program import Program
from sde import MeanRevertingPath, fbm_covariance, refitted_noise
from sde.mean_reversion import linear_scan, slow_waves

__all__ = [
    "Check",
    "Record",
    "RoughVolatility",
    "posterior_predictive_check",
]

MONTH = 21 * DAY
ZERO = torch.zeros((), dtype=torch.float64)
HURST = dist.Uniform(ZERO + 0.02, ZERO + 0.98)
LEVEL = dist.Normal(ZERO - 1.8, 0.5)
RATE = dist.LogNormal(ZERO + 1.0, 1.0)
SWING = dist.LogNormal(ZERO - 1.2, 0.7)
TAILS = dist.LogNormal(ZERO + 2.3, 0.5)
DRIFT = dist.Normal(ZERO, 0.2)
OFFSET = dist.Normal(ZERO, 0.3)
ERROR = dist.LogNormal(ZERO - 1.5, 0.7)

Prior = dist.TorchDistribution | float


class Record(NamedTuple):
    """A simulated record: returns and proxy, and the log volatility that made them; (days,) each."""

    returns: Tensor
    proxy: Tensor
    log_volatility: Tensor


@dataclass(frozen=True)
class RoughVolatility:
    r"""Priors of the parameters, which are sites of their names; a number in place of a distribution fixes one.

    Args:
        hurst: H.
        level: to which log volatility returns, of a yearly volatility.
        rate: of that return, per year.
        swing: sd of the noise of log volatility over a month, scale (21 / 252)^H: the data speak of it, and of H,
            nearly apart, as they do not of the scale.
        tails: degrees of freedom of a return less two; infinity makes it normal. Its variance is e^2v / 252 for any.
        drift: mean return per year.
        offset: of the proxy from log volatility.
        error: of the proxy, its standard deviation.
        factors: of the Markov approximation.

    Raises:
        OptionError: a number out of range.

    Example:
        >>> model = RoughVolatility()
        >>> model.program(torch.linspace(-0.02, 0.02, 10))
        Program(rough_volatility, latents=['hurst', 'level', 'rate', 'swing', 'tails', 'drift', 'initial', 'v'],
            observed=['returns'])
    """

    hurst: Prior = HURST
    level: Prior = LEVEL
    rate: Prior = RATE
    swing: Prior = SWING
    tails: Prior = TAILS
    drift: Prior = DRIFT
    offset: Prior = OFFSET
    error: Prior = ERROR
    factors: int = 8

    def __post_init__(self) -> None:
        for name in ("rate", "swing", "error", "tails"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise OptionError(f"{name} must be positive, got {value}")
        if isinstance(self.hurst, int | float) and not 0.01 < self.hurst < 0.99:
            raise OptionError(f"hurst must lie in (0.01, 0.99), got {self.hurst}")

    def path(
        self,
        days: int,
        *,
        hurst: Tensor,
        level: Tensor,
        rate: Tensor,
        swing: Tensor,
        initial: Tensor,
    ) -> MeanRevertingPath:
        """Log volatility at the close of each day, from `initial` before the first."""
        times = DAY * np.arange(1, days + 1)
        noise = refitted_noise(hurst, DAY, days, self.factors)
        scale = swing * (-math.log(MONTH) * hurst).exp()
        waves = slow_waves(days)  # the data see slow ones well and fast ones hardly: each gets a scale of its own
        return MeanRevertingPath(rate, level, scale, noise, torch.from_numpy(times), initial.reshape(1), basis=waves)

    def program(self, returns: Tensor, proxy: Tensor | None = None) -> Program:
        """The model of a record.

        Args:
            returns: (days,) daily log returns.
            proxy: (days,) a log volatility that was measured, or None.

        Raises:
            OptionError: records of unequal length, fewer than two days, or values that are not finite.
        """
        days = len(returns)
        for name, series in (("returns", returns), ("proxy", proxy)):
            if series is None:
                continue
            if series.shape != (days,) or days < 2:
                raise OptionError(f"{name} must be ({days},), two days or more, got shape {tuple(series.shape)}")
            if not bool(series.isfinite().all()):
                raise OptionError(f"{name} must be finite; day {int((~series.isfinite()).nonzero()[0])} is not")

        def rough_volatility(returns: Tensor, proxy: Tensor | None = None) -> None:
            names = ("hurst", "level", "rate", "swing", "tails", "drift")
            value = {name: self._parameter(name) for name in names}
            tails, drift = value.pop("tails"), value.pop("drift")
            initial = pyro.sample("initial", dist.Normal(value["level"], 1.0))
            v = pyro.sample("v", self.path(days, initial=initial, **value))[:, 0]
            if proxy is not None:
                seen = dist.Normal(v + self._parameter("offset"), self._parameter("error"))
                pyro.sample("proxy", seen.to_event(1), obs=proxy)
            law = self._returns(v, tails, drift)
            pyro.sample("returns", law.to_event(1), obs=returns)

        arguments = [returns.double()] if proxy is None else [returns.double(), proxy.double()]
        # The graph takes milliseconds as it is; the compiler takes minutes over recurrences in H and transforms.
        return Program(rough_volatility, *arguments, compile="never")

    def _returns(self, v: Tensor, tails: Tensor, drift: Tensor) -> dist.TorchDistribution:
        """Law of the returns given log volatility."""
        scale = v.exp() * math.sqrt(DAY)
        if self.tails == math.inf:
            return dist.Normal(drift * DAY, scale)
        return dist.StudentT(2 + tails, drift * DAY, scale * (tails / (2 + tails)).sqrt())  # of variance scale^2

    def _parameter(self, name: str) -> Tensor:
        """A site, or the number that is fixed."""
        prior = getattr(self, name)
        return ZERO + prior if isinstance(prior, int | float) else pyro.sample(name, prior).double()

    def simulate(
        self,
        days: int,
        generator: torch.Generator,
        *,
        hurst: float,
        level: float = -1.8,
        rate: float = 3.0,
        swing: float = 0.3,
        tails: float = 10.0,
        error: float = 0.2,
    ) -> Record:
        """A record of the model with exact fractional noise (a Cholesky factor), from its level, without drift.

        Args:
            days: how many.
            generator: source of randomness.
            hurst: H, as the others of the model's parameters: `level`, `rate`, `swing`, `tails`, `error`.

        Example:
            >>> record = RoughVolatility().simulate(50, torch.Generator().manual_seed(0), hurst=0.1)
            >>> record.returns.shape, bool(record.log_volatility.std() > 0.05)
            (torch.Size([50]), True)
        """
        eps, nu, measured = torch.randn(3, days, generator=generator, dtype=torch.float64)
        times = DAY * torch.arange(1, days + 1, dtype=torch.float64)
        b = torch.linalg.cholesky(fbm_covariance(times[:, None], times, hurst, "II")) @ eps
        noise = swing * MONTH**-hurst * b.diff(prepend=b.new_zeros(1))
        v = level + linear_scan(torch.full_like(noise, 1 - rate * DAY), noise)
        chi = torch._standard_gamma(torch.full_like(v, 1 + tails / 2), generator=generator) / (1 + tails / 2)
        returns = v.exp() * math.sqrt(DAY * tails / (2 + tails)) * nu / chi.sqrt()
        return Record(returns, v + error * measured, v)


# What the returns say about it ----------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A statistic of the returns and its law under the posterior.

    `above` is the share of replications above what was observed: near 0 or 1, the model does not make such returns.
    """

    observed: float
    low: float
    median: float
    high: float
    above: float


def posterior_predictive_check(
    program: Program, posterior: Posterior, generator: torch.Generator, lags: Sequence[int] = (1, 5, 21)
) -> dict[str, Check]:
    """Kurtosis of returns and autocorrelation of their squares, observed and replicated, with 90 % intervals.

    Every draw of the posterior makes a record of returns from its own path of volatility.

    Args:
        program: of `RoughVolatility`.
        posterior: of it.
        generator: source of randomness.
        lags: of the autocorrelation, in days.

    Returns:
        By name: "kurtosis", and "acf 1" and so on.
    """
    replicated = _statistics(program.predict(posterior, generator)["returns"].flatten(0, 1), lags)
    observed = _statistics(program.data["returns"][None], lags)
    found = {}
    for name, values in replicated.items():
        low, median, high = values.quantile(values.new_tensor([0.05, 0.5, 0.95])).tolist()
        seen = float(observed[name])
        found[name] = Check(seen, low, median, high, float((values > seen).double().mean()))
    return found


def _statistics(returns: Tensor, lags: Sequence[int]) -> dict[str, Tensor]:
    """Of each row of (draws, days)."""
    centred = returns - returns.mean(-1, keepdim=True)
    square = centred.square()
    variance = square.mean(-1)
    found: dict[str, Any] = {"kurtosis": square.square().mean(-1) / variance**2}
    moved = square - variance[:, None]
    for lag in lags:
        found[f"acf {lag}"] = (moved[:, lag:] * moved[:, :-lag]).sum(-1) / moved.square().sum(-1)
    return found
