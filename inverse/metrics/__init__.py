"""Quality of posterior draws in inverse problems: images, residuals, coverage, row and null space, modes."""

from __future__ import annotations

from inverse.metrics.images import ImageScores, image_scores, psnr, ssim, ssim_window
from inverse.metrics.modes import mode_weight_tv, mode_weights
from inverse.metrics.spread import VarianceRatio, coverage_map, residual_chi, variance_ratio

__all__ = [
    "ImageScores",
    "VarianceRatio",
    "coverage_map",
    "image_scores",
    "mode_weight_tv",
    "mode_weights",
    "psnr",
    "residual_chi",
    "ssim",
    "ssim_window",
    "variance_ratio",
]
