"""Exact stationary Gaussian series by embedding their covariance in a circulant matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["davies_harte"]


def davies_harte(autocovariance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""Two independent stationary series x = Re, Im of FFT(sqrt(lambda / 2N) (z_1 + i z_2)), first N values.

    lambda is the FFT of the circulant row (rho_0 .. rho_N, rho_{N-1} .. rho_1), so the covariance is exact wherever
    lambda is not negative; for fractional noise it never is.

    Args:
        autocovariance: (*batch, N + 1), rho at lags 0 to N.
        noise: (2, *sample, *batch, 2 N) standard normal.

    Returns:
        Two series, each (*sample, *batch, N).

    Raises:
        ValueError: a covariance whose embedding is not positive, or noise of another length.

    Source: Davies and Harte (1987), Wood and Chan (1994) [inferred]; the row without a zero at lag N [derived].

    Example:
        >>> one, other = davies_harte(torch.tensor([1.0, 0.0, 0.0]), torch.randn(2, 5, 4))
        >>> one.shape, other.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """
    n = autocovariance.shape[-1] - 1
    if n < 1 or noise.shape[0] != 2 or noise.shape[-1] != 2 * n:
        raise ValueError(
            "expected rho at lags 0 to N with N of at least 1 and noise (2, ..., 2 N), got shapes "
            f"{tuple(autocovariance.shape)} and {tuple(noise.shape)}"
        )
    row = torch.cat([autocovariance, autocovariance[..., 1:-1].flip(-1)], -1)
    power = torch.fft.fft(row).real
    least = power.min()
    if bool(least < -1e-6 * power.abs().max()):
        raise ValueError(
            f"the circulant embedding has a negative eigenvalue ({float(least):.3g}), so these lags cannot be drawn "
            "this way; give more lags, or use a Cholesky factor"
        )
    spectrum = (power.clamp_min(0) / (2 * n)).sqrt() * torch.complex(noise[0], noise[1])
    series = torch.fft.fft(spectrum)[..., :n]
    return series.real, series.imag
