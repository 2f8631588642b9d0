"""Multi-coil imaging against the transform written out, and against one coil."""

from __future__ import annotations

import math

import pytest
import torch

from inverse.operators import FourierMask, MultiCoilMRI, coil_sensitivities
from ppl.errors import DataError, OptionError, ShapeError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_against_the_sum_written_out() -> None:
    h, w = 3, 4
    s = torch.randn(2, h, w, generator=generator(), dtype=torch.complex128)
    mask = torch.rand(h, w, generator=generator(1)) < 0.5
    x = torch.randn(h, w, 2, generator=generator(2), dtype=torch.float64)
    image = torch.view_as_complex(x)
    rows = []
    for c in range(2):
        for u in range(h):
            for v in range(w):
                if mask[u, v]:
                    phase = -2 * math.pi * (u * torch.arange(h)[:, None] / h + v * torch.arange(w) / w)
                    wave = torch.polar(torch.ones(h, w, dtype=torch.float64), phase.double())
                    rows.append((s[c] * image * wave).sum() / math.sqrt(h * w))
    expected = torch.view_as_real(torch.stack(rows)).reshape(2, -1, 2)
    torch.testing.assert_close(MultiCoilMRI(s, mask)(x), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(MultiCoilMRI(torch.view_as_real(s), mask)(x), expected, rtol=1e-6, atol=1e-7)
    real = MultiCoilMRI(s, mask, (h, w), complex_image=False)
    padded = torch.stack([x[..., 0], torch.zeros_like(x[..., 0])], -1)
    torch.testing.assert_close(real(x[..., 0]), MultiCoilMRI(s, mask)(padded))


def test_one_uniform_coil_is_the_fourier_mask() -> None:
    mask = torch.rand(4, 5, generator=generator(1)) < 0.5
    one = torch.ones(1, 4, 5, dtype=torch.complex128)
    x = torch.randn(3, 4, 5, 2, generator=generator(2), dtype=torch.float64)
    torch.testing.assert_close(
        MultiCoilMRI(one, mask, (3, 4, 5, 2))(x)[:, 0], FourierMask(mask, (3, 4, 5, 2), complex_image=True)(x)
    )
    real = MultiCoilMRI(one, mask, (3, 4, 5), complex_image=False)
    torch.testing.assert_close(real(x[..., 0])[:, 0], FourierMask(mask, (3, 4, 5))(x[..., 0]))


def test_coils_that_share_the_power_keep_all_of_it() -> None:
    """sum |s|^2 = 1 and every frequency observed: A^H A = I, so the adjoint is the inverse; fewer, and norm <= 1."""
    s = coil_sensitivities(5, (6, 7))
    torch.testing.assert_close(s.abs().square().sum(0), torch.ones(6, 7, dtype=torch.float64))
    assert not torch.allclose(s[0].abs(), s[1].abs(), atol=0.1)
    x = torch.randn(2, 6, 7, 2, generator=generator(2), dtype=torch.float64)
    A = MultiCoilMRI(s, torch.ones(6, 7, dtype=torch.bool))
    torch.testing.assert_close(A.adjoint(A(x)), x)
    part = MultiCoilMRI(s, torch.rand(6, 7, generator=generator(1)) < 0.4)
    assert float(part.norm()) <= 1 + 1e-12


def test_coils_resolve_what_sampling_folds() -> None:
    """Every second line: one coil folds the image, four unfold it (SENSE)."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[::2] = True
    x = torch.randn(8, 8, 2, generator=generator(2), dtype=torch.float64)
    four = MultiCoilMRI(coil_sensitivities(4, (8, 8)), mask)
    torch.testing.assert_close(four.pinv(four(x)), x)
    one = MultiCoilMRI(torch.ones(1, 8, 8, dtype=torch.complex128), mask)
    assert one.svd().rank == 64
    assert float((one.pinv(one(x)) - x).norm() / x.norm()) > 0.3


def test_moving_keeps_the_phases() -> None:
    s = coil_sensitivities(3, (4, 4))
    A = MultiCoilMRI(s, torch.ones(4, 4, dtype=torch.bool))
    x = torch.randn(4, 4, 2, generator=generator(2), dtype=torch.float64)
    expected = A(x)
    torch.testing.assert_close(A.to(torch.float32)(x.float()).double(), expected, rtol=1e-4, atol=1e-5)


def test_refuses_what_does_not_fit() -> None:
    s, mask = coil_sensitivities(2, (4, 5)), torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(ShapeError, match="sensitivities"):
        MultiCoilMRI(s[0], mask)
    with pytest.raises(DataError, match="boolean"):
        MultiCoilMRI(s, mask.T)
    with pytest.raises(DataError, match="nothing"):
        MultiCoilMRI(s, ~mask)
    with pytest.raises(ShapeError, match="end in"):
        MultiCoilMRI(s, mask, (4, 5))
    with pytest.raises(OptionError, match="coils"):
        coil_sensitivities(0, (4, 4))
