r"""Two ways from a denoiser to a log density.

Probability flow: with u = log sigma, dx/du = x - D and log p(x_0) = log p_T(x_T) + \int (d - tr dD/dx) du.
I-MMSE, against a Gaussian q with denoiser D_q:  log p(x) = log q(x) + 1/2 \int (E|x - D_q|^2 - E|x - D|^2) dgamma,
with gamma = 1 / sigma^2 and D, D_q taken at x + sigma eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Estimate", "flow_log_prob", "gaussian_reference", "i_mmse", "rademacher"]


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: Tensor
    stderr: Tensor


def rademacher(count: int, event_shape: torch.Size, seed: int, like: Tensor) -> Tensor:
    """(count, *event) signs from a seed, the same on every device."""
    # numpy, because vmap refuses torch's generators; the result is a constant.
    signs = np.random.default_rng(seed).integers(0, 2, (count, *event_shape)) * 2 - 1
    return torch.from_numpy(signs).to(like.device, like.dtype)


def flow_log_prob(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    steps: int,
    probes: Tensor | None = None,
    on_product: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    r"""Log density of x_0 + sigma_min n by the probability-flow ODE; deterministic and differentiable.

    Classical Runge-Kutta of order four in u = log sigma, relative to a Gaussian q = N(c, v I) with the mean and
    spread of the data, which the flow starts from: y = (x - c) / sqrt(v + sigma^2) moves by
    dy/du = (D_q - D) / sqrt(v + sigma^2) and the log density by tr dD_q/dx - tr dD/dx, both zero where the data are
    this Gaussian.

    Args:
        denoise: (x, sigma) -> E[x_0 | x].
        x: (rows, *event).
        sigma_min: noise level at which x is read.
        sigma_max: noise level of the Gaussian start.
        steps: Runge-Kutta steps, four evaluations each.
        probes: (count, *event) signs for Hutchinson's trace; None takes the exact trace, d vjps per evaluation.
        on_product: called with the number of rows for every vjp.

    Returns:
        (rows,) normalised log densities.

    Source: Song et al. (2021), section 4.3 [read], in noise-to-signal coordinates [derived].

    Example:
        >>> normal = lambda x, sigma: x / (1 + sigma**2)
        >>> x = torch.zeros(1, 2, dtype=torch.float64)
        >>> abs(flow_log_prob(normal, x, 1e-4, 1e3, 60).item() + math.log(2 * math.pi)) < 1e-5
        True
    """
    d = math.prod(x.shape[1:])
    center, spread = gaussian_reference(denoise, x, sigma_min, sigma_max)
    if probes is None:
        probes = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, *x.shape[1:])
        weight = 1.0
    else:
        weight = 1 / len(probes)

    def column(v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * (x.ndim - 1))

    def slope(y: Tensor, u: float) -> tuple[Tensor, Tensor]:
        sigma = torch.tensor(math.exp(u), dtype=torch.float64)
        total = spread + math.exp(2 * u)
        gain, scale = spread / total, total.sqrt()
        with sdpa_kernel(SDPBackend.MATH):
            denoised, vjp = torch.func.vjp(lambda x: denoise(x, sigma), center + column(scale) * y)[:2]
        trace = y.new_zeros(y.shape[0])
        for probe in probes:
            on_product(y.shape[0])
            (product,) = vjp(probe.expand(y.shape))
            trace = trace + (product * probe).flatten(1).sum(1)
        return column(gain) * y - (denoised - center) / column(scale), d * gain - weight * trace

    u, end = math.log(sigma_min), math.log(sigma_max)
    h = (end - u) / steps
    total = spread + sigma_min**2
    y = (x - center) / column(total.sqrt())
    log_det = x.new_zeros(x.shape[0])
    for _ in range(steps):
        k1, l1 = slope(y, u)
        k2, l2 = slope(y + h / 2 * k1, u + h / 2)
        k3, l3 = slope(y + h / 2 * k2, u + h / 2)
        k4, l4 = slope(y + h * k3, u + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        log_det = log_det + h / 6 * (l1 + 2 * l2 + 2 * l3 + l4)
        u += h
    reference = -0.5 * y.square().flatten(1).sum(1) - d / 2 * (2 * math.pi * total).log()
    return reference + log_det


def i_mmse(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    generator: torch.Generator | None = None,
    *,
    levels: int = 32,
    repeats: int = 8,
) -> Estimate:
    """Unbiased estimate of the truncated I-MMSE integral, with the standard error over independent repeats.

    The reference q is an isotropic Gaussian with the mean and the spread of the data: it cancels most of the noise and
    both ends of the integral.

    Args:
        denoise: (x, sigma) -> E[x_0 | x].
        x: (rows, *event).
        sigma_min: lowest noise level.
        sigma_max: highest noise level.
        generator: source of the noise; None takes torch's global one.
        levels: noise levels per repeat, stratified in log sigma; two evaluations each.
        repeats: independent repeats, at least 2.

    Returns:
        Estimate(value, stderr), each (rows,).

    Raises:
        ValueError: if levels or repeats are too few.

    Source: Guo, Shamai & Verdu (2005) [read]; Kong et al. (2023), equation 9 [inferred]; with a Gaussian reference
        [derived].

    Example:
        >>> normal = lambda x, sigma: x / (1 + sigma**2)
        >>> x = torch.ones(1, 2, dtype=torch.float64)
        >>> estimate = i_mmse(normal, x, 1e-3, 1e3, torch.Generator().manual_seed(0))
        >>> bool((estimate.value + 1 + math.log(2 * math.pi)).abs() < 5 * estimate.stderr + 1e-4)
        True
    """
    if levels < 1 or repeats < 2:
        raise ValueError(f"expected levels >= 1 and repeats >= 2, got {levels} and {repeats}")
    event, d = x.shape[1:], math.prod(x.shape[1:])
    device = x.device if generator is None else generator.device
    shift = torch.rand(repeats, generator=generator, dtype=torch.float64, device=device).tolist()
    center, spread = gaussian_reference(denoise, x, sigma_min, sigma_max)
    centred = x - center
    variance = spread.reshape(-1, *[1] * (x.ndim - 1))
    low, width = math.log(sigma_min), math.log(sigma_max / sigma_min)
    totals = []
    for offset in shift:
        total = x.new_zeros(x.shape[0])
        noise = torch.randn((levels, *event), generator=generator, dtype=x.dtype, device=device).to(x.device)
        for level, draw in enumerate(noise):
            sigma = math.exp(low + width * (level + offset) / levels)
            gain = variance / (variance + sigma**2)
            # Pairs of opposite noise: all that is odd in it cancels, which is most of the variance far from the data.
            for eps in (draw, -draw):
                error = x - denoise(x + sigma * eps, torch.tensor(sigma, dtype=torch.float64))
                error_q = (1 - gain) * centred - gain * sigma * eps
                # The same noise in both errors: their large common part, sigma^2 |eps|^2, cancels.
                total = total + (error_q.square() - error.square()).flatten(1).sum(1) / (2 * sigma**2)
        # |dgamma| = 2 gamma dlog(sigma), which takes away the factor 1/2.
        totals.append(total * (width / levels))
    sums = torch.stack(totals)
    reference = -0.5 * (centred.square().flatten(1).sum(1) / spread + d * (2 * math.pi * spread).log())
    return Estimate(reference + sums.mean(0), sums.std(0) / math.sqrt(repeats))


def gaussian_reference(
    denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma_min: float, sigma_max: float
) -> tuple[Tensor, Tensor]:
    """Mean of the data, (rows, *event), and variance of an entry, (rows,), read off the denoiser where it is linear.

    Any value would be valid. Row by row, because rows may have labels.
    """
    sigma = torch.tensor(sigma_max, dtype=torch.float64)
    with torch.no_grad():
        center = denoise(torch.zeros_like(x), sigma)
        spread = x.new_zeros(x.shape[0])
        for signs in rademacher(4, x.shape[1:], 0, x):
            response = denoise(center + sigma_max * signs, sigma) - center
            spread = spread + (response * signs).flatten(1).mean(1) * (sigma_max / 4)
    return center, spread.clamp(min=(10 * sigma_min) ** 2)
