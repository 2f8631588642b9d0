"""Tomography against the analytic Radon transforms of a disc, a Gaussian and a square pixel."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.operators import Radon
from ppl.errors import DataError, OptionError, ShapeError


def grid(n: int, sub: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """X (right) and Y (up) of pixel centres, in pixels; each pixel split into sub by sub points."""
    fine = (torch.arange(n * sub, dtype=torch.float64) - (n * sub - 1) / 2) / sub
    return fine.expand(n * sub, n * sub), fine.flip(0)[:, None].expand(n * sub, n * sub)


def pixel_means(values: torch.Tensor, sub: int) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(values[None], sub)[0]


def disc_cdf(t: torch.Tensor, radius: float) -> torch.Tensor:
    """Area of the disc left of t, the integral of its projection 2 sqrt(r^2 - s^2)."""
    t = t.clamp(-radius, radius)
    return t * (radius**2 - t**2).clamp_min(0).sqrt() + radius**2 * (torch.asin(t / radius) + math.pi / 2)


@pytest.mark.parametrize(("n", "bound"), [(32, 0.12), (64, 0.06), (128, 0.03)])
def test_disc_agrees_with_its_chords(n: int, bound: float) -> None:
    """Off-centre disc; the error of a pixelated edge shrinks with the pixel. Bound relative to the diameter."""
    radius, cx, cy = 0.3 * n, 0.11 * n, -0.07 * n
    X, Y = grid(n, 4)
    image = pixel_means(((X - cx).square() + (Y - cy).square() <= radius**2).double(), 4)
    angles = [0.0, 20.0, 45.0, 90.0, 133.0]
    A = Radon(angles, (n, n))
    edges = torch.arange(A.detectors + 1, dtype=torch.float64) - A.detectors / 2
    for view, degrees in zip(A(image), angles, strict=True):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        exact = disc_cdf(edges - (cx * c + cy * s), radius).diff()
        assert float((view - exact).abs().max()) < bound * 2 * radius
        assert float((view - exact).abs().mean()) < bound * 2 * radius / 10


def test_gaussian_agrees_to_second_order() -> None:
    """The projection of a Gaussian is a Gaussian about its projected centre, whatever the angle: error ~ pixel^2."""
    errors = []
    for n in (24, 48):
        width, cx, cy = n / 10, n / 12, n / 9
        X, Y = grid(n)
        blob = torch.exp(-((X - cx).square() + (Y - cy).square()) / (2 * width**2))
        angles = [0.0, 17.0, 60.0, 90.0, 150.0, 200.0]
        A = Radon(torch.tensor(angles), (n, n))
        s = torch.arange(A.detectors, dtype=torch.float64) - (A.detectors - 1) / 2
        worst = 0.0
        for view, degrees in zip(A(blob), angles, strict=True):
            centre = cx * math.cos(math.radians(degrees)) + cy * math.sin(math.radians(degrees))
            exact = math.sqrt(2 * math.pi) * width * torch.exp(-(s - centre).square() / (2 * width**2))
            worst = max(worst, float((view - exact).abs().max() / exact.max()))
        errors.append(worst)
    assert errors[1] < 0.008
    assert 3.6 < errors[0] / errors[1] < 4.4


def test_a_pixel_is_projected_exactly() -> None:
    """Against the trapezoid of one pixel, integrated over narrow detectors by fine sampling."""
    angles = [0.0, 1e-9, 30.0, 45.0, 90.0, 270.0, 300.0]
    A = Radon(angles, (1, 1), detectors=9, spacing=0.2)
    X, Y = grid(1, 2000)
    for view, degrees in zip(A(torch.ones(1, 1, dtype=torch.float64)), angles, strict=True):
        s = X * math.cos(math.radians(degrees)) + Y * math.sin(math.radians(degrees))
        counts = torch.histc(s.reshape(-1), bins=9, min=-0.9, max=0.9) / 2000**2 / 0.2
        torch.testing.assert_close(view, counts, atol=4e-3, rtol=0)
        assert math.isclose(float(view.sum()) * 0.2, 1.0, rel_tol=1e-12)


def test_every_view_keeps_the_mass() -> None:
    x = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for spacing in (0.4, 1.0, 2.5):
        A = Radon(11, (2, 7, 5), spacing=spacing)
        mass = A(x).sum(-1) * spacing
        torch.testing.assert_close(mass, x.sum((-2, -1))[:, None].expand(2, 11), rtol=1e-12, atol=0)


def test_opposite_views_mirror() -> None:
    x = torch.rand(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = Radon([25.0, 205.0], (6, 6))(x)
    torch.testing.assert_close(y[0], y[1].flip(0))


def test_dense_solve_recovers_the_image() -> None:
    x = torch.rand(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    A = Radon(12, (6, 6))
    torch.testing.assert_close(A.pinv(A(x)), x)


def test_refuses_what_is_no_geometry() -> None:
    with pytest.raises(OptionError, match="angles"):
        Radon([], (4, 4))
    with pytest.raises(OptionError, match="angles"):
        Radon(0, (4, 4))
    with pytest.raises(DataError, match="finite"):
        Radon([math.nan], (4, 4))
    with pytest.raises(OptionError, match="spacing"):
        Radon(3, (4, 4), spacing=0.0)
    with pytest.raises(OptionError, match="detectors"):
        Radon(3, (4, 4), detectors=0)
    with pytest.raises(ShapeError, match="height, width"):
        Radon(3, (4,))
