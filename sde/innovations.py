r"""One-step predictions of a stationary Gaussian series: likelihood and sequential draws in n^2 operations.

    phi_nn = (rho_n - sum_j phi_{n-1,j} rho_{n-j}) / v_{n-1},   phi_nj = phi_{n-1,j} - phi_nn phi_{n-1,n-j},
    v_n = v_{n-1} (1 - phi_nn^2)

Source: Durbin (1960), Levinson (1947); draws: Hosking (1984) [inferred].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Innovations", "hosking", "innovations"]


class Innovations(NamedTuple):
    """What is new in every value of a series.

    Args:
        residual: (*batch, n), x_k less its prediction from x_0 .. x_{k-1}.
        variance: (*batch, n), of the residual where rho_0 stands for a variance.
    """

    residual: Tensor
    variance: Tensor

    @property
    def scale(self) -> Tensor:
        """(*batch,) the standard deviation that fits best, where rho was a correlation."""
        return (self.residual**2 / self.variance).mean(-1).sqrt()

    def log_likelihood(self, scale: Tensor | float | None = None) -> Tensor:
        """(*batch,) log N(x; 0, scale^2 R); the best scale when None."""
        s = self.scale if scale is None else torch.as_tensor(scale, dtype=self.residual.dtype)
        n = self.residual.shape[-1]
        square = (self.residual**2 / self.variance).sum(-1) / s**2
        return -0.5 * (square + self.variance.log().sum(-1) + n * (2 * torch.log(s) + math.log(2 * math.pi)))


def _predictors(autocovariance: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Coefficients of x_{k-1}, .., x_0 in the prediction of x_k, and its variance, for k = 0 .. n - 1."""
    variance = autocovariance[..., 0]
    phi = autocovariance[..., :0]
    yield phi, variance
    for k in range(1, n):
        known = (phi * autocovariance[..., 1:k].flip(-1)).sum(-1)
        reflection = (autocovariance[..., k] - known) / variance
        phi = torch.cat([phi - reflection[..., None] * phi.flip(-1), reflection[..., None]], -1)
        variance = variance * (1 - reflection**2)
        yield phi, variance


def _check(autocovariance: Tensor, n: int) -> None:
    """Refuse a covariance that has fewer lags than the series."""
    if autocovariance.shape[-1] < n:
        raise ValueError(
            f"a series of {n} values needs the autocovariance at lags 0 to {n - 1}, got {autocovariance.shape[-1]} lags"
        )


def innovations(autocovariance: Tensor, series: Tensor) -> Innovations:
    """Residuals of one-step predictions and their variances.

    Args:
        autocovariance: (*batch, n or more), rho at lags 0 to n - 1.
        series: (*batch, n).

    Returns:
        Residuals and variances, with `log_likelihood` and the best `scale`.

    Example:
        >>> found = innovations(torch.tensor([1.0, 0.5, 0.25]), torch.tensor([1.0, 0.5, 2.0]))
        >>> found.residual.tolist(), found.variance.tolist()
        ([1.0, 0.0, 1.75], [1.0, 0.75, 0.75])
    """
    n = series.shape[-1]
    _check(autocovariance, n)
    residual, variances = [], []
    for k, (phi, variance) in enumerate(_predictors(autocovariance, n)):
        residual.append(series[..., k] - (phi * series[..., :k].flip(-1)).sum(-1))
        variances.append(variance.expand_as(residual[-1]))
    return Innovations(torch.stack(residual, -1), torch.stack(variances, -1))


def hosking(autocovariance: Tensor, noise: Tensor, past: Tensor | None = None) -> Tensor:
    """A stationary Gaussian series one value at a time, after any past.

    Args:
        autocovariance: (*batch, past + n or more).
        noise: (*sample, *batch, n) standard normal.
        past: (*sample, *batch, past) values before the first; none when None.

    Returns:
        (*sample, *batch, n), given the past.

    Example:
        >>> hosking(torch.tensor([1.0, 0.5, 0.25]), torch.zeros(1), past=torch.tensor([0.0, 2.0])).tolist()
        [1.0]
    """
    start = 0 if past is None else past.shape[-1]
    n = start + noise.shape[-1]
    _check(autocovariance, n)
    series = noise[..., :0] if past is None else past.expand(*noise.shape[:-1], start)
    for k, (phi, variance) in enumerate(_predictors(autocovariance, n)):
        if k < start:
            continue
        mean = (phi * series.flip(-1)).sum(-1)
        series = torch.cat([series, (mean + variance.sqrt() * noise[..., k - start])[..., None]], -1)
    return series[..., start:]
