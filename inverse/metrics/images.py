"""PSNR and SSIM of images: of the posterior mean, and of single draws.

The best score of an image metric belongs to the posterior mean, not to a draw: a single exact draw has twice its mean
square error, 3 dB less PSNR. So the two are always kept apart, and ranking methods by single draws rewards collapse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.metrics.weights import draw_weights
from inverse.operators.events import flatten_event
from ppl.errors import OptionError, ShapeError

__all__ = ["ImageScores", "image_scores", "psnr", "ssim", "ssim_window"]


def _span(data_range: tuple[float, float]) -> float:
    low, high = data_range
    if not high > low:
        raise OptionError(
            f"data_range must be (low, high) with low < high, got {data_range}; take the prior's data_range"
        )
    return float(high) - float(low)


def _check_event(x: Tensor, truth: Tensor) -> None:
    if truth.ndim == 0 or x.ndim < truth.ndim or x.shape[x.ndim - truth.ndim :] != truth.shape:
        raise ShapeError(
            f"x must be (*batch, *event) and truth (*event), got {tuple(x.shape)} and {tuple(truth.shape)}"
        )


def psnr(x: Tensor, truth: Tensor, data_range: tuple[float, float]) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(range^2 / MSE), in decibel.

    Args:
        x: (*batch, *event).
        truth: (*event).
        data_range: (low, high) of the data, the prior's; never guessed from the image.

    Returns:
        (*batch,) float64; infinity where x equals the truth.

    Example:
        >>> psnr(torch.full((2, 2), 0.2), torch.zeros(2, 2), (-1.0, 1.0))        # 10 log10(4 / 0.04)
        tensor(20.0000, dtype=torch.float64)
    """
    _check_event(x, truth)
    mse = flatten_event((x.double() - truth.double()).square(), truth.ndim).mean(-1)
    return 10 * torch.log10(_span(data_range) ** 2 / mse)


def ssim_window(height: int, width: int) -> int:
    """Side of the SSIM window: 11, or the largest odd number that fits a smaller image.

    Example:
        >>> ssim_window(64, 64), ssim_window(8, 32)
        (11, 7)
    """
    side = min(11, height, width)
    return side - 1 + side % 2


def ssim(x: Tensor, truth: Tensor, data_range: tuple[float, float], *, window: int | None = None) -> Tensor:
    """Structural similarity, Gaussian window 11 x 11 of sigma 1.5, K = (0.01, 0.03), mean over pixels and channels.

    Only windows that lie inside the image count. In images smaller than 11 pixels the window shrinks to `ssim_window`:
    state that number, the scores are not comparable.

    Args:
        x: (*batch, *channels, height, width).
        truth: (*channels, height, width).
        data_range: (low, high) of the data.
        window: odd side of the window, `ssim_window` of the image when None.

    Returns:
        (*batch,) float64, at most one.

    Source: Wang et al. (2004) [inferred].

    Example:
        >>> image = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
        >>> round(float(ssim(image, image, (0.0, 1.0))), 6)
        1.0
    """
    _check_event(x, truth)
    if truth.ndim < 2:
        raise ShapeError(f"SSIM needs images (*channels, height, width), got an event of shape {tuple(truth.shape)}")
    h, w = truth.shape[-2:]
    side = ssim_window(h, w) if window is None else window
    if side < 1 or side % 2 == 0 or side > min(h, w):
        raise OptionError(f"window must be odd and fit into {h} x {w} pixels, got {side}")
    offset = torch.arange(side, dtype=torch.float64, device=x.device) - side // 2
    kernel = torch.exp(-0.5 * (offset / 1.5).square())
    kernel = kernel / kernel.sum()

    def blur(v: Tensor) -> Tensor:
        v = v.reshape(-1, 1, h, w)
        v = torch.nn.functional.conv2d(v, kernel.reshape(1, 1, -1, 1))
        return torch.nn.functional.conv2d(v, kernel.reshape(1, 1, 1, -1))

    batch = x.shape[: x.ndim - truth.ndim]
    a, b = x.double(), truth.double().expand(x.shape)
    if a.numel() == 0:
        return a.new_zeros(batch)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * _span(data_range)) ** 2, (0.03 * _span(data_range)) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.reshape((*batch, -1)).mean(-1)


@dataclass(frozen=True)
class ImageScores:
    """PSNR and SSIM of the posterior mean, and of single draws apart from it.

    Args:
        psnr_mean: decibel, of the posterior mean.
        psnr_draws: decibel, mean over single draws; exact draws lose 3 dB against the mean.
        ssim_mean: of the posterior mean.
        ssim_draws: mean over single draws.
        window: side of the SSIM window, 11 unless the image is smaller.
    """

    psnr_mean: float
    psnr_draws: float
    ssim_mean: float
    ssim_draws: float
    window: int


def image_scores(
    draws: Tensor, truth: Tensor, data_range: tuple[float, float], *, log_weight: Tensor | None = None
) -> ImageScores:
    """PSNR and SSIM of the mean of the draws, and averaged over the draws.

    Args:
        draws: (draws, *channels, height, width).
        truth: (*channels, height, width).
        data_range: (low, high) of the data.
        log_weight: (draws,) up to a constant; equal when None.

    Returns:
        ImageScores.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> scores = image_scores(torch.randn(64, 16, 16, generator=g), torch.zeros(16, 16), (-1.0, 1.0))
        >>> scores.psnr_mean - scores.psnr_draws > 15                   # mean square error 1/64 against 1
        True
    """
    if draws.ndim != truth.ndim + 1 or len(draws) == 0:
        raise ShapeError(f"draws must be (draws, *event), got {tuple(draws.shape)} for an event {tuple(truth.shape)}")
    weights = draw_weights(draws, log_weight)
    mean = torch.tensordot(weights, draws.double(), 1)
    return ImageScores(
        float(psnr(mean, truth, data_range)),
        float(weights @ psnr(draws, truth, data_range)),
        float(ssim(mean, truth, data_range)),
        float(weights @ ssim(draws, truth, data_range)),
        ssim_window(truth.shape[-2], truth.shape[-1]),
    )
