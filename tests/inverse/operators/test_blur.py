"""Blurs against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.operators import CircularBlur, GaussianBlur, MotionBlur
from ppl.errors import DataError, OptionError, ShapeError


def test_convolution_by_hand() -> None:
    """An uneven kernel tells convolution from correlation and fixes the origin."""
    g = torch.Generator().manual_seed(0)
    k, x = torch.randn(2, 3, generator=g, dtype=torch.float64), torch.randn(4, 5, generator=g, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for i in range(4):
        for j in range(5):
            for a in range(2):
                for b in range(3):
                    expected[i, j] += k[a, b] * x[(i - (a - 1)) % 4, (j - (b - 1)) % 5]
    torch.testing.assert_close(CircularBlur(k, (4, 5))(x), expected)


def test_gaussian_kernel_has_its_width() -> None:
    A = GaussianBlur(1.5, (32, 32))
    impulse = torch.zeros(32, 32, dtype=torch.float64)
    impulse[16, 16] = 1
    y = A(impulse)
    offset = torch.arange(32, dtype=torch.float64) - 16
    assert math.isclose(float(y.sum()), 1.0, rel_tol=1e-12)
    assert math.isclose(float((y.sum(1) * offset.square()).sum()), 1.5**2, rel_tol=2e-3)  # cut at 4 sigma
    assert math.isclose(float((y.sum(0) * offset.square()).sum()), 1.5**2, rel_tol=2e-3)


def test_width_may_be_a_latent_variable() -> None:
    x = torch.zeros(9, 9, dtype=torch.float64)
    x[4, 4] = 1

    def centre(sigma: torch.Tensor) -> torch.Tensor:
        return GaussianBlur(sigma, (9, 9), radius=4)(x)[4, 4]

    widths = torch.tensor([0.8, 1.3], dtype=torch.float64)
    values = torch.func.vmap(centre)(widths)
    for value, width in zip(values, widths, strict=True):
        torch.testing.assert_close(value, GaussianBlur(float(width), (9, 9), radius=4)(x)[4, 4])
    slope = torch.func.grad(centre)(widths[0])
    h = 1e-6
    torch.testing.assert_close(slope, (centre(widths[0] + h) - centre(widths[0] - h)) / (2 * h), rtol=1e-6, atol=0)
    with pytest.raises(OptionError, match="radius"):
        GaussianBlur(widths[0], (9, 9))


@pytest.mark.parametrize(("angle", "direction"), [(0.0, (0, 1)), (90.0, (-1, 0)), (45.0, (-1, 1))])
def test_motion_runs_along_its_angle(angle: float, direction: tuple[int, int]) -> None:
    A = MotionBlur(6.0, angle, (15, 15))
    impulse = torch.zeros(15, 15, dtype=torch.float64)
    impulse[7, 7] = 1
    y = A(impulse)
    offset = torch.arange(15, dtype=torch.float64) - 7
    rr = float((y * offset[:, None].square()).sum())
    cc = float((y * offset[None, :].square()).sum())
    rc = float((y * offset[:, None] * offset[None, :]).sum())
    norm2 = direction[0] ** 2 + direction[1] ** 2
    # A uniform line of length 6 has variance 6^2 / 12 along itself; sharing between pixels adds up to 1/4 each way.
    assert math.isclose(rr, 3 * direction[0] ** 2 / norm2, abs_tol=0.27)
    assert math.isclose(cc, 3 * direction[1] ** 2 / norm2, abs_tol=0.27)
    assert math.isclose(rc, 3 * direction[0] * direction[1] / norm2, abs_tol=0.05)
    assert math.isclose(float(y.sum()), 1.0, rel_tol=1e-12)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="positive"):
        GaussianBlur(0.0, (4, 4))
    with pytest.raises(OptionError, match="positive"):
        MotionBlur(-1.0, 0.0, (4, 4))
    with pytest.raises(ShapeError, match="fit"):
        CircularBlur(torch.ones(5, 5), (4, 4))
    with pytest.raises(DataError, match="kernel"):
        CircularBlur(torch.ones(5), (4, 4))
    with pytest.raises(ShapeError, match="pixels"):
        MotionBlur(20.0, 0.0, (4, 4))
