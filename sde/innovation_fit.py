r"""Weights of Ornstein-Uhlenbeck factors on a regular grid by what the innovations of fractional Gaussian noise see.

Factors that move by Y_k+ = l_k Y_k + g_k eps answer noise, in z = e^(-iw), with increments kappa = sum_k w_k b_k,
b_k = g_k (1 - z) / (1 - l_k z). Increments of fractional Brownian motion of type I have a response of their own, psi,
with |psi|^2 = 2 pi f. The weights minimise

    int |kappa / psi - 1|^2 (1 + 1 / (n w)) dw:

to second order the divergence between the two laws for an increment, and for a record of n, which sees every octave of
frequencies below 1 / n as one number.

With d = H - 1/2 and f = |1 - z|^(-2d) f*, the inverse 1 / psi is (1 - z)^d e^(-c(z)), c the half of the cepstrum of f*
that looks back [derived].
"""

from __future__ import annotations

import math

import numpy as np
import torch

from sde.hurst import fgn_spectrum
from sde.incomplete_gamma import Array

__all__ = ["innovation_weights", "whitener"]

CEPSTRUM = 2048  # coefficients of a smooth function
SLOWEST, POINTS = 1e-6, 600  # of the frequencies, even in log w, in turns of the record


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
    w = np.geomspace(SLOWEST / steps, math.pi, POINTS)
    change = 1 - np.exp(-1j * w)
    responses = gain[:, None] * change / (1 - decay[:, None] + decay[:, None] * change)
    weight = (w + 1 / steps) * np.where(np.isin(np.arange(POINTS), (0, POINTS - 1)), 0.5, 1.0)
    found = []
    for inverse in whitener(hurst, w):
        seen = responses * inverse
        normal, right = ((weight * seen) @ seen.conj().T).real, (weight * seen).sum(1).real
        scale = normal.diagonal() ** -0.5
        scaled = scale[:, None] * normal * scale + ridge * np.eye(len(scale))
        found.append(scale * np.linalg.solve(scaled, scale * right))
    return np.stack(found)


def whitener(hurst: Array, frequency: Array) -> np.ndarray:
    """1 / psi, which makes white noise of variance 1 of fractional Gaussian noise: (indices, frequencies), complex.

    Example:
        >>> bool(np.allclose(whitener(np.array([0.5]), np.array([0.1, 1.0])), 1, atol=1e-7))
        True
    """
    d, grid = hurst[:, None] - 0.5, math.pi * np.arange(1, CEPSTRUM + 1) / CEPSTRUM
    with torch.no_grad():
        f = fgn_spectrum(torch.from_numpy(grid), torch.from_numpy(hurst)[:, None]).numpy()
    log_smooth = np.log(2 * math.pi * f) + 2 * d * np.log(2 * np.sin(grid / 2))
    at_zero = [math.log(math.sin(math.pi * h)) + math.lgamma(2 * h + 1) for h in hurst]
    cepstrum = np.fft.irfft(np.concatenate([np.array(at_zero)[:, None], log_smooth], 1), 2 * CEPSTRUM)[:, :CEPSTRUM]
    cepstrum[:, 0] /= 2
    past = cepstrum @ np.exp(-1j * np.outer(np.arange(CEPSTRUM), frequency))
    return np.asarray((1 - np.exp(-1j * frequency)) ** d * np.exp(-past))
