r"""Point estimates of the Hurst index from increments on a regular grid: exact and Whittle likelihood.

Whittle: minimise log(mean_j I_j / f_j) + mean_j log f_j over the Fourier frequencies, I the periodogram and

    f(w) = 2 sin(pi H) Gamma(2H + 1) (1 - cos w) sum_j |w + 2 pi j|^(-2H - 1) / (2 pi)

Source: Whittle (1953), Beran (1994) [inferred].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde.fractional import fgn_autocovariance
from sde.toeplitz import quadratic_and_log_det

__all__ = ["HurstEstimate", "fgn_spectrum", "hurst_mle", "hurst_whittle", "whittle_log_likelihood"]

GOLDEN = (math.sqrt(5) - 1) / 2
ALIASES = 6  # terms of the sum over aliases that are added one by one; the rest by Euler and Maclaurin, to 1e-9


class HurstEstimate(NamedTuple):
    """A Hurst index, the standard deviation of an increment over time dt, and the log likelihood at both."""

    hurst: Tensor
    scale: Tensor
    log_likelihood: Tensor


def fgn_spectrum(frequency: Tensor, hurst: Tensor | float) -> Tensor:
    """Spectral density of fractional Gaussian noise of variance 1, over (-pi, pi).

    Args:
        frequency: w in (0, pi].
        hurst: in (0, 1), broadcasts against the frequencies.

    Example:
        >>> round(fgn_spectrum(torch.tensor(1.0), 0.5).item(), 4)  # white: 1 / (2 pi)
        0.1592
    """
    h = torch.as_tensor(hurst, dtype=frequency.dtype, device=frequency.device)
    power, turns = -2 * h - 1, frequency / (2 * math.pi)
    near = turns.abs() ** power
    for side in (turns, -turns):
        for j in range(1, ALIASES + 1):
            near = near + (j + side) ** power
        end = ALIASES + 1 + side
        rest = end / (2 * h) + 0.5 - power / (12 * end) + power * (power - 1) * (power - 2) / (720 * end**3)
        near = near + rest * end**power
    scale = 2 * torch.sin(math.pi * h) * torch.lgamma(2 * h + 1).exp() / (2 * math.pi)
    return scale * (1 - torch.cos(frequency)) * (2 * math.pi) ** power * near


def _periodogram(increments: Tensor) -> tuple[Tensor, Tensor]:
    """Fourier frequencies in (0, pi) and |FFT|^2 / (2 pi n) at them."""
    n = increments.shape[-1]
    count = (n - 1) // 2
    power = torch.fft.rfft(increments)[..., 1 : count + 1].abs() ** 2 / (2 * math.pi * n)
    frequency = 2 * math.pi * torch.arange(1, count + 1, dtype=increments.dtype, device=increments.device) / n
    return frequency, power


def whittle_log_likelihood(increments: Tensor, hurst: Tensor | float, scale: Tensor | float | None = None) -> Tensor:
    """- sum_j (log f_j + I_j / f_j), Whittle's approximation up to a constant; differentiable in both.

    Args:
        increments: (*batch, n).
        hurst: (*batch,) or a number.
        scale: standard deviation of an increment; the best one when None.

    Example:
        >>> x = torch.randn(256, generator=torch.Generator().manual_seed(0))
        >>> bool(whittle_log_likelihood(x, 0.5) > whittle_log_likelihood(x, 0.9))
        True
    """
    return _whittle(_periodogram(increments), hurst, scale)[1]


def _whittle(
    periodogram: tuple[Tensor, Tensor], hurst: Tensor | float, scale: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Variance of an increment, the best one where no scale is given, and Whittle's log likelihood there."""
    frequency, power = periodogram
    density = fgn_spectrum(frequency, torch.as_tensor(hurst, dtype=power.dtype)[..., None])
    ratio = power / density
    variance = ratio.mean(-1) if scale is None else torch.as_tensor(scale, dtype=power.dtype) ** 2
    terms = -(density.log() + variance[..., None].log() + ratio / variance[..., None])
    return variance, terms.sum(-1)


def _best(judged: Callable[[Tensor], tuple[Tensor, Tensor]], like: Tensor, low: float, high: float) -> HurstEstimate:
    """Golden-section search, one for every series at once, for the index whose (scale, log likelihood) has the most."""
    a, b = like.new_full(like.shape[:-1], low), like.new_full(like.shape[:-1], high)
    for _ in range(28):  # 0.618^28 = 1.4e-6 of the interval
        width = GOLDEN * (b - a)
        left, right = b - width, a + width
        better = judged(left)[1] > judged(right)[1]
        a, b = torch.where(better, a, left), torch.where(better, right, b)
    best = (a + b) / 2
    return HurstEstimate(best, *judged(best))


def _check_series(increments: Any, least: int, low: float, high: float) -> Tensor:
    """The series in a floating type; refuses those that are short, not finite or nothing but zeros."""
    increments = torch.as_tensor(increments)
    if not increments.is_floating_point():
        increments = increments.double()
    if not 0 < low < high < 1:
        raise ValueError(f"the indices looked at need 0 < low < high < 1, got low={low}, high={high}")
    if increments.ndim < 1 or increments.shape[-1] < least or not bool(increments.isfinite().all()):
        raise ValueError(
            f"expected (*batch, n) finite increments with n of at least {least}, got shape {tuple(increments.shape)}; "
            "give the differences of the path, not its values"
        )
    if bool((increments == 0).all(-1).any()):
        raise ValueError("a series of increments is zero throughout: its path does not move, and every index fits it")
    return increments


@torch.no_grad()
def hurst_mle(increments: Tensor, *, low: float = 0.01, high: float = 0.99) -> HurstEstimate:
    """Maximum of the exact Gaussian likelihood over the Hurst index and the scale.

    Args:
        increments: (*batch, n), of type I on a regular grid.
        low: smallest index looked at.
        high: largest.

    Returns:
        Hurst index, scale and log likelihood, each (*batch,).

    Example:
        >>> x = torch.randn(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> abs(hurst_mle(x).hurst.item() - 0.5) < 0.15
        True
    """
    increments = _check_series(increments, 4, low, high)
    series, n = increments.double(), increments.shape[-1]
    lags = torch.arange(n, dtype=series.dtype, device=series.device)

    def judged(hurst: Tensor) -> tuple[Tensor, Tensor]:
        square, log_det = quadratic_and_log_det(fgn_autocovariance(lags, hurst[..., None]), series)
        variance = square / n
        return variance.sqrt(), -0.5 * (n * (1 + (2 * math.pi * variance).log()) + log_det)

    found = _best(judged, series, low, high)
    return HurstEstimate(*(value.to(increments.dtype) for value in found))


@torch.no_grad()
def hurst_whittle(increments: Tensor, *, low: float = 0.01, high: float = 0.99) -> HurstEstimate:
    """Maximum of Whittle's likelihood over the Hurst index and the scale; n log n.

    Args:
        increments: (*batch, n), of type I on a regular grid.
        low: smallest index looked at.
        high: largest.

    Returns:
        Hurst index, scale and Whittle's log likelihood, each (*batch,).

    Example:
        >>> x = torch.randn(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> abs(hurst_whittle(x).hurst.item() - 0.5) < 0.15
        True
    """
    increments = _check_series(increments, 8, low, high)
    periodogram = _periodogram(increments)

    def judged(hurst: Tensor) -> tuple[Tensor, Tensor]:
        variance, value = _whittle(periodogram, hurst)
        return variance.sqrt(), value

    return _best(judged, increments, low, high)
