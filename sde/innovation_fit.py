r"""Weights of Ornstein-Uhlenbeck factors on a regular grid by what the innovations of fractional Gaussian noise see.

The factors answer a unit of noise, m steps later, with an increment kappa_m = sum_k w_k b_km, b_k0 = g_k and
b_km = -g_k (1 - l_k) l_k^(m-1), where Y_k+ = l_k Y_k + g_k eps. Increments of fractional Brownian motion of type I have
a response of their own, psi, with |psi(e^iw)|^2 = 2 pi f(w). The weights minimise

    sum_m (kappa / psi - 1)_m^2 / (1 + m / n),   over m < 4 n, the quotient one of power series:

to second order the divergence between the two laws, for an increment. The process has a past before the record, which
is why responses count that are longer than it.

With d = H - 1/2 and f(w) = |2 sin(w / 2)|^(-2d) f*(w), the inverse 1 / psi is the binomial series of (1 - z)^d times
exp(-c(z)), c the half of the cepstrum of f* that looks back [derived].
"""

from __future__ import annotations

import math

import numpy as np
import torch

from sde.hurst import fgn_spectrum
from sde.incomplete_gamma import Array

__all__ = ["innovation_weights", "whitener"]

LENGTH = 4  # of the responses that are fitted, in records


def innovation_weights(hurst: Array, decay: Array, gain: Array, steps: int, ridge: float = 1e-12) -> Array:
    """Weights for which factors have the law of fractional Gaussian noise of variance 1, as nearly as they can.

    Args:
        hurst: (indices,).
        decay: (factors,) l, over a step.
        gain: (factors,) g, over a step, for a standard normal number.
        steps: n, of the record.
        ridge: added to the scaled normal equations.

    Returns:
        (indices, factors).

    Example:
        >>> white = innovation_weights(np.array([0.5]), np.array([1.0, 0.5]), np.array([1.0, 0.7]), 16)
        >>> bool((abs(white - [1, 0]) < 1e-6).all())
        True
    """
    lags = LENGTH * steps
    powers = decay[:, None] ** np.arange(lags - 1)
    responses = np.concatenate([gain[:, None], -(gain * (1 - decay))[:, None] * powers], 1)
    weight = 1 / (1 + np.arange(lags) / steps)
    found = []
    for inverse in whitener(hurst, lags):
        seen = _product(inverse, responses)
        normal = (weight * seen) @ seen.T
        scale = normal.diagonal() ** -0.5
        scaled = scale[:, None] * normal * scale + ridge * np.eye(len(scale))
        found.append(scale * np.linalg.solve(scaled, scale * seen[:, 0]))
    return np.stack(found)


def whitener(hurst: Array, lags: int) -> Array:
    """Coefficients of 1 / psi, which make white noise of fractional Gaussian noise of variance 1: (indices, lags).

    Example:
        >>> bool(np.allclose(whitener(np.array([0.5]), 3), [1, 0, 0], atol=1e-7))
        True
    """
    d = hurst[:, None] - 0.5
    w = math.pi * np.arange(1, lags + 1) / lags
    with torch.no_grad():
        f = fgn_spectrum(torch.from_numpy(w), torch.from_numpy(hurst)[:, None]).numpy()
    log_smooth = np.log(2 * math.pi * f) + 2 * d * np.log(2 * np.sin(w / 2))
    at_zero = [math.log(math.sin(math.pi * h)) + math.lgamma(2 * h + 1) for h in hurst]
    cepstrum = np.fft.irfft(np.concatenate([np.array(at_zero)[:, None], log_smooth], 1), 2 * lags)
    past = np.concatenate([cepstrum[:, :1] / 2, cepstrum[:, 1:lags], np.zeros((len(hurst), lags))], 1)
    smooth = np.fft.irfft(np.exp(-np.fft.rfft(past)), 2 * lags)[:, :lags]
    m = np.arange(lags - 1)
    return _product(smooth, np.concatenate([np.ones_like(d), ((m - d) / (m + 1)).cumprod(1)], 1))


def _product(a: Array, b: Array) -> Array:
    """The product of two power series, as long as they are."""
    n = a.shape[-1]
    return np.asarray(np.fft.irfft(np.fft.rfft(a, 2 * n) * np.fft.rfft(b, 2 * n), 2 * n)[..., :n])
