"""Quality of posterior draws in inverse problems: images, residuals, coverage, row and null space, modes.

The best score of an image metric belongs to the posterior mean, not to a draw: a single exact draw has twice its mean
square error, 3 dB less PSNR. So the two are always kept apart, and ranking methods by single draws rewards collapse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator, flatten_event
from ppl.diagnostics.coverage import inside_central, ranks
from ppl.errors import OptionError, ShapeError
from ppl.weighted import normalise

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
    weights = _weights(draws, log_weight)
    mean = torch.tensordot(weights, draws.double(), 1)
    return ImageScores(
        float(psnr(mean, truth, data_range)),
        float(weights @ psnr(draws, truth, data_range)),
        float(ssim(mean, truth, data_range)),
        float(weights @ ssim(draws, truth, data_range)),
        ssim_window(truth.shape[-2], truth.shape[-1]),
    )


def _weights(draws: Tensor, log_weight: Tensor | None) -> Tensor:
    """(draws,) float64, sum one."""
    if log_weight is None:
        return torch.full((len(draws),), 1 / len(draws), dtype=torch.float64, device=draws.device)
    if log_weight.shape != draws.shape[:1]:
        raise ShapeError(f"log_weight has shape {tuple(log_weight.shape)}, expected {(len(draws),)}")
    return normalise(log_weight).to(draws.device)


def residual_chi(operator: LinearOperator, x: Tensor, y: Tensor, sigma: float | Tensor) -> Tensor:
    """Size of the residual in units of the noise, ||y - A x|| / (sigma sqrt(m)).

    About one for the true x; a posterior draw is near one when the data are many; below one the noise is overfitted.

    Args:
        operator: A, linear or not.
        x: (*batch, *in_shape).
        y: (*out_shape), m numbers.
        sigma: noise standard deviation, a number or (*out_shape).

    Returns:
        (*batch,) float64.

    Example:
        >>> from inverse.operators import Identity
        >>> residual_chi(Identity((4,)), torch.zeros(4), torch.full((4,), 0.2), 0.1)
        tensor(2.0000, dtype=torch.float64)
    """
    if tuple(y.shape) != operator.out_shape:
        raise ShapeError(f"y has shape {tuple(y.shape)}, but the operator returns {operator.out_shape}")
    scale = torch.as_tensor(sigma, dtype=torch.float64, device=y.device)
    if not bool((scale > 0).all()):
        raise OptionError("sigma must be positive; a residual without noise has no unit")
    z = (y.double() - operator(x.double())) / scale
    return flatten_event(z, len(operator.out_shape)).square().mean(-1).sqrt()


def coverage_map(
    draws: Tensor, truth: Tensor, level: float = 0.9, *, generator: torch.Generator | None = None
) -> Tensor:
    """Which entries of the truth lie in the central interval of the draws.

    The interval between order statistics nearest to the level is used, whose probability is exact at any number of
    draws. Average maps over problems, or over pixels.

    Args:
        draws: (draws, *event), equally weighted and about independent.
        truth: (*event).
        level: of the interval.
        generator: breaks ties between truth and draws.

    Returns:
        (*event) bool.

    Example:
        >>> coverage_map(torch.arange(19.0)[:, None].repeat(1, 2), torch.tensor([9.5, 30.0]))
        tensor([ True, False])
    """
    return inside_central(ranks(draws, truth, generator=generator), len(draws), level)


@dataclass(frozen=True)
class VarianceRatio:
    """Total variance of the draws over the exact one, where the operator looks and where it does not.

    Args:
        row: in the row space of A; None where it has none.
        null: in the null space of A; None where it has none.
        total: in all directions.
    """

    row: float | None
    null: float | None
    total: float


def variance_ratio(
    draws: Tensor, operator: LinearOperator, covariance: Tensor, *, log_weight: Tensor | None = None
) -> VarianceRatio:
    """tr(P S_draws) / tr(P S), P the projector on the row space of A and on its null space.

    Args:
        draws: (draws, *in_shape), two or more.
        operator: A, with a decomposition.
        covariance: (d, d) exact posterior covariance of the flattened x.
        log_weight: (draws,) up to a constant; equal when None.

    Returns:
        VarianceRatio(row, null, total); one is right, less is too sure.

    Example:
        >>> from inverse.operators import Mask
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])                  # variance 2 in each entry
        >>> variance_ratio(x, Mask(torch.tensor([True, False])), torch.diag(torch.tensor([4.0, 1.0])))
        VarianceRatio(row=0.5, null=2.0, total=0.8)
    """
    d = math.prod(operator.in_shape)
    if tuple(covariance.shape) != (d, d):
        raise ShapeError(f"covariance must be {(d, d)} on the flattened x, got {tuple(covariance.shape)}")
    if tuple(draws.shape[1:]) != operator.in_shape or len(draws) < 2:
        raise ShapeError(f"draws must be (draws >= 2, *{operator.in_shape}), got {tuple(draws.shape)}")
    svd = operator.svd()
    weights = _weights(draws, log_weight)
    x = draws.double()
    centred = x - torch.tensordot(weights, x, 1)
    bessel = 1 - float(weights.square().sum())
    if bessel <= 0:
        raise OptionError("all the weight is on one draw, which says nothing about spread")
    square = lambda z: flatten_event(z, len(operator.in_shape)).square().sum(-1)  # noqa: E731
    total = float(weights @ square(centred)) / bessel
    row = float(weights @ svd.to_spectral(centred).square().sum(-1)) / bessel
    exact = covariance.double()
    exact_total = float(exact.trace())
    # tr(V^T S V), with V^T applied to the columns and then to the rows of S.
    half = svd.to_spectral(exact.reshape(d, *operator.in_shape))  # (d, r) = S V
    exact_row = float(svd.to_spectral(half.T.reshape(svd.rank, *operator.in_shape)).diagonal().sum())
    return VarianceRatio(
        row / exact_row if svd.rank else None,
        (total - row) / (exact_total - exact_row) if svd.rank < d else None,
        total / exact_total,
    )


def mode_weights(
    draws: Tensor,
    means: Tensor,
    covariances: Tensor | None = None,
    component_weights: Tensor | None = None,
    *,
    log_weight: Tensor | None = None,
    soft: bool = False,
) -> Tensor:
    """Share of the draws that belongs to each component of a Gaussian mixture.

    Hard shares count each draw for its nearest mean or, given covariances, for its most responsible component; they
    fit separated components. Soft shares average the responsibilities r_k(x), whose expectation under the mixture is
    exactly its weight w_k, also where components overlap.

    Args:
        draws: (draws, *event).
        means: (components, *event).
        covariances: (components,) variances, (components, d) diagonals or (components, d, d) matrices; None for the
            nearest mean.
        component_weights: (components,) of the mixture, for the responsibilities; equal when None.
        log_weight: (draws,) up to a constant; equal when None.
        soft: average responsibilities instead of counting; needs covariances.

    Returns:
        (components,) float64, sum one.

    Example:
        >>> mode_weights(torch.tensor([[0.1], [0.2], [9.0]]), torch.tensor([[0.0], [10.0]]))
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    if draws.shape[1:] != means.shape[1:] or 0 in (len(draws), len(means)):
        raise ShapeError(
            "draws (draws, *event) and means (components, *event) expected, "
            f"got {tuple(draws.shape)} and {tuple(means.shape)}"
        )
    weights = _weights(draws, log_weight)
    k = len(means)
    x, m = draws.double().reshape(len(draws), -1), means.double().reshape(k, -1)
    if covariances is None:
        if soft or component_weights is not None:
            raise OptionError("responsibilities need covariances; pass them, or leave soft and component_weights out")
        score = -torch.cdist(x, m, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        score = _component_log_prob(x, m, covariances.double())
        if component_weights is not None:
            score = score + component_weights.double().log()
    share = torch.softmax(score, -1) if soft else torch.nn.functional.one_hot(score.argmax(-1), k).double()
    return weights @ share


def _component_log_prob(x: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """log N(x; m_k, C_k), (draws, components)."""
    k, d = means.shape
    delta = x[:, None] - means
    if covariances.shape == (k,):
        covariances = covariances[:, None].expand(k, d)
    if covariances.shape == (k, d):
        square = (delta.square() / covariances).sum(-1)
        log_det = covariances.log().sum(-1)
    elif covariances.shape == (k, d, d):
        factor = torch.linalg.cholesky(covariances)
        z = torch.linalg.solve_triangular(factor, delta.permute(1, 2, 0), upper=False)  # (k, d, draws)
        square = z.square().sum(1).T
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        raise ShapeError(f"covariances must be {(k,)}, {(k, d)} or {(k, d, d)}, got {tuple(covariances.shape)}")
    return -0.5 * (square + log_det + d * math.log(2 * math.pi))


def mode_weight_tv(
    draws: Tensor,
    weights: Tensor,
    means: Tensor,
    covariances: Tensor | None = None,
    *,
    log_weight: Tensor | None = None,
    soft: bool = False,
) -> Tensor:
    """Total variation between the mode weights of the draws and the exact ones, 1/2 sum_k |share_k - w_k|.

    Exact draws score about n^(-1/2): compare with that floor, not with zero.

    Args:
        draws: (draws, *event).
        weights: (components,) exact mixture weights, sum one.
        means: (components, *event).
        covariances: as in mode_weights; None assigns each draw to its nearest mean.
        log_weight: (draws,) up to a constant; equal when None.
        soft: use average responsibilities, right for overlapping components.

    Returns:
        0-d float64 in [0, 1].

    Example:
        >>> x = torch.tensor([[0.1], [0.2], [0.3], [9.0]])
        >>> mode_weight_tv(x, torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [10.0]]))
        tensor(0.2500, dtype=torch.float64)
    """
    exact = weights.double()
    if exact.shape != means.shape[:1] or abs(float(exact.sum()) - 1) > 1e-4:
        raise ShapeError(
            f"weights must be {(len(means),)} with sum one, got {tuple(exact.shape)}, sum {float(exact.sum())}"
        )
    prior = None if covariances is None else exact
    share = mode_weights(draws, means, covariances, prior, log_weight=log_weight, soft=soft)
    return 0.5 * (share - exact).abs().sum()
