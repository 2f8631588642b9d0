"""Metrics against hand-computed values and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inverse.metrics import (
    coverage_map,
    image_scores,
    mode_weight_tv,
    mode_weights,
    psnr,
    residual_chi,
    ssim,
    ssim_window,
    variance_ratio,
)
from inverse.operators import Dense, FourierMask, Identity, Mask
from ppl.diagnostics import z_bound
from ppl.errors import OptionError, ShapeError


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_per_image() -> None:
    truth = torch.zeros(1, 2, 2)
    x = torch.stack([torch.full((1, 2, 2), 0.1), torch.tensor([[[0.2, 0.0], [0.0, 0.0]]])])
    torch.testing.assert_close(psnr(x, truth, (0.0, 1.0)), torch.full((2,), 20.0, dtype=torch.float64))
    torch.testing.assert_close(
        psnr(x, truth, (-1.0, 1.0)) - 20, torch.full((2,), 20 * math.log10(2), dtype=torch.float64)
    )
    assert float(psnr(truth, truth, (0.0, 1.0))) == math.inf
    with pytest.raises(OptionError, match="data_range"):
        psnr(truth, truth, (1.0, 0.0))
    with pytest.raises(ShapeError):
        psnr(truth, torch.zeros(3), (0.0, 1.0))


def test_single_exact_draws_lose_three_decibel() -> None:
    """Truth and draws from one posterior: mean square errors v (1 + 1/n) and 2 v. 2500 pixels give 0.3 dB at 1e-5."""
    n = 200
    x = randn(n + 1, 50, 50)
    scores = image_scores(x[1:], x[0], (-1.0, 1.0))
    expected = 10 * math.log10(2 / (1 + 1 / n))
    bound = z_bound(1e-5) * 10 / math.log(10) * math.sqrt(2 / 2500 + 2 / 2500)
    assert abs(scores.psnr_mean - scores.psnr_draws - expected) < bound
    assert scores.window == 11


def test_ssim_by_hand_on_one_window() -> None:
    """An 11 x 11 image holds one window: the formula with explicit weighted moments."""
    x, y = randn(11, 11), 0.5 * randn(11, 11) + randn(11, 11, seed=1) + 0.3
    a = torch.exp(-((torch.arange(11.0).double() - 5) ** 2) / (2 * 1.5**2))
    w = torch.outer(a, a) / a.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, c = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    c1, c2 = 0.02**2, 0.06**2
    expected = (2 * mx * my + c1) * (2 * c + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    torch.testing.assert_close(ssim(x, y, (-1.0, 1.0)), expected)


@pytest.mark.parametrize("side", [11, 16, 28])
def test_psnr_and_ssim_are_those_of_scikit_image(side: int) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    truth = randn(side, side + 3).clamp(-1, 1)
    x = truth + 0.2 * randn(side, side + 3, seed=1)
    theirs = structural_similarity(
        truth.numpy(), x.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2.0
    )
    assert float(ssim(x, truth, (-1.0, 1.0))) == pytest.approx(theirs, rel=1e-10)
    theirs = peak_signal_noise_ratio(truth.numpy(), x.numpy(), data_range=2.0)
    assert float(psnr(x, truth, (-1.0, 1.0))) == pytest.approx(theirs, rel=1e-10)


def test_ssim_batches_channels_and_small_images() -> None:
    truth = randn(3, 16, 12)
    x = randn(2, 3, 16, 12, seed=1)
    by_channel = torch.stack([ssim(x[:, c], truth[c], (-1.0, 1.0)) for c in range(3)]).mean(0)
    torch.testing.assert_close(ssim(x, truth, (-1.0, 1.0)), by_channel)
    torch.testing.assert_close(ssim(x[0], x[0], (-1.0, 1.0)), torch.tensor(1.0, dtype=torch.float64))
    assert [ssim_window(s, 32) for s in (4, 5, 10, 11, 12)] == [3, 5, 9, 11, 11]
    assert float(ssim(truth[0, :6, :6], truth[0, :6, :6], (-1.0, 1.0))) == pytest.approx(1)
    assert image_scores(x[:, :, :6, :6], truth[:, :6, :6], (-1.0, 1.0)).window == 5
    with pytest.raises(OptionError, match="odd"):
        ssim(truth, truth, (-1.0, 1.0), window=4)


def test_scores_weigh_draws() -> None:
    draws, truth = randn(3, 12, 12), randn(12, 12, seed=1)
    weighted = image_scores(draws, truth, (-1.0, 1.0), log_weight=torch.tensor([2.0, 1.0, 1.0]).log())
    copied = image_scores(draws[[0, 0, 1, 2]], truth, (-1.0, 1.0))
    assert weighted.psnr_mean == pytest.approx(copied.psnr_mean)
    assert weighted.psnr_draws == pytest.approx(copied.psnr_draws)
    assert weighted.ssim_draws == pytest.approx(copied.ssim_draws)


def test_residual_is_one_at_the_truth() -> None:
    """chi^2 of m numbers has relative sd sqrt(2/m), chi half of that. False alarm 1e-5."""
    m, sigma = 4000, 0.3
    A = Dense(randn(m, 3))
    x = randn(3, seed=1)
    y = A(x) + sigma * randn(m, seed=2)
    chi = residual_chi(A, torch.stack([x, x + 1]), y, sigma)
    assert abs(float(chi[0]) - 1) < z_bound(1e-5) / math.sqrt(2 * m)
    assert float(chi[1]) > 3
    exact = residual_chi(Identity((2,)), torch.zeros(2), torch.tensor([0.3, 4.0]), torch.tensor([0.1, 1.0]))
    torch.testing.assert_close(exact, torch.tensor(math.sqrt((9 + 16) / 2), dtype=torch.float64))
    with pytest.raises(OptionError, match="positive"):
        residual_chi(A, x, y, 0.0)


def test_coverage_map_has_its_level() -> None:
    """99 draws and a truth from one law: the 90 % interval holds exactly 90 % of the pixels. False alarm 1e-5."""
    x = randn(100, 100, 100)
    share = float(coverage_map(x[1:], x[0], 0.9).double().mean())
    assert abs(share - 0.9) < z_bound(1e-5) * math.sqrt(0.09 / 10_000)
    assert coverage_map(x[1:], 10 + 0 * x[0]).sum() == 0


@pytest.mark.parametrize(
    "operator",
    [
        Mask(torch.tensor([[True, False, True]])),
        Dense(randn(2, 3), (1, 3)),
        FourierMask(torch.tensor([[True, False, False]])),
    ],
)
def test_variance_ratio_splits_the_spaces(operator: object) -> None:
    """Draws whose sample covariance is known exactly, scaled differently in row and null space."""
    assert isinstance(operator, (Mask, Dense, FourierMask))
    root = randn(3, 3, seed=5)
    covariance = root @ root.T
    z = randn(50, 3)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / 49)).T  # sample covariance I
    x = z @ torch.linalg.cholesky(covariance).T
    right = variance_ratio(x.reshape(50, 1, 3), operator, covariance)
    assert right.row == pytest.approx(1)
    assert right.null == pytest.approx(1)
    assert right.total == pytest.approx(1)
    projector = torch.linalg.pinv(operator.dense()) @ operator.dense()
    skewed = 2 * x @ projector + 0.5 * x @ (torch.eye(3) - projector)
    ratio = variance_ratio(skewed.reshape(50, 1, 3), operator, covariance)
    assert ratio.row == pytest.approx(4)
    assert ratio.null == pytest.approx(0.25)


def test_variance_ratio_with_weights_and_full_rank() -> None:
    x = torch.tensor([[1.0], [1.0], [-1.0], [2.0]])
    copies = variance_ratio(x, Identity((1,)), torch.ones(1, 1))
    assert copies.null is None
    assert copies.row == pytest.approx(float(x.var()))
    w = torch.tensor([1.0, 1.0, 1.0, 0.0]).log()
    assert variance_ratio(x, Identity((1,)), torch.ones(1, 1), log_weight=w).row == pytest.approx(float(x[:3].var()))


def test_mode_shares_hard_and_soft() -> None:
    means = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    x = torch.tensor([[1.5, 0.0], [3.0, 1.0], [-1.0, 0.0]])
    assert mode_weights(x, means).tolist() == pytest.approx([2 / 3, 1 / 3])
    # A wide second component claims the point between, though it is nearer to the first mean.
    wide = torch.tensor([0.25, 9.0])
    assert mode_weights(x, means, wide).tolist() == pytest.approx([0 / 3 + 1 / 3, 2 / 3])
    lw = torch.tensor([0.5, 0.25, 0.25]).log()
    assert mode_weights(x, means, log_weight=lw).tolist() == pytest.approx([0.75, 0.25])
    assert float(mode_weight_tv(x, torch.tensor([0.5, 0.5]), means)) == pytest.approx(1 / 6)
    with pytest.raises(OptionError, match="covariances"):
        mode_weights(x, means, soft=True)
    with pytest.raises(ShapeError, match="sum one"):
        mode_weight_tv(x, torch.tensor([0.5, 0.6]), means)


def test_covariance_forms_agree_and_soft_shares_are_unbiased() -> None:
    """Overlapping components: mean responsibilities equal the weights; n = 20000, false alarm 1e-5."""
    n = 20_000
    w = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 2.0]], dtype=torch.float64)
    variance = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    k = torch.multinomial(w, n, replacement=True, generator=torch.Generator().manual_seed(3))
    x = means[k] + variance[k].sqrt()[:, None] * randn(n, 2)
    soft = mode_weights(x, means, variance, w, soft=True)
    assert (soft - w).abs().max() < z_bound(1e-5, 3) * 0.5 / math.sqrt(n)
    hard = mode_weights(x, means, variance, w)
    assert (hard - w).abs().max() > 0.02
    diagonal = variance[:, None].expand(3, 2)
    full = torch.diag_embed(diagonal)
    torch.testing.assert_close(mode_weights(x, means, diagonal, w, soft=True), soft)
    torch.testing.assert_close(mode_weights(x, means, full, w, soft=True), soft)
    # A rotation leaves responsibilities alone; a transposed triangular solve would not.
    c, s = math.cos(0.7), math.sin(0.7)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    uneven = torch.diag_embed(torch.tensor([[1.0, 0.2], [0.5, 2.0], [2.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(
        mode_weights(x @ turn.T, means @ turn.T, turn @ uneven @ turn.T, w, soft=True),
        mode_weights(x, means, uneven, w, soft=True),
    )
