"""Days of the S&P 500 and the VIX, and the roughness of a log volatility by the moments of its increments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppl.errors import OptionError

__all__ = ["DAY", "Market", "StructureFunction", "market", "structure_function"]

DAY = 1 / 252  # of a year


class Market(NamedTuple):
    """Days of the S&P 500: dates, log returns, log volatility from the day's range, and log VIX where it was asked for.

    Both measures of volatility are logs of yearly standard deviations, (days,) float64.
    """

    dates: npt.NDArray[np.datetime64]
    returns: Tensor
    log_range: Tensor
    log_vix: Tensor | None


def market(first: str = "2007-01-03", last: str = "2009-12-31", *, vix: bool = False) -> Market:
    r"""The S&P 500 from 1999 to 2018, and the VIX from 2014 on, as the package `arch` brings them.

    The range gives Parkinson's estimate, log(high / low)^2 / (4 log 2) a day.

    Args:
        first: day, as 2007-01-03.
        last: day, included.
        vix: add the VIX; days without one are left out.

    Raises:
        ImportError: without `arch`, which is the extra `finance`.
        OptionError: no or few days, or no VIX for them.

    Source: Parkinson (1980) [inferred].

    Example:
        >>> days = market("2008-09-01", "2008-12-31")
        >>> len(days.returns), days.dates[0], bool(days.returns.std() > 0.03)
        (85, np.datetime64('2008-09-02'), True)
    """
    try:
        from arch.data import sp500
        from arch.data import vix as vix_data
    except ImportError as missing:
        raise ImportError(
            "market data come with the package arch, which is not installed: pip install 'pilotlight[finance]'"
        ) from missing
    table = sp500.load()
    table["return"] = np.log(table["Adj Close"]).diff()
    if vix:
        table = table.join(vix_data.load(), how="inner")
    table = table.loc[first:last].dropna()
    if len(table) < 2:
        have = "2014-01-03 to 2018-12-31" if vix else "1999-01-05 to 2018-12-31"
        raise OptionError(f"there are {len(table)} days from {first} to {last}; the data go from {have}")
    spread = np.log(table["High"].to_numpy() / table["Low"].to_numpy()) ** 2 / (4 * math.log(2) * DAY)
    return Market(
        table.index.to_numpy().astype("datetime64[D]"),
        torch.from_numpy(table["return"].to_numpy(dtype=np.float64).copy()),
        torch.from_numpy(0.5 * np.log(spread)),
        torch.from_numpy(np.log(table["vix"].to_numpy(dtype=np.float64) / 100)) if vix else None,
    )


@dataclass(frozen=True)
class StructureFunction:
    """E|v(t + lag) - v(t)|^q over lags, and the Hurst index that its slopes give.

    Args:
        lags: in days.
        orders: q.
        moments: (order, lag).
        slopes: of log moments over log lags, (order,): q H where the process is self-similar.
        hurst: slope of the slopes over q, through 0.
        stderr: of `hurst`, from leaving out blocks of the record.
    """

    lags: Tensor
    orders: Tensor
    moments: Tensor
    slopes: Tensor
    hurst: float
    stderr: float


def structure_function(
    log_volatility: Tensor,
    lags: Sequence[int] = (1, 2, 3, 5, 8, 13, 21),
    orders: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 3.0),
    blocks: int = 10,
) -> StructureFunction:
    """The estimate of roughness by moments of increments, for a log volatility that is seen without error.

    Noise in the series flattens it and pulls the estimate to 0; smoothing, as in the VIX, which looks a month ahead,
    pulls it up. The standard error is a jackknife over blocks of days.

    Args:
        log_volatility: (days,).
        lags: in days.
        orders: q.
        blocks: of the jackknife.

    Raises:
        OptionError: a record shorter than twice the longest lag in a block of the jackknife.

    Source: Gatheral, Jaisson & Rosenbaum (2018) [inferred].

    Example:
        >>> walk = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
        >>> found = structure_function(walk)
        >>> bool(abs(found.hurst - 0.5) < 4 * found.stderr), bool(found.stderr < 0.05)
        (True, True)
    """
    days = len(log_volatility)
    if blocks < 2 or days < blocks * 2 or days < 4 * max(lags):
        raise OptionError(
            f"{days} days are few for lags up to {max(lags)} and {blocks} blocks; give four times the lag"
        )
    tau, q = torch.tensor(lags, dtype=torch.float64), torch.tensor(orders, dtype=torch.float64)
    block = torch.arange(days) * blocks // days

    def moments(keep: Tensor) -> Tensor:
        found = []
        for lag in lags:
            moved = (log_volatility[lag:] - log_volatility[:-lag]).abs().double()[keep[lag:] & keep[:-lag]]
            found.append((moved[:, None] ** q).mean(0))
        return torch.stack(found, 1)

    def slopes(of: Tensor) -> Tensor:
        x = tau.log() - tau.log().mean()
        return (of.log() * x).sum(1) / (x * x).sum()

    whole = moments(torch.ones(days, dtype=torch.bool))
    left_out = torch.stack([(slopes(moments(block != b)) * q).sum() / (q * q).sum() for b in range(blocks)])
    error = ((blocks - 1) / blocks * (left_out - left_out.mean()).square().sum()).sqrt()
    slope = slopes(whole)
    return StructureFunction(tau, q, whole, slope, float((slope * q).sum() / (q * q).sum()), float(error))
